"""The header reader on files that lie: whatever is in them, one error or a header, and little is read for it."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ggufs
from gguf_verdict import Verdicts, verdicts_of
from ggufs import ARRAY, LETTERS, STRING, U32, GgufFile, Tensor, Typed, small_model
from llamavisor import gguf
from llamavisor.gguf import GgufError, Header, cursor
from llamavisor.gguf.header import WANTED

_NUMBERS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 31, 32, 33, 42, 63, 64, 65, 255, 256, 2**16, 2**24, 2**28, 2**31 - 1]
_NUMBERS += [2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1]
"""Numbers at which readers break."""


class Source:
    """Bytes that count how they are read; beyond those that are given there are zeros up to any size."""

    def __init__(self, raw: bytes, size: int | None = None) -> None:
        self.raw = raw
        self.size = len(raw) if size is None else size
        self.bytes_read = 0
        self.last = 0

    def read_at(self, offset: int, length: int) -> bytes:
        """A piece of the file."""
        assert self.last <= offset <= self.size, "reads go forward only"
        assert 0 < length <= cursor.CHUNK_BYTES, "reads are bounded"
        self.last = offset
        length = min(length, self.size - offset)
        self.bytes_read += length
        return self.raw[offset : offset + length].ljust(length, b"\0")

    def parse(self) -> Header | GgufError:
        """What comes of it, which is nothing but a header or the one error."""
        try:
            return gguf.parse(self.read_at, self.size)
        except GgufError as exc:
            error = exc
        assert 0 <= error.offset <= self.size
        assert error.reason.isprintable()
        assert len(str(error)) < 400
        return error


def check(raw: bytes) -> Header | GgufError:
    """Reads a small file, which may be anything, and no part of it twice."""
    source = Source(raw)
    result = source.parse()
    assert source.bytes_read <= len(raw)
    if isinstance(result, Header):
        assert result.tensor_count == sum(share.tensors for share in result.type_mix)
        assert result.parameter_count == sum(share.elements for share in result.type_mix)
        assert 0 <= result.last_tensor_bytes <= result.data_bytes
        assert result.is_whole == (len(raw) >= result.min_file_bytes)
    return result


_KEYS = st.one_of(
    st.sampled_from([key.decode().replace("*", "llama") for key in sorted(WANTED)]),
    st.text(min_size=1, max_size=12),
    st.binary(min_size=1, max_size=12),
)
_STRINGS = st.one_of(st.text(max_size=20), st.binary(max_size=20))


def _scalars(code: int) -> st.SearchStrategy[object]:
    if code == STRING:
        return _STRINGS
    if code == ggufs.BOOL:
        return st.booleans()
    if code in (ggufs.F32, ggufs.F64):
        return st.floats(width=32 if code == ggufs.F32 else 64)
    bits = {"b": 8, "h": 16, "i": 32, "q": 64}[LETTERS[code].lower()]
    return (
        st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if LETTERS[code].islower() else st.integers(0, 2**bits - 1)
    )


@st.composite
def typed(draw: st.DrawFn) -> Typed:
    """A value of any type, arrays among them."""
    code = draw(st.sampled_from([*LETTERS, STRING, ARRAY]))
    if code != ARRAY:
        return code, draw(_scalars(code))
    item_code = draw(st.sampled_from([*LETTERS, STRING]))
    return ARRAY, (item_code, draw(st.lists(_scalars(item_code), max_size=6)))


@st.composite
def files(draw: st.DrawFn) -> GgufFile:
    """Files that are right in form and say anything."""
    values = draw(st.dictionaries(_KEYS, typed(), max_size=8))
    values.pop("general.alignment", None)
    names = draw(st.lists(st.text("abk.01lora_", min_size=1, max_size=8), max_size=4, unique=True))
    tensors = []
    for name in names:
        rows = draw(st.lists(st.integers(0, 3), max_size=3))
        length = draw(st.integers(1, 3))
        count = length
        for size in rows:
            count *= size
        tensors.append(Tensor(name, (32 * length, *rows), 8, 34 * count))
    return GgufFile(list(values.items()), tensors, version=draw(st.sampled_from([2, 3])))


@settings(deadline=None, max_examples=300)
@given(files())
def test_any_file_that_is_right_in_form_is_read(file: GgufFile) -> None:
    """Whatever the values say, and of whatever type they are, there is a header; few types are required."""
    raw = file.encode()
    result = check(raw)
    keys = [key.encode() if isinstance(key, str) else key for key, _ in file.values]
    if isinstance(result, GgufError):
        assert "llama.cpp takes only" in result.reason or len(set(keys)) < len(keys), result
    else:
        assert result.file_bytes == len(raw) >= result.min_file_bytes
        assert result.parameter_count == sum(tensor.size // 34 * 32 for tensor in file.tensors)
        assert result.data_offset + sum(tensor.size + -tensor.size % 32 for tensor in file.tensors) == len(raw)


@settings(deadline=None, max_examples=300)
@given(files(), st.data())
def test_a_file_with_wrong_numbers_is_an_error_or_a_header(file: GgufFile, data: st.DataObject) -> None:
    """Lengths, counts, types and offsets may be anything: nothing but the one error comes of it, and little is read."""
    raw = bytearray(file.encode())
    for field in data.draw(st.lists(st.sampled_from(file.fields), min_size=1, max_size=3)):
        number = data.draw(st.one_of(st.sampled_from([*_NUMBERS, len(raw)]), st.integers(0, 2**64 - 1)))
        raw[field.offset : field.offset + field.size] = (number % 2 ** (8 * field.size)).to_bytes(field.size, "little")
    check(bytes(raw))


@settings(deadline=None, max_examples=300)
@given(files(), st.data())
def test_a_damaged_file_is_an_error_or_a_header(file: GgufFile, data: st.DataObject) -> None:
    """Bytes that are lost, added or changed anywhere are no exception of another kind."""
    raw = file.encode()
    begin = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(begin, min(len(raw), begin + 16)))
    check(raw[:begin] + data.draw(st.binary(max_size=16)) + raw[end:])


@settings(deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_noise_is_an_error_or_a_header(noise: bytes, has_magic: bool) -> None:
    """Random bytes, also behind the right magic and version, are no exception of another kind."""
    check(b"GGUF\x03\0\0\0" + noise if has_magic else noise)


def test_a_file_cut_off_anywhere_may_still_become_whole() -> None:
    """Of every beginning of a file it is said that it ends too early, and of every length whether it is whole."""
    file = small_model()
    whole, header_end = file.encode(), len(file.encode_header())
    last_field = file.fields[-1]
    described = last_field.offset + last_field.size
    assert described < header_end < len(whole)
    for size in range(len(whole) + 1):
        result = check(whole[:size])
        if size < described:
            assert isinstance(result, GgufError), size
            assert result.is_partial, (size, result)
        else:
            assert isinstance(result, Header), (size, result)
            assert result.is_whole == (size == len(whole))
            assert replace(result, file_bytes=len(whole)) == check(whole)


@pytest.mark.parametrize("chunk_bytes", [*range(1, 40), 100, 333])
def test_it_does_not_matter_where_a_piece_ends(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    """Every number and every string may lie across the end of what was read at once."""
    raw = small_model().encode()
    blank = raw[:300].ljust(20_000, b"\0")
    expected = check(raw)
    monkeypatch.setattr(cursor, "CHUNK_BYTES", chunk_bytes)
    assert gguf.parse(lambda offset, length: raw[offset : offset + length], len(raw)) == expected
    with pytest.raises(GgufError) as caught:
        gguf.parse(lambda offset, length: blank[offset : offset + length], len(blank))
    assert caught.value.is_partial


def test_a_large_vocabulary_costs_no_memory() -> None:
    """128,000 tokens and their merges are passed over with a chunk or two in memory, and each byte is read once."""
    strings = [f"token{number}" for number in range(128_000)]
    lists = [(f"tokenizer.ggml.{name}", (ARRAY, (STRING, strings))) for name in ("tokens", "merges")]
    file = small_model(values=[("general.architecture", (STRING, "llama")), *lists])
    raw = file.encode_header()
    source = Source(raw)
    tracemalloc.start()
    try:
        header = source.parse()
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(header, Header)
    assert header.vocabulary_size == 128_000
    assert peak_bytes < 4 * cursor.CHUNK_BYTES
    assert source.bytes_read < len(raw) + cursor.CHUNK_BYTES


def test_what_is_not_needed_is_not_read() -> None:
    """Long strings, and arrays of numbers of any length, are jumped over."""
    long = ("x.text", (STRING, "x" * 10_000_000))
    scores = ("tokenizer.ggml.scores", (ARRAY, (ggufs.F64, [0.0] * 1_000_000)))
    source = Source(GgufFile([long, scores, ("general.name", (STRING, "after"))], [Tensor("a")]).encode())
    header = source.parse()
    assert isinstance(header, Header)
    assert header.name == "after"
    assert source.bytes_read <= 3 * cursor.CHUNK_BYTES


def test_tensor_data_is_not_read() -> None:
    """Of a file of a terabyte no more is read than its header's chunk."""
    tensors = [Tensor("a", (2**30, 256), 0, 2**40)]
    source = Source(small_model(tensors=tensors).encode_header(), size=2**41)
    header = source.parse()
    assert isinstance(header, Header)
    assert header.is_whole
    assert source.bytes_read <= cursor.CHUNK_BYTES


def _huge(values: bytes, n_values: int = 1, n_tensors: int = 0) -> bytes:
    counts = n_tensors.to_bytes(8, "little") + n_values.to_bytes(8, "little")
    return b"GGUF\x03\0\0\0" + counts + values


def _array_of_strings(count: int) -> bytes:
    head = GgufFile([("x.strings", (ARRAY, (STRING, [])))]).encode()[24:-8]
    return head + count.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("raw", "size", "limit_bytes"),
    [
        # A header of zeros without end: empty strings, then an empty key.
        (_huge(_array_of_strings(4 * 1024 * 1024), 2), 2**62, 34_000_000),
        (_huge(_array_of_strings(4 * 1024 * 1024 + 1)), 2**62, 300_000),
        (_huge(_array_of_strings(2**63)), 2**62, 300_000),
        (_huge(b"", 0, 128 * 1024), 2**62, 300_000),
        (_huge(b"", 0, 2**40), 2**62, 300_000),
        (_huge(b"", 16 * 1024), 2**62, 300_000),
        # Each string so long that the next length lies in another chunk.
        (_huge(_array_of_strings(256) + (2**20).to_bytes(8, "little").ljust(2**20 + 8, b"\0") * 255, 2), 2**62, 2**27),
    ],
    ids=["strings", "more-strings", "endless-strings", "tensors", "more-tensors", "values", "long-strings"],
)
def test_a_file_that_promises_too_much_costs_little(raw: bytes, size: int, limit_bytes: int) -> None:
    """The most that a liar gets is a bounded read, a chunk at a time, and it is over in a second or two."""
    source = Source(raw, size)
    began = time.process_time()
    result = source.parse()
    assert isinstance(result, GgufError)
    assert source.bytes_read <= limit_bytes
    assert time.process_time() - began < 20


def test_many_names_stay_within_bounds() -> None:
    """As many tensors and values as are allowed at all, with the longest names, take a few megabytes."""
    tensors = [Tensor(f"{number:063}", (), 24, 0) for number in range(20_000)]
    values: list[tuple[str, Typed]] = [(f"{number:01024}", (U32, 0)) for number in range(2000)]
    raw = GgufFile(values, tensors).encode()
    tracemalloc.start(1)
    try:
        Source(raw).parse()
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 20_000 * 200 + 2000 * 1200 + 4 * cursor.CHUNK_BYTES


@pytest.fixture
def verdicts(llama_server: Path) -> Iterator[Verdicts]:
    """llama.cpp's own reader."""
    with verdicts_of(llama_server) as verdicts:
        if verdicts is None:
            pytest.skip("this llama-server has its libraries inside")
        yield verdicts


@pytest.mark.real
@pytest.mark.parametrize("seed", range(4))
def test_llama_cpp_has_the_same_verdict(tmp_path: Path, verdicts: Verdicts, seed: int) -> None:
    """Of files with wrong numbers, llama.cpp takes those that are taken here and finds their data at the same place."""
    dice = random.Random(seed)
    path = tmp_path / "f.gguf"
    taken = 0
    for _ in range(1000):
        file = small_model()
        raw = bytearray(file.encode())
        fields = dice.sample(file.fields, dice.choice([0, 1, 1, 1, 2]))
        for field in fields:
            number = dice.choice([*_NUMBERS, len(raw), len(raw) - field.offset])
            raw[field.offset : field.offset + field.size] = (number % 2 ** (8 * field.size)).to_bytes(
                field.size, "little"
            )
        if not fields:
            raw[dice.randrange(len(raw))] = dice.randrange(256)
        del raw[dice.choice([len(raw), len(raw), dice.randrange(len(raw))]) :]
        path.write_bytes(raw)
        result, verdict = check(bytes(raw)), verdicts.ask(path)
        if isinstance(result, Header) and any(share.type.startswith("type ") for share in result.type_mix):
            assert verdict is None  # newer than this llama.cpp, and taken here: see `container`
            continue
        if isinstance(result, GgufError) and "llama.cpp takes only" in result.reason:
            continue  # llama.cpp refuses it too, but later
        # A file that ends within the padding before its data is partial here, and refused there.
        is_taken = isinstance(result, Header) and (not result.tensor_count or len(raw) >= result.data_offset)
        assert (verdict is not None) == is_taken, (fields, result)
        if verdict is not None:
            taken += 1
            assert verdict["data_offset"] == result.data_offset
            assert verdict["tensors"] == result.tensor_count
    assert 100 < taken < 900
