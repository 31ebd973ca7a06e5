"""Reading how much a model is used, from a process that answers as it is told to."""

from __future__ import annotations

import itertools
import math
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import anyio
import pytest
from anyio.abc import SocketStream
from hypothesis import given
from hypothesis import strategies as st

from fakes.bare_router import free_port
from llamavisor import usage as usage_module
from llamavisor.errors import LlamavisorError
from llamavisor.usage import ANSWER_BYTES, KEPT_BYTES, Usage, UsageError, UsageReader, parse

KEY = "sesame-0451"
TEXT = b"""\
# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed, excluding cached tokens
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 56
# HELP llamacpp:prompt_tokens_cached_total Number of prompt tokens reused from the cache
# TYPE llamacpp:prompt_tokens_cached_total counter
llamacpp:prompt_tokens_cached_total 110
# HELP llamacpp:prompt_seconds_total Total time spent processing prompts
# TYPE llamacpp:prompt_seconds_total counter
llamacpp:prompt_seconds_total 0.25
# HELP llamacpp:tokens_predicted_total Number of generation tokens processed
# TYPE llamacpp:tokens_predicted_total counter
llamacpp:tokens_predicted_total 5
# HELP llamacpp:tokens_predicted_seconds_total Total time spent generating tokens
# TYPE llamacpp:tokens_predicted_seconds_total counter
llamacpp:tokens_predicted_seconds_total 0.5
# HELP llamacpp:n_decode_total Total number of llama_decode() calls
# TYPE llamacpp:n_decode_total counter
llamacpp:n_decode_total 1.2e+06
# HELP llamacpp:n_tokens_max Largest observed sequence length (prompt + generation)
# TYPE llamacpp:n_tokens_max counter
llamacpp:n_tokens_max 4000
# HELP llamacpp:spec_decode_num_accepted_tokens_per_pos_total Accepted tokens per position
# TYPE llamacpp:spec_decode_num_accepted_tokens_per_pos_total counter
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position="0"} 7
# HELP llamacpp:prompt_tokens_seconds Average prompt throughput in tokens/s
# TYPE llamacpp:prompt_tokens_seconds gauge
llamacpp:prompt_tokens_seconds 3113.36
# HELP llamacpp:requests_processing Number of requests processing
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 2
# HELP llamacpp:requests_deferred Number of requests deferred
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 1
"""


# The text


def test_the_text_of_a_busy_model() -> None:
    """Requests that are answered and that wait are in flight; the work is the sum of the counters of work."""
    assert parse(TEXT) == Usage(3, 56 + 110 + 0.25 + 5 + 0.5 + 1.2e6)


@pytest.mark.parametrize("counter", [b"prompt_tokens_total 56", b"n_decode_total 1.2e+06", b"requests_deferred 1"])
def test_a_counter_that_is_not_there_counts_as_nothing(counter: bytes) -> None:
    """A build that does not know a counter is read all the same."""
    name, _, value = counter.partition(b" ")
    usage, whole = parse(TEXT.replace(b"\nllamacpp:" + counter, b"")), parse(TEXT)
    is_gauge = name == b"requests_deferred"
    assert usage == Usage(2 if is_gauge else 3, whole.work if is_gauge else whole.work - float(value))


def test_what_is_not_work_does_not_count() -> None:
    """Peaks, rates, comments, and counters that this version does not know leave the work as it is."""
    idle = TEXT + b"llamacpp:idle_seconds_total 99\n# llamacpp:n_decode_total 99\nother:n_decode_total 99\n"
    assert parse(idle.replace(b"n_tokens_max 4000", b"n_tokens_max 5000")) == parse(TEXT)


def test_labels() -> None:
    """A build that tells the model or the slot with a metric is read all the same; its lines are summed."""
    text = (
        b'llamacpp:requests_processing{model="a}b",slot="0"} 1\nllamacpp:requests_processing{slot="1"} 1 1700000000\n'
    )
    assert parse(text + b'llamacpp:n_decode_total{model="m"} 4\n') == Usage(2, 4)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"<html>llamacpp</html>",
        b'{"error":{"code":501,"message":"This server does not support metrics endpoint."}}',
        b"llamavisor_routers 1\nprocess_cpu_seconds_total 5\n",
        b"llamacpp:n_decode_total 5\nllamacpp:requests_deferred 3\n",
        b"llamacpp:requests_processing many\n",
        b"llamacpp:requests_processing -1\n",
        b"llamacpp:requests_processing nan\n",
        b"llamacpp:requests_processing inf\n",
        b"llamacpp:requests_processing 0\nllamacpp:n_decode_total nan\n",
        b"llamacpp:requests_processing 0\nllamacpp:n_decode_total -inf\n",
        b"llamacpp:requests_processing 0\nllamacpp:n_decode_total 1e308\nllamacpp:prompt_tokens_total 1e308\n",
        b"\xff\xfe\x00",
    ],
)
def test_what_does_not_tell_the_requests_is_refused(text: bytes) -> None:
    """Rather no answer than "nothing in flight" from what did not say so."""
    with pytest.raises(ValueError, match=r"metric"):
        parse(text)


_NAMES = [
    "requests_processing",
    "requests_deferred",
    "n_decode_total",
    "prompt_tokens_total",
    "n_tokens_max",
    "prompt_tokens_seconds",
]
_LINES = st.tuples(st.sampled_from(_NAMES), st.one_of(st.floats(), st.integers(), st.text(max_size=5)))


@given(st.one_of(st.binary(), st.lists(_LINES).map(lambda lines: "".join(f"llamacpp:{a} {b}\n" for a, b in lines))))
def test_any_text_is_read_or_refused(text: bytes | str) -> None:
    """Whatever comes: a number of requests and an amount of work, or ValueError."""
    try:
        usage = parse(text if isinstance(text, bytes) else text.encode())
    except ValueError:
        return
    assert usage.in_flight >= 0
    assert math.isfinite(usage.work)


# The process that answers


@dataclass
class Talker:
    """A process that answers each question with the next of these texts, None = not at all.

    `b""` closes the connection instead of an answer. Every text goes out in pieces of `piece` bytes; after
    the answer `hang_up_after`, counted from one, the connection is closed whatever was said.
    """

    answers: Sequence[bytes | None]
    piece: int = 1 << 30
    hang_up_after: int | None = None
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0
    port: int = 0
    hung_up: anyio.Event = field(default_factory=anyio.Event)

    async def serve(self, stream: SocketStream) -> None:
        """Answer over one connection until it is closed."""
        self.connections += 1
        async with stream:
            while True:
                try:
                    self.requests.append(await stream.receive())
                except (anyio.EndOfStream, anyio.BrokenResourceError):
                    self.hung_up.set()
                    return
                answer = self.answers[len(self.requests) - 1]
                if answer == b"":
                    return
                if answer is not None:
                    for at in range(0, len(answer), self.piece):
                        await stream.send(answer[at : at + self.piece])
                        await anyio.lowlevel.checkpoint()
                    if b"\r\nConnection: close\r\n" in answer or len(self.requests) == self.hang_up_after:
                        return


@asynccontextmanager
async def talking(*answers: bytes | None, **how: int) -> AsyncIterator[Talker]:
    """A process with these answers, gone at the end."""
    talker = Talker(answers, **how)
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        talker.port = listener.extra(anyio.abc.SocketAttribute.local_port)
        tasks.start_soon(listener.serve, talker.serve)
        yield talker
        tasks.cancel_scope.cancel()


def reading(port: int, api_key: str | None = None) -> aclosing[UsageReader]:
    """A reader, closed at the end."""
    return aclosing(UsageReader(port, api_key=api_key))


def answer(body: bytes = TEXT, *more: bytes, status: bytes = b"200 OK", length: int | None = None) -> bytes:
    """A whole answer as llama-server writes it."""
    size = b"%d" % (len(body) if length is None else length)
    return b"\r\n".join([b"HTTP/1.1 " + status, b"Server: llama.cpp", b"Content-Length: " + size, *more, b"", body])


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    """A whole answer in chunks."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + end


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """The sockets are waited for in the same way on both."""
    return request.param


@pytest.mark.anyio
async def test_one_connection_serves_many_reads() -> None:
    """The connection stays open, and what is sent is one small GET."""
    async with talking(answer(), answer(), chunked(TEXT), answer()) as talker, reading(talker.port) as reader:
        for _ in range(4):
            assert (await reader.read()).in_flight == 3
    assert talker.connections == 1
    assert set(talker.requests) == {b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % talker.port}


@pytest.mark.anyio
@pytest.mark.parametrize(
    "whole",
    [
        answer(),
        chunked(TEXT),
        chunked(TEXT[:1], TEXT[1:700], TEXT[700:]),
        chunked(TEXT, end=b"000;last=yes\r\nTrailer: 1\r\nMore: 2\r\n\r\n"),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n" + b"%X ;a=b\r\n%b\r\n0\r\n\r\n" % (len(TEXT), TEXT),
    ],
)
@pytest.mark.parametrize("piece", [1, 7, 1 << 30])
async def test_answers_that_come_in_pieces(whole: bytes, piece: int) -> None:
    """A body by its length or in chunks is read whole, however it is cut up on its way."""
    async with talking(whole, whole, piece=piece) as talker, reading(talker.port) as reader:
        for _ in range(2):
            # One more than the counters: the text has a rate, which tells of work.
            assert await reader.read() == Usage(3, parse(TEXT).work + 1)
    assert talker.connections == 1


@pytest.mark.anyio
async def test_what_was_said_is_kept_if_it_is_short() -> None:
    """All of it, for who shows it; it makes no difference between two usages. What is too long is read all the same."""
    long = TEXT + b"#" * KEPT_BYTES
    async with talking(answer(), answer(long)) as talker, reading(talker.port) as reader:
        first, second = await reader.read(), await reader.read()
    assert (first.text, second.text) == (TEXT, b"")
    assert first == second


@pytest.mark.anyio
async def test_a_connection_that_was_closed_is_replaced_silently() -> None:
    """A process that closed the idle connection is asked again over a new one, and its "close" is heeded."""
    last = answer(TEXT, b"Connection: close")
    async with talking(answer(), b"", answer(), last, answer()) as talker, reading(talker.port) as reader:
        assert (await reader.read()).in_flight == 3
        assert (await reader.read()).in_flight == 3  # closed instead of an answer: asked again
        assert talker.connections == 2
        assert (await reader.read()).in_flight == 3
        assert repr(reader) == f"<UsageReader port={talker.port} not connected>"
        assert (await reader.read()).in_flight == 3
        assert talker.connections == 3


@pytest.mark.anyio
async def test_it_is_tried_anew_once() -> None:
    """A new connection that is closed without an answer is an error; so is one after a kept one."""
    async with talking(b"", answer(), b"", b"", answer()) as talker, reading(talker.port) as reader:
        with pytest.raises(UsageError, match="closed the connection"):
            await reader.read()
        await reader.read()
        with pytest.raises(UsageError, match="closed the connection"):
            await reader.read()
        assert len(talker.requests) == 4
        await reader.read()


@pytest.mark.anyio
@pytest.mark.parametrize("half", [b"HTTP/1.1 2", answer()[:-1], chunked(TEXT)[:-1], chunked(TEXT)[:-9]])
async def test_half_an_answer_is_none(half: bytes) -> None:
    """An answer that breaks off is an error; the question is not put again by itself."""
    async with talking(answer(), half, answer(), hang_up_after=2) as talker, reading(talker.port) as reader:
        await reader.read()
        with pytest.raises(UsageError, match="before the answer was whole"):
            await reader.read()
        assert len(talker.requests) == 2
        await reader.read()


@pytest.mark.anyio
@pytest.mark.parametrize("late", [None, answer()[:50]])
async def test_a_process_that_hangs(late: bytes | None) -> None:
    """The deadline holds for all of the answer; the connection is given up, so that a late answer confuses nothing."""
    async with talking(answer(), late, answer()) as talker, reading(talker.port) as reader:
        await reader.read()
        with pytest.raises(UsageError, match=r"no answer within 0\.1 s") as caught:
            await reader.read(timeout_s=0.1)
        assert caught.value.status is None
        await talker.hung_up.wait()
        assert (await reader.read()).in_flight == 3
        assert talker.connections == 2


@pytest.mark.anyio
async def test_an_answer_that_drips() -> None:
    """A process that sends a byte now and then does not put off the deadline."""
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:

        async def drip(stream: SocketStream) -> None:
            async with stream:
                for at in itertools.count():
                    await stream.send(answer()[at : at + 1])
                    await anyio.sleep(0.02)

        tasks.start_soon(listener.serve, drip)
        async with reading(listener.extra(anyio.abc.SocketAttribute.local_port)) as reader:
            began = anyio.current_time()
            with pytest.raises(UsageError, match="no answer within"):
                await reader.read(timeout_s=0.2)
            assert anyio.current_time() - began < 0.02 * len(answer()) / 2
        tasks.cancel_scope.cancel()


@pytest.mark.anyio
async def test_a_read_that_is_cancelled_leaves_a_reader_that_works() -> None:
    """A read that is given up from outside closes its connection and nothing else."""
    async with talking(None, answer()) as talker, reading(talker.port) as reader:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(reader.read)
            while not talker.requests:
                await anyio.sleep(0.001)
            tasks.cancel_scope.cancel()
        await talker.hung_up.wait()
        assert (await reader.read()).in_flight == 3


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("whole", "why"),
    [
        (answer(length=ANSWER_BYTES), "exceeds"),
        (answer(length=10**30), "exceeds"),
        (b"HTTP/1.1 200 OK\r\nX: " + bytes(ANSWER_BYTES), "exceeds"),
        (chunked(end=b"fffff\r\n"), "exceeds"),
        (chunked(*[b"llamacpp:n 1\n" * 1000] * 30), "exceeds"),
        (chunked(TEXT, end=b"0\r\n" + b"a: b\r\n" * ANSWER_BYTES), "exceeds"),
        (chunked(end=b"x\r\n"), "chunk without a length"),
        (chunked(end=b"-5\r\n"), "chunk without a length"),
        (chunked(end=b"\r\n"), "chunk without a length"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + TEXT, "how long"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\n", "how long"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 yes\r\n\r\n", "not HTTP"),
        (b"\r\n\r\n", "not HTTP"),
        (answer(b""), "do not tell the requests"),
        (answer(b"hello"), "do not tell the requests"),
    ],
)
async def test_an_answer_that_is_none(whole: bytes, why: str) -> None:
    """What is too long or is no answer is an error that says why, and the next read begins afresh."""
    async with talking(whole, answer()) as talker, reading(talker.port) as reader:
        with pytest.raises(UsageError, match=why) as caught:
            await reader.read()
        assert isinstance(caught.value, LlamavisorError)
        assert str(caught.value).startswith(f"the model process on port {talker.port} does not say")
        await reader.read()


@pytest.mark.anyio
async def test_bytes_after_an_answer_are_not_taken_for_the_next_one() -> None:
    """A connection on which more came than was asked for is not used again."""
    extra = answer() + answer(b"llamacpp:requests_processing 0\n")
    async with talking(extra, answer()) as talker, reading(talker.port) as reader:
        assert (await reader.read()).in_flight == 3
        assert (await reader.read()).in_flight == 3
        assert talker.connections == 2


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("status", "why"),
    [
        (b"401 Unauthorized", "refuses the API key"),
        (b"404 Not Found", "has no /metrics"),
        (b"500 Internal Server Error", "answered 500"),
        (b"501 Not Implemented", "metrics = 1"),
        (b"503 Service Unavailable", "still loading"),
    ],
)
async def test_a_refusal(status: bytes, why: str) -> None:
    """A status other than 200 is told with its meaning, and never with what the other side had to say."""
    said = answer(b"you said " + KEY.encode(), b"Connection: close", status=status)
    async with talking(said, answer()) as talker, reading(talker.port, KEY) as reader:
        with pytest.raises(UsageError, match=why) as caught:
            await reader.read()
        assert caught.value.status == int(status[:3])
        assert KEY not in str(caught.value) + repr(caught.value) + repr(vars(caught.value))
        await reader.read()


@pytest.mark.anyio
async def test_nobody_listens() -> None:
    """A process that has gone is an error at once."""
    async with reading(free_port()) as reader:
        with pytest.raises(UsageError, match="refused"):
            await reader.read()


@pytest.mark.anyio
@pytest.mark.parametrize("key", [KEY, "schl\u00fcssel", "\udcff\udcfe"])
async def test_the_key_is_sent_and_never_shown(key: str) -> None:
    """The API key is in every question, byte by byte as the environment had it, and nowhere else."""
    async with talking(answer(), answer(), b"", b"") as talker, reading(talker.port, key) as reader:
        shown = repr(reader)
        for _ in range(2):
            await reader.read()
        shown += repr(reader)
        with pytest.raises(UsageError) as caught:
            await reader.read()
        error: BaseException | None = caught.value
        while error is not None:
            shown += repr(error) + str(error)
            error = error.__context__
    line = b"\r\nAuthorization: Bearer " + key.encode("utf-8", "surrogateescape") + b"\r\n\r\n"
    assert all(request.endswith(line) for request in talker.requests)
    assert key not in shown


@pytest.mark.parametrize("key", [f"{KEY}\r\nX: y", f"{KEY}\n", f"\r{KEY}"])
def test_a_key_that_is_more_than_a_line_is_refused(key: str) -> None:
    """A key cannot bring in headers of its own, and is not shown when it is refused."""
    with pytest.raises(ValueError, match="line break") as caught:
        UsageReader(1, api_key=key)
    assert KEY not in str(caught.value)


@pytest.mark.anyio
async def test_work_that_the_counters_are_too_coarse_for_is_seen() -> None:
    """Counters of six digits stand still for a short answer; the rates since the last read tell of it, once."""

    def said(rate: bytes, decodes: bytes = b"1.2e+07") -> bytes:
        text = TEXT.replace(b"n_decode_total 1.2e+06", b"n_decode_total " + decodes)
        return answer(text.replace(b"prompt_tokens_seconds 3113.36", b"prompt_tokens_seconds " + rate))

    # The last two reads find the model asleep: it repeats its last answer, and nobody has used it.
    texts = [said(rate) for rate in (b"0", b"3113.36", b"0", b"0", b"2987.1", b"4000", b"4000", b"4000")]
    async with talking(*texts, said(b"0", b"1.3e+07")) as talker, reading(talker.port) as reader:
        work = [(await reader.read()).work for _ in range(9)]
    grew = [later > earlier for earlier, later in itertools.pairwise(work)]
    assert grew == [True, False, False, True, True, False, False, True]
    assert work == sorted(work)


@pytest.mark.anyio
async def test_two_reads_at_a_time_are_refused() -> None:
    """One reader belongs to one task: the second read fails and does not spoil the first."""
    async with talking(None) as talker, reading(talker.port) as reader, anyio.create_task_group() as tasks:
        scope = anyio.CancelScope()

        async def wait() -> None:
            with scope:
                await reader.read()

        tasks.start_soon(wait)
        while not talker.requests:
            await anyio.sleep(0.001)
        with pytest.raises(anyio.BusyResourceError):
            await reader.read()
        scope.cancel()


@pytest.mark.anyio
async def test_a_closed_reader_has_no_connection() -> None:
    """Closing hangs up; closing twice, or before the first read, does no harm."""
    async with talking(answer(), answer()) as talker, reading(talker.port) as reader:
        await reader.aclose()
        await reader.read()
        assert repr(reader) == f"<UsageReader port={talker.port} connected>"
        await reader.aclose()
        await talker.hung_up.wait()
        assert repr(reader) == f"<UsageReader port={talker.port} not connected>"


@pytest.mark.anyio
async def test_a_request_that_does_not_go_out_at_once() -> None:
    """A send that the kernel takes only in part is finished."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = await usage_module._Connection.open(listener.getsockname()[1])
        peer, _ = listener.accept()
        size = 20_000_000
        got = 0

        def drain() -> None:
            nonlocal got
            while got < size:
                got += len(peer.recv(1 << 20))

        with peer:
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(anyio.to_thread.run_sync, drain)
                    await connection._send(bytes(size))
            finally:
                connection.close()
        assert got == size
