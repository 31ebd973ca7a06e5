"""The daemon's view of a models folder: what a worker process finds in it, as a stream of news."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import fspath
from pathlib import Path

import anyio
import anyio.lowlevel

from llamavisor.watch.news import Afresh, Found, Looked, ModeChanged, News, Silent, WorkerDied
from llamavisor.watch.wire import Configure, Decoder, Message, Mode, ScanDone, ScanNow, ScanPart, WireError, encode
from llamavisor.workerprocess import WorkerProcess, module_argv

INTERVAL_S = 30.0
"""How often the folder is looked at when nothing hints at a change."""
ANSWER_S = 30.0
"""How long a look may be overdue before the folder counts as silent."""
FIRST_ANSWER_S = 60.0
"""Likewise the first look of a worker, which reads every header."""
_CATCH_UP_S = 0.1
KILL_WAIT_S = 0.5
"""How long to wait for a killed worker. One that the kernel holds in a dead network mount must not hold the daemon."""
BACKOFF_S = 1.0
MAX_BACKOFF_S = 60.0
_ARGV = module_argv("llamavisor.watch.worker")
STEADY_S = 60.0
"""A worker that lived for as long has not failed at once, and the next one is not made to wait for it."""


class FolderWatch:
    """One models folder. Only its worker process ever touches it, so nothing here waits for a disk.

    Args:
        root: the folder. It may be missing, and come and go.
        link_dirs: folders outside of it to which symlinks may lead.
        env: added to the little that the worker has in its environment, such as the marker of this daemon.
        interval_s: how often to look when nothing hints at a change.
    """

    def __init__(
        self,
        root: Path,
        *,
        link_dirs: Sequence[Path] = (),
        env: Mapping[str, str] | None = None,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self.root = root
        self.link_dirs = tuple(link_dirs)
        self._env = dict(env or {})
        self._interval_s = interval_s
        self._worker: WorkerProcess | None = None
        self._token = 0
        self._waiting: list[tuple[int, anyio.Event]] = []
        self._mode: Mode | None = None
        self._past_errors = 0  # of workers that have ended
        self._is_first = True
        self._is_silent = False
        self._due_at = 0.0  # when the worker should have said something
        self._due_changed: anyio.Event | None = None

    def __repr__(self) -> str:
        state = "silent" if self._is_silent else repr(self._worker)
        return f"<FolderWatch {self.root} {state}>"

    @property
    def pid(self) -> int | None:
        """Of the worker, None while there is none."""
        return None if self._worker is None else self._worker.pid

    async def run(self, tell: Callable[[News], None]) -> None:
        """Watch until cancelled; leaves nothing behind but a worker that the kernel does not let go of.

        Called from the main thread.

        Args:
            tell: called with all news, in order; must neither wait nor raise.
        """
        failures = 0
        while True:
            begin = anyio.current_time()
            reason = await self._watch(tell)
            failures = 1 if anyio.current_time() - begin >= STEADY_S else failures + 1
            delay_s = min(MAX_BACKOFF_S, BACKOFF_S * 2 ** min(failures - 1, 16))
            tell(WorkerDied(reason, delay_s))
            await anyio.sleep(delay_s)

    async def rescan(self, *, within_s: float = 10.0) -> bool:
        """Have the folder looked at now, and wait until what was found has been told.

        Returns:
            Whether a look that began after this call has been told in time. If not, it still comes.
        """
        self._token += 1
        told = anyio.Event()
        waiting = (self._token, told)
        self._waiting.append(waiting)
        try:
            if self._worker is not None:
                self._worker.send_nowait(encode(ScanNow(self._token)))
                self._expect(min(self._due_at, anyio.current_time()))
            with anyio.move_on_after(within_s):
                await told.wait()
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
        return told.is_set()

    async def _watch(self, tell: Callable[[News], None]) -> str:
        """Start a worker and pass on what it says until it ends; how it ended."""
        self._mode, self._is_first, self._is_silent = None, True, False
        try:
            worker = WorkerProcess.start(_ARGV, self._env)
        except OSError as error:
            return f"cannot start it: {error.strerror}"
        self._worker, self._due_at = worker, anyio.current_time()
        complaint = ""
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._mind_silence, tell)
                try:
                    await self._converse(worker, tell)
                except WireError as error:
                    complaint = f"it does not make sense: {error}"
                except OSError as error:
                    complaint = f"cannot talk to it: {error.strerror}"
                worker.kill()
                # Only when it has really gone may another one follow: it would hang in the same place.
                ended = await worker.reap()
                group.cancel_scope.cancel()
            return complaint or ended
        finally:
            self._worker = None
            self._past_errors += self._mode.errors if self._mode else 0
            worker.kill()
            with anyio.CancelScope(shield=True), anyio.move_on_after(KILL_WAIT_S):
                await worker.reap()
            worker.close()

    def _expect(self, due_at: float) -> None:
        self._due_at = due_at
        if self._due_changed is not None:
            self._due_changed.set()

    async def _mind_silence(self, tell: Callable[[News], None]) -> None:
        """Say once when the worker does not answer; it is left alone, and no other is started to hang beside it."""
        while True:
            self._due_changed = anyio.Event()
            if self._is_silent:
                await self._due_changed.wait()
                continue
            with anyio.move_on_after(-self._overdue_s()):
                await self._due_changed.wait()
            if self._overdue_s() >= 0:
                await anyio.sleep(_CATCH_UP_S)  # after a pause of the daemon itself, what came meanwhile is read first
            if self._overdue_s() >= 0:
                self._is_silent = True
                tell(Silent(anyio.current_time() - self._due_at))

    def _overdue_s(self) -> float:
        """How long it has been silent; negative while it need not speak yet."""
        return anyio.current_time() - self._due_at - (FIRST_ANSWER_S if self._is_first else ANSWER_S)

    async def _converse(self, worker: WorkerProcess, tell: Callable[[News], None]) -> None:
        links = tuple(map(fspath, self.link_dirs))
        await worker.send(encode(Configure(fspath(self.root), links, self._interval_s, self._token)))
        decoder = Decoder()
        while data := await worker.receive():
            for message in decoder.feed(data):
                self._hear(message, tell)
                await anyio.lowlevel.checkpoint()  # a large folder makes many messages, and others want to go on

    def _hear(self, message: Message, tell: Callable[[News], None]) -> None:
        if isinstance(message, Mode):
            if message != self._mode:
                self._mode = message
                tell(ModeChanged(message.mode, message.reason, self._past_errors + message.errors))
            return
        if isinstance(message, ScanPart | ScanDone) and self._is_first:
            self._is_first = False
            tell(Afresh())
        if isinstance(message, ScanPart):
            self._expect(anyio.current_time())
            tell(Found(changed=message.changed))
        elif isinstance(message, ScanDone):
            self._finish(message, tell)

    def _finish(self, done: ScanDone, tell: Callable[[News], None]) -> None:
        scan = done.scan
        self._is_silent = False
        self._expect(anyio.current_time() + (self._interval_s if done.token >= self._token else 0.0))
        if scan.removed:
            tell(Found(removed=scan.removed))
        tell(Looked(scan.duration_s, scan.file_count, scan.headers_read, scan.problem, scan.disk))
        for token, told in self._waiting:
            if token <= done.token:
                told.set()
