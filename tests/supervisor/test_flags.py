"""From option tables to a preset's entries and a router's command line, for the build found."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from builds import NEW, OLD, OLDEST
from fakes.bare_router import BareRouter
from llamavisor.binary import probe
from llamavisor.errors import OptionError
from llamavisor.flags import LaunchOptions, ModelOptions, OptionLayer, check, resolve
from llamavisor.helptext import FlagSet, HelpOption
from llamavisor.preset import ALWAYS, Preset, lint
from llamavisor.reserved import find_reserved
from llamavisor.rules import ModelSettings
from llamavisor.spellings import LISTENER, MODEL_SPELLINGS, SPELLINGS, typed_name

BINARY = "/opt/llama-server"

_TYPED: Mapping[str, st.SearchStrategy[object]] = {
    "gpu_layers": st.sampled_from(["auto", "all", 0, 7]),
    "devices": st.sampled_from([("CUDA0",), ("CUDA0", "CUDA1"), ("none",)]),
    "split_mode": st.sampled_from(["none", "layer", "row"]),
    "tensor_split": st.sampled_from([(3.0, 1.0), (0.25,)]),
    "main_gpu": st.integers(0, 7),
    "flash_attn": st.sampled_from(["on", "off", "auto"]),
    "ctx_size": st.integers(0, 1 << 20),
    "parallel": st.integers(1, 64),
    "threads": st.integers(1, 256),
    "batch_size": st.integers(1, 4096),
    "ubatch_size": st.integers(1, 4096),
    "cache_type_k": st.sampled_from(["f16", "q8_0"]),
    "cache_type_v": st.sampled_from(["bf16", "q4_0"]),
    "load_mode": st.sampled_from(["auto", "none", "mmap", "mlock", "mmap+mlock", "dio"]),
    "fit": st.booleans(),
    "jinja": st.booleans(),
    "cont_batching": st.booleans(),
    "embeddings": st.booleans(),
    "reranking": st.booleans(),
    "sleep_idle_seconds": st.integers(1, 86400),
    "temperature": st.sampled_from([0.0, 0.7, 2.0]),
    "top_p": st.sampled_from([0.0, 0.95, 1.0]),
    "top_k": st.integers(0, 100),
    "min_p": st.sampled_from([0.0, 0.05, 1.0]),
    "repeat_penalty": st.sampled_from([0.5, 1.1]),
    "max_tokens": st.integers(1, 1 << 20),
}
_OPTIONS = st.fixed_dictionaries({}, optional=dict(_TYPED)).map(lambda fields: ModelOptions(**fields))


def for_all(options: LaunchOptions) -> Preset:
    """A preset that tells all models the same."""
    return Preset(common=dict(sorted({**options.preset, **ALWAYS}.items())))


def _layers(*tables: ModelOptions | Sequence[str]) -> list[OptionLayer]:
    return [
        OptionLayer(f"table {i}", table if isinstance(table, ModelOptions) else ModelOptions(args=tuple(table)))
        for i, table in enumerate(tables)
    ]


def _resolved(*tables: ModelOptions | Sequence[str], flags: FlagSet = NEW) -> LaunchOptions:
    layers = _layers(*tables)
    check(layers)
    return resolve(layers, flags, binary=BINARY)


def _preset(*tables: ModelOptions | Sequence[str], flags: FlagSet = NEW) -> dict[str, str]:
    return dict(_resolved(*tables, flags=flags).preset)


def _refusal(*tables: ModelOptions | Sequence[str], flags: FlagSet = NEW) -> OptionError:
    with pytest.raises(OptionError) as caught:
        resolve(_layers(*tables), flags, binary=BINARY)
    return caught.value


def test_the_table_of_spellings_covers_the_typed_options() -> None:
    """Every field of the configuration but args and ttl has its spellings, and the newest build knows each option."""
    assert set(SPELLINGS) == set(ModelOptions.model_fields) - {"args", "ttl", "hang_after", "recycle_above"}
    assert set(_TYPED) == set(SPELLINGS)
    assert all(any(NEW.find(spelling) for spelling in spellings) for spellings in SPELLINGS.values())


def test_the_table_of_spellings_covers_the_options_of_single_models() -> None:
    """What [model] tables have besides is an option of the newest build, or the supervisor's own."""
    ours = {"aliases", "tags", "load_on_start", "pin", "router"}
    assert set(MODEL_SPELLINGS) == ModelSettings.model_fields.keys() - ModelOptions.model_fields.keys() - ours
    assert all(any(flags.find(word) for word in words) for words in MODEL_SPELLINGS.values() for flags in (NEW, OLD))
    spellings = [word for words in (*SPELLINGS.values(), *MODEL_SPELLINGS.values()) for word in words]
    assert len(spellings) == len(set(spellings))


@pytest.mark.parametrize("flags", [NEW, OLD])
def test_how_long_a_model_stays_is_not_for_llama_server(flags: FlagSet) -> None:
    """Whatever a table says of it, no build is told, and none has to know the option."""
    table = ModelSettings(ttl=60, pin=True, ctx_size=1, args=("--top-k", "1"))
    assert _preset(ModelOptions(ttl=0), table, flags=flags) == {"ctx-size": "1", "top-k": "1"}
    assert typed_name("--ttl") is typed_name("--pin") is None


def test_options_of_drafts_are_found_by_their_old_names() -> None:
    """A build before --spec-draft-n-max is told --draft-max."""
    older = FlagSet(
        [
            HelpOption(("--draft", "--draft-n", "--draft-max"), (), "N", 1, "number of tokens to draft (default: 16)"),
            HelpOption(("-md", "--model-draft"), (), "FNAME", 1, "draft model for speculative decoding"),
            HelpOption(("-ngld", "--gpu-layers-draft"), (), "N", 1, "layers to store in VRAM for the draft model"),
        ]
    )
    table = ModelSettings(draft="/d.gguf", draft_max=4, draft_gpu_layers="all")
    assert _preset(table, flags=older) == {"draft-max": "4", "model-draft": "/d.gguf", "gpu-layers-draft": "999"}
    assert _preset(table, ModelSettings(draft=False, args=("--draft", "7")), flags=older) == {
        "draft-max": "7",
        "gpu-layers-draft": "999",
    }


def test_each_typed_option_has_one_key() -> None:
    """A full table comes out as one entry for each option, sorted, in the words of the build."""
    options = ModelOptions(
        gpu_layers="all",
        devices=("CUDA0", "CUDA1"),
        split_mode="layer",
        tensor_split=(3.0, 1.5),
        main_gpu=1,
        flash_attn="on",
        ctx_size=8192,
        parallel=2,
        threads=4,
        batch_size=512,
        ubatch_size=64,
        cache_type_k="q8_0",
        cache_type_v="f16",
        load_mode="mlock",
        fit=False,
        jinja=False,
        cont_batching=True,
        embeddings=True,
        reranking=False,
        sleep_idle_seconds=300,
        temperature=0.7,
        top_p=0.95,
        top_k=40,
        min_p=0.05,
        repeat_penalty=1.1,
        max_tokens=512,
    )
    assert list(_preset(options).items()) == [
        ("batch-size", "512"),
        ("cache-type-k", "q8_0"),
        ("cache-type-v", "f16"),
        ("cont-batching", "1"),
        ("ctx-size", "8192"),
        ("device", "CUDA0,CUDA1"),
        ("embeddings", "1"),
        ("fit", "off"),
        ("flash-attn", "on"),
        ("jinja", "0"),
        ("load-mode", "mlock"),
        ("main-gpu", "1"),
        ("min-p", "0.05"),
        ("n-gpu-layers", "all"),
        ("n-predict", "512"),
        ("parallel", "2"),
        ("repeat-penalty", "1.1"),
        ("reranking", "0"),
        ("sleep-idle-seconds", "300"),
        ("split-mode", "layer"),
        ("temperature", "0.7"),
        ("tensor-split", "3,1.5"),
        ("threads", "4"),
        ("top-k", "40"),
        ("top-p", "0.95"),
        ("ubatch-size", "64"),
    ]


@settings(deadline=None)
@given(st.lists(_OPTIONS, max_size=4))
def test_of_several_tables_the_last_word_on_each_option_counts(tables: list[ModelOptions]) -> None:
    """Tables laid over each other are the same as one table with the last value of each field."""
    merged: dict[str, object] = {}
    for table in tables:
        merged |= table.model_dump(exclude_none=True)
    for flags in (NEW, OLD):
        assert _resolved(*tables, flags=flags) == _resolved(ModelOptions(**merged), flags=flags)


@settings(deadline=None)
@given(_OPTIONS)
def test_what_is_resolved_passes_the_lint(options: ModelOptions) -> None:
    """Whatever typed options ask for, in a new build and an old one, makes a preset that may be written."""
    for flags in (NEW, OLD):
        lint(for_all(_resolved(options, flags=flags)), flags)


@settings(deadline=None)
@given(st.data())
def test_args_say_the_same_as_typed_options(data: st.DataObject) -> None:
    """A typed option and its spelling in args are one option: same entry, and each replaces the other."""
    name = data.draw(
        st.sampled_from(
            ["ctx_size", "parallel", "threads", "batch_size", "main_gpu", "flash_attn", "top_k", "max_tokens"]
        )
    )
    value = data.draw(_TYPED[name])
    typed = ModelOptions.model_validate({name: value})
    args = [data.draw(st.sampled_from(SPELLINGS[name])), str(value)]
    other = ModelOptions.model_validate({name: data.draw(_TYPED[name])})
    assert _preset(args) == _preset(typed) == _preset(other, args) == _preset(args, typed)


@st.composite
def _any_args(draw: st.DrawFn) -> list[tuple[HelpOption, list[str]]]:
    """Options of the newest build that no one refuses, each once, with values that fit."""
    free = [o for o in NEW if not (find_reserved(o.spellings) or o.is_download or o.removal or o.values > 1)]
    chosen = draw(st.lists(st.sampled_from(free), unique_by=lambda option: option.key, max_size=8))
    values = st.from_regex(r"[a-z0-9][a-z0-9 .:/-]{0,8}[a-z0-9]", fullmatch=True)
    return [
        (option, [draw(st.sampled_from(option.spellings)), *([draw(values)] if option.values else [])])
        for option in chosen
        if option.key != "load-mode"
    ]


@settings(deadline=None)
@given(_any_args())
def test_args_of_any_kind_are_accepted_and_told_apart(chosen: list[tuple[HelpOption, list[str]]]) -> None:
    """Whatever else llama-server takes goes into the preset, except what only its listener understands."""
    options = _resolved([word for _, words in chosen for word in words])
    for option, words in chosen:
        if LISTENER.isdisjoint(option.spellings):
            text = words[1] if option.values else "0" if words[0] in option.negations else "1"
            assert options.preset[option.key] == text
        else:
            assert words[-1] in options.listener_args or words[-1] in option.spellings
    lint(for_all(options), NEW)


def test_a_flag_and_its_negation_are_one_option() -> None:
    """A later --no-jinja or -nocb switches off what an earlier table switched on, and the other way round."""
    assert _preset(ModelOptions(jinja=True), ["--no-jinja"]) == {"jinja": "0"}
    assert _preset(["-nocb"], ModelOptions(cont_batching=True)) == {"cont-batching": "1"}
    assert _preset(["--no-cont-batching"], flags=OLDEST) == {"no-cont-batching": "1"}
    assert _preset(["-nocb"], ModelOptions(cont_batching=True), flags=OLDEST) == {"cont-batching": "1"}


@pytest.mark.parametrize(
    "args",
    [
        ["-c", "1", "--ctx-size", "2"],
        ["--jinja", "--no-jinja"],
        ["--top-k", "1", "--top-k", "2"],
        ["-lv", "1", "--verbosity", "2"],
    ],
)
def test_one_table_cannot_say_two_things(args: list[str]) -> None:
    """The same option twice in one table is an error, whatever the spelling."""
    error = _refusal(args)
    assert args[0] in str(error)
    assert str(error).startswith("table 0: ")


@pytest.mark.parametrize(
    ("typed", "args"),
    [
        (ModelOptions(ctx_size=1), ("-c", "2")),
        (ModelOptions(devices=("CUDA0",)), ("--device", "CUDA1")),
        (ModelOptions(load_mode="none"), ("--mlock",)),
    ],
)
def test_a_typed_option_is_not_said_again_in_the_args_of_its_table(typed: ModelOptions, args: tuple[str, ...]) -> None:
    """Even what args may repeat must not stand beside its typed option; that is seen without a binary."""
    both = typed.model_copy(update={"args": args})
    with pytest.raises(OptionError, match="set the same option"):
        check(_layers(both))
    assert "set the same option" in str(_refusal(both))


def test_what_may_be_repeated_is_joined_with_commas() -> None:
    """Two --lora in one table become one entry, since a preset holds each option once."""
    assert _preset(["--lora", "a.gguf", "--lora", "b.gguf"]) == {"lora": "a.gguf,b.gguf"}
    assert _preset(["--lora", "a.gguf"], ["--lora", "b.gguf"]) == {"lora": "b.gguf"}
    assert _resolved(["--cors-origins", "a", "--cors-origins", "b"]).listener_args == (
        "--cors-origins",
        "a,b",
    )


@pytest.mark.parametrize(
    ("mode", "entries"),
    [
        ("auto", {}),
        ("none", {"mmap": "0"}),
        ("mmap", {"mmap": "1"}),
        ("mlock", {"mlock": "1", "mmap": "0"}),
        ("mmap+mlock", {"mlock": "1", "mmap": "1"}),
        ("dio", {"direct-io": "1"}),
    ],
)
def test_load_modes_are_translated_for_builds_without_them(mode: str, entries: dict[str, str]) -> None:
    """A build before --load-mode gets flags that mean the same; an earlier table's mode leaves no trace."""
    options = ModelOptions.model_validate({"load_mode": mode})
    assert _preset(options, flags=OLD) == entries
    assert _preset(ModelOptions(load_mode="mmap+mlock"), options, flags=OLD) == entries
    assert _preset(options) == {"load-mode": mode}


@pytest.mark.parametrize(
    ("args", "mode"),
    [
        (["--no-mmap"], "none"),
        (["--mmap"], "mmap"),
        (["--mlock"], "mmap+mlock"),
        (["--mlock", "--no-mmap"], "mlock"),
        (["-dio"], "dio"),
        (["-ndio"], "auto"),
        (["--load-mode", "dio"], "dio"),
    ],
)
def test_old_load_flags_mean_what_they_meant(args: list[str], mode: str) -> None:
    """Flags that newer builds have removed still say the same in args, and override an earlier mode."""
    expected = {"load-mode": mode}
    assert _preset(args) == expected
    assert _preset(ModelOptions(load_mode="mmap"), args) == expected
    assert _preset(args, flags=OLD) == _preset(ModelOptions.model_validate({"load_mode": mode}), flags=OLD)


@pytest.mark.parametrize("args", [["--load-mode", "dio", "--mlock"], ["--mmap", "--no-mmap"]])
def test_contradicting_load_flags_are_refused(args: list[str]) -> None:
    """One table chooses one load mode."""
    assert "contradict" in str(_refusal(args))


def test_builds_that_count_layers_only_are_told_a_number() -> None:
    """Where --gpu-layers takes no words, "all" is more layers than any model has, and "auto" is left out."""
    assert _preset(ModelOptions(gpu_layers="all"), flags=OLDEST) == {"n-gpu-layers": "999"}
    assert _preset(ModelOptions(gpu_layers="all"), ModelOptions(gpu_layers="auto"), flags=OLDEST) == {}
    assert _preset(ModelOptions(gpu_layers=7), flags=OLDEST) == {"n-gpu-layers": "7"}
    assert _resolved(ModelOptions(gpu_layers="all"), flags=OLDEST).needs_gpu


def test_flash_attention_as_a_bare_flag_is_set_or_left_out() -> None:
    """Builds with a bare --flash-attn have it off by default: "on" sets it, all else leaves it."""
    assert _preset(ModelOptions(flash_attn="on"), flags=OLDEST) == {"flash-attn": "1"}
    assert _preset(ModelOptions(flash_attn="on"), ModelOptions(flash_attn="off"), flags=OLDEST) == {}


def test_a_lone_negation_carries_the_load_mode_of_the_oldest_builds() -> None:
    """A build with --no-mmap alone is told "none" and "mmap" by that flag, and cannot do direct I/O."""
    assert _preset(ModelOptions(load_mode="none"), flags=OLDEST) == {"no-mmap": "1"}
    assert _preset(ModelOptions(load_mode="mmap+mlock"), flags=OLDEST) == {"mlock": "1", "no-mmap": "0"}
    assert "'dio'" in str(_refusal(ModelOptions(load_mode="dio"), flags=OLDEST))


def test_a_typed_option_that_the_build_lacks_names_option_and_binary() -> None:
    """Somebody who reads the error knows which option, in which table, in which binary, and what to do."""
    error = _refusal(ModelOptions(fit=True), flags=OLDEST)
    assert str(error) == f"table 0: fit needs --fit, which {BINARY} does not know"
    assert "Remove fit" in error.hint


def test_a_value_that_the_build_does_not_take_lists_those_it_takes() -> None:
    """A choice that came with later builds is refused with the choices there are."""
    older = FlagSet(
        [HelpOption(("-sm", "--split-mode"), (), "{none,layer,row}", 1, "how to split the model")],
    )
    error = _refusal(ModelOptions(split_mode="tensor"), flags=older)
    assert "split_mode = 'tensor'" in str(error)
    assert error.hint == "It takes none, layer, row."


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["--frobnicate"], "is not an option of", "--help"),
        (["--ctx-sizes", "1"], "is not an option of", "--ctx-size"),
        (["--draft-max", "1"], "is not an option of", "use --spec-draft-n-max"),
        (["--threads=8"], "llama-server wants two", '"--threads", "8"'),
        (["--threads 8"], "llama-server wants two", '"--threads", "8"'),
        (["threads", "8"], "'threads' in args is not an option", "one string per word"),
        (["--jinja", "true"], "'true' in args after --jinja", "one string per word"),
        (["--top-k"], "--top-k in args needs a value", ""),
        (["--top-k", "--jinja"], "--top-k in args needs a value", ""),
        (["--gpt-oss-20b-default"], "downloads one model", "models_dir"),
        (["--control-vector-layer-range", "1", "2"], "two values", ""),
    ],
)
def test_args_that_cannot_work_say_why(args: list[str], message: str, hint: str) -> None:
    """A mistake in args is answered with what is wrong and what to write instead."""
    error = _refusal(args)
    assert message in str(error)
    assert hint in error.hint


@pytest.mark.parametrize("spelling", ["-m", "--model", "-hf", "--hf_repo", "--port", "--models-dir", "--api-key"])
def test_what_would_fight_the_supervisor_is_refused_in_every_spelling(spelling: str) -> None:
    """Reserved options are refused with and without a binary, with the reason and the way out."""
    error = _refusal([spelling, "x"])
    assert f"{spelling} in args is refused: " in str(error)
    assert error.hint
    with pytest.raises(OptionError, match="is refused"):
        check(_layers([spelling, "x"]))


def test_a_spelling_that_only_the_build_knows_is_reserved_with_its_option() -> None:
    """When a build gives a reserved option one more name, that name is refused too."""
    flags = FlagSet([HelpOption(("-m", "--model", "--weights"), (), "FNAME", 1, "model path to load")])
    assert "--weights in args is refused" in str(_refusal(["--weights", "x"], flags=flags))


def test_every_option_that_ends_at_once_or_is_the_routers_own_is_reserved() -> None:
    """No option that the router keeps from its models, or that makes it print and exit, gets through."""
    for option in NEW:
        is_routers_own = re.match(r"(api-key|ssl-|models-|host$|port$|reuse-port)", option.key)
        if is_routers_own or " and exit" in option.help or option.key in ("version", "cache-list", "hf-repo"):
            assert find_reserved(option.spellings), option.spellings


@pytest.mark.parametrize("value", ["a;b", "a#b", "a\nb", "a\rb", " a", "a\t", "", "a\0b", "\udcff"])
def test_values_that_a_preset_cannot_carry_are_refused(value: str) -> None:
    """What the INI dialect would cut, drop or choke on is an error, with and without a binary."""
    assert "--reverse-prompt" in str(_refusal(["--reverse-prompt", value]))
    with pytest.raises(OptionError, match="--reverse-prompt"):
        check(_layers(["--reverse-prompt", value]))
    with pytest.raises(OptionError):
        resolve(_layers(ModelOptions.model_construct(devices=(value,), args=())), NEW, binary=BINARY)


@pytest.mark.parametrize(
    ("args", "way_out"),
    [
        (["--grammar", "root ::= x # any"], "--grammar-file"),
        (["--chat-template", "a\nb"], "--chat-template-file"),
        (["--samplers", "top_k;top_p"], "--sampling-seq"),
        (["--reverse-prompt", ""], "Leave --reverse-prompt out"),
    ],
)
def test_a_value_that_does_not_fit_has_a_way_out(args: list[str], way_out: str) -> None:
    """Where llama-server takes the same in another way, the error names it."""
    assert way_out in _refusal(args).hint


def test_options_of_the_listener_go_onto_the_command_line() -> None:
    """What only the router's own process reads is not written into the preset, and may hold any character."""
    options = _resolved(["--no-ui", "--ui-config", '{"a": "#;"}', "--top-k", "1", "-lv", "4"], ["-lv", "2"])
    assert options.preset == {"top-k": "1"}
    assert options.listener_args == ("--no-webui", "--webui-config", '{"a": "#;"}', "--log-verbosity", "2")


@pytest.mark.parametrize(
    ("table", "devices", "needs_gpu"),
    [
        (ModelOptions(), (), False),
        (ModelOptions(gpu_layers="auto"), (), False),
        (ModelOptions(gpu_layers=0), (), False),
        (ModelOptions(gpu_layers="all"), (), True),
        (ModelOptions(gpu_layers=7), (), True),
        (ModelOptions(gpu_layers="all", devices=("none",)), (), False),
        (ModelOptions(devices=("CUDA0", "CUDA1")), ("CUDA0", "CUDA1"), True),
        (ModelOptions(args=("-ngl", "99")), (), True),
        (ModelOptions(args=("-ngl", "-1")), (), False),
        (ModelOptions(args=("-dev", "Vulkan0,RPC0", "-devd", "Vulkan1")), ("Vulkan0", "Vulkan1"), True),
        (ModelOptions(args=("-dev", "none", "-ngl", "99")), (), False),
    ],
)
def test_it_is_known_which_devices_a_model_waits_for(
    table: ModelOptions, devices: tuple[str, ...], needs_gpu: bool
) -> None:
    """Named devices are waited for, except the CPU and other machines'; layers on a GPU need any one."""
    options = _resolved(table)
    assert (options.required_devices, options.needs_gpu) == (devices, needs_gpu)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"gpu_layers": "12"}, {"gpu_layers": 12}),
        ({"devices": "CUDA0, CUDA1"}, {"devices": ("CUDA0", "CUDA1")}),
        ({"devices": ["cpu"]}, {"devices": ("none",)}),
        ({"flash_attn": True}, {"flash_attn": "on"}),
        ({"sleep_idle_seconds": "5m"}, {"sleep_idle_seconds": 300}),
        ({"sleep_idle_seconds": "1h30m"}, {"sleep_idle_seconds": 5400}),
        ({"ttl": "1h30m"}, {"ttl": 5400}),
        ({"ttl": "90"}, {"ttl": 90}),
        ({"ttl": "0"}, {"ttl": 0.0}),
        ({"args": ["--threads", 8]}, {"args": ("--threads", "8")}),
    ],
)
def test_options_are_taken_in_the_ways_people_write_them(
    written: dict[str, object], expected: dict[str, object]
) -> None:
    """Numbers as text, devices in one string, true for "on", a duration with its unit are understood."""
    assert ModelOptions.model_validate(written) == ModelOptions.model_validate(expected)


@pytest.mark.parametrize(
    "written",
    [
        {"gpu_layers": "most"},
        {"gpu_layers": True},
        {"gpu_layers": -1},
        {"ctx_size": True},
        {"ctx_size": 0.5},
        {"devices": []},
        {"devices": ["none", "CUDA0"]},
        {"tensor_split": [float("nan")]},
        {"sleep_idle_seconds": "soon"},
        {"sleep_idle_seconds": 0},
        {"sleep_idle_seconds": "250ms"},
        {"sleep_idle_seconds": True},
        {"ttl": "soon"},
        {"ttl": "5 parsecs"},
        {"ttl": -1},
        {"ttl": True},
        {"ttl": False},
        {"ttl": float("nan")},
        {"ttl": ["5m"]},
        {"args": "--threads 8"},
        {"ctxsize": 1},
    ],
)
def test_options_out_of_range_are_refused(written: dict[str, object]) -> None:
    """A value that cannot be meant fails with the configuration, not with a model."""
    with pytest.raises(ValidationError):
        ModelOptions.model_validate(written)


@pytest.mark.real
def test_the_router_knows_every_key_that_is_not_refused(llama_server: Path, tmp_path: Path) -> None:
    """A preset with all that args may hold starts the true router, which refuses a single unknown key."""
    flags = probe(llama_server, {}).flags
    words: list[str] = []
    for option in flags:
        if not (find_reserved(option.spellings) or option.removal or option.is_download or option.values > 1):
            words += [option.spelling, *(["1"] if option.values else [])]
    mode_at = words.index("--load-mode")
    words[mode_at + 1] = "none"
    options = resolve(_layers(words), flags, binary=str(llama_server))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "broken.gguf").write_bytes(b"no model")
    with BareRouter(llama_server, tmp_path, tmp_path / "models", preset=for_all(options).render()) as router:
        known = router.models()["broken"]["status"]["preset"]
    assert {line.partition(" = ")[0] for line in known.splitlines()} >= set(options.preset)


@pytest.mark.real
def test_models_of_the_router_run_as_the_tables_say(llama_server: Path, tmp_path: Path, models_dir: Path) -> None:
    """Typed options, args and a later table reach a true model's command line, and it loads with them."""
    defaults = ModelOptions(
        threads=1,
        ctx_size=512,
        parallel=1,
        jinja=False,
        load_mode="mlock",
        flash_attn="off",
        gpu_layers="auto",
    )
    flags = probe(llama_server, {}).flags
    layers = _layers(defaults, ["-c", "256", "--reverse-prompt", "a = b \\ “c” {}"])
    preset: Preset = for_all(resolve(layers, flags, binary=str(llama_server)))
    with BareRouter(llama_server, tmp_path / "router", models_dir, preset=preset.render()) as router:
        router.load("alpha")
        alpha = router.models()["alpha"]
    words = alpha["status"]["args"]
    assert words[words.index("--ctx-size") + 1] == "256"
    assert words[words.index("--reverse-prompt") + 1] == "a = b \\ “c” {}"
    assert "--no-jinja" in words
    assert "--metrics" in words
    assert "stop-timeout = 3" in alpha["status"]["preset"]
    assert alpha["meta"]["n_ctx"] == 256
