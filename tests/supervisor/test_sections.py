"""From an entry of the catalog and the tables of models to a section of the preset."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builds import NEW, OLD, OLDEST
from fakes.bare_router import BareRouter
from ggufs import small_model
from llamavisor import gguf
from llamavisor.binary import probe
from llamavisor.catalog import Entry, EntryState, FileId, ModelFile
from llamavisor.errors import OptionError
from llamavisor.flags import ModelOptions, OptionLayer, resolve
from llamavisor.gguf import Header, Kind
from llamavisor.helptext import FlagSet
from llamavisor.preset import for_router, lint, write
from llamavisor.rules import ModelRule, ModelSettings
from llamavisor.sections import ModelSpec, layers_in_force, named_files, section, specify, try_rule, without_clashes

BINARY = "/opt/llama-server"
_IDS = itertools.count(1)


def _header(kind: Kind = Kind.MODEL, context: int | None = 4096) -> Header:
    raw = small_model().encode()
    header = gguf.parse(lambda offset, length: raw[offset : offset + length], len(raw))
    return replace(header, kind=kind, context_length=context)


def _file(path: str) -> ModelFile:
    return ModelFile(path, FileId(1, next(_IDS), 100, 0))


def _entry(name: str = "alpha", **changes: object) -> Entry:
    said: dict[str, object] = {
        "name": name,
        "state": EntryState.READY,
        "files": (_file(f"/m/{name}.gguf"),),
        "header": _header(),
        **changes,
    }
    return Entry(**said)


def _rule(pattern: str, **options: object) -> ModelRule:
    return ModelRule.of(pattern, ModelSettings.model_validate(options))


def _base(**options: object) -> list[OptionLayer]:
    return [OptionLayer("[defaults]", ModelOptions.model_validate(options))]


def _spec(entry: Entry, *rules: ModelRule, router: str = "main") -> ModelSpec:
    spec = specify(entry, rules, router=router)
    assert spec is not None
    return spec


def _section(
    spec: ModelSpec, base: Sequence[OptionLayer] = (), flags: FlagSet = NEW, *, path: bool = False
) -> dict[str, str]:
    entries = dict(section(replace(spec, base=tuple(base)), flags, binary=BINARY))
    lint(for_router({spec.name: entries}), None if flags is OLDEST else flags)
    assert entries["model"] == spec.path
    return entries if path else {key: value for key, value in entries.items() if key != "model"}


def _refusal(spec: ModelSpec, base: Sequence[OptionLayer] = (), flags: FlagSet = NEW) -> OptionError:
    with pytest.raises(OptionError) as caught:
        section(replace(spec, base=tuple(base)), flags, binary=BINARY)
    return caught.value


# What a model is to be


def test_a_model_without_tables_is_its_file() -> None:
    """Its section names the file, and says what its router's tables say."""
    entry = _entry(changed_at=5.0)
    spec = _spec(entry)
    assert spec == ModelSpec(name="alpha", path="/m/alpha.gguf", files=(entry.files[0].id,), n_ctx_train=4096)
    assert spec.changed_at == 5.0
    assert _section(spec, path=True) == {"model": "/m/alpha.gguf"}
    assert _section(spec, _base(ctx_size=512)) == {"ctx-size": "512"}


def test_lower_tables_give_way_option_by_option() -> None:
    """A section says all that its model is told: the router's tables, and what the model's own say otherwise."""
    rules = [_rule("al*", ctx_size=1, parallel=2, args=["--top-k", "3"]), _rule("alpha", ctx_size=256)]
    base = _base(ctx_size=256, threads=4, args=["--top-p", "0.5"])
    common = {"ctx-size": "256", "threads": "4", "top-p": "0.5"}
    assert _section(_spec(_entry(), *rules), base) == {**common, "parallel": "2", "top-k": "3"}
    assert _section(_spec(_entry("albert"), *rules), base) == {**common, "ctx-size": "1", "parallel": "2", "top-k": "3"}
    assert _section(_spec(_entry("beta"), *rules), base) == common


def test_everything_that_a_table_may_say_reaches_the_section() -> None:
    """Each key in the words of the build."""
    rule = _rule(
        "*",
        aliases=["a", "b"],
        chat_template="chatml",
        chat_template_kwargs={"x": 1},
        mmproj="/p.gguf",
        draft="/d.gguf",
        draft_max=8,
        draft_min=1,
        draft_p_min=0.75,
        draft_gpu_layers="all",
        draft_devices=["CUDA1"],
        draft_threads=2,
        draft_cache_type_k="q8_0",
        draft_cache_type_v="f16",
        draft_type="draft-simple,ngram-mod",
        lora=["/a.gguf", "/b.gguf:0.5"],
        grammar_file="/g.gbnf",
        slot_save_path="/slots",
        tags=["t", "u"],
        load_on_start=True,
        router=["main"],
    )
    spec = _spec(_entry(aliases=("folder",)), rule)
    assert spec.load_on_start
    assert _section(spec) == {
        "alias": "folder,a,b",
        "tags": "t,u",
        "cache-type-k-draft": "q8_0",
        "cache-type-v-draft": "f16",
        "chat-template": "chatml",
        "chat-template-kwargs": '{"x":1}',
        "device-draft": "CUDA1",
        "draft-p-min": "0.75",
        "grammar-file": "/g.gbnf",
        "lora-scaled": "/a.gguf:1,/b.gguf:0.5",
        "mmproj": "/p.gguf",
        "model-draft": "/d.gguf",
        "n-gpu-layers-draft": "all",
        "slot-save-path": "/slots",
        "spec-draft-n-max": "8",
        "spec-draft-n-min": "1",
        "spec-type": "draft-simple,ngram-mod",
        "threads-draft": "2",
    }


@pytest.mark.parametrize(
    ("options", "entries"),
    [
        ({"chat_template": "/t.jinja"}, {"chat-template-file": "/t.jinja"}),
        ({"chat_template": "t.jinja"}, {"chat-template-file": "t.jinja"}),
        ({"lora": ["/a.gguf", "/b:c.gguf"]}, {"lora": "/a.gguf,/b:c.gguf"}),
        ({"lora": []}, {}),
        ({"mmproj": False, "draft": False}, {}),
    ],
)
def test_one_key_may_be_several_options(options: dict[str, object], entries: dict[str, str]) -> None:
    """Templates by name or file, adapters with scales or without, and what is switched off."""
    assert _section(_spec(_entry(), _rule("*", **options))) == entries


def test_a_later_table_replaces_the_other_way_to_say_the_same() -> None:
    """A template by file replaces one by name, scaled adapters replace plain ones, and args replace both."""
    low = _rule("*", chat_template="chatml", lora=["/a.gguf"], grammar_file="/g.gbnf")
    high = _rule("a*", chat_template="/t.jinja", lora=["/b.gguf:2"], args=["--grammar", "root ::= x"])
    assert _section(_spec(_entry(), low, high)) == {
        "chat-template-file": "/t.jinja",
        "lora-scaled": "/b.gguf:2",
        "grammar": "root ::= x",
    }
    args = _rule("a*", args=["--chat-template-file", "/u.jinja", "--lora", "/c.gguf"])
    assert _section(_spec(_entry(), low, args)) == {
        "chat-template-file": "/u.jinja",
        "lora": "/c.gguf",
        "grammar-file": "/g.gbnf",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"args": ["--alias", "x"]}, "--alias in args is refused"),
        ({"args": ["-m", "x"]}, "-m in args is refused"),
        ({"args": ["--tags", "x"]}, "--tags in args is refused"),
        ({"args": ["--load-on-startup"]}, "--load-on-startup in args is refused"),
        ({"args": ["-lv", "4"]}, "about the router itself"),
        ({"args": ["--no-ui"]}, "about the router itself"),
        ({"mmproj": "/p", "args": ["-mm", "/q"]}, "set the same option"),
        ({"draft_max": 1, "args": ["--draft-max", "2"]}, "is not an option of|set the same option"),
        ({"lora": ["/a"], "args": ["--lora-scaled", "/q:1"]}, "set the same option"),
        ({"chat_template": "chatml", "args": ["--chat-template-file", "/q"]}, "set the same option"),
        ({"chat_template": "chatlm"}, "not known to"),
        ({"draft_type": "draft-magic"}, "not known to"),
        ({"mmproj": "/a#b"}, "begins a comment"),
    ],
)
def test_what_a_table_may_not_say_names_table_and_model(options: dict[str, object], message: str) -> None:
    """Somebody who reads why a model is missing finds the table."""
    error = _refusal(_spec(_entry(), _rule("al*", **options)))
    assert str(error).startswith('model alpha: [model."al*"]: ')
    with pytest.raises(OptionError, match=message):
        raise error


@pytest.mark.parametrize(("name", "path"), [("a]b", "/m/a.gguf"), ("a", "/m/we#ird.gguf"), ("a", "/m/\udcff.gguf")])
def test_a_model_that_no_preset_can_name_is_refused(name: str, path: str) -> None:
    """It is withheld with the reason; it would stop the router."""
    error = _refusal(_spec(_entry(name, files=(_file(path),))))
    assert "its name" in str(error) or "its path" in str(error)
    assert error.hint


def test_what_the_build_lacks_is_an_error() -> None:
    """A key that an old build has no option for is never left out silently; false needs none."""
    assert "draft_max needs --spec-draft-n-max" in str(_refusal(_spec(_entry(), _rule("*", draft_max=1)), flags=OLDEST))
    assert _section(_spec(_entry(), _rule("*", draft=False, lora=[])), flags=OLDEST) == {}


# What a table takes back


def test_what_a_table_takes_back_is_not_said() -> None:
    """A table that goes back to a build's default leaves nothing of what all models are told."""
    back = _rule("*", load_mode="auto", mmproj=False, lora=["/b:2"])
    base = _base(load_mode="mlock", args=["--mmproj", "/p", "--lora", "/a"])
    assert _section(_spec(_entry(), back), base) == _section(_spec(_entry(), back), ())
    assert _section(_spec(_entry(), _rule("*", gpu_layers="auto")), _base(gpu_layers="all"), OLDEST) == {}


# What lies beside it


def test_files_beside_a_model_are_used_unless_its_table_says_otherwise() -> None:
    """A path replaces what was found, false switches it off, true brings it back; content is only what is used."""
    projector, draft = _file("/m/mmproj.gguf"), _file("/m/mtp-alpha.gguf")
    entry = _entry(projector=projector, draft=draft)
    spec = _spec(entry)
    assert spec.files == (entry.files[0].id, projector.id, draft.id)
    assert (spec.projector, spec.draft) == (projector.path, draft.path)
    assert _section(spec) == {"mmproj": projector.path, "model-draft": draft.path, "spec-type": "draft-mtp"}
    without = _spec(entry, _rule("*", mmproj=False, draft="/d.gguf"))
    assert without.files == (entry.files[0].id,)
    assert (without.projector, without.draft) == (None, None)
    assert _section(without) == {"model-draft": "/d.gguf"}
    again = _spec(entry, _rule("*", mmproj=False, draft="/d.gguf"), _rule("alpha", mmproj=True, draft=True))
    assert _section(again) == _section(spec)
    assert _section(_spec(_entry(), _rule("*", mmproj="/p"), _rule("alpha", mmproj=True))) == {}


@pytest.mark.parametrize(
    ("name", "options", "flags", "kind"),
    [
        ("mtp-x.gguf", {}, NEW, "draft-mtp"),
        ("dflash-x.gguf", {}, NEW, "draft-dflash"),
        ("dspark-x.gguf", {}, NEW, "draft-dspark"),
        ("dspark-x.gguf", {}, OLD, None),
        ("small.gguf", {}, NEW, None),
        ("mtp-x.gguf", {"draft_type": "draft-simple"}, NEW, "draft-simple"),
        ("mtp-x.gguf", {"args": ["--spec-type", "ngram-mod"]}, NEW, "ngram-mod"),
    ],
)
def test_how_a_draft_is_used_follows_from_its_name(
    name: str, options: dict[str, object], flags: FlagSet, kind: str | None
) -> None:
    """llama-server takes any draft for a small model; the prefix of a sidecar says what it is, unless a table does."""
    spec = _spec(_entry(draft=_file(f"/m/{name}")), _rule("*", **options))
    assert _section(spec, flags=flags).get("spec-type") == kind


# Embedding and rerank models


@pytest.mark.parametrize(
    ("context", "base", "own", "expected"),
    [
        (512, {}, {}, 512),
        (32768, {}, {}, 8192),
        (32768, {"ctx_size": 16384}, {}, 16384),
        (2048, {"ctx_size": 16384}, {}, 2048),
        (2048, {"args": ["-c", "1024"]}, {}, 1024),
        (32768, {"ctx_size": 0}, {}, 8192),
        (32768, {"ctx_size": 1024}, {"ctx_size": 2048}, 2048),
        (32768, {}, {"args": ["--ctx-size", "4096"]}, 4096),
        (32768, {}, {"ctx_size": 0}, 32768),
        (None, {"ctx_size": 1024}, {}, 1024),
    ],
)
def test_an_embedding_model_takes_whole_texts(
    context: int | None, base: dict[str, object], own: dict[str, object], expected: int
) -> None:
    """Its batches are as large as its context: what its table says, else the router's, never beyond its training."""
    spec = _spec(_entry(header=_header(Kind.EMBEDDING, context)), _rule("*", **own))
    layers = layers_in_force(replace(spec, base=tuple(_base(**base, parallel=1))))
    preset = resolve(layers, NEW, binary=BINARY).preset
    if own.get("ctx_size") != 0:
        assert preset["ctx-size"] == str(expected)
    assert (preset["batch-size"], preset["ubatch-size"], preset["embeddings"]) == (str(expected), str(expected), "1")
    assert layers[1].source == "automatic (an embedding model)"


def test_a_rerank_model_reranks_and_its_table_has_the_last_word() -> None:
    """What is written for the model itself beats what is known of its kind."""
    entry = _entry(header=_header(Kind.RERANK, 512))
    assert _section(_spec(entry), _base(batch_size=64)) == {
        "reranking": "1",
        "ctx-size": "512",
        "batch-size": "512",
        "ubatch-size": "512",
    }
    assert _section(_spec(entry, _rule("*", ubatch_size=64)))["ubatch-size"] == "64"
    assert _section(_spec(entry, _rule("*", reranking=False))) == {"reranking": "0"}
    assert _section(_spec(_entry(header=_header(Kind.EMBEDDING, None)))) == {"embeddings": "1"}
    assert _section(_spec(_entry(header=None))) == {}


# Routers, specs, aliases


def test_a_table_says_which_routers_may_hold_a_model() -> None:
    """The last table that says it counts; none at all may be named."""
    rules = [_rule("*", router=["a", "b"]), _rule("alpha", router="c"), _rule("beta", router=[])]
    held = {
        (name, router): specify(_entry(name), rules, router=router) is not None
        for name in ("alpha", "beta", "gamma")
        for router in ("a", "c")
    }
    assert [key for key, is_held in held.items() if is_held] == [("alpha", "c"), ("gamma", "a")]


def test_specs_are_equal_until_something_changes() -> None:
    """Another look with the same tables, even read again, changes nothing; content, a table or a neighbour does."""
    entry = _entry()
    spec = _spec(entry, _rule("*", ctx_size=1, lora=["/x"]))
    assert spec == _spec(replace(entry, changed_at=9.0), _rule("*", ctx_size=1, lora=["/x"]))
    assert hash(spec) == hash(_spec(entry, _rule("*", ctx_size=1, lora=["/x"])))
    assert spec == _spec(entry, _rule("*", ctx_size=1, lora=["/x"]), _rule("beta", ctx_size=2))
    assert spec != _spec(entry, _rule("*", ctx_size=2, lora=["/x"]))
    assert spec != _spec(replace(entry, files=(_file("/m/alpha.gguf"),)), _rule("*", ctx_size=1, lora=["/x"]))
    assert spec != _spec(replace(entry, draft=_file("/m/d.gguf")), _rule("*", ctx_size=1, lora=["/x"]))


@pytest.mark.parametrize(
    ("base", "tables", "ttl_s", "is_pinned"),
    [
        ({}, [], None, False),
        ({"ttl": "10m"}, [], 600.0, False),
        ({"ttl": "10m"}, [{"ctx_size": 1}], 600.0, False),
        ({"ttl": "10m"}, [{"ttl": "1h30m"}], 5400.0, False),
        ({"ttl": "10m"}, [{"ttl": 5}, {"ttl": 7, "pin": True}], 7.0, True),
        ({"ttl": "10m"}, [{"ttl": 5, "pin": True}, {"ttl": 0, "pin": False}], None, False),
        ({"ttl": 0}, [], None, False),
        ({"ttl": 0}, [{"pin": True}], None, True),
    ],
)
def test_the_last_table_says_how_long_a_model_stays(
    base: dict[str, object], tables: list[dict[str, object]], ttl_s: float | None, is_pinned: bool
) -> None:
    """A model's own tables beat its router's; a time of 0 is never, be it written above one that is not."""
    rules = [_rule("al*", **tables[0])] if tables else []
    rules += [_rule("alpha", **table) for table in tables[1:]]
    spec = specify(_entry(), rules, router="main", base=tuple(_base(**base)))
    assert spec is not None
    assert (spec.ttl_s, spec.is_pinned) == (ttl_s, is_pinned)


def test_how_long_a_model_stays_makes_no_other_model_of_it() -> None:
    """Tables that say nothing else leave no trace, and in the others nothing is left of it; `is_same` sees it still."""
    entry = _entry()

    def spec(base: Mapping[str, object], *rules: ModelRule) -> ModelSpec:
        found = specify(entry, rules, router="main", base=tuple(_base(**base)) if base else ())
        assert found is not None
        return found

    plain = spec({})
    for base, rule in (
        ({"ttl": 60}, _rule("beta", pin=True)),
        ({}, _rule("alpha", ttl=60)),
        ({}, _rule("alpha", pin=True)),
        ({"ttl": 60}, _rule("alpha", ttl=0, pin=True)),
    ):
        stays = spec(base, rule)
        assert (stays, stays.base, stays.layers) == (plain, (), ())
        assert not plain.is_same(stays)
        assert not stays.is_same(plain)
    options: dict[str, object] = {"ctx_size": 512, "args": ["--top-k", "3"]}
    told = spec(options, _rule("alpha", threads=2))
    stays = spec({**options, "ttl": 60}, _rule("alpha", threads=2, pin=True))
    assert stays == told
    assert section(stays, NEW, binary=BINARY) == section(told, NEW, binary=BINARY)
    assert layers_in_force(stays) == layers_in_force(told)
    assert stays.is_same(spec({**options, "ttl": "1m"}, _rule("alpha", threads=2, pin=True)))
    assert not stays.is_same(spec({**options, "ttl": 60, "ctx_size": 256}, _rule("alpha", threads=2, pin=True)))
    assert plain.is_same(_spec(replace(entry, changed_at=9.0)))


def test_models_share_the_tables_that_they_have_in_common() -> None:
    """Ten thousand models whose [defaults] have a time to live do not hold ten thousand copies of [defaults]."""
    base, rules = tuple(_base(ttl=60, ctx_size=512)), (_rule("*", pin=True, threads=2),)
    one, other = (specify(_entry(name), rules, router="main", base=base) for name in ("alpha", "beta"))
    assert one is not None
    assert other is not None
    assert one.base is other.base
    assert one.layers is other.layers


def test_of_lists_the_last_table_counts() -> None:
    """Aliases and tags of a table replace those of another; the folder's name stays."""
    entry = _entry(aliases=("folder",))
    rules = [_rule("alph?", tags=["x"]), _rule("alpha", tags=["y"], aliases=["z", "folder"])]
    spec = _spec(entry, *rules)
    assert (spec.tags, spec.aliases) == (("y",), ("folder", "z"))
    assert _spec(entry, *rules, _rule("[a]lpha", tags=[])).tags == ()


def _named(name: str, *aliases: str) -> ModelSpec:
    return ModelSpec(name=name, path=f"/m/{name}.gguf", files=(), aliases=aliases)


def test_an_alias_that_clashes_is_dropped_and_told() -> None:
    """A name beats an alias, the smaller name keeps an alias; nobody loses a model."""
    kept, notes = without_clashes([_named("b", "x", "a", "b", "z"), _named("a", "x", "y", "y", "c,d")])
    assert {name: spec.aliases for name, spec in kept.items()} == {"a": ("x", "y"), "b": ("z",)}
    assert notes == {
        "a": "the alias 'c,d' holds a ',', which separates aliases",
        "b": "the alias 'x' is what the model a is called; the alias 'a' is what the model a is called",
    }
    same = _named("c", "d")
    assert without_clashes([same])[0]["c"] is same


@given(
    st.dictionaries(st.sampled_from("abcd"), st.lists(st.sampled_from("abcdef,"), max_size=4), max_size=4),
    st.randoms(use_true_random=False),
)
def test_what_is_left_of_aliases_never_stops_a_router(aliases: Mapping[str, list[str]], random: object) -> None:
    """In whatever order the models come, the answer is the same and passes the lint."""
    specs = [_named(name, *each) for name, each in aliases.items()]
    kept, notes = without_clashes(specs)
    random.shuffle(specs)
    assert without_clashes(specs) == (kept, notes)
    assert kept.keys() == aliases.keys()
    lint(for_router({n: section(s, NEW, binary="") for n, s in kept.items()}))


def test_a_rule_is_checked_without_a_model() -> None:
    """What no model of a router could get is told by `config check`."""
    base = _base(ctx_size=1)
    try_rule(_rule("*", mmproj=True, draft=True, lora=[]), base, NEW, binary=BINARY)
    with pytest.raises(OptionError, match=r'\[model."\*"\]: --nope'):
        try_rule(_rule("*", args=["--nope"]), base, NEW, binary=BINARY)


# Files that tables name


def missing_files(layers: Sequence[OptionLayer]) -> str | None:
    """What is wrong with the first of the files that tables name."""
    return next(filter(None, (file.problem() for file in named_files(layers))), None)


def test_files_that_a_table_names_must_be_there(tmp_path: Path) -> None:
    """Each is looked at by its kind, in the table that counts; built-in templates and switched off files are not."""
    there, folder, pipe = tmp_path / "x.gguf", tmp_path / "slots", tmp_path / "pipe"
    there.write_bytes(b"")
    folder.mkdir()
    os.mkfifo(pipe)
    good = {
        "mmproj": str(there),
        "draft": str(there),
        "lora": [str(there), f"{there}:0.5"],
        "chat_template": str(there),
        "grammar_file": str(there),
        "slot_save_path": str(folder),
    }
    assert missing_files(_spec(_entry(), _rule("*", **good)).layers) is None
    assert missing_files(_spec(_entry(), _rule("*", mmproj=False, draft=False, chat_template="chatml")).layers) is None
    gone = str(tmp_path / "gone")
    for key in good:
        value = [f"{gone}:2"] if key == "lora" else gone
        reason = missing_files(_spec(_entry(), _rule("*", **{**good, key: value})).layers)
        assert reason == f'[model."*"]: {key} {gone} is not there'
    told = {
        "mmproj": (str(pipe), "is no file"),
        "draft": (str(folder), "is no file"),
        "slot_save_path": (str(there), "is no folder"),
        "grammar_file": (f"{there}/x", "cannot be used"),
        "chat_template": ("/a\0.jinja", "is no path"),
    }
    for key, (path, why) in told.items():
        assert why in str(missing_files(_spec(_entry(), _rule("*", **{**good, key: path})).layers))
    assert missing_files(_spec(_entry(projector=_file(gone))).layers) is None
    assert missing_files(_spec(_entry(projector=_file(gone)), _rule("*", mmproj=str(there))).layers) is None


# Size and truth


def test_ten_thousand_models_take_a_second() -> None:
    """Specs, clashes, sections and the lint of a large folder; a table that speaks for all is worked out once."""
    rules = (_rule("*", ctx_size=512, tags=["t"]), *(_rule(f"m{i}*", args=["--top-k", str(i)]) for i in range(30)))
    entries = [_entry(f"m{i}", aliases=(f"f{i}",)) for i in range(10_000)]
    base = _base(threads=1, ctx_size=256)
    began = time.process_time()
    specs = [specify(entry, rules, router="main", base=tuple(base)) for entry in entries]
    cleared, notes = without_clashes(spec for spec in specs if spec)
    sections = {name: section(spec, NEW, binary=BINARY) for name, spec in cleared.items()}
    made = time.process_time()
    lint(for_router(sections), NEW)
    linted = time.process_time()
    assert (len(sections), notes) == (10_000, {})
    assert sections["m5"]["top-k"] == "5"
    assert made - began < 5
    assert linted - made < 1


@pytest.mark.real
def test_the_true_router_gives_each_model_what_its_section_says(
    llama_server: Path, tmp_path: Path, models_dir: Path
) -> None:
    """Many sections with all kinds of options come back from GET /models, each model with its own words."""
    flags = probe(llama_server, {}).flags
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    base = _base(ctx_size=512, threads=1, parallel=1, load_mode="mmap", args=["--top-k", "20"])
    rules = (
        _rule("*", chat_template_kwargs={"note": "a;b#c"}, tags=["all", "é"]),
        _rule("file*", chat_template=str(tmp_path / "t.jinja"), lora=["/x/a.gguf:0.5", "/x/b.gguf"], jinja=False),
        _rule("spec*", draft=str(models_dir / "beta.gguf"), draft_max=5, draft_p_min=0.5, draft_threads=1),
        _rule("alpha", aliases=["first", "org/first:Q8_0"], ctx_size=256, args=["--top-k", "30"], load_mode="none"),
    )
    names = ["alpha", "beta", *(f"{kind}-{i}" for kind in ("file", "spec", "plain") for i in range(40))]
    entries = [_entry(name, files=(_file(str(models_dir / "alpha.gguf")),)) for name in names]
    specs, notes = without_clashes(replace(_spec(entry, *rules), base=tuple(base)) for entry in entries)
    sections = {name: dict(section(spec, flags, binary=str(llama_server))) for name, spec in specs.items()}
    preset = for_router(sections)
    lint(preset, flags)
    write(tmp_path / "preset.ini", preset)
    (tmp_path / "none").mkdir()
    text = (tmp_path / "preset.ini").read_text(encoding="utf-8")
    with BareRouter(llama_server, tmp_path / "router", tmp_path / "none", preset=text) as router:
        told = router.models()
        assert router.load("alpha").name == "alpha"
        assert router.chat("org/first:Q8_0").json["choices"][0]["message"]["content"].strip() == "I am alpha"
        n_ctx = router.models()["alpha"]["meta"]["n_ctx"]
    assert notes == {}
    assert set(told) == set(names)
    assert n_ctx == 256
    for name, entries_of in sections.items():
        read = dict(line.split(" = ", 1) for line in told[name]["status"]["preset"].splitlines() if " = " in line)
        expected = {**preset.common, **entries_of}
        for ours in ("alias", "tags"):
            expected.pop(ours, None)
        flat = {key: _truth(read.get(key, "")) for key in expected}
        assert flat == {key: _truth(value) for key, value in expected.items()}
        words = told[name]["status"]["args"]
        assert words[words.index("--model") + 1] == entries_of["model"]
    assert sorted(told["alpha"]["aliases"]) == ["first", "org/first:Q8_0"]
    assert sorted(told["beta"]["tags"]) == ["all", "é"]


def _truth(value: str) -> str:
    return {"true": "1", "false": "0"}.get(value, value)
