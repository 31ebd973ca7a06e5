"""The beginning of a GGUF file: what a model is, from the little of its header that is worth fetching over a network.

A whole header is mostly vocabulary, up to 16 MB of it. What is about the model stands before, within the first KiB of
every file that llama.cpp's tools write.
"""

from __future__ import annotations

from dataclasses import dataclass

from llamavisor.gguf.container import peek
from llamavisor.gguf.cursor import GgufError, ReadAt
from llamavisor.gguf.header import WANTED
from llamavisor.gguf.values import PerLayer, Values

_VOCABULARY = b"tokenizer."


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """What is known before the vocabulary. As in a `Header`, numbers are None when the file does not say them.

    How it is quantized is not among that: llama-quantize writes it behind the vocabulary.

    Attributes:
        architecture: llama.cpp's name of it.
        name: what its maker calls it.
        size_label: its size as its maker calls it, such as `8x7B`.
        context_length: tokens that it was trained for.
        embedding_length: size of the embedding.
        layer_count: layers.
        head_count: attention heads.
        head_count_kv: heads of keys and values.
        key_length: size of a key of one head.
        value_length: size of a value of one head.
        expert_count: experts in a layer, None in a dense model.
    """

    architecture: str
    name: str = ""
    size_label: str = ""
    context_length: int | None = None
    embedding_length: int | None = None
    layer_count: int | None = None
    head_count: PerLayer | None = None
    head_count_kv: PerLayer | None = None
    key_length: int | None = None
    value_length: int | None = None
    expert_count: int | None = None


class ShortError(GgufError):
    """Raised when the beginning that is there is too short to tell.

    Attributes:
        needed: so many bytes of the file are wanted at least.
    """

    def __init__(self, needed: int) -> None:
        super().__init__(f"its first {needed} bytes are needed", needed, is_partial=True)
        self.needed = needed


def parse_beginning(prefix: bytes, size: int) -> Beginning:
    """Reads the first bytes of a file.

    Args:
        prefix: they.
        size: of the whole file in bytes.

    Raises:
        ShortError: more of them are needed.
        GgufError: it is not a GGUF file that llama.cpp reads.
    """
    values = Values(peek(_reader(prefix, size), size, WANTED, _VOCABULARY))
    key = values.key
    return Beginning(
        architecture=values.architecture,
        name=values.text("general.name"),
        size_label=values.text("general.size_label"),
        context_length=values.count(key("context_length")),
        embedding_length=values.count(key("embedding_length")),
        layer_count=values.count(key("block_count")),
        head_count=values.per_layer(key("attention.head_count")),
        head_count_kv=values.per_layer(key("attention.head_count_kv")),
        key_length=values.count(key("attention.key_length")),
        value_length=values.count(key("attention.value_length")),
        expert_count=values.count(key("expert_count")),
    )


def _reader(prefix: bytes, size: int) -> ReadAt:
    def read_at(offset: int, length: int) -> bytes:
        if offset >= len(prefix) and length and offset < size:
            raise ShortError(offset + 1)
        return prefix[offset : offset + length]

    return read_at
