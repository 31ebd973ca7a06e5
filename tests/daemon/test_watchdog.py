"""When the watchdog is pinged: not because an event loop runs, but because somebody was answered and work was done."""

from __future__ import annotations

import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import anyio
import anyio.abc
import pytest

from fakes.waiting import PATIENCE_S
from llamavisor.fleet import Fleet
from llamavisord import watchdog
from llamavisord.notify import Notifier

pytestmark = pytest.mark.anyio

EVERY_S = 0.1
SILENCE_S = 1.0
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n"


class Pinged(Notifier):
    """Counts pings."""

    def __init__(self) -> None:
        super().__init__({})
        self.pings = 0

    def alive(self) -> None:
        """Count."""
        self.pings += 1

    async def hears(self) -> None:
        """Wait until it is pinged again."""
        before = self.pings
        with anyio.fail_after(PATIENCE_S):
            while self.pings <= before + 1:  # the first may have been on its way
                await anyio.sleep(0.01)

    async def hears_nothing(self) -> None:
        """See that it is not, or once more at most for what was seen before."""
        before = self.pings
        await anyio.sleep(SILENCE_S)
        assert self.pings <= before + 1


class Works:
    """A fleet that works, or does not."""

    is_stuck = False

    async def live_on(self) -> None:
        """Return if it works."""
        if self.is_stuck:
            await anyio.sleep_forever()


class Control:
    """A control socket that gives the same answer to all, or none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answer = OK

    async def serve(self, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Answer until cancelled."""
        async with await anyio.create_unix_listener(self.path) as listener:
            task_status.started()
            await listener.serve(self._handle)

    async def _handle(self, stream: anyio.abc.SocketStream) -> None:
        async with stream:
            assert (await stream.receive()).startswith(b"GET /livez HTTP/1.1\r\n")
            if not self.answer:
                await anyio.sleep_forever()
            await stream.send(self.answer)


@asynccontextmanager
async def watched(tmp_path: Path) -> AsyncIterator[tuple[Pinged, Works, Control]]:
    """A daemon's parts, and the task that looks at them."""
    pinged, works, control = Pinged(), Works(), Control(tmp_path / "control.sock")
    async with anyio.create_task_group() as tasks:
        await tasks.start(control.serve)
        tasks.start_soon(watchdog._keep_alive, pinged, EVERY_S, cast(Fleet, works), control.path)
        await pinged.hears()
        yield pinged, works, control
        tasks.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks that come to nothing end soon."""
    monkeypatch.setattr(watchdog, "LOOK_S", 0.2)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"])
async def test_a_control_socket_that_does_not_answer_is_no_life(tmp_path: Path, answer: bytes) -> None:
    """No ping while it says nothing, or something else than that it lives; pings go on when it does again."""
    async with watched(tmp_path) as (pinged, _, control):
        control.answer = answer
        await pinged.hears_nothing()
        control.answer = OK
        await pinged.hears()


async def test_a_fleet_that_does_not_work_is_no_life(tmp_path: Path) -> None:
    """No ping while somebody who works every second does not."""
    async with watched(tmp_path) as (pinged, works, _):
        works.is_stuck = True
        await pinged.hears_nothing()
        works.is_stuck = False
        await pinged.hears()


async def test_a_socket_file_that_has_gone_is_no_death(tmp_path: Path) -> None:
    """Whoever removes the file of the socket does not have all models unloaded; but the fleet has to work."""
    async with watched(tmp_path) as (pinged, works, control):
        control.path.unlink()
        await pinged.hears()
        works.is_stuck = True
        await pinged.hears_nothing()


async def test_a_daemon_without_a_descriptor_is_no_death(tmp_path: Path) -> None:
    """R2: when there is none left to ask with, work goes on, and so do the pings."""
    async with watched(tmp_path) as (pinged, _, _):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                socket.socket(socket.AF_UNIX)
            await pinged.hears()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_queue_that_nobody_empties_is_no_life(tmp_path: Path) -> None:
    """A socket whose owner accepts nobody, so that one cannot even wait in line, is silent too."""
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(path))
        listener.listen(0)
        waiting.connect(str(path))
        pinged = Pinged()
        with anyio.move_on_after(SILENCE_S):
            await watchdog._keep_alive(pinged, EVERY_S, cast(Fleet, Works()), path)
        assert pinged.pings == 0
