"""What a header says about the memory that a model takes when it runs: its layers, and what each of them keeps."""

from __future__ import annotations

from dataclasses import dataclass, fields

from llamavisor.gguf.container import Places
from llamavisor.gguf.values import PerLayer, Values


@dataclass(frozen=True, slots=True)
class Recurrence:
    """Sizes of what layers without attention keep for each sequence; 0 where a model has none of it.

    Attributes:
        conv_kernel: width of the convolution (Mamba and its relatives).
        inner_size: size of the inner state.
        state_size: how many states each of it has.
        group_count: groups.
        wkv_head_size: head size of RWKV.
        token_shift_count: shifted tokens that RWKV keeps.
        shortconv_length: length of the short convolution (LFM2).
        kda_head_size: head size of Kimi's delta attention.
    """

    conv_kernel: int = 0
    inner_size: int = 0
    state_size: int = 0
    group_count: int = 0
    wkv_head_size: int = 0
    token_shift_count: int = 0
    shortconv_length: int = 0
    kda_head_size: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model's memory is laid out, as far as a header's better known values do not say it.

    Numbers are None when the file does not say them.

    Attributes:
        places: how many bytes of its tensors are the input, each layer, and the rest; of this file alone.
        key_length_swa: size of a key of one head in layers with a sliding window, where it is another one there.
        value_length_swa: likewise of a value.
        key_length_mla: size of a key before it is compressed (latent attention); None in models without, and in files
            from before llama.cpp kept only what is compressed.
        indexer_key_length: size of a key of the indexer (sparse attention).
        shared_kv_layer_count: so many layers at the end use keys and values of earlier ones.
        recurrent_layers: which layers are recurrent, 1 and 0 for each.
        full_attention_interval: one of so many layers has attention, the others are recurrent.
        recurrence: sizes of the recurrent layers, None in models without.
        feed_forward_length: size of the feed-forward network; 0 in layers without.
        expert_feed_forward_length: size of that of one expert.
    """

    places: Places
    key_length_swa: int | None = None
    value_length_swa: int | None = None
    key_length_mla: int | None = None
    indexer_key_length: int | None = None
    shared_kv_layer_count: int | None = None
    recurrent_layers: PerLayer | None = None
    full_attention_interval: int | None = None
    recurrence: Recurrence | None = None
    feed_forward_length: PerLayer | None = None
    expert_feed_forward_length: int | None = None


_RECURRENCE = {
    "conv_kernel": "ssm.conv_kernel",
    "inner_size": "ssm.inner_size",
    "state_size": "ssm.state_size",
    "group_count": "ssm.group_count",
    "wkv_head_size": "wkv.head_size",
    "token_shift_count": "token_shift_count",
    "shortconv_length": "shortconv.l_cache",
    "kda_head_size": "kda.head_dim",
}
_COUNTS = {
    "key_length_swa": "attention.key_length_swa",
    "value_length_swa": "attention.value_length_swa",
    "key_length_mla": "attention.key_length_mla",
    "indexer_key_length": "attention.indexer.key_length",
    "shared_kv_layer_count": "attention.shared_kv_layers",
    "full_attention_interval": "full_attention_interval",
    "expert_feed_forward_length": "expert_feed_forward_length",
}
_PER_LAYER = {"recurrent_layers": "attention.recurrent_layers", "feed_forward_length": "feed_forward_length"}
KEYS = frozenset(f"*.{key}".encode() for keys in (_RECURRENCE, _COUNTS, _PER_LAYER) for key in keys.values())
"""Keys of all values that a layout is made of, as `llm_kv` in llama.cpp's src/llama-arch.cpp names them."""


def lay_out(values: Values, places: Places) -> Layout:
    """What a header of these values says. It is total."""
    recurrence = Recurrence(**{name: values.count(values.key(key), 0) or 0 for name, key in _RECURRENCE.items()})
    counts = {name: values.count(values.key(key)) for name, key in _COUNTS.items()}
    per_layer = {name: values.per_layer(values.key(key)) for name, key in _PER_LAYER.items()}
    is_recurrent = any(getattr(recurrence, field.name) for field in fields(recurrence))
    return Layout(
        places=places,
        recurrence=recurrence if is_recurrent else None,
        key_length_swa=counts["key_length_swa"],
        value_length_swa=counts["value_length_swa"],
        key_length_mla=counts["key_length_mla"],
        indexer_key_length=counts["indexer_key_length"],
        shared_kv_layer_count=counts["shared_kv_layer_count"],
        full_attention_interval=counts["full_attention_interval"],
        expert_feed_forward_length=counts["expert_feed_forward_length"],
        recurrent_layers=per_layer["recurrent_layers"],
        feed_forward_length=per_layer["feed_forward_length"],
    )
