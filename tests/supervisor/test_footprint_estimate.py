"""Which source a footprint is taken from, how llama-fit-params is put right, and what follows for options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggufs import STRING, U32, GgufFile, Tensor
from llamavisor import gguf
from llamavisor.footprint import (
    RAM,
    Device,
    FitRow,
    Footprint,
    MemoryOptions,
    Plan,
    Source,
    Weights,
    cache_ram_bytes,
    default_ctx_size,
    estimate,
    fit_target,
    work_out,
)
from llamavisor.footprint.estimate import median_of
from llamavisor.gguf import Header

MIB = 1024 * 1024
GIB = 1024 * MIB
GPU = Device("CUDA0", "0000:01:00.0")


def model(architecture: str = "llama", context_length: int = 131_072, **values: int) -> Header:
    """A model of 32 layers with 128 KiB of cache a token, of 10 MiB."""
    numbers = {
        "block_count": 32,
        "embedding_length": 4096,
        "feed_forward_length": 14_336,
        "context_length": context_length,
        "vocab_size": 128_000,
        "attention.head_count": 32,
        "attention.head_count_kv": 8,
    }
    said = numbers | {key.replace("__", "."): value for key, value in values.items()}
    file = GgufFile(
        values=[
            ("general.architecture", (STRING, architecture)),
            *((f"{architecture}.{key}", (U32, number)) for key, number in said.items()),
        ],
        tensors=[Tensor("token_embd.weight", (MIB,), 0, 4 * MIB), Tensor("output.weight", (MIB,), 0, 4 * MIB)],
    )
    data = file.encode()
    return gguf.parse(lambda offset, length: data[offset : offset + length], len(data))


HEADER = model()
WEIGHTS = Weights(header=HEADER, size_bytes=HEADER.file_bytes)
PLAN = Plan(options=MemoryOptions(), n_ctx=8192)
HOST = FitRow(None, 8 * MIB, GIB, 200 * MIB)


def expect(weights: Weights = WEIGHTS, plan: Plan = PLAN, **sources: object) -> Footprint:
    """A footprint that is known."""
    found = estimate(weights, plan, **sources)
    assert found is not None
    return found


def test_measured_beats_fit_params_beats_the_formula() -> None:
    """The best source that there is counts, and says so."""
    formula = expect()
    by_tool = expect(fit=(replace(HOST, context=2 * GIB),))
    measured = expect(fit=(HOST,), measured=[{RAM: 7 * GIB}])
    assert [each.source for each in (formula, by_tool, measured)] == [
        Source.FORMULA,
        Source.FIT_PARAMS,
        Source.MEASURED,
    ]
    assert by_tool.bytes[RAM] - formula.bytes[RAM] == pytest.approx(GIB, abs=20 * MIB)
    assert measured.bytes == {RAM: 7 * GIB}
    assert measured.parts[RAM]["context"] == GIB


def test_nothing_known_is_none() -> None:
    """Unknown is never nothing; what was measured needs no header."""
    bare = replace(WEIGHTS, header=model(block_count=0))
    assert estimate(bare, PLAN) is None
    assert expect(bare, measured=[{RAM: 5}]).bytes == {RAM: 5}
    assert expect(bare, fit=(HOST,)).source is Source.FIT_PARAMS


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([{RAM: 1}], {RAM: 1}),
        ([{RAM: 1}, {RAM: 4}], {RAM: 2}),
        ([{RAM: 100}, {RAM: 1}, {RAM: 4}, {RAM: 2}], {RAM: 2}),
        ([{RAM: 1, "a": 5}, {RAM: 1, "a": 7}, {RAM: 1}], {RAM: 1, "a": 5}),
    ],
)
def test_the_median_of_the_last_three_counts(measured: list[Mapping[str, int]], expected: Mapping[str, int]) -> None:
    """One odd measurement changes little, an old one nothing."""
    assert median_of(measured) == expected


def test_outputs_of_a_whole_batch_are_taken_off() -> None:
    """The tool reserves outputs for 512 tokens where the server has four; an unexplained number stays as it is."""
    batch_of_outputs = 512 * 128_000 * 4
    told = FitRow(None, 8 * MIB, GIB, batch_of_outputs + 60 * MIB)
    expected = expect(fit=(told,)).parts[RAM]["compute"]
    assert expected == expect().parts[RAM]["compute"] < told.compute / 2
    larger = replace(told, compute=3 * GIB)
    assert expect(fit=(larger,)).parts[RAM]["compute"] == 3 * GIB
    embedding = replace(PLAN, options=MemoryOptions(is_embedding=True))
    assert expect(plan=embedding, fit=(told,)).parts[RAM]["compute"] == told.compute


def test_windows_and_states_of_all_slots_are_added() -> None:
    """The tool speaks of one slot when slots share a cache."""
    header = model("gemma3", attention__sliding_window=1024)
    weights = replace(WEIGHTS, header=header)
    alone = replace(PLAN, options=MemoryOptions(parallel=1), n_ctx=32_768)
    one = work_out(weights, alone)
    assert one is not None
    told = FitRow(None, 8 * MIB, one.of[RAM]["context"], 200 * MIB)
    four = replace(alone, options=MemoryOptions())
    assert expect(weights, four, fit=(told,)).parts[RAM]["context"] == expect(weights, four).parts[RAM]["context"]
    assert expect(weights, alone, fit=(told,)).parts[RAM]["context"] == told.context


def test_weights_that_the_tool_counts_nowhere_are_added() -> None:
    """What the CPU stores anew is missing in its answer: it is there once, and twice while the file is mapped."""
    weights = replace(WEIGHTS, size_bytes=GIB)
    told = replace(HOST, weights=100 * MIB)
    parts = expect(weights, fit=(told,)).parts[RAM]
    assert parts["weights"] == pytest.approx(GIB, abs=MIB)
    assert parts["copies"] == pytest.approx(GIB - 100 * MIB, abs=MIB)
    read = replace(PLAN, options=MemoryOptions(load_mode="none"))
    assert expect(weights, read, fit=(told,)).parts[RAM]["copies"] == 0
    on_gpu = replace(PLAN, devices=(GPU,))
    gpu = FitRow("CUDA0", GIB - 100 * MIB, GIB, 200 * MIB)
    split = expect(weights, on_gpu, fit=(gpu, told)).parts
    assert split[RAM]["weights"] == 100 * MIB
    assert split[GPU.id]["weights"] == gpu.weights
    assert "copies" not in split[RAM]


def test_devices_are_the_physical_ones() -> None:
    """The tool's names are the router's; a device that nobody knows makes the answer useless."""
    plan = replace(PLAN, devices=(Device("CUDA0", "GPU-b"), Device("CUDA1", "GPU-a")))
    rows = (FitRow("CUDA0", 3 * MIB, 0, 0), FitRow("CUDA1", 5 * MIB, 0, 0), HOST)
    found = expect(plan=plan, fit=rows)
    assert (found.parts["GPU-b"]["weights"], found.parts["GPU-a"]["weights"]) == (3 * MIB, 5 * MIB)
    assert expect(plan=plan, fit=(FitRow("Vulkan0", 3 * MIB, 0, 0), HOST)).source is Source.FORMULA


def test_memory_that_a_gpu_shares_is_counted_once() -> None:
    """On a machine whose GPU has no memory of its own everything is RAM."""
    plan = replace(PLAN, devices=(Device("CUDA0", RAM),))
    found = expect(plan=plan, fit=(FitRow("CUDA0", 4 * MIB, GIB, 0), replace(HOST, context=0)))
    assert set(found.bytes) == {RAM}
    assert found.parts[RAM]["context"] == GIB
    assert set(expect(plan=plan).bytes) == {RAM}


def test_a_draft_is_counted_by_the_tool_or_by_the_formula() -> None:
    """The better of both is used for each."""
    plan = replace(PLAN, options=MemoryOptions(draft="/d"))
    weights = replace(WEIGHTS, draft=HEADER, draft_bytes=HEADER.file_bytes)
    by_formula = expect(weights, plan, fit=(HOST,)).parts[RAM]["draft"]
    by_tool = expect(weights, plan, fit=(HOST,), draft_fit=(replace(HOST, context=3 * GIB),)).parts[RAM]["draft"]
    assert by_formula > GIB
    assert by_tool - by_formula == pytest.approx(2 * GIB, abs=20 * MIB)


def test_what_it_grows_by_is_told_besides() -> None:
    """The prompt cache and checkpoints are not in the bytes; without a bound they are unknown."""
    small = expect(plan=replace(PLAN, options=MemoryOptions(cache_ram_bytes=0)))
    large = expect()
    assert small.bytes == large.bytes
    assert (small.growth_bytes, large.growth_bytes) == (0, 8 * GIB)
    assert expect(plan=replace(PLAN, options=MemoryOptions(cache_ram_bytes=-1))).growth_bytes is None


# --- what follows for options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "trained", "expected"),
    [
        (1 * GIB, 131_072, 4096),  # not even that is within a quarter: the least
        (4 * GIB, 131_072, 4096),  # 0.5 GiB of cache and 0.3 GiB of compute buffers
        (8 * GIB, 131_072, 8192),
        (24 * GIB, 131_072, 32_768),
        (1000 * GIB, 131_072, 131_072),
        (1000 * GIB, 40_960, 32_768),
        (1000 * GIB, 2048, 2048),
    ],
)
def test_an_unset_context_follows_the_budget(budget: int, trained: int, expected: int) -> None:
    """It doubles from 4096 while it fits, and never goes beyond what a model was trained for."""
    header = model(context_length=trained)
    weights = Weights(header=header, size_bytes=header.file_bytes)
    assert default_ctx_size(weights, PLAN, budget) == expected


def test_an_unset_context_leaves_room_for_the_weights() -> None:
    """Weights that nearly fill the budget leave no more than the least."""
    assert default_ctx_size(replace(WEIGHTS, size_bytes=23 * GIB), PLAN, 24 * GIB) == 4096
    on_gpu = replace(PLAN, devices=(GPU,))
    assert default_ctx_size(WEIGHTS, on_gpu, 24 * GIB) == 32_768


def test_slots_of_their_own_share_an_unset_context() -> None:
    """Each slot may then have what a model was trained for."""
    header = model(context_length=8192)
    plan = replace(PLAN, options=MemoryOptions(parallel=4))
    assert default_ctx_size(replace(WEIGHTS, header=header), plan, 1000 * GIB) == 32_768


def test_a_model_of_unknown_layout_gets_the_least_context() -> None:
    """Nothing is guessed."""
    assert default_ctx_size(replace(WEIGHTS, header=model(block_count=0)), PLAN, 1000 * GIB) == 4096


def test_a_header_may_say_anything() -> None:
    """Neither four billion layers nor a context of as many tokens is believed; no time is lost with them."""
    assert default_ctx_size(replace(WEIGHTS, header=model(block_count=2**32 - 1)), PLAN, 1000 * GIB) == 4096
    keeps_nothing = model("bert", context_length=2**32 - 1)
    assert default_ctx_size(replace(WEIGHTS, header=keeps_nothing), PLAN, 10**30) == 2**30


@given(st.integers(0, 10**14), st.integers(1, 10**6))
def test_an_unset_context_is_never_beyond_its_bounds(budget: int, trained: int) -> None:
    """At least 4096 or what was trained, at most what was trained, and more budget is never less context."""
    header = replace(HEADER, context_length=trained)
    weights = replace(WEIGHTS, header=header)
    chosen = default_ctx_size(weights, PLAN, budget)
    assert min(4096, trained) <= chosen <= trained
    assert chosen <= default_ctx_size(weights, PLAN, budget * 2)


@pytest.mark.parametrize(
    ("ram", "models", "expected"),
    [
        (64 * GIB, 4, 1638 * MIB),
        (256 * GIB, 4, 2 * GIB),
        (8 * GIB, None, 204 * MIB),
        (8 * GIB, 0, 204 * MIB),
        (5 * MIB, 1, 0),
        (-1, 1, 0),
    ],
)
def test_prompt_caches_share_a_tenth_of_ram(ram: int, models: int | None, expected: int) -> None:
    """Whole MiB, at most 2 GiB for one."""
    assert cache_ram_bytes(ram, models) == expected


def test_the_fit_leaves_what_is_beyond_the_budget() -> None:
    """The margin is the total less the budget, rounded up to MiB, with a least."""
    assert fit_target([(24 * GIB, 22 * GIB), (8 * GIB, 8 * GIB), (8 * GIB, 7 * GIB - 1)]) == "2048,256,1025"
    assert fit_target([]) is None
