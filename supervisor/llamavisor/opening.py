"""Opens a fleet on this machine: puts the real parts together."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from llamavisor.appraisal import Appraiser
from llamavisor.binary import ProbeCache, find
from llamavisor.errors import BinaryError
from llamavisor.events import Bus, StraysKilled
from llamavisor.fleet import Fleet
from llamavisor.folder import Watch
from llamavisor.gauge import open_gauge
from llamavisor.host import Host
from llamavisor.launch import Launcher, ModelSource
from llamavisor.ledger import Footprints
from llamavisor.meter import Meter
from llamavisor.output import CAP_BYTES
from llamavisor.pins import Pins
from llamavisor.process import INSTANCE_VARIABLE, Spawner
from llamavisor.quarantine_records import QuarantineRecords
from llamavisor.residents import Residents
from llamavisor.settings import RouterSettings
from llamavisor.sight import Sights
from llamavisor.watch import FolderWatch


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
) -> Fleet:
    """A fleet of real routers.

    Args:
        spawner: starts the processes.
        state_dir: folder for generated files.
        log_dir: folder for what the routers print.
        environ: the environment of which a short list is passed on.
        bus: where the events go.
        log_size_bytes: size at which a router's output file is rotated.
        llama_server: as configured; asked for devices that nobody else tells of.
        footprints: what models took when they were loaded before; what is learned is added.
        pins: which models people want to stay in memory.
        records: which models were left alone.
        residents: which models were in memory.
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
        footprints=footprints,
        pins=pins,
        records=records,
        residents=residents,
        spawner=spawner,
        bus=bus,
        clock=time.monotonic,
    )
    appraiser.is_loading = fleet.memory.is_loading
    return fleet


async def sweep(spawner: Spawner, bus: Bus) -> None:
    """Kill what an earlier daemon of this installation left running; before any port is bound."""
    leftovers = await spawner.sweep()
    if leftovers:
        bus.publish(StraysKilled(router=None, pids=leftovers.killed, survivors=leftovers.survivors))
