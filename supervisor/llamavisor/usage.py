"""How much the process of one model is used, asked of its own GET /metrics.

Asking costs the process next to nothing and changes nothing for it: /metrics never loads a model, never wakes one, and
is the one question that does not put off its sleep (checked against build b11434). It is there when the model was
started with `metrics = 1`.

The connection is a plain socket that stays open, and the little HTTP is spoken here: this is asked of every loaded
model every second, and a general HTTP client takes several times the CPU for the same answer.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from dataclasses import dataclass, field
from math import isfinite, nan

import anyio

from llamavisor.errors import LlamavisorError

READ_TIMEOUT_S = 2.0
"""A process that is being woken answers when it is awake: no answer means unknown, not idle."""
ANSWER_BYTES = 256 * 1024
"""A longer answer is no answer; b11434 says 3 KB."""
KEPT_BYTES = 64 * 1024
"""A longer one is not kept: there may be as many as there are models."""
_PIECE_BYTES = 64 * 1024

_WORK = frozenset(
    {
        b"prompt_tokens_total",
        b"prompt_tokens_cached_total",
        b"prompt_seconds_total",
        b"tokens_predicted_total",
        b"tokens_predicted_seconds_total",
        b"n_decode_total",
        b"spec_decode_num_draft_tokens_total",
        b"spec_decode_num_accepted_tokens_total",
        b"spec_decode_num_drafts_total",
    }
)
"""Counters that stand still while the model does. Named one by one: a later build may count its idle seconds too."""
_RATES = (b"prompt_tokens_seconds", b"predicted_tokens_seconds")
_SAMPLE = re.compile(rb"^llamacpp:([a-z_]+)(?:\{.*\})? +(\S+)", re.MULTILINE)
_REFUSALS = {
    401: "it refuses the API key",
    404: "it has no /metrics",
    501: "its metrics are switched off (metrics = 1 is missing)",
    503: "it is still loading",
}


class UsageError(LlamavisorError):
    """Raised when the process of a model does not say how much it is used.

    `status` is the HTTP status of a refusal, or None when no whole answer came. How much it is used is unknown then,
    never nothing.
    """

    code = "usage_unknown"

    def __init__(self, port: int, reason: str, *, status: int | None = None) -> None:
        super().__init__(f"the model process on port {port} does not say how much it is used: {reason}")
        self.reason = reason
        self.status = status


@dataclass(frozen=True, slots=True)
class Usage:
    """What the process of one model has to do, and has done.

    Attributes:
        in_flight: requests that it answers or that wait for a slot of it.
        work: grows whenever the model does something; of no unit.
        text: all that it said, for who shows it; empty when that is too long to be kept.
    """

    in_flight: int
    work: float
    text: bytes = field(default=b"", compare=False, repr=False)


def parse(text: bytes) -> Usage:
    """Read the answer of GET /metrics; `work` is the sum of the counters that are there.

    Counters are written with six digits, whatever their size: after a million tokens ten more may not show in them.
    `UsageReader` sees those too.

    Raises:
        ValueError: this is not what a llama-server that serves a model says, or it does not tell the requests.
    """
    return _parse(text)[0]


def _parse(text: bytes) -> tuple[Usage, tuple[float, ...]]:
    """The usage, and the rates since the last time that anybody asked."""
    found: dict[bytes, float] = {}
    try:
        for name, value in _SAMPLE.findall(text):
            found[name] = found.get(name, 0.0) + float(value)
    except ValueError as exc:
        raise ValueError("a metric has a value that is no number") from exc
    in_flight = found.get(b"requests_processing", nan) + found.get(b"requests_deferred", 0.0)
    if not isfinite(in_flight) or in_flight < 0:
        raise ValueError("these metrics do not tell the requests in flight")
    work = sum(value for name, value in found.items() if name in _WORK)
    if not isfinite(work):
        raise ValueError("a counter of these metrics is not finite")
    return Usage(int(in_flight), work), tuple(found.get(name, 0.0) for name in _RATES)


class UsageReader:
    """Reads the usage of one model process, for one task, over one connection that it keeps.

    One reader belongs to one process: its port may be another's once it has ended.

    Args:
        port: where the process listens on 127.0.0.1.
        api_key: the key that it asks for, if any.
    """

    def __init__(self, port: int, *, api_key: str | None) -> None:
        if api_key is not None and not {"\r", "\n"}.isdisjoint(api_key):
            raise ValueError("the API key has a line break")
        lines = ["GET /metrics HTTP/1.1", f"Host: 127.0.0.1:{port}"]
        lines += [f"Authorization: Bearer {api_key}"] if api_key else []
        self._port = port
        # An environment, where keys come from, may hold what is no UTF-8: it goes out as it came in.
        self._request = os.fsencode("\r\n".join([*lines, "", ""]))
        self._connection: _Connection | None = None
        self._guard = anyio.ResourceGuard("reading the usage of a model")
        self._rates: tuple[float, ...] = ()
        self._bursts = 0  # how often the rates told of work

    def __repr__(self) -> str:
        return f"<UsageReader port={self._port} {'connected' if self._connection else 'not connected'}>"

    async def read(self, *, timeout_s: float = READ_TIMEOUT_S) -> Usage:
        """Ask the process now.

        A connection that it has closed in the meantime, as it does after 5 s without a question and after 100 answers,
        is replaced without a word.

        Raises:
            UsageError: no understandable answer within `timeout_s` in all; the next call begins with a new connection.
        """
        with self._guard:
            try:
                with anyio.fail_after(timeout_s):
                    answer = await self._ask()
                usage, rates = _parse(answer)
            except TimeoutError as exc:
                raise UsageError(self._port, f"no answer within {timeout_s:g} s") from exc
            except _RefusedError as exc:
                reason = _REFUSALS.get(exc.status, f"it answered {exc.status}")
                raise UsageError(self._port, reason, status=exc.status) from exc
            except OSError as exc:
                raise UsageError(self._port, exc.strerror or str(exc)) from exc
            except ValueError as exc:
                raise UsageError(self._port, str(exc)) from exc
        # The rates begin anew whenever somebody asks, so a new one tells of work however large the counters are; a
        # process that sleeps repeats its last answer. Somebody else who asks takes them from us: then there are
        # still the counters.
        if rates != self._rates and any(rates):
            self._bursts += 1
        self._rates = rates
        text = answer if len(answer) <= KEPT_BYTES else b""
        return Usage(usage.in_flight, usage.work + self._bursts, text)

    async def aclose(self) -> None:
        """Close the connection; a later read would open one again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _ask(self) -> bytes:
        """The body of the answer."""
        kept, self._connection = self._connection, None
        if kept is not None:
            try:
                return await self._exchange(kept)
            except OSError:
                if kept.has_answered:
                    raise
        return await self._exchange(await _Connection.open(self._port))

    async def _exchange(self, connection: _Connection) -> bytes:
        """Ask over this connection and keep it if it is good for another time; else, and on any error, close it."""
        stays = False
        try:
            body, stays = await connection.ask(self._request)
        finally:
            if stays:
                self._connection = connection
            else:
                connection.close()
        return body


class _RefusedError(Exception):
    """Raised when the answer is none of 200."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Connection:
    """One HTTP connection to a process on this machine.

    Its errors are OSError where it broke, ValueError where what came is no answer.
    """

    def __init__(self, plug: socket.socket) -> None:
        self.has_answered = False  # a part of the answer to the last question has come
        self._plug = plug
        self._buffer = bytearray()

    @classmethod
    async def open(cls, port: int) -> _Connection:
        """Connect."""
        connection = cls(socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
        try:
            await connection._connect(port)
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Close it."""
        self._plug.close()

    async def _connect(self, port: int) -> None:
        failure = self._plug.connect_ex(("127.0.0.1", port))
        if failure == errno.EINPROGRESS:
            await anyio.wait_writable(self._plug)
            failure = self._plug.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failure:
            raise OSError(failure, os.strerror(failure))

    async def ask(self, request: bytes) -> tuple[bytes, bool]:
        """Send the request; return the body of the answer, and whether the connection is good for another one."""
        self._buffer.clear()
        self.has_answered = False
        await self._send(request)
        end = await self._find(b"\r\n\r\n", 0)
        first, *lines = bytes(self._buffer[:end]).split(b"\r\n")
        version, _, status = first.partition(b" ")
        if version not in {b"HTTP/1.1", b"HTTP/1.0"} or not status[:3].isdigit():
            raise ValueError("the answer is not HTTP")
        if status[:3] != b"200":
            raise _RefusedError(int(status[:3]))
        fields = (line.partition(b":") for line in lines)
        headers = {name.strip().lower(): value.strip().lower() for name, _, value in fields}
        begin = end + 4
        if headers.get(b"transfer-encoding") == b"chunked":
            body, end = await self._chunks(begin)
        elif (length := headers.get(b"content-length", b"")).isdigit():
            end = begin + int(length[:9])
            await self._fill(end)
            body = bytes(self._buffer[begin:end])
        else:
            raise ValueError("the answer does not say how long it is")
        closes = version == b"HTTP/1.0" or headers.get(b"connection") == b"close"
        return body, not closes and len(self._buffer) == end

    async def _chunks(self, at: int) -> tuple[bytes, int]:
        """The body in the chunks that begin `at`, and where it ends."""
        body = bytearray()
        while True:
            end = await self._find(b"\r\n", at)
            size = bytes(self._buffer[at:end]).partition(b";")[0].strip()
            length = int(size, 16) if re.fullmatch(rb"[0-9a-fA-F]{1,8}", size) else -1
            if length < 0:
                raise ValueError("the answer has a chunk without a length")
            begin = end + 2
            if length == 0:
                break
            at = begin + length + 2
            await self._fill(at)
            body += self._buffer[begin : at - 2]
        while (end := await self._find(b"\r\n", begin)) != begin:  # what may follow the last chunk
            begin = end + 2
        return bytes(body), begin + 2

    async def _find(self, mark: bytes, begin: int) -> int:
        """Where the next `mark` is; receives until it is there."""
        while (at := self._buffer.find(mark, begin)) < 0:
            await self._receive()
        return at

    async def _fill(self, size: int) -> None:
        """Receive until the buffer has this size."""
        if size > ANSWER_BYTES:
            raise ValueError(f"the answer exceeds {ANSWER_BYTES} bytes")
        while len(self._buffer) < size:
            await self._receive()

    async def _receive(self) -> None:
        """Receive what there is, at least one byte."""
        while True:
            try:
                piece = self._plug.recv(_PIECE_BYTES)
                break
            except BlockingIOError:
                await anyio.wait_readable(self._plug)
        if not piece:
            raise ConnectionResetError(errno.ECONNRESET, "it closed the connection before the answer was whole")
        self.has_answered = True
        self._buffer += piece
        if len(self._buffer) > ANSWER_BYTES:
            raise ValueError(f"the answer exceeds {ANSWER_BYTES} bytes")

    async def _send(self, request: bytes) -> None:
        left = memoryview(request)
        while left:
            try:
                left = left[self._plug.send(left) :]
            except BlockingIOError:
                await anyio.wait_writable(self._plug)
