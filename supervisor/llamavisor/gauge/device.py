"""What memory is measured in: devices, readings of them, and the Protocol of whatever reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Kind = Literal["ram", "nvidia", "amd", "other"]
RAM_ID = "RAM"

_PCI_ID = re.compile(r"(?:([0-9a-f]{1,8}):)?([0-9a-f]{1,2}):([0-9a-f]{1,2})\.([0-7])", re.IGNORECASE)
_INTEGRATED = re.compile(
    r"\b(?:GB10|N1X|Orin|Xavier|Thor|Tegra"  # NVIDIA
    r"|Radeon(?:\(TM\))? (?:Graphics|Vega \d+|\d{3,4}[MS])|Custom GPU 0\d{3}"  # AMD; not an RX 7700S
    r"|U?HD Graphics|Iris|Intel\(R\) Graphics|Arc\(TM\) (?:Graphics|\d{3}[VT])"  # Intel; not an Arc A770
    r"|llvmpipe|SwiftShader|Apple M\d)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Device:
    """One physical memory that models are put into: RAM, a GPU, or a MIG instance of one.

    Attributes:
        id: "RAM"; a PCI id such as "0000:01:00.0"; the UUID of a MIG instance, "MIG-…"; or "CUDA0@llama-server" where
            nobody but llama-server knows the device.
        kind: whose it is.
        name: as a person knows it.
        is_ram_shared: whether its memory is RAM (an APU, Jetson, GB10). What is on it is counted under RAM, once.
        uuids: other strings by which CUDA_VISIBLE_DEVICES or ROCR_VISIBLE_DEVICES may mean it.
        rank: its place in the order in which its driver counts devices, None if that is unknown. Ranks order devices
            of one kind; they need not be without gaps.
    """

    id: str
    kind: Kind
    name: str
    is_ram_shared: bool = False
    uuids: tuple[str, ...] = ()
    rank: int | None = None

    @property
    def memory_id(self) -> str:
        """The id under which bytes on this device are counted."""
        return RAM_ID if self.is_ram_shared else self.id


RAM = Device(RAM_ID, "ram", "RAM")


@dataclass(frozen=True, slots=True)
class Reading:
    """How much memory a device has. What is unknown is None, never zero.

    Attributes:
        device: which.
        total_bytes: what there is for us to use.
        used_bytes: what of it is taken, by whomever.
        free_bytes: what of it can be had. The three need not add up: drivers keep some for themselves.
        at: when, in the time of `anyio.current_time`.
        reason: why a number is missing; empty when all are there.
        processes: what each process (by pid) has on the device, None for a process of which the driver tells no number;
            None altogether where it tells of no processes. In a container these may be pids of the host.
        high_bytes: of RAM, the limit above which the kernel slows us down instead of refusing (memory.high).
    """

    device: Device
    total_bytes: int | None
    used_bytes: int | None
    free_bytes: int | None
    at: float
    reason: str = ""
    processes: Mapping[int, int | None] | None = field(default=None, hash=False)
    high_bytes: int | None = None

    @property
    def is_known(self) -> bool:
        """Whether it tells how much there is and how much is free."""
        return self.total_bytes is not None and self.free_bytes is not None


@dataclass(frozen=True, slots=True)
class Pressure:
    """How much work stood still for want of memory over the last ten seconds; see the kernel's PSI documentation.

    Attributes:
        some_avg10: share of the time in which some task waited for memory, in percent.
        full_avg10: likewise all tasks at once.
    """

    some_avg10: float
    full_avg10: float


class Gauge(Protocol):
    """Reads how much memory devices have."""

    async def read(self) -> Sequence[Reading]:
        """Every device there is, each once.

        Never raises for a device that fails: its numbers are None then, and `reason` says why. Ends within a few
        seconds whatever the driver does; a question that it has not answered is not asked a second time beside it.
        """
        ...

    async def aclose(self) -> None:
        """Let go of whatever was opened; a later `read` would open it again."""
        ...


def unknown(device: Device, at: float, reason: str) -> Reading:
    """The reading of a device that does not tell."""
    return Reading(device, None, None, None, at, reason)


def parse_pci_id(text: str) -> str | None:
    """A PCI id in the form that sysfs has, None if it is none: NVML says "00000000:0A:00.0", sysfs "0000:0a:00.0"."""
    found = _PCI_ID.fullmatch(text.strip())
    if found is None:
        return None
    domain, bus, device = (int(found[group] or "0", 16) for group in (1, 2, 3))
    return f"{domain:04x}:{bus:02x}:{device:02x}.{found[4]}" if device < 32 else None


def pci_order(pci_id: str) -> tuple[int, int, int, int]:
    """Sort key of PCI ids in their normal form; what is none comes last."""
    found = _PCI_ID.fullmatch(pci_id)
    if found is None:
        return 1 << 32, 0, 0, 0
    return int(found[1] or "0", 16), int(found[2], 16), int(found[3], 16), int(found[4])


def is_integrated(name: str) -> bool:
    """Whether a device of this name is known to have no memory of its own.

    Goes by the product names that drivers tell, and only helps where they tell nothing better.
    """
    return _INTEGRATED.search(name) is not None


def once(readings: Iterable[Reading]) -> tuple[Reading, ...]:
    """The readings with every device in it once; the first one counts."""
    found: dict[str, Reading] = {}
    for reading in readings:
        found.setdefault(reading.device.id, reading)
    return tuple(found.values())
