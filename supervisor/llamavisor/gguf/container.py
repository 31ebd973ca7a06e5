"""What is in a GGUF file: the values of its header that are wanted, and a summary of its tensors.

The format is that of ggml's docs/gguf.md. What llama.cpp refuses (`gguf_init_from_reader` in its ggml/src/gguf.cpp) is
refused here, with one exception: a tensor type that is newer than this program is not an error, because the
llama-server in use may know it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from llamavisor.gguf.cursor import Cursor, GgufError, ReadAt
from llamavisor.gguf.tensortypes import REMOVED_TYPES, TENSOR_TYPES, type_name

Value = bool | int | float | str | tuple[bool | int | float, ...]

MAX_VALUES = 16 * 1024
"""No file has more values. Models have less than a hundred."""
MAX_TENSORS = 128 * 1024
"""No file has more tensors. The largest model with every expert apart has 46,000."""
MAX_KEY_BYTES = 1024
"""No key is longer. The format allows 64 KiB, and the longest in use have 60 bytes."""
MAX_LABEL_BYTES = 1024
"""Longer strings are cut off here."""
MAX_TEXT_BYTES = 256 * 1024
"""A longer chat template is left out. Those in use have up to 40 KB."""
MAX_LAYERS = 1024
"""Longer arrays are not kept; llama.cpp takes 512 layers (LLAMA_MAX_LAYERS)."""

_INPUTS = (b"token_embd.", b"position_embd.", b"token_types.", b"per_layer_token_embd.")
"""How tensors of the input layer begin: LLM_TENSOR_LAYER_INPUT in llama.cpp's src/llama-arch.cpp."""
_LAYER = b"blk."
_EXPERTS = b"exps."
"""In the names of experts: those that --cpu-moe keeps on the CPU (LLM_FFN_EXPS_REGEX in common/common.h)."""

_MAGIC = b"GGUF"
_OTHER_FORMATS: tuple[tuple[tuple[bytes, ...], str, str], ...] = (
    ((b"lmgg", b"fmgg", b"tjgg"), "this is a GGML file of 2023, from before GGUF", "Convert the model again."),
    ((b"vers",), "this is a Git LFS pointer, not the file itself", "Fetch it with `git lfs pull`."),
    ((b"<!do", b"<!DO", b"<htm"), "this is a web page, not a model", "Download it again."),
    ((b"PK\x03\x04",), "this is a zip file or a PyTorch checkpoint", "Convert the model to GGUF."),
)
"""What is often found under the name of a model, by its first four bytes."""

_STRING, _ARRAY = 8, 9
_SCALARS: Mapping[int, struct.Struct] = {
    code: struct.Struct(f"<{letter}") for code, letter in enumerate("BbHhIif?  Qqd") if letter != " "
}
_TYPE_NAMES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64")
_REQUIRED_TYPES: Mapping[bytes, int] = {
    b"general.alignment": 4,
    b"general.architecture": _STRING,
    b"split.no": 2,
    b"split.count": 2,
    b"split.tensors.count": 5,
}
"""llama.cpp takes these in no other type, whatever the file is for."""

_MAX_DIMENSIONS = 4
_MAX_NAME_BYTES = 63
"""GGML_MAX_NAME in ggml.h, without its closing zero."""
_MAX_TYPE = 1023
"""Types of other programs made from llama.cpp go to 400; beyond this it is no type, but noise."""
_MAX_SIZE = 2**63 - 1
_DEFAULT_ALIGNMENT = 32
_LEAST_VALUE_BYTES = 8 + 1 + 4 + 1
_LEAST_TENSOR_BYTES = 8 + 4 + 4 + 8

_U32 = struct.Struct("<I")
_COUNT = struct.Struct("<q")
_SHAPES = tuple(struct.Struct(f"<{dimensions}qiQ") for dimensions in range(_MAX_DIMENSIONS + 1))
_ARRAY_HEAD = struct.Struct("<IQ")


@dataclass(frozen=True, slots=True)
class TypeShare:
    """How much of a file is stored in one type.

    Attributes:
        type: its name, as `Q4_K`; `type 57` when it is newer than this program.
        tensors: how many tensors.
        elements: how many numbers.
        size_bytes: how many bytes.
    """

    type: str
    tensors: int
    elements: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Places:
    """How many bytes of a file's tensors belong where, by their names. Padding is not counted.

    Attributes:
        input_bytes: what a token is looked up in, which llama.cpp keeps on the CPU.
        layer_bytes: layers, from 0 on; empty when no tensor is named after one, or when there are too many.
        expert_bytes: of `layer_bytes`, what are experts of a mixture.
        other_bytes: the output layer, and whatever else is named otherwise.
    """

    input_bytes: int
    layer_bytes: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    other_bytes: int


@dataclass(frozen=True, slots=True)
class Tensors:
    """The tensors of a file.

    Attributes:
        count: how many there are.
        names: their names, without what follows a zero byte.
        mix: how they are stored, the largest part first.
        data_offset: where the first one begins in the file.
        end_offset: where the last one ends in the file, without padding: llama.cpp needs so many bytes.
        last_bytes: the size of the last one.
        places: what belongs where.
    """

    count: int
    names: AbstractSet[bytes]
    mix: tuple[TypeShare, ...]
    data_offset: int
    end_offset: int
    last_bytes: int
    places: Places


@dataclass(frozen=True, slots=True)
class Container:
    """What a GGUF file holds.

    Attributes:
        version: of the format, 2 or 3.
        values: the wanted values by their keys; arrays only when they are short and hold numbers.
        lengths: the lengths of all wanted arrays by their keys.
        tensors: what is known of the tensors.
    """

    version: int
    values: Mapping[str, Value]
    lengths: Mapping[str, int]
    tensors: Tensors


def walk(read_at: ReadAt, size: int, wanted: AbstractSet[bytes], texts: AbstractSet[bytes] = frozenset()) -> Container:
    """Reads the header of a file from its beginning to the tensors' data, of which nothing is read.

    Args:
        read_at: reads the file.
        size: the file's size in bytes.
        wanted: keys whose values are kept; `*.context_length` stands for that key of any architecture.
        texts: those of them that are long strings, kept up to `MAX_TEXT_BYTES` and else left out.

    Raises:
        GgufError: it is not a GGUF file that llama.cpp reads.
    """
    cursor = Cursor(read_at, size)
    try:
        return _walk(cursor, wanted, texts)
    except GgufError as exc:
        if exc.is_partial or not cursor.is_before_zeros():
            raise
        raise GgufError(exc.reason, exc.offset, is_partial=True, hint=exc.hint) from None


def peek(read_at: ReadAt, size: int, wanted: AbstractSet[bytes], until: bytes) -> Container:
    """What stands before the first array whose key begins with `until`, and how long that is; nothing behind is read.

    Of the tensors their number alone is known.

    Args:
        read_at: reads the file.
        size: the file's size in bytes.
        wanted: keys whose values are kept, as for `walk`.
        until: a beginning of keys.

    Raises:
        GgufError: it is not a GGUF file that llama.cpp reads, as far as it was read.
    """
    cursor = Cursor(read_at, size)
    version, n_tensors, n_values = _read_counts(cursor)
    values, lengths = _walk_values(cursor, n_values, wanted | _REQUIRED_TYPES.keys(), frozenset(), until)
    return Container(version, values, lengths, Tensors(n_tensors, frozenset(), (), 0, 0, 0, _places({})))


def printable(text: str, limit: int = MAX_LABEL_BYTES) -> str:
    """`text` as one line for people: what is not printable is escaped, what is too long is cut off."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else f"{text[:limit]}…"


def _walk(cursor: Cursor, wanted: AbstractSet[bytes], texts: AbstractSet[bytes]) -> Container:
    version, n_tensors, n_values = _read_counts(cursor)
    values, lengths = _walk_values(cursor, n_values, wanted | _REQUIRED_TYPES.keys(), texts)
    alignment = values.get("general.alignment", _DEFAULT_ALIGNMENT)
    assert isinstance(alignment, int)  # noqa: S101 (its type is required)
    tensors = _walk_tensors(cursor, n_tensors, alignment)
    return Container(version, values, lengths, tensors)


def _read_counts(cursor: Cursor) -> tuple[int, int, int]:
    """The version, and how many tensors and values there are."""
    version = _read_version(cursor)
    n_tensors = _read_count(cursor, "tensors", MAX_TENSORS)
    n_values = _read_count(cursor, "values", MAX_VALUES)
    cursor.check_room(n_tensors * _LEAST_TENSOR_BYTES + n_values * _LEAST_VALUE_BYTES)
    return version, n_tensors, n_values


def _read_version(cursor: Cursor) -> int:
    if cursor.size == 0:
        raise GgufError("the file is empty", 0, is_partial=True)
    magic = cursor.take_bytes(len(_MAGIC))
    if magic != _MAGIC:
        for beginnings, reason, hint in _OTHER_FORMATS:
            if magic in beginnings:
                raise GgufError(reason, 0, hint=hint)
        said = f'"{magic.decode("ascii")}"' if magic.isalnum() else f"bytes {magic.hex(' ')}"
        raise GgufError(f"the file begins with {said}, not with GGUF", 0)
    offset = cursor.offset
    version: int = cursor.unpack(_U32)[0]
    if version in (2, 3):
        return version
    if version == 1:
        raise GgufError("GGUF version 1 of 2023 is no longer read", offset, hint="Convert the model again.")
    if version & 0xFFFF == 0 and version:
        raise GgufError(
            "this is a big-endian GGUF file, which no llama.cpp on this machine reads",
            offset,
            hint="Download the little-endian file, or convert it with gguf_convert_endian.py.",
        )
    raise GgufError(f"GGUF version {version} is not known; 2 and 3 are", offset)


def _read_count(cursor: Cursor, what: str, limit: int) -> int:
    begin = cursor.offset
    count: int = cursor.unpack(_COUNT)[0]
    if not 0 <= count <= limit:
        raise GgufError(f"the file would have {count} {what}", begin)
    return count


def _walk_values(
    cursor: Cursor, count: int, wanted: AbstractSet[bytes], texts: AbstractSet[bytes], until: bytes = b""
) -> tuple[dict[str, Value], dict[str, int]]:
    """The wanted values, and the lengths of the wanted arrays; up to the first array whose key begins with `until`."""
    values: dict[str, Value] = {}
    lengths: dict[str, int] = {}
    seen: set[bytes] = set()
    for number in range(count):
        cursor.inside = f"value {number}"
        begin = cursor.offset
        length = cursor.take_length()
        if not 0 < length <= MAX_KEY_BYTES:
            raise GgufError(f"the key of value {number} would have {length} bytes", begin)
        key = cursor.take_bytes(length)
        if key in seen:
            raise GgufError(f"the key {_shown(key)} is there twice", begin)
        seen.add(key)
        cursor.inside = f"the value of {_shown(key)}"
        begin = cursor.offset
        code: int = cursor.unpack(_U32)[0]
        required = _REQUIRED_TYPES.get(key)
        if required is not None and code != required:
            reason = f"{cursor.inside} is of type {_value_type_name(code)}; llama.cpp takes only "
            raise GgufError(reason + _value_type_name(required), begin)
        is_wanted = key in wanted or b"*" + key[key.find(b".") :] in wanted
        value: Value | None
        if until and code == _ARRAY and key.startswith(until):
            _, array_length = cursor.unpack(_ARRAY_HEAD)
            cursor.check_room(array_length)
            lengths[key.decode(errors="replace")] = array_length
            break
        if code in _SCALARS:
            value = _read_scalar(cursor, code)
        elif code == _STRING:
            value = _read_string(cursor, is_wanted=is_wanted, is_text=key in texts)
        elif code == _ARRAY:
            array_length, value = _read_array(cursor, is_wanted=is_wanted)
            if is_wanted:
                lengths[key.decode(errors="replace")] = array_length
        else:
            raise GgufError(f"{cursor.inside} is of type {code}, which GGUF does not have", begin)
        if key == b"general.alignment" and (not isinstance(value, int) or value == 0 or value & (value - 1)):
            raise GgufError(f"{cursor.inside} is {value}, not a power of two", begin)
        if is_wanted and value is not None:
            values[key.decode(errors="replace")] = value
    return values, lengths


def _read_scalar(cursor: Cursor, code: int) -> bool | int | float:
    value: bool | int | float = cursor.unpack(_SCALARS[code])[0]
    return value


def _read_string(cursor: Cursor, *, is_wanted: bool, is_text: bool) -> str | None:
    length = cursor.take_length()
    cursor.check_room(length)
    if not is_wanted or (is_text and length > MAX_TEXT_BYTES):
        cursor.skip(length)
        return None
    kept = length if is_text else min(length, MAX_LABEL_BYTES)
    raw = cursor.take_bytes(kept)
    cursor.skip(length - kept)
    # llama.cpp reads strings as C does: up to the first zero byte.
    text = raw.partition(b"\0")[0].decode(errors="replace")
    return text if is_text else printable(text)


def _read_array(cursor: Cursor, *, is_wanted: bool) -> tuple[int, tuple[bool | int | float, ...] | None]:
    """The length of an array, and what is in it if that is wanted, short and numbers."""
    begin = cursor.offset
    code, count = cursor.unpack(_ARRAY_HEAD)
    if code == _STRING:
        cursor.skip_strings(count)
        return count, None
    if code not in _SCALARS:
        kind = "arrays" if code == _ARRAY else f"type {code}"
        raise GgufError(f"{cursor.inside} is an array of {kind}, which GGUF does not have", begin)
    scalar = _SCALARS[code]
    if not is_wanted or count > MAX_LAYERS:
        cursor.skip(scalar.size * count)
        return count, None
    return count, cursor.unpack(struct.Struct(f"<{count}{scalar.format[1:]}"))


def _walk_tensors(cursor: Cursor, count: int, alignment: int) -> Tensors:
    names: set[bytes] = set()
    totals: dict[int, list[int]] = {}
    placed: dict[int, list[int]] = {}
    begin = end = 0
    last = b""
    unsized: list[int] | None = None
    """Totals of a tensor of unknown type, whose size is where the next one begins."""
    for number in range(count):
        cursor.inside = f"tensor {number}"
        at = cursor.offset
        length = cursor.take_length()
        if length > _MAX_NAME_BYTES:
            raise GgufError(f"the name of tensor {number} would have {length} bytes", at)
        name = cursor.take_bytes(length).partition(b"\0")[0]
        if name in names:
            raise GgufError(f"the tensor {_shown(name)} is there twice", at)
        names.add(name)
        dimensions: int = cursor.unpack(_U32)[0]
        if dimensions > _MAX_DIMENSIONS:
            raise GgufError(f"the tensor {_shown(name)} would have {dimensions} dimensions", at + 8 + length)
        *sizes, code, offset = cursor.unpack(_SHAPES[dimensions])
        elements = _count_elements(sizes, name, at)
        size = _size_of(code, sizes, elements, name, at)
        expected = end + (-end % alignment)
        if unsized is not None and offset >= expected and offset % alignment == 0 and offset <= _MAX_SIZE:
            unsized[2] += offset - begin
            _place(placed, last, offset - begin)
            expected = offset
            unsized = None
        if offset != expected:
            raise GgufError(f"the data of {_shown(name)} would begin at {offset} instead of {expected}", at)
        begin, end = offset, offset + (size or 0)
        if end > _MAX_SIZE:
            raise GgufError(f"the tensors up to {_shown(name)} would have {end} bytes", at)
        total = totals.setdefault(code, [0, 0, 0])
        total[0] += 1
        total[1] += elements
        total[2] += size or 0
        _place(placed, name, size or 0)
        unsized, last = (total if size is None else None), name
    data_offset = cursor.offset + (-cursor.offset % alignment if count else 0)
    shares = (TypeShare(type_name(code), *total) for code, total in totals.items())
    mix = tuple(sorted(shares, key=lambda share: (-share.size_bytes, -share.tensors, share.type)))
    return Tensors(count, names, mix, data_offset, data_offset + end, end - begin, _places(placed))


def _place(placed: dict[int, list[int]], name: bytes, size: int) -> None:
    """Adds a tensor to what was seen of its layer: all of it, and its experts. -1 is the input, -2 is all else."""
    at = -2
    if name.startswith(_LAYER):
        number = name[len(_LAYER) :].partition(b".")[0]
        if number.isdigit() and len(number) < 6:
            at = int(number)
    elif name.startswith(_INPUTS):
        at = -1
    both = placed.setdefault(at, [0, 0])
    both[0] += size
    if at >= 0 and _EXPERTS in name:
        both[1] += size


def _places(placed: Mapping[int, Sequence[int]]) -> Places:
    layers = max(placed, default=-1) + 1
    if layers > MAX_LAYERS:
        return Places(placed.get(-1, (0,))[0], (), (), sum(both[0] for at, both in placed.items() if at != -1))
    of_layers = [placed.get(at, (0, 0)) for at in range(layers)]
    return Places(
        input_bytes=placed.get(-1, (0,))[0],
        layer_bytes=tuple(both[0] for both in of_layers),
        expert_bytes=tuple(both[1] for both in of_layers),
        other_bytes=placed.get(-2, (0,))[0],
    )


def _count_elements(sizes: list[int], name: bytes, offset: int) -> int:
    elements = 1
    for size in sizes:
        if size < 0:
            raise GgufError(f"the tensor {_shown(name)} would have {size} rows", offset)
        elements *= size
    if elements >= _MAX_SIZE:
        raise GgufError(f"the tensor {_shown(name)} would have {elements} elements", offset)
    return elements


def _size_of(code: int, sizes: list[int], elements: int, name: bytes, offset: int) -> int | None:
    """Bytes of a tensor, None when its type is newer than this program."""
    kind = TENSOR_TYPES.get(code)
    if kind is None:
        if code in REMOVED_TYPES:
            reason = f"the tensor {_shown(name)} is {REMOVED_TYPES[code]}, which llama.cpp no longer reads"
            raise GgufError(reason, offset, hint="Download a newer file of the model, or quantize it again.")
        if not 0 <= code <= _MAX_TYPE:
            raise GgufError(f"the tensor {_shown(name)} is of type {code}, which ggml does not have", offset)
        return None
    row = sizes[0] if sizes else 1
    if row % kind.block:
        reason = f"the tensor {_shown(name)} has rows of {row}, and {kind.name} stores {kind.block} together"
        raise GgufError(reason, offset)
    return elements // kind.block * kind.block_bytes


def _value_type_name(code: int) -> str:
    return _TYPE_NAMES[code] if code < len(_TYPE_NAMES) else str(code)


def _shown(raw: bytes) -> str:
    return printable(raw.decode(errors="replace"), 80)
