"""How much memory a model takes, worked out from its header: for builds without llama-fit-params, and what that omits.

Every formula names the file of llama.cpp (b11434) in which the allocation is made. Weights, caches and states are
exact; compute buffers, projectors and what a process takes by itself are estimates, and say so.
"""

from __future__ import annotations

import platform
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from llamavisor.footprint.layers import Layer, Layers, at_layer, find_layers
from llamavisor.footprint.options import MemoryOptions
from llamavisor.gauge.device import RAM_ID as RAM
from llamavisor.gguf import Header, PerLayer
from llamavisor.gguf.tensortypes import TENSOR_TYPES

MIB = 1024 * 1024
PROCESS_BYTES = 22 * MIB
"""What a llama-server takes that has loaded nothing: 8 MiB of its own and 14 of its libraries, which several share.

Measured with b11434 on x86-64, a build for the CPU alone.
"""
TOKEN_BYTES = 140
"""What a token of the vocabulary takes in RAM. Measured: 17 MiB for 128,000 SentencePiece tokens."""
MERGED_TOKEN_BYTES = 300
"""The same of a BPE vocabulary, where each token has a merge too. An estimate."""
DEVICE_CONTEXT_BYTES = 320 * MIB
"""What a process takes on a GPU before it loads anything: code and context of CUDA or ROCm. An estimate."""
PROJECTOR_COMPUTE_SHARE = 0.25
"""Compute buffers of a projector, as a share of its weights. An estimate."""
_PAD = 256
"""Contexts are rounded up to it (`GGML_PAD(…, 256)` in src/llama-context.cpp and src/llama-kv-cache-iswa.cpp)."""
_F32, _F16 = 4, 2
_ACTIVATIONS = 5
"""Rows of the embedding's size that live at once: measured on llama and gemma3, for which it is exact."""
_PIPELINE_COPIES = 4
"""GGML_SCHED_MAX_COPIES in ggml/src/ggml-backend.cpp: inputs are kept so often when several GPUs take turns."""
_TYPES = {kind.name.lower(): kind for kind in TENSOR_TYPES.values()}
_REPACKED_X86 = frozenset({"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"})
_REPACKED_ARM = _REPACKED_X86 | {"Q5_K", "Q6_K", "Q8_0"}
_MTP = "draft-mtp"


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU as one router sees it.

    Attributes:
        name: what the router calls it, such as `CUDA0`.
        id: which it physically is; "RAM" when its memory is the machine's.
        free_bytes: what is free on it, by which llama.cpp splits a model; None when that is not known.
    """

    name: str
    id: str
    free_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The files of a model, as far as they take memory.

    Attributes:
        header: of the model's first file.
        size_bytes: of all its files together.
        projector: header of the projector, None without one.
        draft: header of the draft, None without one.
        draft_bytes: of all the draft's files.
        adapter_bytes: of all LoRAs and control vectors together.
    """

    header: Header
    size_bytes: int
    projector: Header | None = None
    draft: Header | None = None
    draft_bytes: int = 0
    adapter_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one router is to run a model.

    Attributes:
        options: what it is told.
        devices: the GPUs that the router sees, in its order; whichever of them the model may use.
        n_ctx: tokens of context, all slots together.
        repacked: names of the types of weights that the CPU stores anew, None for what is usual on this machine.
    """

    options: MemoryOptions
    n_ctx: int
    devices: tuple[Device, ...] = ()
    repacked: frozenset[str] | None = None

    @property
    def used(self) -> tuple[Device, ...]:
        """The GPUs that the model is put on, none when it stays on the CPU.

        `llama_prepare_model_devices` in src/llama.cpp.
        """
        options, used = self.options, self.devices
        if options.gpu_layers == 0:
            return ()
        if options.devices is not None:
            by_name = {device.name.lower(): device for device in self.devices}
            used = tuple(found for name in options.devices if (found := by_name.get(name.lower())))
        if options.split_mode == "none" and used:
            return (used[options.main_gpu] if options.main_gpu < len(used) else used[0],)
        return used

    @property
    def digest(self) -> str:
        """Names this way to run a model: what was measured for one digest says nothing of another."""
        return self.options.digest(self.n_ctx, [device.id for device in self.devices])

    def for_draft(self) -> Plan:
        """How the model's draft runs."""
        return replace(self, options=self.options.for_draft())


@dataclass(slots=True)
class Parts:
    """Bytes by device and by what they are for."""

    of: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, device: str, name: str, size: int) -> None:
        """Adds bytes; nothing below zero."""
        self.of[device][name] += max(0, size)

    def total(self) -> dict[str, int]:
        """Bytes by device."""
        return {device: parts.total() for device, parts in self.of.items()}


def repacked_types(machine: str = platform.machine()) -> frozenset[str]:
    """Types of weights that a CPU of this machine stores anew (`ggml_repack_get_optimal_repack_type`).

    ggml/src/ggml-cpu/repack.cpp decides by the CPU's extensions; assumed are AVX2, or NEON with dotprod.
    """
    return _REPACKED_ARM if machine in ("aarch64", "arm64") else _REPACKED_X86 if machine == "x86_64" else frozenset()


def context_size(header: Header, options: MemoryOptions) -> int:
    """Tokens of context for all slots together, as llama-server makes of its options (tools/server/server.cpp)."""
    if options.ctx_size:
        return options.ctx_size
    if options.ctx_size is None and options.ctx_per_slot:
        return options.ctx_per_slot * options.slots
    trained = header.context_length or 4096
    # Each slot has all of it where llama.cpp fits the model in (`common_params_fit_impl` in common/fit.cpp).
    return trained if options.is_unified or not options.is_fitted else trained * options.slots


def slot_context(header: Header, options: MemoryOptions, n_ctx: int) -> int:
    """Tokens of context that one request can have: the context that llama-server tells of a model.

    Its share of the cache unless that is shared, and no more than the model was trained for (`n_ctx_slot` in
    tools/server/server-context.cpp).

    Args:
        header: the model's.
        options: how it is run.
        n_ctx: tokens of context, all slots together.
    """
    size, _ = cells(options, n_ctx)
    return min(size, header.context_length or size, options.ctx_per_slot or size)


def cells(options: MemoryOptions, n_ctx: int) -> tuple[int, int]:
    """Cells of a KV cache, and how many such caches there are (`llama_context` in src/llama-context.cpp)."""
    n_ctx = _padded(max(1, n_ctx))
    if options.is_unified or options.slots == 1:
        return n_ctx, 1
    return _padded(n_ctx // options.slots), options.slots


def window_cells(options: MemoryOptions, n_ctx: int, window: int) -> int:
    """Cells of the cache of layers with a sliding window (`llama_kv_cache_iswa` in src/llama-kv-cache-iswa.cpp).

    They hold the window of every sequence that shares the cache, and one physical batch; never more than the others.
    """
    size, _ = cells(options, n_ctx)
    if options.swa_full:
        return size
    sharing = options.slots if options.is_unified else 1
    return _padded(min(size, window * sharing + micro_batch(options, n_ctx)))


def micro_batch(options: MemoryOptions, n_ctx: int) -> int:
    """Tokens that are computed at once (`n_ubatch` in src/llama-context.cpp)."""
    return min(options.ubatch_size, options.batch_size, _padded(max(1, n_ctx)))


def outputs(options: MemoryOptions, n_ctx: int) -> int:
    """Tokens of a batch whose output is wanted at most (`server_output_limits` in tools/server/server-context.cpp)."""
    if options.is_embedding:
        return micro_batch(options, n_ctx)
    drafted = options.draft_max if options.draft or options.draft_types else 0
    return min(options.batch_size, options.slots * (1 + drafted))


def row_bytes(kind: str, numbers: int) -> int:
    """Bytes of a row of a cache; a type that is newer than this program is taken for f16, the default."""
    found = _TYPES.get(kind)
    if found is None:
        return numbers * _F16
    return -(-numbers // found.block) * found.block_bytes


def layer_context(layer: Layer, layers: Layers, options: MemoryOptions, n_ctx: int) -> int:
    """Bytes of one layer's cache and state.

    K and V have a row for every cell of every stream (`llama_kv_cache` in src/llama-kv-cache.cpp); states are f32, one
    for each slot (`llama_memory_recurrent` in src/llama-memory-recurrent.cpp).
    """
    size, streams = cells(options, n_ctx)
    if layer.has_window:
        size = window_cells(options, n_ctx, layers.window)
    values = layer.values
    if values and options.flash_attn == "off":  # [TAG_V_CACHE_VARIABLE] in src/llama-kv-cache.cpp
        values = max(each.values for each in layers.trunk)
    token = row_bytes(options.cache_type_k, layer.keys) + row_bytes(options.cache_type_v, values)
    return token * size * streams + layer.state * _F32 * options.slots


def compute_bytes(header: Header, layers: Layers, options: MemoryOptions, n_ctx: int, n_outputs: int) -> int:
    """Bytes of a compute buffer: what lives at once while a physical batch goes through the largest layer. An estimate.

    The masks of all caches, some rows of the embedding's size, and the larger of feed-forward network and attention; or
    else the output. Without Flash Attention the scores of all heads are there too, and masks are f32
    (`build_attn_mha` and `build_ffn` in src/llama-graph.cpp; the allocator is ggml/src/ggml-alloc.c).
    """
    batch, width = micro_batch(options, n_ctx), header.embedding_length or 0
    size, streams = cells(options, n_ctx)
    has_scores = options.flash_attn == "off"
    caches = [size] if any(layer.keys and not layer.has_window for layer in layers.trunk) else []
    if any(layer.has_window for layer in layers.trunk):
        caches.append(window_cells(options, n_ctx, layers.window))
    masks = sum(caches) * -(-batch // streams) * streams * (_F32 if has_scores else _F16)
    heads = _largest(header.head_count, len(layers.trunk))
    attention = 2 * heads * (header.key_length or 0) + max((x.keys + x.values for x in layers.trunk), default=0)
    if has_scores:
        attention += heads * max(caches, default=batch)
    widest = max(_feed_forward(header, len(layers.trunk)), attention, _scan(header))
    running = batch * _F32 * (_ACTIVATIONS * width + widest)
    ending = _F32 * (_ACTIVATIONS * width * batch + n_outputs * (header.vocabulary_size or 0))
    return masks + max(running, ending)


def output_bytes(header: Header, options: MemoryOptions, n_ctx: int) -> int:
    """Bytes of what is handed out: scores of all tokens for each output (`output_reserve` in src/llama-context.cpp)."""
    per_output = (header.vocabulary_size or 0) + (header.embedding_length or 0 if options.is_embedding else 0)
    return per_output * outputs(options, n_ctx) * _F32


def checkpoint_bytes(layers: Layers, options: MemoryOptions, n_ctx: int) -> int:
    """What context checkpoints may grow to: states, and what windows saw (`create_checkpoint` in server-context.cpp).

    They are made only for models that cannot go back in their context. A slot has one at the beginning, one before the
    last message, one at the end, and one every so many tokens, up to its bound.
    """
    if options.swa_full:
        window = 0
    else:
        window = sum(
            row_bytes(options.cache_type_k, layer.keys) + row_bytes(options.cache_type_v, layer.values)
            for layer in layers.trunk
            if layer.has_window
        ) * min(layers.window, n_ctx)
    one = window + sum(layer.state for layer in layers.trunk) * _F32
    step = options.checkpoint_step or 1
    count = min(options.ctx_checkpoints * options.slots, n_ctx // step + 3 * options.slots)
    return one * count


def work_out(weights: Weights, plan: Plan) -> Parts | None:
    """All parts of a model's footprint; None when its header does not say enough. Pure."""
    parts = Parts()
    if not _add_model(parts, weights.header, weights.size_bytes, plan):
        return None
    add_process(parts, weights, plan)
    add_extras(parts, weights, plan)
    return parts


def add_process(parts: Parts, weights: Weights, plan: Plan) -> None:
    """Adds what the process takes besides the model: itself, its libraries, the vocabulary, GPU contexts. Estimates."""
    header = weights.header
    token = MERGED_TOKEN_BYTES if header.tokenizer == "gpt2" else TOKEN_BYTES
    parts.add(RAM, "process", PROCESS_BYTES + token * (header.vocabulary_size or 0))
    for device in plan.used:
        if device.id != RAM:
            parts.add(device.id, "process", DEVICE_CONTEXT_BYTES)


def add_extras(parts: Parts, weights: Weights, plan: Plan) -> None:
    """Adds what stands beside the model: projector, adapters, draft, and layers that draft."""
    options, used = plan.options, plan.used
    first = used[0].id if used else RAM
    if weights.projector is not None:
        at = first if options.mmproj_offload else RAM
        size = weights.projector.data_bytes
        parts.add(at, "projector", size + int(size * PROJECTOR_COMPUTE_SHARE))
    if weights.adapter_bytes:
        placed = Counter(place_layers(weights.header, plan))
        for device, count in placed.items():
            parts.add(device, "adapters", weights.adapter_bytes * count // placed.total())
    if weights.draft is not None:
        beside = Parts()
        if _add_model(beside, weights.draft, weights.draft_bytes, plan.for_draft()):
            for device, size in beside.total().items():
                parts.add(device, "draft", size)
        else:
            parts.add(first, "draft", weights.draft_bytes)
    elif _MTP in options.draft_types and (layers := find_layers(weights.header)):
        for layer in layers.nextn:
            parts.add(first, "draft", layer_context(layer, layers, options.for_draft(), plan.n_ctx))


def place_layers(header: Header, plan: Plan) -> list[str]:
    """The device of each layer, the output last (`load_tensors` in src/llama-model.cpp)."""
    options, used = plan.options, plan.used
    n_layer = header.layer_count or 0
    if not used:
        return [RAM] * (n_layer + 1)
    wanted = n_layer + 1 if options.gpu_layers is None else options.gpu_layers
    begin, active = max(n_layer + 1 - wanted, 0), min(wanted, n_layer + 1)
    placed = [RAM] * begin
    if len(used) == 1:
        return placed + [used[0].id] * active
    bounds = _split(options, used)
    for at in range(active):
        which = next((number for number, bound in enumerate(bounds) if at / active < bound), len(used) - 1)
        placed.append(used[which].id)
    return placed


def _add_model(parts: Parts, header: Header, size_bytes: int, plan: Plan) -> bool:
    layers, options, n_ctx = find_layers(header), plan.options, plan.n_ctx
    if layers is None:
        return False
    placed = place_layers(header, plan)
    for device, size in _weights(header, size_bytes, options, placed):
        parts.add(device, "weights", size)
    if not plan.used:
        parts.add(RAM, "copies", copied_bytes(header, size_bytes, plan))
    for device, size in context_parts(header, plan):
        parts.add(device, "context", size)
    compute = compute_bytes(header, layers, options, n_ctx, outputs(options, n_ctx))
    for device in dict.fromkeys(placed):
        parts.add(device, "compute", compute)
    if RAM not in placed:  # inputs are made on the CPU whatever happens to them after
        copies = _PIPELINE_COPIES if len(set(placed)) > 1 else 1
        parts.add(RAM, "compute", copies * micro_batch(options, n_ctx) * _F32 * (header.embedding_length or 0))
    parts.add(RAM, "output", output_bytes(header, options, n_ctx))
    return True


def context_parts(header: Header, plan: Plan) -> Iterator[tuple[str, int]]:
    """Bytes of caches and states, each layer's where the layer is unless the KV cache is kept on the CPU."""
    layers = find_layers(header)
    if layers is None:
        return
    # Most layers are alike: what one of them takes is worked out once.
    alike = Counter(zip(layers.trunk, place_layers(header, plan), strict=False))
    for (layer, device), count in alike.items():
        size = layer_context(layer, layers, plan.options, plan.n_ctx) * count
        yield device if plan.options.kv_offload else RAM, size


def copied_bytes(header: Header, size_bytes: int, plan: Plan) -> int:
    """Bytes that are there twice: weights that the CPU stores anew while their file stays mapped.

    The pages of the file are read once, remain resident, and go when memory is short. The input layer is not repacked.
    A file that is read instead of mapped leaves nothing behind.
    """
    if not (plan.options.repack and plan.options.is_mapped) or not header.data_bytes:
        return 0
    types = repacked_types() if plan.repacked is None else plan.repacked
    share = sum(each.size_bytes for each in header.type_mix if each.type in types) / header.data_bytes
    return int(share * max(0, size_bytes - header.layout.places.input_bytes))


def _weights(
    header: Header, size_bytes: int, options: MemoryOptions, placed: Sequence[str]
) -> Iterator[tuple[str, int]]:
    """Where the weights lie.

    Layers of which nothing is known get equal shares: those in later files of a split model, and all of a model of
    which only the beginning was read.
    """
    places, n_layer = header.layout.places, header.layer_count or 0
    known, experts = (_of_layers(sizes, n_layer) for sizes in (places.layer_bytes, places.expert_bytes))
    rest = size_bytes - sum(known) - places.input_bytes - places.other_bytes - header.data_offset
    unknown = [layer for layer, size in enumerate(known) if not size] if header.split or not any(known) else []
    for layer in unknown:
        known[layer] = max(0, rest) // len(unknown)
        experts[layer] = known[layer] if header.expert_count else 0
    if not unknown and rest > 0:
        yield placed[-1], rest
    yield RAM, places.input_bytes
    yield placed[-1], places.other_bytes
    if placed[-1] != RAM and not header.split and places.other_bytes <= places.input_bytes // 2:
        yield placed[-1], places.input_bytes  # tied: the output is the input once more, on its own device
    laid: Counter[str] = Counter()
    for layer, device in enumerate(placed[:n_layer]):
        on_cpu = experts[layer] if layer < options.cpu_moe_layers else 0
        laid[RAM] += on_cpu
        laid[device] += known[layer] - on_cpu
    yield from laid.items()


def _of_layers(sizes: Sequence[int], n_layer: int) -> list[int]:
    """Bytes of so many layers, 0 of those that a file does not speak of."""
    return [*sizes[:n_layer], *[0] * (n_layer - len(sizes))]


def _split(options: MemoryOptions, used: Sequence[Device]) -> list[float]:
    """The share of layers at which each device ends."""
    shares = [*options.tensor_split[: len(used)], *[0.0] * (len(used) - len(options.tensor_split))]
    if not any(shares):
        free = [device.free_bytes for device in used]
        shares = [float(each) for each in free if each] if all(free) else [1.0] * len(used)
    total, ends, end = sum(shares), [], 0.0
    for share in shares:
        end += share
        ends.append(end / total)
    return ends


def _feed_forward(header: Header, n_layer: int) -> int:
    """Numbers of a token that live at once in the largest feed-forward network: gate, up, and what becomes of them."""
    dense = 3 * _largest(header.layout.feed_forward_length, n_layer)
    used, inner = header.expert_used_count or 0, header.layout.expert_feed_forward_length or 0
    if not used:
        return dense
    inner = inner or _largest(header.layout.feed_forward_length, n_layer)
    mixed = used * (2 * inner + (header.embedding_length or 0))
    return max(dense, mixed) if header.layout.expert_feed_forward_length else mixed


def _scan(header: Header) -> int:
    """Numbers of a token that live at once in a recurrent layer."""
    sizes = header.layout.recurrence
    if sizes is None:
        return 0
    return 3 * (2 * sizes.inner_size + 2 * sizes.group_count * sizes.state_size)


def _largest(value: PerLayer | None, n_layer: int) -> int:
    if isinstance(value, tuple):
        return max((at_layer(value, layer) for layer in range(n_layer)), default=0)
    return value if isinstance(value, int) else 0


def _padded(size: int) -> int:
    return -(-size // _PAD) * _PAD
