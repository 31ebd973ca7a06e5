"""The beginning of a GGUF file: what a model is, from the little of its header that is worth fetching over a network.

A whole header is mostly vocabulary, up to 16 MB of it. What is about the model stands before, within the first KiB of
every file that llama.cpp's tools write.
"""

from __future__ import annotations

from llamavisor.gguf.container import peek
from llamavisor.gguf.cursor import GgufError, ReadAt
from llamavisor.gguf.header import WANTED, Header, describe

_VOCABULARY = b"tokenizer."


class ShortError(GgufError):
    """Raised when the beginning that is there is too short to tell.

    Attributes:
        needed: so many bytes of the file are wanted at least.
    """

    def __init__(self, needed: int) -> None:
        super().__init__(f"its first {needed} bytes are needed", needed, is_partial=True)
        self.needed = needed


def parse_beginning(prefix: bytes, size: int) -> Header:
    """The header of a file as far as its first bytes tell: up to the length of the vocabulary.

    Of what stands behind nothing is known: the chat template, how the file is quantized (llama-quantize writes that
    there), and all of the tensors but their number. That is as empty as in a file that does not say it.

    Args:
        prefix: the first bytes.
        size: of the whole file in bytes.

    Raises:
        ShortError: more of them are needed.
        GgufError: it is not a GGUF file that llama.cpp reads.
    """
    return describe(peek(_reader(prefix, size), size, WANTED, _VOCABULARY), size)


def _reader(prefix: bytes, size: int) -> ReadAt:
    def read_at(offset: int, length: int) -> bytes:
        if offset >= len(prefix) and length and offset < size:
            raise ShortError(offset + 1)
        return prefix[offset : offset + length]

    return read_at
