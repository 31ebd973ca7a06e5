"""What the header of a GGUF file says about the model, in llama.cpp's terms."""

from __future__ import annotations

from dataclasses import dataclass

from llamavisor.gguf.chatfamily import find_family
from llamavisor.gguf.container import Container, TypeShare
from llamavisor.gguf.kind import Kind, find_kind
from llamavisor.gguf.layout import KEYS as LAYOUT_KEYS
from llamavisor.gguf.layout import Layout, lay_out
from llamavisor.gguf.tensortypes import FILE_TYPES, GUESSED
from llamavisor.gguf.values import PerLayer, Values


@dataclass(frozen=True, slots=True)
class Split:
    """Which part of a split file this is.

    Attributes:
        number: of this part, from 0 on; file names count from 1.
        count: of all parts.
        tensor_count: of all parts together, None when the file does not say.
    """

    number: int
    count: int
    tensor_count: int | None


@dataclass(frozen=True, slots=True)
class Projector:
    """What a projector adds to a model.

    Attributes:
        type: llama.cpp's name of it, such as `qwen2.5vl_merger`; empty when there is none.
        has_vision: whether it reads images.
        has_audio: whether it reads sound.
        projection_length: size of its output, which must be the embedding length of the model; None when unknown.
    """

    type: str
    has_vision: bool
    has_audio: bool
    projection_length: int | None


@dataclass(frozen=True, slots=True)
class Header:
    """A GGUF file's header, without what is long: no vocabulary, no list of tensors.

    Numbers are None when the file does not say them. Text is fit to be shown: what is not printable is escaped. Only
    `chat_template` is as it stands in the file. Nothing here is checked against what llama.cpp expects of this
    architecture: whether a model loads is for llama-server to say.

    Attributes:
        kind: what the file is for.
        version: of the format, 2 or 3.
        architecture: llama.cpp's name of it; of a LoRA or control vector, that of the model it is for. Empty in later
            parts of a split file.
        name: what its maker calls it, empty when it has no name.
        size_label: its size as its maker calls it, such as `8x7B`; empty when there is none.
        parameter_count: of this file: all numbers in all tensors.
        quantization: the file type as llama-quantize spells it, such as `Q4_K_M`. When the file says none, or one that
            is newer than this program, the type that takes the most bytes.
        file_type: its number, None when the file does not say it.
        type_mix: how the tensors are really stored, the largest part first.
        context_length: tokens that it was trained for.
        embedding_length: size of the embedding.
        layer_count: layers, those for multi-token prediction included.
        nextn_layer_count: layers for multi-token prediction, the last ones.
        head_count: attention heads; 0 in layers without attention.
        head_count_kv: heads of keys and values.
        key_length: size of a key of one head.
        value_length: size of a value of one head.
        sliding_window: tokens that a layer with a sliding window sees.
        sliding_window_pattern: which layers have one: every so many layers one has none, or 1 and 0 for each.
        expert_count: experts in a layer, None in a dense model.
        expert_used_count: how many of them a token uses.
        rope_dimension_count: how much of a head is rotated.
        rope_freq_base: base frequency.
        rope_scaling: how the context is stretched: `linear`, `yarn`, `longrope`; empty when it is not said.
        rope_scaling_factor: by how much.
        is_causal: whether a token sees only what is before it.
        pooling: how vectors of tokens become one: `none`, `mean`, `cls`, `last`, `rank`; None when it is not said.
        tokenizer: its kind as llama.cpp calls it: `llama` is SentencePiece, `gpt2` BPE, `bert` WordPiece.
        tokenizer_pre: how text is cut before.
        vocabulary_size: number of tokens.
        chat_template: Jinja text; None when there is none or when it is longer than 256 KiB.
        chat_family: known family of the template, None when it is no known one.
        projector: what it adds, of a projector only.
        split: which part it is, None when the file is not split.
        tensor_count: tensors in this file.
        layout: what decides how much memory it takes, besides the above.
        data_offset: where their data begins.
        data_bytes: their size with the padding between them.
        last_tensor_bytes: size of the one that ends last: its tail is zeros while a copy of full size is under way.
        file_bytes: size of the file when it was read.
    """

    kind: Kind
    version: int
    architecture: str
    name: str
    size_label: str
    parameter_count: int
    quantization: str
    file_type: int | None
    type_mix: tuple[TypeShare, ...]
    context_length: int | None
    embedding_length: int | None
    layer_count: int | None
    nextn_layer_count: int | None
    head_count: PerLayer | None
    head_count_kv: PerLayer | None
    key_length: int | None
    value_length: int | None
    sliding_window: int | None
    sliding_window_pattern: PerLayer | None
    expert_count: int | None
    expert_used_count: int | None
    rope_dimension_count: int | None
    rope_freq_base: float | None
    rope_scaling: str
    rope_scaling_factor: float | None
    is_causal: bool
    pooling: str | None
    tokenizer: str
    tokenizer_pre: str
    vocabulary_size: int | None
    chat_template: str | None
    chat_family: str | None
    projector: Projector | None
    split: Split | None
    tensor_count: int
    layout: Layout
    data_offset: int
    data_bytes: int
    last_tensor_bytes: int
    file_bytes: int

    @property
    def min_file_bytes(self) -> int:
        """The size that the file must have at least: the padding after the last tensor may be missing."""
        return self.data_offset + self.data_bytes

    @property
    def is_whole(self) -> bool:
        """Whether the file is long enough for its tensors. They may still be holes or zeros."""
        return self.file_bytes >= self.min_file_bytes


_TEMPLATE = "tokenizer.chat_template"
_TOKENS = "tokenizer.ggml.tokens"
TEXTS = frozenset({_TEMPLATE.encode()})
"""Keys of long strings."""
WANTED = (
    TEXTS
    | LAYOUT_KEYS
    | {
        key.encode()
        for key in (
            "general.type",
            "general.architecture",
            "general.name",
            "general.size_label",
            "general.file_type",
            "split.no",
            "split.count",
            "split.tensors.count",
            "adapter.type",
            "controlvector.model_hint",
            "clip.projector_type",
            "clip.has_vision_encoder",
            "clip.has_audio_encoder",
            "clip.vision.projector_type",
            "clip.vision.projection_dim",
            "clip.audio.projector_type",
            "clip.audio.projection_dim",
            "tokenizer.ggml.model",
            "tokenizer.ggml.pre",
            _TOKENS,
            "*.vocab_size",
            "*.context_length",
            "*.embedding_length",
            "*.block_count",
            "*.nextn_predict_layers",
            "*.attention.head_count",
            "*.attention.head_count_kv",
            "*.attention.key_length",
            "*.attention.value_length",
            "*.attention.sliding_window",
            "*.attention.sliding_window_pattern",
            "*.attention.causal",
            "*.expert_count",
            "*.expert_used_count",
            "*.rope.dimension_count",
            "*.rope.freq_base",
            "*.rope.scaling.type",
            "*.rope.scaling.factor",
            "*.pooling_type",
        )
    }
)
"""Keys of all values that a header is made of."""

_POOLING = ("none", "mean", "cls", "last", "rank")
"""`llama_pooling_type` in llama.cpp's include/llama.h."""


def describe(container: Container, file_bytes: int) -> Header:
    """What a file of this content and size is. It is total: every container has a header."""
    values, tensors = Values(container.values), container.tensors
    key = values.key
    heads = values.per_layer(key("attention.head_count"))
    heads_kv = values.per_layer(key("attention.head_count_kv"))
    embedding_length = values.count(key("embedding_length"))
    # As in `load_hparams` of llama.cpp's src/llama-model.cpp: heads share the embedding where nothing else is said.
    first_heads = heads[0] if isinstance(heads, tuple) else heads
    head_length = embedding_length // first_heads if embedding_length and first_heads else None
    key_length = values.count(key("attention.key_length"), head_length)
    file_type = values.count("general.file_type")
    template = values.text(_TEMPLATE)
    split, pooling = _split(values), _pooling(values)
    kind = find_kind(values, tensors, part=split.number if split else None, pooling=pooling)
    return Header(
        kind=kind,
        version=container.version,
        architecture=values.text("controlvector.model_hint") if kind is Kind.CONTROL_VECTOR else values.architecture,
        name=values.text("general.name"),
        size_label=values.text("general.size_label"),
        parameter_count=sum(share.elements for share in tensors.mix),
        quantization=_quantization(file_type, tensors.mix),
        file_type=file_type,
        type_mix=tensors.mix,
        context_length=values.count(key("context_length")),
        embedding_length=embedding_length,
        layer_count=values.count(key("block_count")),
        nextn_layer_count=values.count(key("nextn_predict_layers")),
        head_count=heads,
        head_count_kv=heads if heads_kv is None else heads_kv,
        key_length=key_length,
        value_length=values.count(key("attention.value_length"), head_length),
        sliding_window=values.count(key("attention.sliding_window")),
        sliding_window_pattern=values.per_layer(key("attention.sliding_window_pattern")),
        expert_count=values.count(key("expert_count")),
        expert_used_count=values.count(key("expert_used_count")),
        rope_dimension_count=values.count(key("rope.dimension_count"), key_length),
        rope_freq_base=values.number(key("rope.freq_base")),
        rope_scaling=values.text(key("rope.scaling.type")),
        rope_scaling_factor=values.number(key("rope.scaling.factor")),
        is_causal=values.flag(key("attention.causal"), default=True),
        pooling=pooling,
        tokenizer=values.text("tokenizer.ggml.model"),
        tokenizer_pre=values.text("tokenizer.ggml.pre"),
        vocabulary_size=container.lengths.get(_TOKENS, values.count(key("vocab_size"))),
        chat_template=template or None,
        chat_family=find_family(template),
        projector=_projector(values) if kind is Kind.PROJECTOR else None,
        split=split,
        tensor_count=tensors.count,
        layout=lay_out(values, tensors.places),
        data_offset=tensors.data_offset,
        data_bytes=tensors.end_offset - tensors.data_offset,
        last_tensor_bytes=tensors.last_bytes,
        file_bytes=file_bytes,
    )


def _pooling(values: Values) -> str | None:
    code = values.count(values.key("pooling_type"))
    return _POOLING[code] if code is not None and code < len(_POOLING) else None


def _split(values: Values) -> Split | None:
    number, count = values.count("split.no"), values.count("split.count")
    if count is None or count < 2:
        return None
    return Split(number or 0, count, values.count("split.tensors.count"))


def _projector(values: Values) -> Projector:
    kinds = (values.text(f"clip.{sense}projector_type") for sense in ("", "vision.", "audio."))
    lengths = (values.count(f"clip.{sense}.projection_dim") for sense in ("vision", "audio"))
    return Projector(
        type=next(filter(None, kinds), ""),
        has_vision=values.flag("clip.has_vision_encoder"),
        has_audio=values.flag("clip.has_audio_encoder"),
        projection_length=next(filter(None, lengths), None),
    )


def _quantization(file_type: int | None, mix: tuple[TypeShare, ...]) -> str:
    name = FILE_TYPES.get(file_type & ~GUESSED) if file_type is not None else None
    return name or (mix[0].type if mix else "")
