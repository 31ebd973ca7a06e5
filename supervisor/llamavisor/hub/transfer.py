"""One file on its way from the Hub to the disk: gone on with where it broke off, and believed by its hash alone."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import anyio

from llamavisor.hub.failure import HubError, Why, on_disk
from llamavisor.hub.listing import Listing, RemoteFile
from llamavisor.hub.part import Part
from llamavisor.hub.patience import Patience
from llamavisor.hub.progress import Progress, Stage
from llamavisor.hub.remote import Connection
from llamavisor.threads import Threads, surely

SPAN_BYTES = 16 * 1024**3
"""So much is asked for at once: what serves the Hub's files sends none beyond 50 GB in one answer."""
BUFFER_BYTES = 4 * 1024 * 1024
"""So much may wait for the disk."""
_READ_BYTES = 8 * 1024 * 1024
_OLDER_NS = 1_000_000_000


class Sink:
    """The beginning of a file on the disk, and the hash of it. Blocking, but for its attributes.

    Args:
        part: where it is.
        file: which file it is to be.

    Attributes:
        size: bytes that are there.
    """

    def __init__(self, part: Part, file: RemoteFile) -> None:
        self.size = 0
        self._part = part
        self._file = file
        self._hash = file.hash()
        with on_disk(part.partial):
            self._fd = os.open(part.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def __repr__(self) -> str:
        return f"<Sink {self._part.partial.name} {self.size}>"

    def close(self) -> None:
        """Nothing more is written. What a file system loses only now is missed when it is gone on with."""
        with suppress(OSError):
            os.close(self._fd)

    def recall(self) -> bool:
        """Takes over the next bytes that are there from before; whether there were any."""
        with on_disk(self._part.partial):
            piece = os.pread(self._fd, _READ_BYTES, self.size)
        self._hash.update(piece)
        self.size += len(piece)
        return bool(piece)

    def write(self, chunks: list[bytes]) -> None:
        """Puts bytes at the end."""
        with on_disk(self._part.partial):
            for chunk in chunks:
                view = memoryview(chunk)
                while view:
                    written = os.pwrite(self._fd, view, self.size)
                    self._hash.update(view[:written])
                    self.size += written
                    view = view[written:]

    def clear(self) -> None:
        """Begins anew."""
        with on_disk(self._part.partial):
            os.ftruncate(self._fd, 0)
            self._part.etag.unlink(missing_ok=True)
        self.size, self._hash = 0, self._file.hash()

    def note(self, etag: str) -> None:
        """Remembers what the server calls the content that this is the beginning of."""
        with on_disk(self._part.etag):
            if etag:
                self._part.etag.write_text(etag, encoding="latin-1")
            else:
                self._part.etag.unlink(missing_ok=True)

    def is_right(self) -> bool:
        """Whether this is all of that file, and no other."""
        return self.size == self._file.size and self._file.digest in {"", self._hash.hexdigest()}

    def finish(self) -> None:
        """Makes it whole, so that a power failure finds it so."""
        with on_disk(self._part.partial):
            os.fsync(self._fd)
            # The catalog takes at once what was renamed later than it was written, and its clock has coarse ticks.
            status = os.fstat(self._fd)
            os.utime(self._fd, ns=(status.st_atime_ns, status.st_mtime_ns - _OLDER_NS))
            self._part.partial.rename(self._part.whole)
            self._part.etag.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Errand:
    """A file that is to be brought.

    Attributes:
        listing: the repository and its commit.
        file: what is wanted.
        part: where it goes.
        progress: is told how far it is.
        threads: in which the disk is touched.
    """

    listing: Listing
    file: RemoteFile
    part: Part
    progress: Progress
    threads: Threads


async def fetch(connection: Connection, errand: Errand, patience: Patience) -> None:
    """Brings a file, as often as it takes. The part's lock is held by the caller.

    What is here already is gone on with. It may be cancelled at any moment: what is on the disk is kept.

    Args:
        connection: to the Hub.
        errand: what is wanted.
        patience: how long the Hub is waited for.

    Raises:
        HubError: it cannot be had, or not now.
    """
    run, progress = errand.threads.run, errand.progress
    sink = await run(Sink, errand.part, errand.file)
    try:
        progress.stage = Stage.CHECKING
        while await run(sink.recall):
            progress.reach(sink.size)
        await _complete(connection, errand, sink, patience)
        await run(sink.finish)
    finally:
        await surely(sink.close)
    progress.stage = Stage.DONE


async def _complete(connection: Connection, errand: Errand, sink: Sink, patience: Patience) -> None:
    """Brings what is missing of a file, until all of it is there and right."""
    file, progress, run = errand.file, errand.progress, errand.threads.run
    if sink.size > file.size or (sink.size and not file.digest and not await run(errand.part.read_etag)):
        await run(sink.clear)
    failures, is_second = 0, False
    while True:
        before = sink.size
        try:
            await _bring(connection, errand, sink)
            progress.stage = Stage.CHECKING
            if await run(sink.is_right):
                return
            await run(sink.clear)
            progress.reach(0)
            if is_second:
                raise _wrong(errand, "what comes has another hash than the Hub says")
            is_second = progress.is_again = True  # what was here, or one bit on the way
            continue
        except HubError as exc:
            failures = 1 if sink.size > before else failures + 1
            delay_s = patience.delay_s(exc, failures)
            if delay_s is None:
                raise
            progress.stage, progress.trouble = Stage.WAITING, str(exc)
        await anyio.sleep(delay_s)
        progress.trouble = ""


async def _bring(connection: Connection, errand: Errand, sink: Sink) -> None:
    """Brings what is missing of a file, until its size is reached or something goes wrong."""
    listing, file, progress, run = errand.listing, errand.file, errand.progress, errand.threads.run
    while sink.size < file.size:
        end = min(sink.size + SPAN_BYTES, file.size)
        etag = await run(errand.part.read_etag) if sink.size else ""
        async with connection.open(listing, file, begin=sink.size, end=end, etag=etag) as body:
            if body.total not in {None, file.size}:
                text = f"it has {body.total} bytes where the Hub's list says {file.size}"
                raise _wrong(errand, text)
            if body.is_whole:  # whatever was asked for
                end = file.size
                if sink.size:
                    await run(sink.clear)
            if not sink.size or not etag:
                await run(sink.note, body.etag)
            progress.stage = Stage.RECEIVING
            progress.reach(sink.size)
            await _pour(body.chunks, sink, errand, end - sink.size)
        if sink.size < end:
            raise HubError(f"{listing.repository}/{file.path}: the connection was cut", why=Why.UNREACHABLE)
        if sink.size > end:
            raise _wrong(errand, "more comes than the Hub's list says")


async def _pour(chunks: AsyncIterator[bytes], sink: Sink, errand: Errand, limit: int) -> None:
    """Has the disk take what comes while more comes, no further than a piece beyond `limit` bytes.

    Whatever goes wrong on the way, what came before is on the disk in the end.
    """
    failures: list[HubError] = []
    buffer = _Buffer()

    async def write() -> None:
        try:
            while batch := await buffer.take():
                await errand.threads.run(sink.write, batch)
                errand.progress.reach(sink.size)
        except HubError as exc:
            failures.append(exc)
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write)
        try:
            async for chunk in chunks:
                await buffer.put(chunk)
                if buffer.total > limit:
                    break
        except HubError as exc:
            failures.append(exc)
        buffer.end()
    if failures:
        raise failures[-1]  # the disk's own comes last, and is the graver


class _Buffer:
    """What has come and is not on the disk yet: as much as came while the disk was busy, within bounds.

    Attributes:
        total: bytes that ever came.
    """

    def __init__(self) -> None:
        self.total = 0
        self._chunks: list[bytes] = []
        self._size = 0
        self._has_ended = False
        self._changed = anyio.Event()

    def __repr__(self) -> str:
        return f"<_Buffer {self._size} of {self.total}>"

    async def put(self, chunk: bytes) -> None:
        """Takes a piece; waits while there are too many."""
        self._chunks.append(chunk)
        self._size += len(chunk)
        self.total += len(chunk)
        self._change()
        while self._size > BUFFER_BYTES:
            await self._changed.wait()

    async def take(self) -> list[bytes]:
        """All that is there; waits for something. Empty at the end."""
        while not self._chunks and not self._has_ended:
            await self._changed.wait()
        taken, self._chunks, self._size = self._chunks, [], 0
        self._change()
        return taken

    def end(self) -> None:
        """Nothing more comes."""
        self._has_ended = True
        self._change()

    def _change(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()


def _wrong(errand: Errand, text: str) -> HubError:
    what = f"{errand.listing.repository}/{errand.file.path}"
    hint = "Try again later; if it stays so, tell who keeps the repository."
    return HubError(f"{what}: {text}", why=Why.WRONG_CONTENT, hint=hint)


async def is_same(path: Path, file: RemoteFile, progress: Progress, threads: Threads) -> bool:
    """Whether a file on the disk is that file; all of it is read, unless the Hub does not tell its hash.

    Raises:
        HubError: it cannot be read.
    """
    if not file.digest:
        return True
    progress.stage, found, at = Stage.CHECKING, file.hash(), 0

    def take() -> int:
        with on_disk(path), path.open("rb") as source:
            source.seek(at)
            piece = source.read(_READ_BYTES)
        found.update(piece)
        return len(piece)

    while size := await threads.run(take, abandon_on_cancel=True):
        at += size
        progress.reach(at)
    return found.hexdigest() == file.digest
