"""The only place that wires: from a configuration to a running daemon, and back to nothing."""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
from aiohttp import web
from anyio.abc import SocketAttribute

from llamavisor.bookkeeping import keep
from llamavisor.events import (
    Bus,
    DaemonStarted,
    DaemonStopping,
    Warned,
)
from llamavisor.ledger import NAME as LEDGER
from llamavisor.ledger import Footprints, Ledger
from llamavisor.lock import AlreadyRunningError, Lock
from llamavisor.opening import instance_of, open_fleet, sweep
from llamavisor.pins import Pins
from llamavisor.process import KILL_GRACE_S, TERM_GRACE_S, Spawner, become_subreaper
from llamavisor.quarantine_records import QuarantineRecords
from llamavisor.residents import Residents
from llamavisor.started import Started
from llamavisord import __version__, log
from llamavisord.acceptor import Accept, Acceptor
from llamavisord.activation import Activation
from llamavisord.config import Config
from llamavisord.control import control_app
from llamavisord.control_socket import ControlSocket, Keeper, SocketPathError
from llamavisord.daemon import Daemon
from llamavisord.exit_codes import ExitCode
from llamavisord.exposition import Exposition
from llamavisord.gateway.service import Service
from llamavisord.leaving import leave_hung_threads, leave_within
from llamavisord.lives import Lives
from llamavisord.notify import Notifier
from llamavisord.plain import plain
from llamavisord.watchdog import report

LAG_INTERVAL_S = 0.5
LAG_WINDOW = 20
"""The lag that is shown is the longest of this many measurements, ten seconds."""
HEAD_S = 10.0
"""How long a connection may take to send the head of a request, or to say nothing between two."""
LINGER_S = 1.0
"""How long what is left of a body may take when its request has been answered: an answer amid it would be lost."""
REQUEST_END_S = 1.0
"""How long a request that is being answered may take when the daemon ends; streams are cut."""
METRICS_RETRY_S = 5.0
DESCRIPTORS = 65536
"""So many are enough for all that the gateway allows at once."""
STOP_S = TERM_GRACE_S + 2 * KILL_GRACE_S + 5.0
"""How long routers may take to be gone, and we ourselves after them."""
END_S = 4.0
"""How long we may take when nothing of the routers is left: more than all that is done then and has a deadline."""
HURRY_S = 0.5
"""The grace of the stop ladder after a second SIGTERM."""

_Leave = Callable[[float, int], None]
"""`leave_within`, which knows what is to be done last."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""All that people send to daemons; each has an effect of its own or none, and none kills us."""

_log = logging.getLogger("llamavisor")


def run(config: Config, reload: Callable[[], Config], activation: Activation) -> int:
    """Run the daemon until a signal ends it.

    Args:
        config: what to begin with.
        reload: reads the configuration again; raises ConfigError.
        activation: the sockets that the service manager listens on.

    Returns:
        The exit code of the process.
    """
    faulthandler.enable()  # SIGABRT, which is what a watchdog sends, has every thread say where it is
    notifier = Notifier(os.environ)
    gc.freeze()  # what was imported lives for ever: walking it again and again would hold the event loop
    # They wait for the receiver in _main: what comes before it is neither lost nor fatal.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    log.begin(config.log_level)
    _raise_descriptors()
    try:
        with (
            closing(_lock_state(config.state_dir)),
            closing(ControlSocket(config.socket, activation.control)) as control_socket,
        ):
            main = partial(_main, config, reload, control_socket, activation.gateway, notifier)
            exit_code = anyio.run(main, backend_options={"use_uvloop": True})
    except (AlreadyRunningError, SocketPathError) as error:
        sys.stderr.write(f"llamavisor: {plain(error)}; {error.hint}\n")
        is_running = isinstance(error, AlreadyRunningError)
        return ExitCode.ALREADY_RUNNING if is_running else ExitCode.FAILED
    leave_hung_threads(exit_code)
    return exit_code


def _raise_descriptors() -> None:
    """Every request takes two descriptors; the soft limit of 1,024 is for programs that call select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _lock_state(state_dir: Path) -> Lock:
    """Two daemons with one state folder would take each other's processes for left-overs."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # logs may hold what people ask their models
        return Lock(state_dir / "lock")
    except OSError as error:
        raise SocketPathError(
            f"cannot use the state folder {state_dir}: {error.strerror}",
            hint="choose another with --state-dir, or let this user write there",
        ) from error


async def _main(
    config: Config,
    reload: Callable[[], Config],
    control_socket: ControlSocket,
    doors: Sequence[socket.socket],
    notifier: Notifier,
) -> int:
    with anyio.open_signal_receiver(*_SIGNALS) as signals:
        # Before anything is started: llama-server would inherit the mask.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        return await _live(config, reload, control_socket, doors, notifier=notifier, signals=signals)


async def _live(
    config: Config,
    reload: Callable[[], Config],
    control_socket: ControlSocket,
    doors: Sequence[socket.socket],
    *,
    notifier: Notifier,
    signals: AsyncIterator[signal.Signals],
) -> int:
    become_subreaper()
    bus = Bus()
    bus.listen(log.log_event)
    started, lives = Started(), Lives()
    footprints, pins, records, residents = Footprints(), Pins(), QuarantineRecords(), Residents(bus)
    ledger = Ledger(config.state_dir / LEDGER, [footprints, pins, records, residents, started, lives])
    spawner = Spawner(instance_of(config.state_dir), started)
    for problem in ledger.load():
        bus.publish(Warned(subject="ledger", text=problem))
    fleet = open_fleet(
        spawner=spawner,
        state_dir=config.state_dir,
        log_dir=config.log_dir,
        log_size_bytes=config.log_size_bytes,
        environ=os.environ,
        bus=bus,
        llama_server=config.routers[0].llama_server,
        footprints=footprints,
        pins=pins,
        records=records,
        residents=residents,
    )
    daemon = Daemon(config, load_config=reload, fleet=fleet, bus=bus, notifier=notifier)
    exposition = Exposition(daemon, lives)
    service = Service(daemon, config.gateway, doors) if config.gateway is not None else None
    await sweep(spawner, bus)
    exit_code = ExitCode.OK
    leave = partial(leave_within, last=partial(_give_up, control_socket, ledger))
    try:
        # An error in any of these tasks ends them all and leaves here: never half alive.
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_limit_end, leave)
            tasks.start_soon(fleet.run, daemon.fleet_settings())
            tasks.start_soon(daemon.downloads.run, daemon.models_dirs)
            if service is not None:
                tasks.start_soon(service.run)
            tasks.start_soon(_measure_lag, daemon)
            tasks.start_soon(keep, ledger, bus)
            if config.metrics.enabled:
                tasks.start_soon(_serve_metrics, daemon, exposition)
            app, keeper = control_app(daemon, control_socket), Keeper(control_socket, bus)
            async with _web_server(app, keeper.serve, Acceptor("control socket", bus)):
                path = str(config.path) if config.path else None
                bus.publish(DaemonStarted(version=__version__, pid=os.getpid(), socket=str(config.socket), config=path))
                if lives.was_cut_short:
                    text = "the last one did not end in order; what it had in memory is loaded again"
                    bus.publish(Warned(subject="daemon", text=text))
                for warning in config.warnings:
                    bus.publish(Warned(subject="configuration", text=warning))
                if notifier:
                    tasks.start_soon(report, notifier, daemon, config.socket)
                await _obey(signals, daemon, service, notifier, leave)
            lives.end()
            leave(END_S, ExitCode.OK)
            tasks.cancel_scope.cancel()
    except* Exception:  # noqa: BLE001 (the boundary of everything: a bug ends the daemon cleanly)
        _log.exception("an internal task failed; llamavisor ends with all that it started")
        exit_code = ExitCode.FAILED
    return exit_code


def _give_up(control_socket: ControlSocket, ledger: Ledger) -> None:
    """What would be missed if something that hangs keeps it from being done in order. The ledger may be what hangs."""
    with suppress(OSError):
        control_socket.close()
    _log.warning("something hangs, such as a file system that does not answer; llamavisor ends without waiting for it")
    ledger.flush()


async def _limit_end(leave: _Leave) -> None:
    """See that a bug ends the process as well, whatever hangs: first the fleet ends its routers."""
    try:
        await anyio.sleep_forever()
    finally:
        leave(STOP_S + END_S, ExitCode.FAILED)


async def _obey(
    signals: AsyncIterator[signal.Signals],
    daemon: Daemon,
    service: Service | None,
    notifier: Notifier,
    leave: _Leave,
) -> None:
    """Reload on SIGHUP; end on SIGTERM and SIGINT, and faster on a second one. Returns when the fleet has ended."""
    async with anyio.create_task_group() as tasks:
        ending = False
        async for number in signals:
            if number in {signal.SIGUSR1, signal.SIGUSR2}:
                continue
            if number == signal.SIGHUP:
                tasks.start_soon(daemon.try_reload)
            elif not ending:
                ending = True
                within_s = _ends_within_s(daemon.config)
                notifier.stopping(within_s=within_s)
                leave(within_s + END_S, ExitCode.FAILED)
                daemon.bus.publish(DaemonStopping(reason=number.name))
                tasks.start_soon(_shut_down, daemon, service, tasks.cancel_scope)
            else:
                tasks.start_soon(_hurry, daemon, service)


def _ends_within_s(config: Config) -> float:
    """How long the end may take: answers are let go on, then routers have their grace."""
    drain_s = config.gateway.drain_s if config.gateway is not None else 0.0
    return drain_s + STOP_S


async def _shut_down(daemon: Daemon, service: Service | None, scope: anyio.CancelScope) -> None:
    if service is not None:
        await service.end()
    await daemon.fleet.shut_down()
    scope.cancel()


async def _hurry(daemon: Daemon, service: Service | None) -> None:
    if service is not None:
        service.hurry()
    await daemon.fleet.shut_down(grace_s=HURRY_S)


async def _measure_lag(daemon: Daemon) -> None:
    """Note how late the event loop wakes us: everything else on it was as late."""
    lags = [0.0] * LAG_WINDOW
    while True:
        before = anyio.current_time()
        await anyio.sleep(LAG_INTERVAL_S)
        lags = [*lags[1:], anyio.current_time() - before - LAG_INTERVAL_S]
        daemon.loop_lag_s = max(0.0, *lags)


async def _serve_metrics(daemon: Daemon, exposition: Exposition) -> None:
    """Serve the metrics; a port that is taken is tried again, and is no reason to let models go."""
    metrics = daemon.config.metrics
    while True:
        try:
            listening = await anyio.create_tcp_listener(local_host=metrics.host, local_port=metrics.port)
            break
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that IDNA cannot write, such as "é..b"
            reason = error.strerror if isinstance(error, OSError) else "not a name of a host"
            text = f"cannot listen on {metrics.host}:{metrics.port}: {reason}; it is tried again"
            if daemon.metrics_error != f"metrics: {text}":
                daemon.bus.publish(Warned(subject="metrics", text=text))
            daemon.metrics_error = f"metrics: {text}"
        await anyio.sleep(METRICS_RETRY_S)
    daemon.metrics_error = None
    listeners = [each.extra(SocketAttribute.raw_socket) for each in listening.listeners]  # noqa: S610 (not Django's)
    serve = partial(_accept_on, listeners)
    async with listening, _web_server(exposition.app(), serve, Acceptor("metrics", daemon.bus)):
        await anyio.sleep_forever()


async def _accept_on(listeners: Sequence[socket.socket], accept: Accept) -> None:
    async with anyio.create_task_group() as accepting:
        for listener in listeners:
            accepting.start_soon(accept, listener)


@asynccontextmanager
async def _web_server(
    app: web.Application,
    serve: Callable[[Accept], Coroutine[Any, Any, None]],
    acceptor: Acceptor,
    *,
    head_s: float = HEAD_S,
) -> AsyncIterator[None]:
    """A server for `app` where `serve` has connections taken; at the end requests may end, and streams are cut."""
    app.middlewares.insert(0, acceptor.note)
    runner = web.AppRunner(
        app,
        access_log=None,
        shutdown_timeout=REQUEST_END_S,
        keepalive_timeout=head_s,  # to aiohttp a connection is idle until the head is whole
        lingering_time=LINGER_S,
        auto_decompress=False,  # no request needs a body
    )
    await runner.setup()
    assert runner.server is not None  # noqa: S101 (it is set up)
    try:
        async with anyio.create_task_group() as accepting:
            accepting.start_soon(serve, partial(acceptor.serve, server=runner.server))
            yield
            accepting.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(2 * REQUEST_END_S):
            await runner.cleanup()
