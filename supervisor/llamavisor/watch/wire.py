"""What the daemon and the worker that looks at a models folder say to each other, and how it crosses the pipe.

A message is four bytes of length and a pickle. Unpickling runs what it is told to run; here both ends are this program,
with the same rights, joined by a pipe that nobody else can open: the worker can do nothing to the daemon by a pickle
that it could not do by a signal.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from llamavisor.catalog.entry import Entry, Scan

MAX_MESSAGE_BYTES = 32 * 1024 * 1024
"""Far beyond the largest entry (its texts are capped by the GGUF reader); longer means that the two are out of step."""
MAX_PART_ENTRIES = 64
MAX_PART_BYTES = 512 * 1024
"""What the daemon unpickles in one go; the event loop stands still meanwhile."""
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Configure:
    """To the worker, first and once: what to look at.

    Attributes:
        root: the models folder.
        link_dirs: folders outside of it to which symlinks may lead.
        interval_s: how often to look when nothing hints at a change.
        token: of the last `ScanNow` that the first look covers.
    """

    root: str
    link_dirs: tuple[str, ...]
    interval_s: float
    token: int


@dataclass(frozen=True, slots=True)
class ScanNow:
    """To the worker: look. Tokens only grow."""

    token: int


@dataclass(frozen=True, slots=True)
class ScanPart:
    """To the daemon: some of what a look found; `ScanDone` follows after the last part."""

    changed: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class ScanDone:
    """To the daemon: a look has ended.

    Attributes:
        scan: all of it but `changed`, which came before.
        token: of the last `ScanNow` that had been read when the look began.
    """

    scan: Scan
    token: int


@dataclass(frozen=True, slots=True)
class Mode:
    """To the daemon: how changes are noticed.

    Attributes:
        mode: "inotify" or "polling".
        reason: why it is polling, or what failed last; empty when nothing ever did.
        errors: how often something failed since the worker began.
    """

    mode: str
    reason: str
    errors: int


Message: TypeAlias = Configure | ScanNow | ScanPart | ScanDone | Mode


class WireError(Exception):
    """Raised when what came through the pipe is no message."""


def encode(message: Message) -> bytes:
    """The message as it goes through the pipe."""
    body = pickle.dumps(message, protocol=5)
    return _LENGTH.pack(len(body)) + body


def encode_scan(scan: Scan, token: int) -> Iterator[bytes]:
    """The messages that tell a look, each small enough to be unpickled between two breaths of the event loop."""
    for begin in range(0, len(scan.changed), MAX_PART_ENTRIES):
        yield from _encode_part(scan.changed[begin : begin + MAX_PART_ENTRIES])
    yield encode(ScanDone(replace(scan, changed=()), token))


def _encode_part(entries: tuple[Entry, ...]) -> Iterator[bytes]:
    data = encode(ScanPart(entries))
    if len(data) <= MAX_PART_BYTES or len(entries) == 1:
        yield data
        return
    half = len(entries) // 2
    yield from _encode_part(entries[:half])
    yield from _encode_part(entries[half:])


class Decoder:
    """Cuts what comes out of the pipe into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def __repr__(self) -> str:
        return f"<Decoder {len(self._buffer)} bytes>"

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are complete with `data`.

        Raises:
            WireError: this is no message. What follows cannot be understood either.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_MESSAGE_BYTES:
                raise WireError(f"a message of {length} bytes")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                message = pickle.loads(body)  # noqa: S301 (of our own worker, see above)
            except Exception as exc:  # a pickle can fail in every way there is
                raise WireError(f"not a pickle: {exc!r}") from exc
            if not isinstance(message, Message):
                raise WireError(f"a {type(message).__name__} is no message")
            yield message
