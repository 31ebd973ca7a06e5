"""A gauge whose devices are asked by a process of its own, because asking them may hang."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn, Protocol, Self

import anyio

from llamavisor.gauge.device import Device, Reading, unknown
from llamavisor.gauge.wire import MAX_LINE_BYTES, Answer, decode_answer, encode_question
from llamavisor.workerprocess import WorkerProcess, module_argv

ANSWER_S = 2.0
"""How long a read waits. The first question to NVML may take longer, then its devices are unknown at first."""
GIVE_UP_S = 30.0
"""A question that is out for as long will not be answered: the worker is killed. Without persistence mode the driver
takes ten seconds for a machine with eight GPUs."""
ABSENT_S = 300.0
"""How long no devices are believed to be no devices: a driver may be loaded later."""
RESTART_S = 5.0
"""Between two starts of a worker that ends by itself."""
KILL_WAIT_S = 0.5
"""How long to wait for a killed worker. One that the kernel holds in a driver must not hold the daemon."""


class Worker(Protocol):
    """A process that answers: a `WorkerProcess` that runs `llamavisor.gauge.worker`."""

    def send_nowait(self, data: bytes) -> None: ...  # noqa: D102
    async def receive(self) -> bytes: ...  # noqa: D102
    def kill(self) -> None: ...  # noqa: D102
    async def reap(self) -> str: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class _FailedError(Exception):
    """Raised when the worker has ended, or says what makes no sense; the message is the reason."""


class RemoteGauge:
    """Reads devices by asking a worker process, which is started with the first question and then kept.

    There is one worker and one question at a time, whatever happens: a worker that does not answer is left alone, and
    while it is silent all its devices are unknown. It counts again as soon as it answers. Silent for `GIVE_UP_S` it is
    killed, and another one starts only when it has really gone: it would hang in the same place.

    Args:
        what: of the devices, for messages: "NVML".
        start: starts a worker.
        find: the devices that there must be, without asking any driver; asked only when the worker knows none.
        answer_s: how long a read waits.
    """

    def __init__(
        self,
        what: str,
        start: Callable[[], Worker],
        *,
        find: Callable[[], Sequence[Device]] = tuple,
        answer_s: float = ANSWER_S,
    ) -> None:
        self._what = what
        self._start = start
        self._find = find
        self._answer_s = answer_s
        self._worker: Worker | None = None
        self._is_killed = False
        self._number = 0
        self._asked_at: float | None = None  # when the question was asked that is still out
        self._buffer = bytearray()
        self._known: dict[str, Device] = {}
        self._absent_until = 0.0
        self._absent = ""  # why there are no devices, until then
        self._start_at = 0.0
        self._failure = ""  # why no worker may be started until then
        self._lock = anyio.Lock()

    def __repr__(self) -> str:
        state = "absent" if self._absent else "silent" if self._asked_at is not None else "ready"
        return f"<RemoteGauge {self._what} {state if self._worker or self._absent else 'not started'}>"

    @classmethod
    def of(
        cls,
        kind: Literal["nvidia", "amd"],
        *,
        root: Path,
        env: Mapping[str, str],
        find: Callable[[], Sequence[Device]],
    ) -> Self:
        """The gauge of all devices of one kind."""
        what = "NVML" if kind == "nvidia" else "amdgpu"
        argv = module_argv("llamavisor.gauge.worker", kind, os.fspath(root))
        return cls(what, partial(WorkerProcess.start, argv, env), find=find)

    async def read(self) -> Sequence[Reading]:
        """Ask the worker now. Ends within `answer_s`, give or take the end of a killed worker."""
        at = anyio.current_time()
        reason = f"{self._what} does not answer"
        with anyio.move_on_after(self._answer_s):
            async with self._lock:
                try:
                    answer = await self._ask(at)
                except _FailedError as exc:
                    return self._all_unknown(at, str(exc))
                return await self._understand(answer, at)
        return self._all_unknown(at, reason)

    async def aclose(self) -> None:
        """End the worker; leaves nothing behind but one that the kernel does not let go of."""
        if self._worker is not None:
            self._worker.kill()  # whoever waits for its answer is told that it has ended
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(self._answer_s):
                await self._lock.acquire()
            try:
                await self._end()
            finally:
                with suppress(RuntimeError):  # not ours: a read that hangs on has it
                    self._lock.release()

    async def _ask(self, now: float) -> Answer:
        """The answer to a question that is asked now.

        Raises:
            _FailedError: there is none, and why.
        """
        if self._absent and now < self._absent_until:
            return Answer(0, failure=self._absent, is_absent=True)
        if self._worker is not None and self._asked_at is not None and now - self._asked_at >= GIVE_UP_S:
            self._kill(f"{self._what} did not answer for {GIVE_UP_S:g} s")
        if self._is_killed:
            await self._see_gone()
        worker = self._worker or self._begin(now)
        if self._asked_at is not None:
            await self._hear(worker)  # the answer that somebody else did not wait for: it may be old
        self._number += 1
        self._asked_at = anyio.current_time()
        worker.send_nowait(encode_question(self._number))
        return await self._hear(worker)

    def _begin(self, now: float) -> Worker:
        if now < self._start_at:
            raise _FailedError(self._failure)
        self._start_at = now + RESTART_S
        try:
            self._worker = self._start()
        except OSError as exc:
            self._failure = f"cannot start what asks {self._what}: {exc.strerror}"
            raise _FailedError(self._failure) from exc
        return self._worker

    async def _hear(self, worker: Worker) -> Answer:
        """The answer to the question that is out; when cancelled, the question stays out."""
        while (end := self._buffer.find(b"\n")) < 0:
            try:
                data = await worker.receive()
            except OSError:
                data = b""
            if not data or len(self._buffer) > MAX_LINE_BYTES:
                await self._fail(f"what asks {self._what} ended")
            self._buffer += data
        answer = decode_answer(bytes(self._buffer[:end]), self._asked_at or 0.0)
        del self._buffer[: end + 1]
        if answer is None or answer.number != self._number:
            await self._fail(f"what asks {self._what} does not make sense")
        self._asked_at = None
        return answer

    async def _fail(self, reason: str) -> NoReturn:
        """Get rid of a worker that has failed.

        Raises:
            _FailedError: always.
        """
        self._kill(reason)
        how = await self._see_gone()
        self._failure = f"{reason} ({how})"
        raise _FailedError(self._failure)

    def _kill(self, reason: str) -> None:
        self._failure = reason
        self._is_killed = True
        if self._worker is not None:
            self._worker.kill()

    async def _see_gone(self) -> str:
        """Let go of a killed worker; how it ended.

        Raises:
            _FailedError: it has not ended yet.
        """
        how = ""
        if self._worker is not None:
            with anyio.move_on_after(KILL_WAIT_S):
                how = await self._worker.reap()
            if not how:
                raise _FailedError(self._failure)
        self._forget()
        return how

    def _forget(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker, self._is_killed, self._asked_at = None, False, None
        self._buffer.clear()

    async def _end(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            with anyio.move_on_after(KILL_WAIT_S):
                await self._worker.reap()
            self._forget()

    async def _understand(self, answer: Answer, at: float) -> Sequence[Reading]:
        missing = () if answer.readings else self._find()
        if answer.is_absent and not missing and not self._known:
            self._absent = answer.failure
            if self._worker is not None:
                self._absent_until = at + ABSENT_S
                await self._end()  # the next one looks for the driver's library anew
            return ()
        self._absent = ""
        if not answer.failure:
            self._known = {reading.device.id: reading.device for reading in answer.readings}
            return answer.readings
        # What does not even say which device it is has mostly said so before. Places are those of before, too.
        known = self._known
        readings = [replace(told, device=known.get(told.device.id, told.device)) for told in answer.readings]
        expected = {device.id: device for device in missing} | known
        silent = expected.keys() - {reading.device.id for reading in readings}
        return [*readings, *(unknown(expected[key], at, answer.failure) for key in sorted(silent))]

    def _all_unknown(self, at: float, reason: str) -> Sequence[Reading]:
        devices = list(self._known.values()) or self._find()
        return [unknown(device, at, reason) for device in devices]
