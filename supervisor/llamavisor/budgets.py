"""How much memory the models of a router may take of each device, and what they are told because of that. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from llamavisor.footprint import RAM, Device
from llamavisor.gauge import Reading
from llamavisor.settings import MemoryBudget

RAM_RESERVE_SHARE = 0.10
"""What an "auto" budget leaves of RAM: for the system, its page cache, and what models grow beyond estimates."""
LEAST_RAM_RESERVE_BYTES = 1024 * 1024 * 1024
GPU_RESERVE_SHARE = 0.05
"""What it leaves of a GPU: less, for nobody else lives there but a desktop, and estimates are off by a few percent."""
LEAST_GPU_RESERVE_BYTES = 512 * 1024 * 1024
"""A desktop, or the buffers that a driver takes for itself."""
MAX_RESERVE_SHARE = 0.25
"""On a small device the least reserves would leave too little for models: never more than a quarter is kept."""
_NOTHING: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Limit:
    """What models may take of one device.

    Attributes:
        total: bytes that there are, None when that is not known.
        bytes: what models may take together; None when it is not known, and so not kept to.
        is_auto: whether that follows from what there is, and was not written.
    """

    total: int | None
    bytes: int | None
    is_auto: bool


@dataclass(frozen=True, slots=True)
class GpuAllowance:
    """What models may take of one GPU.

    Attributes:
        name: what the router calls it.
        id: which it physically is; "RAM" when its memory is the machine's.
        total: bytes that there are, None when that is not known.
        budget: bytes that models may take together, likewise.
    """

    name: str
    id: str
    total: int | None
    budget: int | None


@dataclass(frozen=True, slots=True)
class Allowance:
    """What the models of a router are told because of its budgets. Another one means that they are loaded anew.

    Attributes:
        ram_bytes: RAM that models may take together, None when it is not known.
        gpus: those that the router sees, in its order.
        models_max: how many models may be loaded at once, 0 for any number.
    """

    ram_bytes: int | None
    gpus: tuple[GpuAllowance, ...] = ()
    models_max: int = 0


def limits(
    memory: MemoryBudget,
    devices: Sequence[Device],
    readings: Sequence[Reading],
    *,
    foreign: Mapping[str, int] = _NOTHING,
) -> dict[str, Limit]:
    """What a router's models may take, by device id: of RAM, and of every GPU that the router sees.

    A size is of every GPU that is seen, each, or of RAM when none is that has memory of its own; a name is of that
    device alone. What is written is never more than there is. All else is "auto": what there is, less a reserve.

    Args:
        memory: what the configuration says.
        devices: the GPUs that the router sees.
        readings: what there is.
        foreign: bytes that others hold than our models, by device id. An "auto" budget gives way to them once they are
            more than its reserve. Without them it does not change while the machine does not, as an `Allowance` needs.
    """
    ids = dict.fromkeys((RAM, *(device.id for device in devices)))
    written = _written(memory, devices)
    return {device: _limit(device, written.get(device), readings, foreign.get(device, 0)) for device in ids}


def unseen(memory: MemoryBudget, devices: Sequence[Device]) -> tuple[str, ...]:
    """The names in a configuration that the router has no device for: their budgets hold for nothing."""
    seen = {RAM.lower(), *(device.name.lower() for device in devices)}
    return tuple(name for name, _ in memory.devices if name.lower() not in seen)


def allow(limits: Mapping[str, Limit], devices: Sequence[Device], models_max: int) -> Allowance:
    """What a router's models are told because of these limits.

    Args:
        limits: as they are without what others hold: they must not change from minute to minute.
        devices: the GPUs that the router sees.
        models_max: how many of its models may be loaded at once, 0 for any number.
    """
    unknown = Limit(None, None, is_auto=True)
    gpus = ((device, limits.get(device.id, unknown)) for device in devices)
    return Allowance(
        ram_bytes=limits.get(RAM, unknown).bytes,
        gpus=tuple(GpuAllowance(device.name, device.id, limit.total, limit.bytes) for device, limit in gpus),
        models_max=models_max,
    )


def reserve(total: int, *, of_ram: bool) -> int:
    """Bytes of a device that an "auto" budget leaves to others."""
    share, least = (
        (RAM_RESERVE_SHARE, LEAST_RAM_RESERVE_BYTES) if of_ram else (GPU_RESERVE_SHARE, LEAST_GPU_RESERVE_BYTES)
    )
    return int(min(max(total * share, least), total * MAX_RESERVE_SHARE))


def _written(memory: MemoryBudget, devices: Sequence[Device]) -> dict[str, int]:
    """The budgets that the configuration says, by device id; where two names mean one device the smaller one counts."""
    written: dict[str, int] = {}
    if memory.size is not None:
        written = dict.fromkeys([device.id for device in devices if device.id != RAM] or [RAM], memory.size)
    ids = {RAM.lower(): RAM} | {device.name.lower(): device.id for device in devices}
    named: dict[str, int] = {}
    for name, size in memory.devices:
        device_id = ids.get(name.lower())
        if device_id is not None:
            named[device_id] = min(size, named.get(device_id, size))
    return written | named


def _limit(device: str, written: int | None, readings: Sequence[Reading], foreign: int) -> Limit:
    reading = next((each for each in readings if each.device.id == device), None)
    total = reading.total_bytes if reading is not None else None
    if written is not None:
        return Limit(total, written if total is None else min(written, total), is_auto=False)
    if reading is None or total is None:
        return Limit(None, None, is_auto=True)
    # Above memory.high the kernel slows us down instead of refusing: models that live there are of no use.
    most = total if reading.high_bytes is None else min(total, reading.high_bytes)
    kept = reserve(most, of_ram=device == RAM)
    # Half of the reserve stays for what others will take, and for estimates that were too small.
    return Limit(total, max(0, most - max(kept, foreign + kept // 2)), is_auto=True)
