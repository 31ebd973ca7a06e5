"""Responses of children, cut wherever a network may cut them: heads, framings, and what is no HTTP at all."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llamavisord.gateway import framing
from llamavisord.gateway.framing import (
    CHUNK_BYTES,
    HEAD_BYTES,
    LAST_CHUNK,
    EventPeek,
    Framing,
    GarbageError,
    Head,
    Response,
    as_chunk,
    dechunked,
    parse_head,
)

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CUTS = st.lists(st.integers(min_value=0, max_value=400), max_size=12)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    """The same bytes in pieces."""
    edges = [0, *sorted(min(at, len(data)) for at in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def fed(pieces: list[bytes], *, is_bodiless: bool = False) -> tuple[Response, list[bytes]]:
    """A response that was fed these pieces, and what it let go on."""
    response = Response(is_bodiless=is_bodiless)
    return response, [out for piece in pieces if (out := response.feed(piece))]


def head_of(text: bytes, *, is_bodiless: bool = False) -> Head:
    """The head that these lines make."""
    return parse_head(text.strip(b"\n").replace(b"\n", b"\r\n"), is_bodiless=is_bodiless)


@given(st.lists(st.binary(min_size=1, max_size=60), max_size=8), CUTS)
def test_a_chunked_body_goes_on_in_complete_chunks_however_it_is_cut(payloads: list[bytes], cuts: list[int]) -> None:
    """Whatever the cuts are, every piece that goes on is complete chunks, and together they are the body untouched."""
    body = b"".join(map(as_chunk, payloads)) + LAST_CHUNK
    response, pieces = fed(cut(CHUNKED + body, cuts))
    assert b"".join(pieces) == body
    assert b"".join(map(dechunked, pieces)) == b"".join(payloads)
    for piece in pieces:  # a piece alone is read to its end
        alone, _ = fed([CHUNKED, piece, LAST_CHUNK])
        assert alone.is_whole
    assert response.is_whole
    assert not response.has_excess


@given(st.binary(max_size=200), CUTS, st.binary(max_size=5))
def test_a_body_with_a_length_ends_there(payload: bytes, cuts: list[int], excess: bytes) -> None:
    """A body with a length goes on up to it, and what comes behind it is seen and dropped."""
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(payload) + payload + excess
    response, pieces = fed(cut(whole, cuts))
    assert b"".join(pieces) == payload
    assert response.is_whole
    assert response.has_excess == bool(excess)


@given(st.binary(max_size=200), CUTS)
def test_a_body_without_framing_ends_with_the_connection(payload: bytes, cuts: list[int]) -> None:
    """Without a length and without chunks a body is whole when the connection ends, and only then."""
    response, pieces = fed(cut(b"HTTP/1.1 200 OK\r\n\r\n" + payload, cuts))
    assert b"".join(pieces) == payload
    assert not response.is_whole
    assert response.feed_eof()
    assert response.head is not None
    assert not response.head.keeps_alive


@given(st.binary(max_size=300), CUTS)
def test_no_bytes_of_a_broken_child_do_more_than_be_garbage(noise: bytes, cuts: list[int]) -> None:
    """Arbitrary bytes are read or are garbage; no other error comes of them."""
    for start in (b"", b"HTTP/1.1 200 OK\r\n", CHUNKED):
        try:
            fed(cut(start + noise, cuts))
        except GarbageError:
            continue


@given(
    st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=4), CUTS, st.integers(min_value=8, max_value=100)
)
@example(payloads=[bytes(1), bytes(16)], cuts=[26], limit=8)  # all of a chunk but its line end
@example(payloads=[bytes(16)], cuts=[21], limit=8)  # and with half of that
def test_a_long_chunk_goes_on_as_several(payloads: list[bytes], cuts: list[int], limit: int) -> None:
    """A chunk too long to be held is split, and the payload stays the same."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(framing, "CHUNK_BYTES", limit)
        body = b"".join(map(as_chunk, payloads)) + LAST_CHUNK
        response, _ = fed([CHUNKED])
        out = b""
        for piece in cut(body, cuts):
            out += response.feed(piece)
            line = len(b"%x\r\n" % limit)
            assert len(response._held) <= line + limit + 1  # all but the last byte of a chunk's line end
        assert response.is_whole
        assert dechunked(out) == b"".join(payloads)


def test_a_huge_chunk_is_not_held_until_it_is_whole() -> None:
    """Of a chunk that never ends, no more than the limit is held."""
    response, _ = fed([CHUNKED, b"7fffffffffff\r\n"])
    passed = 0
    for _ in range(80):
        passed += len(dechunked(response.feed(b"x" * 65536)))
        assert len(response._held) <= CHUNK_BYTES
    assert passed >= 80 * 65536 - CHUNK_BYTES


def test_interim_heads_are_skipped() -> None:
    """100 Continue and its like are no answer."""
    response, pieces = fed(
        [
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        ]
    )
    assert response.head is not None
    assert response.head.status == 200
    assert pieces == [b"ok"]


@pytest.mark.parametrize(
    "noise",
    [
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * HEAD_BYTES,
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * HEAD_BYTES + b"\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * (HEAD_BYTES // 20),
        b"x" * (HEAD_BYTES + 1),
    ],
    ids=["endless field", "long field", "endless interims", "endless line"],
)
def test_an_endless_head_is_garbage(noise: bytes) -> None:
    """No head is read beyond its bound, neither in one piece nor byte by byte."""
    with pytest.raises(GarbageError):
        fed([noise])
    with pytest.raises(GarbageError):
        fed([noise[at : at + 1000] for at in range(0, len(noise), 1000)])


@pytest.mark.parametrize(
    "text",
    [
        b"HTTP/2 200 OK",
        b"HTTP/1.1 20 OK",
        b"HTTP/1.1 2000 OK",
        b"HTTP/1.1200 OK",
        b"http/1.1 200 OK",
        b"ICY 200 OK",
        b"HTTP/1.1 200 OK\nNo colon",
        b"HTTP/1.1 200 OK\nSpace : before colon",
        b"HTTP/1.1 200 OK\n: no name",
        b"HTTP/1.1 200 OK\nA: folded\n  value",
        b"HTTP/1.1 200 OK\nA: nul\0",
        b"HTTP/1.1 200 OK\nA: bare\rreturn",
        b"HTTP/1.1 200 OK\nContent-Length: 1\nTransfer-Encoding: chunked",
        b"HTTP/1.1 200 OK\nContent-Length: 1\nContent-Length: 2",
        b"HTTP/1.1 200 OK\nContent-Length: 1, 1",
        b"HTTP/1.1 200 OK\nContent-Length: -1",
        b"HTTP/1.1 200 OK\nContent-Length: +1",
        b"HTTP/1.1 200 OK\nContent-Length: 0x1",
        b"HTTP/1.1 200 OK\nContent-Length:",
        b"HTTP/1.1 200 OK\nContent-Length: 99999999999999999999",
        b"HTTP/1.1 200 OK\nTransfer-Encoding: gzip",
        b"HTTP/1.1 200 OK\nTransfer-Encoding: gzip, chunked",
        b"HTTP/1.1 200 OK\nTransfer-Encoding: chunked\nTransfer-Encoding: chunked",
    ],
)
def test_a_malformed_head_is_garbage(text: bytes) -> None:
    """A head that two readers could read differently is not read at all."""
    with pytest.raises(GarbageError):
        head_of(text)


def test_another_protocol_is_garbage() -> None:
    """A child may not switch protocols."""
    with pytest.raises(GarbageError):
        fed([b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"])


@pytest.mark.parametrize(
    "noise",
    [
        b"x\r\n",
        b"\r\n",
        b"-1\r\n",
        b"+1\r\n",
        b" 1\r\n",
        b"0x1\r\n",
        b"1_0\r\n",
        b"1\n",
        b"1\rx",
        b"2\r\nabcd",
        b"2\r\nab\rx",
        b"1234567890abcdef0",
        b"1;" + b"x" * 300,
        b"1" + b" " * 20,
        b"0\r\nA: " + b"x" * 10000,
    ],
)
def test_malformed_chunks_are_garbage(noise: bytes) -> None:
    """What is no chunk is garbage as soon as that is certain, in one piece or byte by byte."""
    with pytest.raises(GarbageError):
        fed([CHUNKED, noise])
    with pytest.raises(GarbageError):
        fed([CHUNKED, *(noise[at : at + 1] for at in range(len(noise)))])


def test_trailers_are_not_passed_on() -> None:
    """The fields behind a chunked body are dropped, and its end is still its end."""
    body = b"2\r\nok\r\n0\r\nA: b\r\nC: d\r\n\r\n"
    for pieces in ([body], [body[at : at + 1] for at in range(len(body))]):
        response, out = fed([CHUNKED, *pieces])
        assert b"".join(out) == b"2\r\nok\r\n" + LAST_CHUNK
        assert response.is_whole
        assert not response.has_excess


def test_chunk_extensions_are_read() -> None:
    """A chunk may say something of itself; nobody listens."""
    response, out = fed([CHUNKED, b"2;a=b\r\nok\r\n0\r\n\r\nmore"])
    assert dechunked(b"".join(out)) == b"ok"
    assert response.is_whole
    assert response.has_excess


@pytest.mark.parametrize(
    ("text", "is_bodiless", "expected"),
    [
        (b"HTTP/1.1 200 OK\nContent-Length: 7", False, (Framing.LENGTH, 7)),
        (b"HTTP/1.1 200 OK\nContent-Length: 7\ncontent-length: 7", False, (Framing.LENGTH, 7)),
        (b"HTTP/1.1 200 OK\nContent-Length: 7", True, (Framing.NONE, 0)),
        (b"HTTP/1.1 200 OK\nContent-Length: 0", False, (Framing.NONE, 0)),
        (b"HTTP/1.1 204 No Content", False, (Framing.NONE, 0)),
        (b"HTTP/1.1 304 Not Modified\nContent-Length: 7", False, (Framing.NONE, 0)),
        (b"HTTP/1.1 200 OK\nTransfer-Encoding: Chunked", False, (Framing.CHUNKED, 0)),
        (b"HTTP/1.1 200 OK\nTransfer-Encoding: chunked", True, (Framing.NONE, 0)),
        (b"HTTP/1.1 200 OK", False, (Framing.CLOSE, 0)),
    ],
)
def test_the_framing_of_a_body(text: bytes, is_bodiless: bool, expected: tuple[Framing, int]) -> None:
    """How a body ends follows from its head and from what was asked."""
    head = head_of(text, is_bodiless=is_bodiless)
    assert (head.framing, head.length) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"HTTP/1.1 200 OK\nContent-Length: 1", True),
        (b"HTTP/1.1 200 OK\nContent-Length: 1\nConnection: Keep-Alive, Close", False),
        (b"HTTP/1.0 200 OK\nContent-Length: 1", False),
        (b"HTTP/1.0 200 OK\nContent-Length: 1\nConnection: keep-alive", True),
        (b"HTTP/1.1 200 OK", False),
    ],
)
def test_whether_a_connection_goes_on(text: bytes, expected: bool) -> None:
    """A connection goes on by its version, unless its head or its framing says otherwise."""
    assert head_of(text).keeps_alive is expected


def test_a_head_is_read_as_it_stands() -> None:
    """Its lines are kept as they were sent, in order, and each is known by its name in lower case."""
    head = head_of(b"HTTP/1.1 503 Loading model\nContent-Type: Application/JSON; charset=utf-8\nX-a:\t b c \nX-Empty:")
    assert (head.status, head.reason, head.content_type) == (503, b"Loading model", b"application/json")
    assert head.fields[1:] == ((b"x-a", b"X-a:\t b c "), (b"x-empty", b"X-Empty:"))
    assert head_of(b"HTTP/1.1 200").reason == b""


def test_a_response_without_a_body_is_whole_with_its_head() -> None:
    """The answer to a HEAD ends with its head, whatever length it names; more is not part of it."""
    response, out = fed([b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n"], is_bodiless=True)
    assert response.is_whole
    assert out == []
    assert response.feed(b"HTTP/1.1") == b""
    assert response.has_excess


def test_a_connection_that_ends_early_leaves_a_response_that_is_not_whole() -> None:
    """The end of a connection is the end of a body only where nothing else tells it."""
    for sent in (b"", b"HTTP/1.1 200 OK\r\n", CHUNKED, CHUNKED + b"2\r\nok\r\n", CHUNKED + b"2\r\nok\r\n0\r\n"):
        response, _ = fed([sent])
        assert not response.feed_eof()


@pytest.mark.parametrize(
    ("payload", "has_data", "is_idle"),
    [
        (b"", False, True),
        (b": ping\n\n", False, True),
        (b":\r\n\r\n:\r\n", False, True),
        (b": data:", False, False),
        (b": data: no\n", False, True),
        (b"event: message_start\n", False, False),
        (b"event: message_start\ndata: {}", True, False),
        (b"data: {}", True, False),
        (b"data:", True, False),
        (b"data\n", True, False),
        (b"data", False, False),
        (b"database: x\n", False, False),
        (b"retry: 3\n\n: ping\n", False, False),
        (b": ping\r\rdata: x", True, False),
    ],
)
def test_where_an_event_stream_begins_to_speak(payload: bytes, has_data: bool, is_idle: bool) -> None:
    """Data begins with a line of it; comments and blank lines say nothing. Cuts change nothing about that."""
    for pieces in ([payload], [payload[at : at + 1] for at in range(len(payload))]):
        peek = EventPeek()
        for piece in pieces:
            if not peek.has_data:
                peek.feed(piece)
        assert (peek.has_data, peek.is_idle) == (has_data, is_idle)


def test_a_response_shows_its_state() -> None:
    """Its repr says how far it is."""
    response, _ = fed([CHUNKED, b"5\r\nab"])
    assert repr(response) == "<Response 200, not whole, 5 bytes held>"


def test_a_response_is_no_work_for_the_garbage_collector() -> None:
    """It goes when nobody holds it, since there is one for every request."""
    response = Response()
    response.feed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
    gone = weakref.ref(response)
    gc.disable()
    try:
        del response
        assert gone() is None
    finally:
        gc.enable()


def test_what_is_remembered_of_heads_is_bounded() -> None:
    """Lines of long heads are read anew each time, so that a child cannot fill the memory with them."""
    before = framing._known_field.cache_info().currsize
    long = b"X-A: " + b"a" * 4096
    assert parse_head(b"HTTP/1.1 200 OK\r\n" + long).fields == ((b"x-a", long),)
    assert framing._known_field.cache_info().currsize == before
