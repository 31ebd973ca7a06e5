"""The preset file: what is written is what the router reads, and what would harm it is not written."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from builds import NEW, OLD
from fakes.bare_router import BareRouter
from llamavisor import ini
from llamavisor.binary import probe
from llamavisor.errors import OptionError
from llamavisor.flags import LaunchOptions
from llamavisor.helptext import FlagSet, HelpOption
from llamavisor.preset import ALWAYS, STOP_TIMEOUT_S, Preset, for_router, lint, write

MODEL = "/srv/models/a.gguf"
_KEYS = st.sampled_from(["ctx-size", "top-k", "n-gpu-layers", "chat-template-kwargs", "reverse-prompt", "jinja"])
_NASTY = st.text(st.one_of(st.sampled_from(" \t\r\n;#[]=:\\\"'\0éλ☃"), st.characters(codec="utf-8")), max_size=12)
_TABLES = st.dictionaries(_KEYS, _NASTY, max_size=4)


def for_all(options: LaunchOptions) -> Preset:
    """A preset that tells all models the same."""
    return Preset(common=dict(sorted({**options.preset, **ALWAYS}.items())))


def _read(text: str) -> dict[str, dict[str, str]]:
    """The file as the router reads it: the grammar of `parse_ini_from_file`, and the renaming of `load_from_ini`."""
    tables: dict[str, dict[str, str]] = {}
    at, name = 0, "default"
    line = re.compile(
        r"\[[ \t]*(?P<name>[^]]+)\](?P<eol1>[ \t]*(?:[;#][^\r\n]*)?(?:\r\n|\n|\r|\Z))"
        r"|(?P<key>[A-Za-z_][A-Za-z0-9_.-]*)[ \t]*=[ \t]*(?P<value>(?:(?![ \t]*(?:[;#\r\n]|\Z)).)*)"
        r"(?P<eol2>[ \t]*(?:[;#][^\r\n]*)?(?:\r\n|\n|\r|\Z))"
        r"|(?P<blank>[ \t]*(?:[;#][^\r\n]*)?(?:\r\n|\n|\r|\Z))",
        re.DOTALL,
    )
    while at < len(text):
        found = line.match(text, at)
        assert found is not None, f"the router stops at {text[at : at + 40]!r}"
        assert found.end() > at
        at = found.end()
        if found["name"] is not None:
            name = _as_renamed(found["name"])
            tables[name] = {}
        elif found["key"] is not None and found["key"] != "version":
            tables.setdefault(name, {})[found["key"]] = found["value"]
    return tables


def _as_renamed(name: str) -> str:
    prefix, colon, tag = name.rpartition(":")
    if not colon:
        return name
    quant = re.search(r"[-.]([A-Za-z0-9_]+)\Z", tag)
    return prefix + colon + re.sub(r"[a-z]", lambda c: c[0].upper(), quant[1] if quant else tag)


@settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much])  # nasty tables seldom pass the lint
@given(_TABLES, st.dictionaries(_NASTY, _TABLES, max_size=3))
def test_what_passes_the_lint_is_read_back_unchanged(
    common: dict[str, str], sections: dict[str, dict[str, str]]
) -> None:
    """Whatever names and values are tried, a preset that may be written means to the router what it says."""
    preset = Preset(common, {name: {"model": MODEL, **table} for name, table in sections.items()})
    try:
        lint(preset)
    except OptionError:
        assume(False)
    assert _read(preset.render()) == {"*": preset.common, **preset.sections}


@settings(deadline=None)
@given(_NASTY)
def test_a_value_is_refused_exactly_if_it_would_not_come_back(value: str) -> None:
    """No value that an INI carries is refused for nothing, except the empty one and the one with a NUL."""
    try:
        comes_back = _read(f"[*]\nkey = {value}\nnext = 1\n") == {"*": {"key": value, "next": "1"}}
    except AssertionError:
        comes_back = False
    assert (ini.value_problem(value) is None) == (comes_back and value != "" and "\0" not in value)


@settings(deadline=None)
@given(_NASTY)
def test_a_name_is_refused_exactly_if_it_would_not_come_back(name: str) -> None:
    """No name that a section can have is refused for nothing; blanks at its end and line breaks are."""
    try:
        comes_back = _read(f"[{name}]\nkey = 1\n") == {name: {"key": "1"}}
    except AssertionError:
        comes_back = False
    is_odd = name == "*" or name != name.strip(" \t") or any(c in name for c in "\r\n\0")
    assert (ini.section_problem(name) is None) == (comes_back and not is_odd)


@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("foo:latest", "foo:LATEST"),
        ("with:UD-q4_k_xl", "with:Q4_K_XL"),
        ("a:b.c", "a:C"),
        ("foo:LATEST", None),
        ("a:é", None),
        ("org/model:Q4_K_M", None),
        ("plain", None),
    ],
)
def test_names_that_the_router_would_rename_are_refused(name: str, renamed: str | None) -> None:
    """What follows a ':' is a quantization to the router, which rewrites it; the error says into what."""
    problem = ini.section_problem(name)
    assert (renamed is None) == (problem is None)
    assert renamed is None or repr(renamed) in str(problem)


def test_every_preset_has_metrics_and_a_short_stop_timeout() -> None:
    """A router's preset says what its models are told, and for all of them what the supervisor relies on."""
    preset = for_router({"a": {"model": MODEL, "ctx-size": "512"}})
    assert (
        preset.common == {"metrics": "1", "stop-timeout": str(STOP_TIMEOUT_S)} == {"metrics": "1", "stop-timeout": "3"}
    )
    assert preset.sections == {"a": {"model": MODEL, "ctx-size": "512"}}
    lint(preset, NEW)
    lint(preset, OLD)


def test_equal_presets_are_equal_files() -> None:
    """Nothing in the text depends on when or where it was written, so that an unchanged file needs no reload."""
    options = LaunchOptions({"b": "1", "a": "2"}), LaunchOptions({"a": "2", "b": "1"})
    assert for_all(options[0]).render() == for_all(options[1]).render()
    assert for_all(options[0]).render().startswith("# Written by llamavisor")


@pytest.mark.parametrize(
    ("common", "message"),
    [
        ({"": "1"}, "is not a name"),
        ({"-c": "1"}, "is not a name"),
        ({"version": "1"}, "skipped"),
        ({"LLAMA_ARG_CTX_SIZE": "1"}, "variable"),
        ({"ctx-size": "1;2"}, "comment"),
        ({"api-key": "x"}, "api-key is refused"),
        ({"ssl-key-file": "/k"}, "ssl-key-file is refused"),
        ({"models-max": "2"}, "models-max is refused"),
        ({"no-models-autoload": "1"}, "is refused"),
        ({"hf-repo": "a/b"}, "hf-repo is refused"),
        ({"hf-token": "x"}, "hf-token is refused"),
        ({"host": "0.0.0.0"}, "host is refused"),
        ({"load-on-startup": "1"}, "load-on-startup is refused"),
        ({"control-vector-layer-range": "1"}, "two values"),
        ({"help": "1"}, "help is refused"),
        ({"model": MODEL}, "the same for every model"),
        ({"alias": "a"}, "the same for every model"),
    ],
)
def test_common_entries_that_would_harm_the_router_are_refused(common: Mapping[str, str], message: str) -> None:
    """A key or value that keeps the router from starting, or makes reloads restart models, is not written."""
    with pytest.raises(OptionError, match=re.escape("preset [*]: ")) as caught:
        lint(Preset(common))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"a": {}}, "needs model"),
        ({"a": {"model": "models/a.gguf"}}, "an absolute path"),
        ({"a": {"model": "/srv/we#ird.gguf"}}, "comment"),
        ({"a": {"model": "/srv/\udcff.gguf"}}, "UTF-8"),
        ({"*": {"model": MODEL}}, "all models share"),
        ({"": {"model": MODEL}}, "is empty"),
        ({"a]b": {"model": MODEL}}, "']'"),
        ({" a": {"model": MODEL}}, "blank"),
        ({"\udcff": {"model": MODEL}}, "UTF-8"),
        ({"a": {"model": MODEL, "load-on-startup": "1"}}, "load-on-startup is refused"),
        ({"a": {"model": MODEL, "alias": "b"}, "b": {"model": MODEL}}, "already names the model 'b'"),
        ({"a": {"model": MODEL, "alias": "x, y"}, "b": {"model": MODEL, "alias": "y"}}, "alias 'y'"),
    ],
)
def test_sections_that_would_harm_the_router_are_refused(
    sections: Mapping[str, Mapping[str, str]], message: str
) -> None:
    """A section without a model would become a router in the router; a name for two models ends the start."""
    with pytest.raises(OptionError) as caught:
        lint(Preset({}, sections))
    assert message in str(caught.value)


def test_a_model_may_have_aliases_and_its_own_name_among_them() -> None:
    """Aliases that clash with nobody pass."""
    lint(Preset({}, {"a": {"model": MODEL, "alias": "a, x,x"}, "default": {"model": MODEL, "tags": "t"}}))


@pytest.mark.parametrize(
    ("common", "message"),
    [
        ({"mmap": "1"}, "mmap is not an option"),
        ({"draft-max": "1"}, "draft-max is not an option"),
        ({"ctx-size": "1", "c": "2"}, "ctx-size and c are the same option"),
        ({"no-jinja": "1", "jinja": "1"}, "no-jinja and jinja are the same option"),
        ({"model-draft": "/a", "md": "/b"}, "model-draft and md are the same option"),
        ({"jinja": "yes"}, "would be read as off"),
        ({"gpt-oss-20b-default": "1"}, "downloads a model"),
    ],
)
def test_with_a_build_unknown_keys_and_second_names_are_refused(common: Mapping[str, str], message: str) -> None:
    """One key that the build does not know stops the router; of two spellings it would take either."""
    with pytest.raises(OptionError, match=message):
        lint(Preset(common), NEW)
    lint(Preset({"mmap": "1", "stop-timeout": "3"}), OLD)


@pytest.mark.parametrize(
    ("common", "message"),
    [
        ({"ctx-size": "1", "c": "2"}, "ctx-size and c are the same option"),
        ({"no-jinja": "1", "jinja": "1"}, "no-jinja and jinja are the same option"),
        ({"spec-draft-n-max": "1", "draft-max": "1"}, "spec-draft-n-max and draft-max are the same option"),
        ({"stop-timeout": "soon"}, "no whole number of seconds"),
    ],
)
def test_second_names_of_typed_options_are_refused_without_a_build(common: Mapping[str, str], message: str) -> None:
    """What all builds call one option is known without asking one; what are several options in some is not refused."""
    with pytest.raises(OptionError, match=message):
        lint(Preset(common))
    lint(Preset({"mmap": "0", "mlock": "1", "cont-batching": "0", "no-cont-batching": "1", "lora": "a"}))


def test_a_name_that_only_the_build_knows_is_reserved_in_a_section_too() -> None:
    """When a build gives a reserved option one more name, no model gets it by that name."""
    flags = FlagSet([HelpOption(("--models-dir", "--folder"), (), "PATH", 1, "directory")])
    with pytest.raises(OptionError, match="folder is refused"):
        lint(Preset({"folder": "/x"}), flags)


def test_a_preset_is_written_for_its_owner_alone_and_replaces_the_old_one(tmp_path: Path) -> None:
    """The file has mode 0600 whatever was there, even a draft that a crash left behind; nothing else remains."""
    path = tmp_path / "preset.ini"
    path.write_text("old")
    path.chmod(0o644)
    (tmp_path / ".preset.ini.tmp").write_text("left behind")
    (tmp_path / ".preset.ini.tmp").chmod(0o644)
    preset = for_all(LaunchOptions({"reverse-prompt": "é"}))
    write(path, preset)
    assert path.read_text(encoding="utf-8") == preset.render()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_what_must_not_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    """A preset that the lint refuses does not touch the file that a router is living on."""
    path = tmp_path / "preset.ini"
    write(path, Preset({"ctx-size": "1"}))
    before = path.stat()
    with pytest.raises(OptionError):
        write(path, Preset({"ctx-size": "#"}))
    assert path.stat() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_gone_is_the_callers_to_handle(tmp_path: Path) -> None:
    """The system's own error comes through when the folder cannot be written."""
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "gone" / "preset.ini", Preset())


@pytest.mark.real
def test_the_true_router_reads_what_was_written(llama_server: Path, tmp_path: Path) -> None:
    """Odd names and values arrive in the true router as they were written, each with its model."""
    model = tmp_path / "not a model.gguf"
    model.write_bytes(b"no GGUF")
    values = ['{"a": [1, "b c"]}', "back\\slash \\", "'quoted' \"twice\"", "= x = y", "λ ☃ 𝄞", "[x]", "a\tb"]
    names = ["org/name:Q4_K_M", "a;b#c", "with blank", "=", "[x", "λ☃", "-dash", '"q"', "default"]
    sections = {name: {"model": str(model), "reverse-prompt": values[i % len(values)]} for i, name in enumerate(names)}
    preset = replace(for_all(LaunchOptions({"threads": "1", "cont-batching": "0"})), sections=sections)
    write(tmp_path / "preset.ini", preset)
    lint(preset, probe(llama_server, {}).flags)
    (tmp_path / "none").mkdir()
    text = (tmp_path / "preset.ini").read_text(encoding="utf-8")
    with BareRouter(llama_server, tmp_path / "router", tmp_path / "none", preset=text) as router:
        models = router.models()
    assert set(models) == set(names)
    for name, section in sections.items():
        words = models[name]["status"]["args"]
        assert words[words.index("--model") + 1] == str(model)
        assert words[words.index("--reverse-prompt") + 1] == section["reverse-prompt"]
        assert "--metrics" in words
        assert "--no-cont-batching" in words


@pytest.mark.real
@pytest.mark.parametrize(
    "preset",
    [
        Preset({"no-such-key": "1"}),
        Preset({"control-vector-layer-range": "1"}, {"a": {"model": MODEL}}),
        Preset({}, {"a": {"model": MODEL, "alias": "b"}, "b": {"model": MODEL}}),
        Preset({}, {"": {"model": MODEL}}),
    ],
)
def test_the_lint_knows_what_the_true_router_does_not_survive(
    preset: Preset, llama_server: Path, tmp_path: Path
) -> None:
    """What is refused here does keep the router from starting: the lint is no stricter out of habit."""
    with pytest.raises(OptionError):
        lint(preset, probe(llama_server, {}).flags)
    (tmp_path / "none").mkdir()
    router = BareRouter(llama_server, tmp_path / "router", tmp_path / "none", preset=preset.render())
    with pytest.raises(RuntimeError, match="the router ended with 1"), router:
        pytest.fail("it started")
