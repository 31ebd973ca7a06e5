"""What a model is told because of the memory budget: a context, a bound for its prompt cache, a margin for fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from builds import NEW, OLD, OLDEST
from ggufs import STRING, U32, GgufFile, Tensor
from llamavisor import automatic, gguf
from llamavisor.budgets import Allowance, GpuAllowance
from llamavisor.catalog import Entry, EntryState, FileId, ModelFile
from llamavisor.flags import resolve
from llamavisor.footprint import RAM
from llamavisor.gguf import Header, Kind
from llamavisor.helptext import FlagSet
from llamavisor.preset import for_router, lint
from llamavisor.rules import ModelRule, ModelSettings
from llamavisor.sections import ModelSpec, for_memory, layers_in_force, section, specify

MIB = 1024**2
GIB = 1024**3
ON_CPU = Allowance(24 * GIB, (), 4)
ONE_GPU = Allowance(24 * GIB, (GpuAllowance("CUDA0", "0000:01:00.0", 24 * GIB, 22 * GIB),), 4)
TWO_GPUS = Allowance(
    24 * GIB,
    (
        GpuAllowance("CUDA0", "0000:01:00.0", 24 * GIB, 22 * GIB),
        GpuAllowance("CUDA1", "0000:02:00.0", 80 * GIB, 70 * GIB),
    ),
    0,
)


def model(**changes: int) -> Header:
    """A model of 32 layers with 128 KiB of cache a token, trained for 131,072 of them; 8 MiB."""
    numbers = {
        "block_count": 32,
        "embedding_length": 4096,
        "feed_forward_length": 14_336,
        "context_length": 131_072,
        "vocab_size": 128_000,
        "attention.head_count": 32,
        "attention.head_count_kv": 8,
        **{name.replace("__", "."): number for name, number in changes.items()},
    }
    data = GgufFile(
        values=[
            ("general.architecture", (STRING, "llama")),
            *((f"llama.{key}", (U32, number)) for key, number in numbers.items()),
        ],
        tensors=[Tensor("token_embd.weight", (MIB,), 0, 4 * MIB), Tensor("output.weight", (MIB,), 0, 4 * MIB)],
    ).encode()
    return gguf.parse(lambda offset, length: data[offset : offset + length], len(data))


HEADER = model()


def entry(
    name: str = "alpha", *, header: Header | None = HEADER, size: int = 8 * MIB, projector: int | None = None
) -> Entry:
    """A model of two files, and a projector of so many bytes."""
    files = tuple(ModelFile(f"/m/{name}-{part}.gguf", FileId(1, part, size // 2, 0)) for part in (1, 2))
    beside = None if projector is None else ModelFile("/m/mmproj.gguf", FileId(1, 3, projector, 0))
    return Entry(name=name, state=EntryState.READY, files=files, header=header, projector=beside)


def spec(
    allowance: Allowance | None, *tables: Mapping[str, object], of: Entry | None = None, base: Sequence[str] = ()
) -> ModelSpec:
    """The model with these tables of its own, and with args of its router."""
    rules = tuple(ModelRule.of("*", ModelSettings.model_validate(table)) for table in tables)
    layers = (automatic.OptionLayer("[defaults]", automatic.ModelOptions(args=tuple(base))),) if base else ()
    found = specify(of or entry(), rules, router="main", base=layers, allowance=allowance)
    assert found is not None
    return found


def told(what: ModelSpec, flags: FlagSet = NEW) -> dict[str, str]:
    """Its section but for its file, which any router takes."""
    entries = dict(section(what, flags, binary="llama-server"))
    lint(for_router({what.name: entries}), None if flags is OLDEST else flags)
    return {key: value for key, value in entries.items() if key != "model"}


def test_without_budgets_nothing_is_said() -> None:
    """Before anybody knows what there is, a model is told what its tables say."""
    assert told(spec(None)) == {}
    assert for_memory(spec(None)) is None


@pytest.mark.parametrize(
    ("allowance", "expected"),
    [
        (ON_CPU, {"ctx-size": "32768", "cache-ram": "614"}),
        (ONE_GPU, {"ctx-size": "32768", "cache-ram": "614", "fit-target": "2048"}),
        (TWO_GPUS, {"ctx-size": "131072", "cache-ram": "614", "fit-target": "2048,10240"}),
        (Allowance(1 * GIB, (), 1), {"ctx-size": "4096", "cache-ram": "102"}),
        (Allowance(0, (), 1), {"ctx-size": "4096", "cache-ram": "0"}),
        (Allowance(None), {"ctx-size": "4096"}),
        (
            replace(ONE_GPU, gpus=(GpuAllowance("CUDA0", RAM, 24 * GIB, 20 * GIB),)),
            {"ctx-size": "32768", "cache-ram": "614", "fit-target": "4096"},
        ),
        (
            replace(ONE_GPU, gpus=(*ONE_GPU.gpus, GpuAllowance("CUDA1", "CUDA1@llama-server", None, None))),
            {"ctx-size": "4096", "cache-ram": "614"},
        ),
    ],
    ids=["cpu", "gpu", "two-gpus", "small", "nothing", "unknown", "gpu-without-memory", "unknown-gpu"],
)
def test_what_nobody_said_follows_from_the_budget(allowance: Allowance, expected: dict[str, str]) -> None:
    """A context within the budget of what the model is put on, a bound for its prompt cache, a margin for each GPU."""
    assert told(spec(allowance)) == expected


def test_its_table_reads_well_and_is_the_lowest() -> None:
    """`show` and `config show` tell that nobody has written it; whatever anybody writes wins."""
    what = spec(ONE_GPU, {"threads": 2}, base=["--temp", "1"])
    assert [layer.source for layer in layers_in_force(what)] == [
        "automatic (fits the memory budget)",
        "[defaults]",
        '[model."*"]',
    ]


@pytest.mark.parametrize(
    ("table", "base", "expected"),
    [
        ({"ctx_size": 0}, [], {"ctx-size": "0", "cache-ram": "614", "fit-target": "2048"}),
        ({"args": ["-c", "77"]}, [], {"ctx-size": "77", "cache-ram": "614", "fit-target": "2048"}),
        ({}, ["-c", "77"], {"ctx-size": "77", "cache-ram": "614", "fit-target": "2048"}),
        (
            {"args": ["--kv-unified-per-slot", "1000"]},
            [],
            {"kv-unified-per-slot": "1000", "cache-ram": "614", "fit-target": "2048"},
        ),
        ({"args": ["-cram", "-1"]}, [], {"ctx-size": "32768", "cache-ram": "-1", "fit-target": "2048"}),
        ({"args": ["-fitt", "9"]}, [], {"ctx-size": "32768", "cache-ram": "614", "fit-target": "9"}),
        ({"fit": False}, [], {"ctx-size": "32768", "cache-ram": "614", "fit": "off"}),
        ({}, ["--fit", "off"], {"ctx-size": "32768", "cache-ram": "614", "fit": "off"}),
        ({"fit": True}, ["--fit", "off"], {"ctx-size": "32768", "cache-ram": "614", "fit": "on", "fit-target": "2048"}),
        ({"gpu_layers": 0}, [], {"ctx-size": "32768", "cache-ram": "614", "n-gpu-layers": "0"}),
        ({"devices": ["none"]}, [], {"ctx-size": "32768", "cache-ram": "614", "device": "none"}),
    ],
)
def test_what_somebody_said_stays(table: dict[str, object], base: list[str], expected: dict[str, str]) -> None:
    """In whatever words and in whichever table; a model that is on no GPU has no margin to keep there."""
    assert told(spec(ONE_GPU, table, base=base)) == expected


def test_options_of_a_model_change_what_it_gets() -> None:
    """A smaller cache leaves room for more context; GPUs count in the order and the number that the model uses."""
    assert told(spec(ON_CPU, {"cache_type_k": "q8_0", "cache_type_v": "q8_0"}))["ctx-size"] == "65536"
    assert told(spec(TWO_GPUS, {"devices": ["CUDA1", "CUDA0"]}))["fit-target"] == "10240,2048"
    assert told(spec(TWO_GPUS, {"devices": ["CUDA1"]}))["fit-target"] == "10240"
    assert told(spec(TWO_GPUS, {"split_mode": "none"}))["fit-target"] == "2048"
    assert told(spec(ON_CPU, of=entry(size=23 * GIB)))["ctx-size"] == "4096"
    assert told(spec(ON_CPU, of=entry(size=10 * GIB, projector=13 * GIB)))["ctx-size"] == "4096"
    assert told(spec(ON_CPU, of=entry(header=model(context_length=2048))))["ctx-size"] == "2048"


@pytest.mark.parametrize("header", [None, model(block_count=0)])
def test_a_model_of_unknown_layout_gets_the_least(header: Header | None) -> None:
    """Nothing is guessed, and it is never simply what the model was trained for."""
    assert told(spec(ON_CPU, of=entry(header=header)))["ctx-size"] == "4096"


@pytest.mark.parametrize("kind", [Kind.EMBEDDING, Kind.RERANK])
def test_embedding_models_keep_their_context(kind: Kind) -> None:
    """It is as large as their batch; when they are to generate after all, it is chosen as for others."""
    of = entry(header=replace(HEADER, kind=kind))
    assert told(spec(ON_CPU, of=of))["ctx-size"] == "8192"
    name = "embeddings" if kind is Kind.EMBEDDING else "reranking"
    assert told(spec(ON_CPU, {name: False}, of=of))["ctx-size"] == "32768"


def test_a_build_is_told_what_it_knows() -> None:
    """What it has no option for is left out; a table that shows all is for people, who may have any build."""
    assert told(spec(ONE_GPU), OLD).keys() == {"ctx-size", "cache-ram", "fit-target"}
    lacking = FlagSet([option for option in NEW if option.key not in ("cache-ram", "fit-target")])
    assert told(spec(ONE_GPU), lacking) == {"ctx-size": "32768"}
    (alone,) = layers_in_force(spec(ONE_GPU), lacking)
    assert resolve((alone,), lacking, binary="").preset == {"ctx-size": "32768"}
    shown = for_memory(spec(ONE_GPU))
    assert shown is not None
    assert shown.options.args == ("--cache-ram", "614", "--fit-target", "2048")


def test_another_budget_is_another_model() -> None:
    """It is loaded anew when it is idle; a header that was read again is none."""
    assert spec(ON_CPU) != spec(ONE_GPU)
    assert spec(ON_CPU) == spec(replace(ON_CPU), of=entry(header=model()))
    assert hash(spec(ON_CPU)) == hash(spec(replace(ON_CPU)))
