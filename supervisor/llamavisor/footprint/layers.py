"""What each layer of a model keeps: of every token, of the tokens in its window, or of every sequence.

Which layers do what is decided in llama.cpp's src/models/*.cpp, partly from the header and partly from what is known of
an architecture; the tables here are those of b11434.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from llamavisor.gguf import Header, PerLayer
from llamavisor.gguf.container import MAX_LAYERS

_NO_MEMORY = frozenset(
    {
        *("bert", "jina-bert-v2", "jina-bert-v3", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert"),
        *("wavtokenizer-dec", "modern-bert", "gemma-embedding", "dream", "llada", "llada-moe", "rnd1", "t5encoder"),
    }
)
"""Architectures that see a text at once and keep nothing (`create_memory` in src/llama-model.cpp)."""
_RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
"""Those without attention (`llm_arch_is_recurrent` in src/llama-arch.cpp)."""
_INTERVALS: Mapping[str, int] = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "qwen4exp": 4, "minimax-01": 8}
"""Those of which every so many layers one has attention, unless the header says another number."""
_BOTH = frozenset({"falcon-h1"})
"""Those whose layers have attention and are recurrent."""
_NO_FEED_FORWARD = frozenset({"nemotron_h", "nemotron_h_moe"})
"""Those in which a layer with a feed-forward network is nothing else."""


@dataclass(frozen=True, slots=True)
class _Window:
    """How an architecture places its sliding windows (`load_swa_pattern` in src/llama-model.cpp).

    Attributes:
        pattern: of so many layers one has none, unless the header says another number; 0 for windows everywhere.
        dense_first: whether it is the first of them, and not the last.
        size: tokens, where the header need not say it.
        is_fixed: whether the header is not asked for the size.
    """

    pattern: int
    dense_first: bool = False
    size: int | None = None
    is_fixed: bool = False


_WINDOWS: Mapping[str, _Window] = {
    "afmoe": _Window(4),
    "cohere2": _Window(4),
    "cohere2moe": _Window(4, dense_first=True),
    "exaone-moe": _Window(4, size=128),
    "exaone4": _Window(4, size=4096),
    "gemma2": _Window(2, size=4096),
    "gemma3": _Window(6),
    "gemma3n": _Window(5),
    "gpt-oss": _Window(2),
    "laguna": _Window(4, dense_first=True),
    "lfm2": _Window(0),
    "lfm2moe": _Window(0),
    "llama4": _Window(4, size=8192, is_fixed=True),
    "mellum": _Window(4),
    "muse-glimmer": _Window(4),
    "olmo2": _Window(4),
    "plamo3": _Window(8),
    "smallthinker": _Window(4, dense_first=True, size=4096),
}
_IGNORES_WINDOW = frozenset({"phi3"})
"""Those whose windows llama.cpp has switched off though headers speak of them."""
_EXAONE4_LAYERS = 64
"""Only the exaone4 of so many layers has windows."""
_GEMMA3N_OWN_KV = 20
"""Layers of gemma3n that have keys and values of their own."""
_SHIFTED_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer keeps, counted in numbers, whatever their type.

    Attributes:
        keys: for every token.
        values: for every token.
        has_window: whether it keeps only what its window sees.
        state: for every sequence, however long it is.
    """

    keys: int = 0
    values: int = 0
    has_window: bool = False
    state: int = 0


@dataclass(frozen=True, slots=True)
class Layers:
    """What a model keeps.

    Attributes:
        trunk: its layers.
        nextn: those for multi-token prediction, used only when it drafts for itself.
        window: tokens that a sliding window sees, 0 when there is none.
    """

    trunk: tuple[Layer, ...]
    nextn: tuple[Layer, ...]
    window: int


@functools.lru_cache(maxsize=128)
def _layer(keys: int, values: int, has_window: bool, state: int) -> Layer:
    """A layer; of those that are alike the same object, so that they are compared in no time."""
    return Layer(keys, values, has_window, state)


@functools.lru_cache(maxsize=128)
def find_layers(header: Header) -> Layers | None:
    """What a model of this header keeps; None when the header does not say enough. Pure."""
    if not header.layer_count or header.layer_count > MAX_LAYERS or header.embedding_length is None:
        return None
    n_all = header.layer_count
    n_trunk = n_all - min(header.nextn_layer_count or 0, n_all - 1)
    if header.architecture in _NO_MEMORY:
        empty = Layer()
        return Layers((empty,) * n_trunk, (empty,) * (n_all - n_trunk), 0)
    window, windows = _windows(header, n_trunk)
    recurrent = _recurrent(header, n_trunk)
    state = _state(header) if any(recurrent) else 0
    own = _own_kv(header, n_all)
    layers = []
    for at in range(n_all):
        is_trunk = at < n_trunk
        is_recurrent = is_trunk and recurrent[at]
        has_attention = not is_recurrent or header.architecture in _BOTH
        has_window = is_trunk and windows[at]
        keys, values = _attention(header, at, has_window=has_window) if has_attention and at < own else (0, 0)
        layers.append(_layer(keys, values, has_window, state if is_recurrent else 0))
    return Layers(tuple(layers[:n_trunk]), tuple(layers[n_trunk:]), window if any(windows) else 0)


def at_layer(value: PerLayer | None, layer: int, default: int = 0) -> int:
    """The number for one layer of what may vary from layer to layer; an array that is too short ends in its default."""
    if isinstance(value, tuple):
        return value[layer] if layer < len(value) else default
    return default if value is None else value


def _attention(header: Header, layer: int, *, has_window: bool) -> tuple[int, int]:
    """Numbers in a token's key and value (`n_embd_k_gqa`, `n_embd_v_gqa` in src/llama-hparams.cpp).

    With latent attention a single compressed row is both (`llama_kv_cache` in src/llama-kv-cache.cpp has no V then).
    The indexer of sparse attention keeps a key of its own (src/llama-kv-cache-dsa.cpp).
    """
    layout = header.layout
    heads = at_layer(header.head_count_kv, layer)
    key, value = header.key_length or 0, header.value_length or 0
    if has_window:
        key = key if layout.key_length_swa is None else layout.key_length_swa
        value = value if layout.value_length_swa is None else layout.value_length_swa
    indexer = layout.indexer_key_length or 0 if heads else 0
    return heads * key + indexer, 0 if layout.key_length_mla else heads * value


def _windows(header: Header, n_layer: int) -> tuple[int, tuple[bool, ...]]:
    """The window's size, and which layers have one."""
    none = (0, (False,) * n_layer)
    known, pattern = _WINDOWS.get(header.architecture), header.sliding_window_pattern
    if header.architecture in _IGNORES_WINDOW or (header.architecture == "exaone4" and n_layer != _EXAONE4_LAYERS):
        return none
    if known is not None and known.is_fixed:
        size = 0 if header.sliding_window == 0 else known.size
    else:
        size = header.sliding_window if header.sliding_window is not None else known.size if known else None
    if not size:
        return none
    if isinstance(pattern, tuple):
        return size, tuple(bool(at_layer(pattern, layer)) for layer in range(n_layer))
    if known is None:
        # An array of ones only, in a header of an architecture that has no rule: windows everywhere.
        return (size, (True,) * n_layer) if pattern == 1 else none
    every = known.pattern if pattern is None else pattern
    if every == 0:
        return size, (True,) * n_layer
    dense = 0 if known.dense_first else every - 1
    return size, tuple(layer % every != dense for layer in range(n_layer))


def _recurrent(header: Header, n_layer: int) -> tuple[bool, ...]:
    """Which layers are recurrent (`is_recr_impl` in src/models/*.cpp)."""
    layout, architecture = header.layout, header.architecture
    if architecture in _RECURRENT or architecture in _BOTH:
        return (True,) * n_layer
    if layout.recurrence is None and architecture not in _INTERVALS:
        return (False,) * n_layer
    if layout.recurrent_layers is not None:
        return tuple(bool(at_layer(layout.recurrent_layers, layer)) for layer in range(n_layer))
    if architecture in _INTERVALS:
        every = layout.full_attention_interval or _INTERVALS[architecture]
        return tuple((layer + 1) % every != 0 for layer in range(n_layer))
    forward = layout.feed_forward_length if architecture in _NO_FEED_FORWARD else None
    return tuple(
        at_layer(header.head_count_kv, layer, 1) == 0 and at_layer(forward, layer) == 0 for layer in range(n_layer)
    )


def _state(header: Header) -> int:
    """Numbers that a recurrent layer keeps of a sequence (`n_embd_r`, `n_embd_s` in src/llama-hparams.cpp)."""
    sizes, width = header.layout.recurrence, header.embedding_length or 0
    heads = at_layer(header.head_count, 0)
    if sizes is None:  # MiniMax-Text-01: linear attention, with nothing in the header about it
        return (header.key_length or 0) ** 2 * heads
    if sizes.wkv_head_size:
        return (sizes.token_shift_count or _SHIFTED_TOKENS) * width + width * sizes.wkv_head_size
    if sizes.shortconv_length:
        return width * (sizes.shortconv_length - 1)
    conv = sizes.conv_kernel - 1 if sizes.conv_kernel else 0
    if sizes.kda_head_size:
        return 3 * (conv or 3) * heads * sizes.kda_head_size + sizes.kda_head_size**2 * heads
    inner, state = sizes.inner_size, sizes.state_size
    return conv * (inner + 2 * sizes.group_count * state) + state * inner


def _own_kv(header: Header, n_layer: int) -> int:
    """So many layers, from the first on, have keys and values of their own (`n_layer_kv_from_start`)."""
    if header.architecture == "gemma3n":
        return _GEMMA3N_OWN_KV
    return (
        n_layer - min(header.layout.shared_kv_layer_count or 0, n_layer) if header.architecture == "gemma4" else n_layer
    )
