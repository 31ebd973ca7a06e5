"""The formula over a header: hand-computed numbers of known models, and what holds for every header."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggufs import ARRAY, I32, STRING, U32, GgufFile, Tensor, Typed
from llamavisor import gguf
from llamavisor.footprint import RAM, Device, MemoryOptions, Plan, Weights, context_size, slot_context, work_out
from llamavisor.footprint.formula import (
    DEVICE_CONTEXT_BYTES,
    cells,
    checkpoint_bytes,
    compute_bytes,
    copied_bytes,
    outputs,
    place_layers,
    repacked_types,
    row_bytes,
    window_cells,
)
from llamavisor.footprint.layers import find_layers
from llamavisor.gguf import Header

MIB = 1024 * 1024
ONE = MemoryOptions(parallel=1)
GPUS = (Device("CUDA0", "0000:01:00.0", 24_000), Device("CUDA1", "0000:02:00.0", 8_000))


def header(architecture: str, *tensors: Tensor, **values: int | list[int]) -> Header:
    """A header of these values; in their names two underscores stand for a dot."""
    said: list[tuple[str | bytes, Typed]] = [("general.architecture", (STRING, architecture))]
    for name, value in values.items():
        typed = (U32, value) if isinstance(value, int) else (ARRAY, (I32, value))
        said.append((f"{architecture}.{name.replace('__', '.')}", typed))
    data = GgufFile(values=said, tensors=tensors or (Tensor("output_norm.weight"),)).encode()
    return gguf.parse(lambda offset, length: data[offset : offset + length], len(data))


def attention(
    architecture: str, layers: int, heads_kv: int | list[int], head: int, width: int = 4096, **more: int | list[int]
) -> Header:
    """A header of a model with attention."""
    return header(
        architecture,
        block_count=layers,
        embedding_length=width,
        context_length=131_072,
        attention__head_count=32,
        attention__head_count_kv=heads_kv,
        attention__key_length=head,
        attention__value_length=head,
        **more,
    )


def context(model: Header, n_ctx: int, options: MemoryOptions = ONE) -> int:
    """Bytes of caches and states."""
    parts = work_out(Weights(header=model, size_bytes=0), Plan(options=options, n_ctx=n_ctx))
    assert parts is not None
    return parts.of[RAM]["context"]


LLAMA_8B = attention("llama", 32, 8, 128)
GEMMA_27B = attention("gemma3", 62, 16, 128, 5376, attention__sliding_window=1024)
DEEPSEEK_V3 = attention("deepseek2", 61, 1, 576, 7168, attention__key_length_mla=192, attention__value_length_mla=128)
MAMBA = header(
    "mamba",
    block_count=64,
    embedding_length=2560,
    attention__head_count=0,
    ssm__conv_kernel=4,
    ssm__inner_size=5120,
    ssm__state_size=16,
)
RWKV6 = header("rwkv6", block_count=32, embedding_length=4096, attention__head_count=0, wkv__head_size=64)
QWEN3_NEXT = attention(
    "qwen3next",
    48,
    2,
    256,
    2048,
    ssm__conv_kernel=4,
    ssm__inner_size=4096,
    ssm__state_size=128,
    ssm__group_count=16,
)
GPT_OSS = attention("gpt-oss", 24, 8, 64, 2880, attention__sliding_window=128)
JAMBA = attention("jamba", 4, [0, 8, 0, 8], 128, ssm__conv_kernel=4, ssm__inner_size=8192, ssm__state_size=16)
LFM2 = attention("lfm2", 4, [0, 8, 0, 8], 64, 2048, shortconv__l_cache=3)
Q8 = MemoryOptions(parallel=1, cache_type_k="q8_0", cache_type_v="q4_0")


@pytest.mark.parametrize(
    ("model", "n_ctx", "options", "expected"),
    [
        pytest.param(LLAMA_8B, 8192, ONE, 1024 * MIB, id="grouped heads: 32 layers of 8 x 128, twice, in f16"),
        pytest.param(LLAMA_8B, 8192, Q8, 8192 * 32 * (1024 // 32) * (34 + 18), id="q8_0 keys, q4_0 values"),
        pytest.param(LLAMA_8B, 8000, ONE, 8192 * 131_072, id="padded to 256"),
        pytest.param(LLAMA_8B, 8192, MemoryOptions(), 1024 * MIB, id="four slots share one cache"),
        pytest.param(LLAMA_8B, 9000, MemoryOptions(parallel=4), 4 * 2304 * 131_072, id="four caches, each padded"),
        pytest.param(LLAMA_8B, 9000, MemoryOptions(parallel=4, kv_unified=True), 9216 * 131_072, id="shared by will"),
        pytest.param(
            attention("deci", 4, [8, 0, 2, 8], 128), 1024, ONE, 1024 * 18 * 128 * 2 * 2, id="heads vary by layer"
        ),
        pytest.param(GEMMA_27B, 32_768, ONE, 8192 * (10 * 32_768 + 52 * 1536), id="five of six layers have windows"),
        pytest.param(
            GEMMA_27B, 32_768, MemoryOptions(), 8192 * (10 * 32_768 + 52 * 4608), id="the windows of four slots"
        ),
        pytest.param(
            GEMMA_27B, 32_768, replace(ONE, swa_full=True), 8192 * 62 * 32_768, id="windows that keep everything"
        ),
        pytest.param(GEMMA_27B, 1024, ONE, 8192 * 62 * 1024, id="no window is larger than the context"),
        pytest.param(GPT_OSS, 8192, MemoryOptions(), 2048 * 12 * (8192 + 1024), id="every other layer has a window"),
        pytest.param(
            attention("phi3", 2, 8, 128, attention__sliding_window=512), 8192, ONE, 8192 * 2 * 4096, id="windows off"
        ),
        pytest.param(
            attention(
                "gemma4",
                4,
                8,
                128,
                attention__sliding_window=512,
                attention__key_length_swa=64,
                attention__value_length_swa=64,
                attention__sliding_window_pattern=[1, 0, 1, 0],
                attention__shared_kv_layers=2,
            ),
            8192,
            ONE,
            8192 * 4096 + 1024 * 2048,
            id="smaller heads in windows, and layers that share",
        ),
        pytest.param(DEEPSEEK_V3, 4096, ONE, 4096 * 61 * 576 * 2, id="latent attention keeps one row"),
        pytest.param(MAMBA, 100_000, ONE, 64 * 4 * (3 * 5120 + 16 * 5120), id="states do not grow"),
        pytest.param(MAMBA, 1, MemoryOptions(), 4 * 64 * 4 * (3 * 5120 + 16 * 5120), id="a state for each slot"),
        pytest.param(RWKV6, 4096, ONE, 32 * 4 * (2 * 4096 + 4096 * 64), id="rwkv"),
        pytest.param(
            QWEN3_NEXT, 4096, ONE, 4096 * 12 * 2048 + 36 * 4 * (3 * 8192 + 128 * 4096), id="attention in one of four"
        ),
        pytest.param(
            JAMBA, 4096, ONE, 4096 * 2 * 4096 + 2 * 4 * (3 * 8192 + 16 * 8192), id="recurrent where no heads are"
        ),
        pytest.param(LFM2, 4096, ONE, 4096 * 2 * 2048 + 2 * 4 * 2 * 2048, id="short convolutions"),
        pytest.param(attention("bert", 12, 12, 64), 512, ONE, 0, id="encoders keep nothing"),
        pytest.param(
            attention("glm4moe", 3, 8, 128, nextn_predict_layers=1),
            1024,
            ONE,
            1024 * 2 * 4096,
            id="not the drafting ones",
        ),
    ],
)
def test_context_of_known_models(model: Header, n_ctx: int, options: MemoryOptions, expected: int) -> None:
    """Caches and states are what they come to by hand."""
    assert context(model, n_ctx, options) == expected


def test_values_without_flash_attention_are_padded() -> None:
    """Values that vary by layer all take the room of the largest when they are stored the other way round."""
    model = attention("deci", 2, [8, 2], 128)
    assert context(model, 1024) == 1024 * 2 * 128 * (8 + 8 + 2 + 2)
    assert context(model, 1024, replace(ONE, flash_attn="off")) == 1024 * 2 * 128 * (8 + 8 + 2 + 8)


@pytest.mark.parametrize(
    ("width", "forward", "heads", "n_ctx", "options", "real_mib"),
    [
        (2048, 8192, 16, 4096, MemoryOptions(), 72.02),
        (1024, 2048, 16, 16_384, MemoryOptions(), 38.02),
        (1024, 2048, 16, 16_384, MemoryOptions(parallel=2), 30.10),
        (2048, 8192, 16, 8192, MemoryOptions(flash_attn="off"), 298.01),
        (4096, 1024, 8, 8192, MemoryOptions(), 48.02),
    ],
)
def test_compute_is_near_what_llama_cpp_reserves(
    width: int, forward: int, heads: int, n_ctx: int, options: MemoryOptions, real_mib: float
) -> None:
    """The estimate is within an eighth of what llama-server b11434 logged, and hardly below it."""
    model = header(
        "llama",
        block_count=4,
        embedding_length=width,
        feed_forward_length=forward,
        vocab_size=32_000,
        attention__head_count=heads,
        attention__head_count_kv=4,
        attention__key_length=128,
        attention__value_length=128,
    )
    layers = find_layers(model)
    assert layers is not None
    estimate = compute_bytes(model, layers, options, n_ctx, outputs(options, n_ctx)) / MIB
    assert real_mib * 0.99 <= estimate <= real_mib * 1.15


def test_outputs_follow_slots_drafts_and_embeddings() -> None:
    """A slot has one output, one more for each drafted token; an embedding needs those of a whole batch."""
    assert outputs(MemoryOptions(), 4096) == 4
    assert outputs(MemoryOptions(parallel=2, draft="/d.gguf", draft_max=7), 4096) == 16
    assert outputs(MemoryOptions(is_embedding=True), 4096) == 512
    assert outputs(MemoryOptions(parallel=64, batch_size=32), 4096) == 32


def test_rows_of_unknown_types_are_those_of_f16() -> None:
    """A type that is newer than this program is taken for the default; quantized rows are whole blocks."""
    assert row_bytes("tq9", 100) == 200
    assert row_bytes("q8_0", 33) == 68
    assert row_bytes("f32", 10) == 40


def model_of_layers(*, experts: bool = False, output: bool = True) -> Header:
    """A model of four layers of 1 KiB each, its input 2 KiB and its output 3."""
    tensors = [Tensor("token_embd.weight", (512,), 0, 2048)]
    tensors += [Tensor("output.weight", (768,), 0, 3072)] if output else []
    for layer in range(4):
        tensors.append(Tensor(f"blk.{layer}.attn_q.weight", (64,), 0, 256))
        name = f"blk.{layer}.ffn_up_exps.weight" if experts else f"blk.{layer}.ffn_up.weight"
        tensors.append(Tensor(name, (192,), 0, 768))
    return header("llama", *tensors, block_count=4, embedding_length=64, attention__head_count=1)


def weights_of(model: Header, options: MemoryOptions, devices: tuple[Device, ...] = GPUS) -> dict[str, int]:
    """Bytes of weights by device."""
    parts = work_out(
        Weights(header=model, size_bytes=model.file_bytes), Plan(options=options, n_ctx=256, devices=devices)
    )
    assert parts is not None
    return {device: each["weights"] for device, each in parts.of.items() if each["weights"]}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (MemoryOptions(gpu_layers=0), {RAM: 9216}),
        (MemoryOptions(devices=()), {RAM: 9216}),
        (MemoryOptions(devices=("cuda1",)), {RAM: 2048, GPUS[1].id: 7168}),
        (MemoryOptions(split_mode="none", main_gpu=1), {RAM: 2048, GPUS[1].id: 7168}),
        (MemoryOptions(), {RAM: 2048, GPUS[0].id: 4096, GPUS[1].id: 3072}),  # 0.75 of five: four, and the output
        (MemoryOptions(tensor_split=(1.0, 4.0)), {RAM: 2048, GPUS[0].id: 1024, GPUS[1].id: 6144}),
        (MemoryOptions(devices=("CUDA0",), gpu_layers=2), {RAM: 5120, GPUS[0].id: 4096}),
    ],
)
def test_layers_go_where_llama_cpp_puts_them(options: MemoryOptions, expected: dict[str, int]) -> None:
    """The input stays in RAM, the last layers and the output go to GPUs, split by what is free or as it is said."""
    assert weights_of(model_of_layers(), options) == expected


def test_experts_may_stay_in_ram() -> None:
    """Experts of the first layers are kept from the GPU; without a GPU nothing changes."""
    model = model_of_layers(experts=True)
    options = MemoryOptions(devices=("CUDA0",), cpu_moe_layers=3)
    assert weights_of(model, options) == {RAM: 2048 + 3 * 768, GPUS[0].id: 7168 - 3 * 768}
    assert weights_of(model, options, ()) == {RAM: 9216}


def test_an_output_that_is_the_input_is_there_twice_with_a_gpu() -> None:
    """Without an output of its own a model's input is copied to the GPU and stays in RAM."""
    model = model_of_layers(output=False)
    assert weights_of(model, MemoryOptions(), GPUS[:1]) == {RAM: 2048, GPUS[0].id: 4096 + 2048}
    assert weights_of(model, MemoryOptions(), ()) == {RAM: 6144}


def test_layers_of_other_parts_get_equal_shares() -> None:
    """Of a split model only the first file's layers are known; what is left is spread over the others."""
    data = GgufFile(
        values=[
            ("general.architecture", (STRING, "llama")),
            ("llama.block_count", (U32, 4)),
            ("llama.embedding_length", (U32, 64)),
            ("split.no", (2, 0)),
            ("split.count", (2, 2)),
        ],
        tensors=[Tensor("token_embd.weight", (512,), 0, 2048), Tensor("blk.0.attn_q.weight", (256,), 0, 1024)],
    ).encode()
    model = gguf.parse(lambda offset, length: data[offset : offset + length], len(data))
    weights = Weights(header=model, size_bytes=model.file_bytes + 3 * 5000)
    parts = work_out(weights, Plan(options=MemoryOptions(gpu_layers=3), n_ctx=256, devices=GPUS[:1]))
    assert parts is not None
    assert parts.of[GPUS[0].id]["weights"] == 2 * 5000  # two layers; the third "layer" on the GPU is the output
    assert parts.of[RAM]["weights"] == 2048 + 1024 + 5000


def test_the_cache_follows_its_layer_unless_it_is_kept() -> None:
    """Each layer's cache lies with the layer, or all of it in RAM."""
    model = attention("llama", 4, 8, 128)
    with_gpu = Plan(options=replace(ONE, gpu_layers=3), n_ctx=1024, devices=GPUS[:1])
    parts = work_out(Weights(header=model, size_bytes=0), with_gpu)
    assert parts is not None
    assert (parts.of[RAM]["context"], parts.of[GPUS[0].id]["context"]) == (2 * 1024 * 4096, 2 * 1024 * 4096)
    kept = work_out(
        Weights(header=model, size_bytes=0), replace(with_gpu, options=replace(with_gpu.options, kv_offload=False))
    )
    assert kept is not None
    assert (kept.of[RAM]["context"], kept.of[GPUS[0].id]["context"]) == (4 * 1024 * 4096, 0)
    assert kept.of[GPUS[0].id]["process"] == DEVICE_CONTEXT_BYTES


def test_layers_of_which_nothing_was_read_get_equal_shares() -> None:
    """Of a model that is still elsewhere only the beginning is known: its weights lie where its layers go."""
    values: list[tuple[str | bytes, Typed]] = [
        ("general.architecture", (STRING, "llama")),
        ("llama.block_count", (U32, 4)),
        ("llama.embedding_length", (U32, 64)),
    ]
    data = GgufFile(values=values, tensors=[Tensor("blk.0.attn_q.weight")]).encode()
    weights = Weights(header=gguf.parse_beginning(data, len(data)), size_bytes=4000)
    parts = work_out(weights, Plan(options=MemoryOptions(gpu_layers=2), n_ctx=256, devices=GPUS[:1]))
    assert parts is not None
    assert parts.of[RAM]["weights"] == 3 * 1000
    assert parts.of[GPUS[0].id]["weights"] == 1000  # and the output


def test_weights_that_are_stored_anew_are_there_twice() -> None:
    """A mapped Q4_0 is repacked all but its input; not when it is read, switched off, or of another type."""
    tensors = (Tensor("token_embd.weight", (32, 10), 2, 180), Tensor("blk.0.attn_q.weight", (32, 40), 2, 720))
    model = header("llama", *tensors, block_count=1, embedding_length=32)
    plan = Plan(options=MemoryOptions(), n_ctx=256, repacked=repacked_types("x86_64"))
    size = model.data_bytes
    assert copied_bytes(model, size, plan) == pytest.approx(720, abs=15)
    assert copied_bytes(model, size, replace(plan, repacked=frozenset())) == 0
    for options in (MemoryOptions(repack=False), MemoryOptions(load_mode="none"), MemoryOptions(load_mode="dio")):
        assert copied_bytes(model, size, replace(plan, options=options)) == 0
    with_gpu = work_out(Weights(header=model, size_bytes=size), replace(plan, devices=GPUS))
    assert with_gpu is not None
    assert with_gpu.of[RAM]["copies"] == 0
    assert "Q8_0" in repacked_types("aarch64")
    assert repacked_types("riscv64") == frozenset()


def test_what_stands_beside_a_model_is_counted() -> None:
    """Projector, adapters and draft each have their part, where they lie."""
    model, draft = attention("llama", 4, 8, 128), attention("llama", 2, 2, 64, 512)
    projector = header("clip", Tensor("v.weight", (1000,), 0, 4000))
    weights = Weights(
        header=model, size_bytes=0, projector=projector, draft=draft, draft_bytes=7_000_000, adapter_bytes=1000
    )
    plan = Plan(options=replace(ONE, draft="/d", mmproj="/p"), n_ctx=1024, devices=GPUS[:1])
    parts = work_out(weights, plan)
    assert parts is not None
    gpu = parts.of[GPUS[0].id]
    assert (gpu["projector"], gpu["adapters"]) == (5000, 1000)
    assert gpu["draft"] > 6_990_000 + 1024 * 2 * 512
    in_ram = work_out(weights, replace(plan, options=replace(plan.options, mmproj_offload=False, draft_devices=())))
    assert in_ram is not None
    assert in_ram.of[RAM]["projector"] == 5000
    assert in_ram.of[RAM]["draft"] > 6_990_000
    assert in_ram.of[GPUS[0].id]["draft"] == 0


def test_layers_that_draft_have_a_cache_when_they_do() -> None:
    """Multi-token prediction adds the caches of its layers, only when it is asked for."""
    model = attention("glm4moe", 3, 8, 128, nextn_predict_layers=1)
    weights = Weights(header=model, size_bytes=0)
    quiet = work_out(weights, Plan(options=ONE, n_ctx=1024))
    drafting = work_out(weights, Plan(options=replace(ONE, draft_types=("draft-mtp",)), n_ctx=1024))
    assert quiet is not None
    assert drafting is not None
    assert quiet.of[RAM]["draft"] == 0
    assert drafting.of[RAM]["draft"] == 1024 * 4096


def test_checkpoints_are_bounded_by_slots_and_by_tokens() -> None:
    """Only what cannot be rolled back is kept, so often as bounds and spacing allow."""
    layers = find_layers(GEMMA_27B)
    assert layers is not None
    one = 1024 * 52 * 8192
    assert checkpoint_bytes(layers, ONE, 32_768) == one * (4 + 3)
    assert checkpoint_bytes(layers, replace(ONE, ctx_checkpoints=2), 32_768) == one * 2
    assert checkpoint_bytes(layers, replace(ONE, swa_full=True), 32_768) == 0
    plain = find_layers(LLAMA_8B)
    assert plain is not None
    assert checkpoint_bytes(plain, MemoryOptions(), 32_768) == 0


def test_the_context_is_what_the_server_makes_of_its_options() -> None:
    """0 and nothing are what the model was trained for, unless a slot's share is said."""
    assert context_size(LLAMA_8B, MemoryOptions(ctx_size=8192)) == 8192
    assert context_size(LLAMA_8B, MemoryOptions(ctx_size=0, ctx_per_slot=100)) == 131_072
    assert context_size(LLAMA_8B, MemoryOptions()) == 131_072
    assert context_size(LLAMA_8B, MemoryOptions(ctx_per_slot=1000)) == 4000
    assert context_size(MAMBA, MemoryOptions()) == 4096


def test_all_that_it_was_trained_for_is_so_for_each_slot() -> None:
    """Slots with caches of their own get the trained context each, unless llama.cpp is told to fit nothing."""
    four = MemoryOptions(ctx_size=0, parallel=4)
    assert context_size(LLAMA_8B, four) == 4 * 131_072
    assert context_size(LLAMA_8B, replace(four, is_fitted=False)) == 131_072
    assert context_size(LLAMA_8B, replace(four, kv_unified=True)) == 131_072


@pytest.mark.parametrize(
    ("options", "n_ctx", "told"),
    [
        (MemoryOptions(), 8192, 8192),
        (MemoryOptions(parallel=1), 5000, 5120),
        (MemoryOptions(parallel=4), 8192, 2048),
        (MemoryOptions(parallel=3), 5000, 1792),
        (MemoryOptions(parallel=4, kv_unified=True), 8192, 8192),
        (MemoryOptions(), 1_000_000, 131_072),
        (MemoryOptions(parallel=4), 4 * 131_072, 131_072),
        (MemoryOptions(ctx_per_slot=1000), 4000, 1000),
    ],
    ids=["shared", "alone", "of four", "of three", "said to be shared", "beyond training", "all", "bounded"],
)
def test_a_request_has_its_share_of_the_context(options: MemoryOptions, n_ctx: int, told: int) -> None:
    """It is what b11434 told of itself with these options."""
    assert slot_context(LLAMA_8B, options, n_ctx) == told


def test_a_header_that_says_too_little_has_no_footprint() -> None:
    """Unknown is None, not nothing."""
    weights = Weights(header=header("llama", embedding_length=64), size_bytes=1)
    assert work_out(weights, Plan(options=ONE, n_ctx=4096)) is None


natural = st.integers(min_value=0, max_value=200)
per_layer = st.one_of(natural, st.lists(natural, min_size=1, max_size=9))


@st.composite
def headers(draw: st.DrawFn) -> Header:
    """Headers of known and unknown architectures, sensible or not."""
    keys = [
        *("nextn_predict_layers", "attention.key_length", "attention.value_length", "attention.key_length_mla"),
        *("attention.sliding_window", "attention.shared_kv_layers", "full_attention_interval", "vocab_size"),
        *("ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.group_count", "wkv.head_size"),
        *("shortconv.l_cache", "kda.head_dim", "expert_count", "expert_used_count", "expert_feed_forward_length"),
        *("attention.indexer.key_length", "attention.key_length_swa", "context_length"),
    ]
    arrays = [
        *("attention.head_count", "attention.head_count_kv", "attention.sliding_window_pattern"),
        *("feed_forward_length", "attention.recurrent_layers"),
    ]
    values: dict[str, int | list[int]] = draw(st.dictionaries(st.sampled_from(keys), natural))
    values |= draw(st.dictionaries(st.sampled_from(arrays), per_layer))
    values |= {"block_count": draw(st.integers(1, 8)), "embedding_length": draw(natural)}
    names = ["llama", "gemma3", "gemma3n", "gemma4", "exaone4", "llama4", "lfm2", "mamba", "qwen3next", "jamba"]
    names += ["falcon-h1", "nemotron_h", "minimax-01", "deepseek2", "bert", "phi3", "tomorrow"]
    architecture = draw(st.sampled_from(names))
    return header(architecture, **{key.replace(".", "__"): value for key, value in values.items()})


options_st = st.builds(
    MemoryOptions,
    parallel=st.one_of(st.none(), st.integers(1, 8)),
    kv_unified=st.one_of(st.none(), st.booleans()),
    batch_size=st.integers(1, 4096),
    ubatch_size=st.integers(1, 1024),
    flash_attn=st.sampled_from(["on", "off", "auto"]),
    cache_type_k=st.sampled_from(["f16", "f32", "q8_0", "q4_1", "nonsense"]),
    cache_type_v=st.sampled_from(["f16", "iq4_nl"]),
    swa_full=st.booleans(),
    kv_offload=st.booleans(),
    gpu_layers=st.one_of(st.none(), st.integers(0, 12)),
    devices=st.one_of(st.none(), st.lists(st.sampled_from(["CUDA0", "cuda1", "ROCm7"]), max_size=2).map(tuple)),
    split_mode=st.sampled_from(["none", "layer", "row"]),
    tensor_split=st.lists(st.floats(0, 9), max_size=4).map(tuple),
    main_gpu=st.integers(0, 3),
    cpu_moe_layers=st.integers(0, 12),
    is_embedding=st.booleans(),
)


@settings(max_examples=150)
@given(headers(), options_st, st.integers(1, 200_000), st.integers(0, 10**12), st.integers(0, 2))
def test_the_formula_is_total(model: Header, options: MemoryOptions, n_ctx: int, size: int, n_devices: int) -> None:
    """Every header has an answer, every number in it is one and not negative, and every layer has its place."""
    plan = Plan(options=options, n_ctx=n_ctx, devices=GPUS[:n_devices])
    parts = work_out(Weights(header=model, size_bytes=size), plan)
    assert parts is not None
    assert parts.total()[RAM] > 0
    assert all(number >= 0 for each in parts.of.values() for number in each.values())
    assert set(parts.of) <= {RAM, *(device.id for device in plan.used)}
    assert len(place_layers(model, plan)) == (model.layer_count or 0) + 1
    layers = find_layers(model)
    assert layers is not None
    assert checkpoint_bytes(layers, options, n_ctx) >= 0


@settings(max_examples=150)
@given(headers(), options_st, st.integers(1, 100_000), st.integers(1, 100_000))
def test_more_context_never_takes_less(model: Header, options: MemoryOptions, n_ctx: int, more: int) -> None:
    """The footprint grows with the context on every device, or stays."""
    weights = Weights(header=model, size_bytes=0)
    small = work_out(weights, Plan(options=options, n_ctx=n_ctx, devices=GPUS))
    large = work_out(weights, Plan(options=options, n_ctx=n_ctx + more, devices=GPUS))
    assert small is not None
    assert large is not None
    assert all(size <= large.total().get(device, 0) for device, size in small.total().items())


@given(options_st, st.integers(1, 200_000), st.integers(1, 10_000))
def test_windows_are_never_larger_than_the_cache(options: MemoryOptions, n_ctx: int, window: int) -> None:
    """Cells are whole pads, enough for what was asked, and a window's are no more than the others'."""
    size, streams = cells(options, n_ctx)
    assert size % 256 == 0
    assert size * streams >= n_ctx - 256 * streams
    assert 0 < window_cells(options, n_ctx, window) <= size
