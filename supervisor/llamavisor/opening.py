"""Opens a fleet on this machine: puts the real parts together."""

from __future__ import annotations

import logging
import os
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import anyio
import anyio.lowlevel

from llamavisor.appraisal import Appraiser
from llamavisor.binary import ProbeCache, find
from llamavisor.bookkeeping import keep
from llamavisor.downloads import Downloads
from llamavisor.errors import BinaryError
from llamavisor.events import Bus, StraysKilled, Warned
from llamavisor.fleet import Fleet
from llamavisor.folder import Watch
from llamavisor.gauge import open_gauge
from llamavisor.host import Host
from llamavisor.hub import Hub
from llamavisor.launch import Launcher, ModelSource
from llamavisor.ledger import NAME as LEDGER
from llamavisor.ledger import Footprints, Ledger
from llamavisor.lock import Lock
from llamavisor.meter import Meter
from llamavisor.output import CAP_BYTES
from llamavisor.pins import Pins
from llamavisor.process import INSTANCE_VARIABLE, Spawner
from llamavisor.quarantine_records import QuarantineRecords
from llamavisor.residents import Residents
from llamavisor.router import Router
from llamavisor.settings import FleetSettings, RouterSettings
from llamavisor.sight import Sights
from llamavisor.started import Started
from llamavisor.states import SERVING, RouterState
from llamavisor.threads import run_in_thread
from llamavisor.watch import FolderWatch

COME_UP_S = 30.0
"""How long routers may take to come up before a fleet is handed over all the same."""

_log = logging.getLogger("llamavisor")


def open_fleet(
    *,
    spawner: Spawner,
    state_dir: Path,
    log_dir: Path,
    environ: Mapping[str, str],
    bus: Bus,
    log_size_bytes: int = CAP_BYTES,
    llama_server: str | None = None,
    footprints: Footprints | None = None,
    pins: Pins | None = None,
    records: QuarantineRecords | None = None,
    residents: Residents | None = None,
    reaps: bool = True,
) -> Fleet:
    """A fleet of real routers.

    Args:
        spawner: starts the processes.
        state_dir: folder for generated files.
        log_dir: folder for what the routers print.
        environ: the environment of which a short list is passed on; it says how the Hub is reached, too.
        bus: where the events go.
        log_size_bytes: size at which a router's output file is rotated.
        llama_server: as configured; asked for devices that nobody else tells of.
        footprints: what models took when they were loaded before; what is learned is added.
        pins: which models people want to stay in memory.
        records: which models were left alone.
        residents: which models were in memory.
        reaps: whether processes that are handed to us are reaped; only for who has no other children.
    """
    probes, sights = ProbeCache(), Sights()
    footprints = Footprints() if footprints is None else footprints
    appraiser = Appraiser(footprints=footprints)
    marker = {INSTANCE_VARIABLE: spawner.instance}
    try:
        asked = find(llama_server)
    except BinaryError:
        asked = None
    meter = Meter(open_gauge(environ, llama_server=asked, worker_env=marker), bus=bus)

    def make_host(settings: RouterSettings, source: ModelSource) -> Host:
        return Launcher(
            settings,
            source=source,
            spawner=spawner,
            state_dir=state_dir,
            log_dir=log_dir,
            log_size_bytes=log_size_bytes,
            probes=probes,
            sights=sights,
            appraiser=appraiser,
            environ=environ,
        )

    def make_watch(path: Path, link_dirs: Sequence[Path]) -> Watch:
        return FolderWatch(path, link_dirs=link_dirs, env=marker)

    fleet = Fleet(
        make_host=make_host,
        make_watch=make_watch,
        meter=meter,
        downloads=Downloads(Hub(environ), bus),
        footprints=footprints,
        pins=pins,
        records=records,
        residents=residents,
        spawner=spawner if reaps else None,
        bus=bus,
        clock=time.monotonic,
    )
    appraiser.is_loading = fleet.memory.is_loading
    return fleet


@asynccontextmanager
async def running(settings: FleetSettings, *, state_dir: Path, bus: Bus | None = None) -> AsyncIterator[Fleet]:
    """What `Fleet.open` does."""
    settings, bus = settings.for_leases(secrets.token_urlsafe(32)), bus or Bus()
    state_dir, settings = await run_in_thread(_in_full, state_dir, settings)
    with closing(_claim(state_dir)):
        started, footprints, pins, records = Started(), Footprints(), Pins(), QuarantineRecords()
        ledger = Ledger(state_dir / LEDGER, [started, footprints, pins, records])
        for problem in await run_in_thread(ledger.load):
            bus.publish(Warned(subject="ledger", text=problem))
        spawner = Spawner(instance_of(state_dir), started)
        fleet = open_fleet(
            spawner=spawner,
            state_dir=state_dir,
            log_dir=state_dir / "logs",
            environ=os.environ,
            bus=bus,
            llama_server=settings.routers[0].llama_server if settings.routers else None,
            footprints=footprints,
            pins=pins,
            records=records,
            reaps=False,
        )
        await sweep(spawner, bus)
        failure: Exception | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(keep, ledger, bus)
            tasks.start_soon(fleet.run, settings)
            tasks.start_soon(fleet.downloads.run, {each.models_dir for each in settings.routers})
            try:
                await _come_up(fleet)
                yield fleet
            except Exception as error:  # noqa: BLE001 (a task group would hand it on in a group)
                failure = error
            await fleet.shut_down()
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure


def _in_full(state_dir: Path, settings: FleetSettings) -> tuple[Path, FleetSettings]:
    """The same with absolute paths: llama-server runs in a folder of its own."""
    routers = tuple(replace(each, models_dir=each.models_dir.absolute()) for each in settings.routers)
    return state_dir.absolute(), replace(settings, routers=routers)


def _claim(state_dir: Path) -> Lock:
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Lock(state_dir / "lock")


async def _come_up(fleet: Fleet) -> None:
    """Wait until every router serves or has said why it does not, and the models folders were looked at."""
    while not list(fleet):
        await anyio.lowlevel.checkpoint()
    with anyio.move_on_after(COME_UP_S):
        await fleet.wait_for_models()
        for router in fleet:
            await router.wait_until(partial(_has_settled, router))


def _has_settled(router: Router) -> bool:
    return router.state in SERVING | {RouterState.FAILED, RouterState.BACKOFF, RouterState.STOPPED}


def instance_of(state_dir: Path) -> str:
    """The id of this installation: what carries it in its environment was started by it, now or before."""
    path = state_dir / "instance"
    fresh = str(uuid.uuid4())
    try:
        return str(uuid.UUID(path.read_text(encoding="ascii").strip()))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no id of an installation"
        _log.warning("cannot use %s (%s): left-overs of an earlier daemon will not be recognised", path, why)
    try:
        path.write_text(f"{fresh}\n", encoding="ascii")
    except OSError as error:
        _log.warning("cannot write %s (%s): left-overs of this daemon will not be recognised", path, error)
    return fresh


async def sweep(spawner: Spawner, bus: Bus) -> None:
    """Kill what an earlier daemon of this installation left running; before any port is bound."""
    leftovers = await spawner.sweep()
    if leftovers:
        bus.publish(StraysKilled(router=None, pids=leftovers.killed, survivors=leftovers.survivors))
