"""All the memory of this machine: which gauges it needs, and what they say together."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import anyio

from llamavisor.gauge.amd import find_amd
from llamavisor.gauge.device import Gauge, Reading, once
from llamavisor.gauge.listed import ListedGauge
from llamavisor.gauge.nvidia import find_nvidia
from llamavisor.gauge.ram import RamGauge
from llamavisor.gauge.remote import RemoteGauge


class MachineGauge:
    """Reads everything at once; a gauge that takes its time does not make another one wait, only their common answer.

    Args:
        gauges: of which no two read the same device.
        listed: asked last, and only for what none of the others reads.
    """

    def __init__(self, gauges: Sequence[Gauge], *, listed: ListedGauge | None = None) -> None:
        self._gauges = tuple(gauges)
        self._listed = listed

    def __repr__(self) -> str:
        return f"<MachineGauge {[*self._gauges, *filter(None, [self._listed])]}>"

    async def read(self) -> Sequence[Reading]:
        """RAM first, then the others, each device once."""
        parts: list[Sequence[Reading]] = [()] * len(self._gauges)

        async def take(place: int, gauge: Gauge) -> None:
            parts[place] = await gauge.read()

        async with anyio.create_task_group() as group:
            for place, gauge in enumerate(self._gauges):
                group.start_soon(take, place, gauge)
        readings = [reading for part in parts for reading in part]
        if self._listed is not None:
            readings += await self._listed.read_beyond({reading.device.kind for reading in readings})
        return once(readings)

    async def aclose(self) -> None:
        """Close all of them."""
        with anyio.CancelScope(shield=True):
            for gauge in (*self._gauges, *filter(None, [self._listed])):
                await gauge.aclose()


def has_nvml() -> bool:
    """Whether the bindings of NVML are installed; imports nothing."""
    return importlib.util.find_spec("pynvml") is not None


def open_gauge(
    environ: Mapping[str, str],
    *,
    root: Path = Path("/"),
    llama_server: Path | None = None,
    worker_env: Mapping[str, str] | None = None,
) -> MachineGauge:
    """The gauge of what this machine has; it opens nothing until it is read.

    NVIDIA devices are read when nvidia-ml-py is installed, and AMD devices when there were any at this moment. What
    neither of them knows is asked of llama-server.

    Args:
        environ: that a router would have, for asking llama-server.
        root: where /proc, /sys and /dev are.
        llama_server: whom to ask for devices that nobody else knows; None asks nobody.
        worker_env: added to the environment of worker processes, such as the marker of this daemon.
    """
    env = dict(worker_env or {})
    gauges: list[Gauge] = [RamGauge(root)]
    if has_nvml():
        gauges.append(RemoteGauge.of("nvidia", root=root, env=env, find=partial(find_nvidia, root)))
    if find_amd(root):
        gauges.append(RemoteGauge.of("amd", root=root, env=env, find=partial(find_amd, root)))
    listed = None if llama_server is None else ListedGauge(llama_server, environ)
    return MachineGauge(gauges, listed=listed)
