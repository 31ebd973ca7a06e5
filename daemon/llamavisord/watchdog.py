"""What the service manager hears of a daemon that runs: that it is up, in which state it is, and that it lives."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path

import anyio

from llamavisor.events import Published
from llamavisor.fleet import Fleet
from llamavisor.router import Router
from llamavisord.daemon import Daemon
from llamavisord.inventory import counts
from llamavisord.notify import Notifier

STATUS_S = 1.0
"""How often it is looked whether there is something new to say, if nothing happens."""
STATUS_PAUSE_S = 0.1
"""Between two looks at least: a thousand models may come at once."""
LOOK_S = 3.0
"""How long one look at the daemon may take at least: what works every second has done so twice by then."""
RETRY_S = 1.0
"""One look that fails says little: a busy socket may have turned it away."""

_NOT_SILENT = {errno.ENOENT, errno.ECONNREFUSED, errno.EMFILE, errno.ENFILE}
"""The file of the socket is gone, or there is no descriptor to ask with: that passes, and a restart is no help."""


async def report(notifier: Notifier, daemon: Daemon, control_socket: Path) -> None:
    """Tell the service manager, from the first answer of the control socket on, until cancelled."""
    while not await _answers(control_socket):
        await anyio.sleep(STATUS_S)
    notifier.ready()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_tell_status, notifier, daemon)
        if notifier.watchdog_s is not None:
            tasks.start_soon(_keep_alive, notifier, notifier.watchdog_s / 2, daemon.fleet, control_socket)


async def _tell_status(notifier: Notifier, daemon: Daemon) -> None:
    """Tell every change, at once where an event goes with it."""
    happened = anyio.Event()

    def hear(_: Published) -> None:
        happened.set()

    daemon.bus.listen(hear, hears_frequent=False)
    told = None
    while True:
        happened = anyio.Event()
        if (text := "; ".join(_parts(daemon))) != told:
            notifier.status(text)
            told = text
        await anyio.sleep(STATUS_PAUSE_S)
        with anyio.move_on_after(STATUS_S):
            await happened.wait()


def _parts(daemon: Daemon) -> Iterator[str]:
    yield from map(_summary, daemon.fleet)
    if daemon.traffic is not None and daemon.traffic.drain.is_draining:
        yield "the gateway takes no new requests"
    elif daemon.traffic is not None and daemon.traffic.problem:
        yield f"no client can connect: {daemon.traffic.problem}"
    if daemon.config_error is not None:
        yield "the last change of the configuration is refused"


def _summary(router: Router) -> str:
    count = counts(router)
    text = f"router {router.name} is {router.state.value}"
    if router.is_serving:
        text += f" with {count['loaded_count']} of {count['model_count']} models loaded"
    return f"{text}: {router.reason}" if router.reason else text


async def _keep_alive(notifier: Notifier, every_s: float, fleet: Fleet, control_socket: Path) -> None:
    """Ping the watchdog, but only after everybody was seen at work.

    This task being scheduled proves that the event loop runs and no more: a daemon may answer and supervise nothing, or
    supervise and answer nobody.
    """
    while True:
        began, is_alive = anyio.current_time(), False
        with anyio.move_on_after(max(every_s, LOOK_S)):
            if await _answers(control_socket):
                await fleet.live_on()
                notifier.alive()
                is_alive = True
        await anyio.sleep_until(began + (every_s if is_alive else RETRY_S))


async def _answers(control_socket: Path) -> bool:
    """Whether the control socket answers as it would a client; False if it says something else than "ok"."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.setblocking(False)
            asking.connect(str(control_socket))  # it stands in line at once, or there is no room
            asking.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            await anyio.wait_readable(asking)
            return asking.recv(64).startswith(b"HTTP/1.1 200 ")
    except OSError as error:
        return error.errno in _NOT_SILENT
