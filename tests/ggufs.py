"""GGUF files byte by byte, right and wrong ones, with the place of every field that a reader has to distrust."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
LETTERS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}

Scalar = bool | int | float | str | bytes
Typed = tuple[int, object]
"""A type and a value of it; of an array, `(ARRAY, (type, [values]))`."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as the file describes it.

    Attributes:
        name: its name.
        shape: its dimensions, the length of a row first.
        code: its type.
        size: bytes of its data.
        offset: where its data is said to begin, None = where it should.
    """

    name: str | bytes
    shape: tuple[int, ...] = (32,)
    code: int = 0
    size: int = 128
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class Field:
    """A number in the file that says how to read on: where it is, how long, and what it is."""

    what: str
    offset: int
    size: int


@dataclass
class GgufFile:
    """What is to be written.

    Attributes:
        values: keys and values; a key may be there twice.
        tensors: the tensors, whose data is zeros.
        version: of the format.
        alignment: of the data, as if the values said so.
        order: `<` or `>`, the order of the bytes.
        fields: filled in by `encode`.
    """

    values: Sequence[tuple[str | bytes, Typed]] = ()
    tensors: Sequence[Tensor] = ()
    version: int = 3
    alignment: int = 32
    order: str = "<"
    fields: list[Field] = field(default_factory=list)
    _out: bytearray = field(default_factory=bytearray)

    def encode(self) -> bytes:
        """The whole file, with padding after the last tensor."""
        return self.encode_header() + bytes(sum(self._padded(tensor) for tensor in self.tensors))

    def encode_header(self) -> bytes:
        """Everything before the data, with the padding that leads to it."""
        self.fields, self._out = [], bytearray(b"GGUF")
        self._number("version", "I", self.version)
        self._number("tensor count", "Q", len(self.tensors))
        self._number("value count", "Q", len(self.values))
        for key, (code, value) in self.values:
            self._text("key length", key)
            self._number("value type", "I", code)
            self._value(code, value)
        offset = 0
        for tensor in self.tensors:
            self._text("name length", tensor.name)
            self._number("dimension count", "I", len(tensor.shape))
            for size in tensor.shape:
                self._number("dimension", "q", size)
            self._number("tensor type", "i", tensor.code)
            self._number("tensor offset", "Q", offset if tensor.offset is None else tensor.offset)
            offset += self._padded(tensor)
        self._out += bytes(-len(self._out) % self.alignment if self.tensors else 0)
        return bytes(self._out)

    def find(self, what: str, nth: int = 0) -> Field:
        """Where the nth field of this kind lies in what was encoded last."""
        return [field for field in self.fields if field.what == what][nth]

    def _padded(self, tensor: Tensor) -> int:
        return tensor.size + -tensor.size % self.alignment

    def _value(self, code: int, value: object) -> None:
        if code == STRING:
            self._text("string length", value)
        elif code == ARRAY:
            item_code, items = value
            self._number("array type", "I", item_code)
            self._number("array length", "Q", len(items))
            for item in items:
                self._value(item_code, item)
        else:
            self._out += struct.pack(f"{self.order}{LETTERS[code]}", value)

    def _text(self, what: str, text: object) -> None:
        raw = text if isinstance(text, bytes) else str(text).encode()
        self._number(what, "Q", len(raw))
        self._out += raw

    def _number(self, what: str, letter: str, value: int) -> None:
        self.fields.append(Field(what, len(self._out), struct.calcsize(f"={letter}")))
        self._out += struct.pack(f"{self.order}{letter}", value)


def small_model(**changes: object) -> GgufFile:
    """A little of everything: numbers, texts, arrays long and short, two tensors."""
    values: list[tuple[str | bytes, Typed]] = [
        ("general.architecture", (STRING, "llama")),
        ("general.name", (STRING, "Small")),
        ("general.file_type", (U32, 2)),
        ("general.quantization_version", (U32, 2)),
        ("llama.context_length", (U32, 4096)),
        ("llama.embedding_length", (U32, 64)),
        ("llama.block_count", (U32, 2)),
        ("llama.attention.head_count", (ARRAY, (I32, [4, 2]))),
        ("llama.rope.freq_base", (F32, 10000.0)),
        ("tokenizer.ggml.model", (STRING, "gpt2")),
        ("tokenizer.ggml.tokens", (ARRAY, (STRING, ["a", "bc", "", "d" * 40]))),
        ("tokenizer.ggml.token_type", (ARRAY, (I32, [1, 1, 1, 1]))),
        ("tokenizer.ggml.add_bos_token", (BOOL, True)),
        ("tokenizer.chat_template", (STRING, "<|im_start|>{{ messages }}")),
    ]
    tensors = [Tensor("token_embd.weight", (64, 4), 2, 144), Tensor("blk.0.attn_norm.weight", (64,), 0, 256)]
    return GgufFile(**{"values": values, "tensors": tensors, **changes})
