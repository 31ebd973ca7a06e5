"""RAM: how much there is for us, and how much a process takes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio

from llamavisor.gauge.cgroup import parse_number, read_cgroup
from llamavisor.gauge.device import RAM, Reading, unknown
from llamavisor.threads import run_in_thread

ROOT = Path("/")
_KIB = 1024


class RamGauge:
    """Reads RAM: the smaller of what the machine has and what our cgroup may take. Files of the kernel, no device.

    Args:
        root: where /proc and /sys are.
        measure: what reads, for tests on virtual time; blocking.
    """

    def __init__(self, root: Path = ROOT, *, measure: Callable[[Path, float], Reading] | None = None) -> None:
        self._root = root
        self._measure = measure or read_ram

    def __repr__(self) -> str:
        return f"<RamGauge {self._root}>"

    async def read(self) -> Sequence[Reading]:
        """RAM, always exactly one."""
        at = anyio.current_time()
        return (await run_in_thread(partial(self._measure, self._root, at)),)

    async def aclose(self) -> None:
        """There is nothing to let go of."""


def read_ram(root: Path, at: float) -> Reading:
    """RAM now: MemTotal and MemAvailable of the machine, or less where our cgroup's limits leave less.

    What is free is what can be had without swapping and without meeting a limit: the smaller of MemAvailable and the
    room that the tightest limit leaves. The rest of the total counts as used, whoever uses it. Swap is no memory here.
    Blocks for about a millisecond.
    """
    try:
        known = parse_meminfo((root / "proc/meminfo").read_text(encoding="ascii", errors="replace"))
    except OSError as exc:
        return unknown(RAM, at, f"/proc/meminfo cannot be read: {exc.strerror}")
    total, available = known.get("MemTotal"), known.get("MemAvailable")
    if not total:
        return unknown(RAM, at, "/proc/meminfo does not tell MemTotal")
    ours = read_cgroup(root)
    total = total if ours.limit_bytes is None else min(total, ours.limit_bytes)
    high = ours.high_bytes if ours.high_bytes is not None and ours.high_bytes < total else None
    if available is None or ours.problem:
        reason = ours.problem or "/proc/meminfo does not tell MemAvailable"
        # A limit that cannot be read may be smaller than what we know.
        known_total = None if ours.problem and ours.limit_bytes is None else total
        return Reading(RAM, known_total, None, None, at, reason, high_bytes=high)
    free = available if ours.room_bytes is None else min(available, ours.room_bytes)
    free = min(free, total)
    return Reading(RAM, total, total - free, free, at, high_bytes=high)


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """What a process takes of RAM, in bytes; what is unknown is None.

    Pages that several processes share are split evenly among them, so that the numbers of several processes can be
    added up: weights that two children have mapped count once.

    Attributes:
        pss: all of it that is in RAM; None where the kernel does not let us see how pages are shared. The others are
            then not split: they count shared pages in full.
        anonymous: what it allocated: KV cache, compute buffers, weights that are not mapped.
        file: files that it has mapped: weights. The kernel can drop these, and reads them again when they are used.
        swap: what of it has been swapped out.
        shmem: memory shared on purpose, and tmpfs.
    """

    pss: int | None
    anonymous: int | None
    file: int | None
    swap: int | None
    shmem: int | None

    @property
    def private(self) -> int | None:
        """What only its end gives back, swapped out or not. This is what grows when it leaks."""
        return None if self.anonymous is None or self.swap is None else self.anonymous + self.swap


def memory_of(pid: int, *, root: Path = ROOT) -> ProcessMemory | None:
    """What one process takes now, without those that it started; None if it has ended, or cannot be seen at all.

    The kernel walks all of its pages for this, tens of milliseconds for a large model, and may wait while the process
    changes its mappings: call it in a worker thread, and not every second. What a GPU's driver keeps for the process
    in RAM (pinned buffers) does not show here.
    """
    folder = root / "proc" / str(pid)
    rollup = parse_meminfo(_read(folder / "smaps_rollup"))
    if "Pss" in rollup:
        return ProcessMemory(
            pss=rollup["Pss"],
            anonymous=rollup.get("Pss_Anon", rollup.get("Anonymous")),
            file=rollup.get("Pss_File"),
            swap=rollup.get("SwapPss", rollup.get("Swap")),
            shmem=rollup.get("Pss_Shmem"),
        )
    # A process of another user, or one that may not be traced: its sums are still for everybody to see.
    status = parse_meminfo(_read(folder / "status"))
    if "RssAnon" not in status:
        return None
    names = "RssAnon", "RssFile", "VmSwap", "RssShmem"
    anonymous, file, swap, shmem = (status.get(name) for name in names)
    return ProcessMemory(None, anonymous, file, swap, shmem)


def memory_of_all(pids: Iterable[int], *, root: Path = ROOT) -> ProcessMemory:
    """What several processes take together, such as a child and its descendants; one that has ended counts nothing."""
    found = [memory for memory in (memory_of(pid, root=root) for pid in pids) if memory is not None]
    return ProcessMemory(
        pss=_sum(memory.pss for memory in found),
        anonymous=_sum(memory.anonymous for memory in found),
        file=_sum(memory.file for memory in found),
        swap=_sum(memory.swap for memory in found),
        shmem=_sum(memory.shmem for memory in found),
    )


def parse_meminfo(text: str) -> dict[str, int]:
    """Bytes by name, from lines such as `MemTotal:  1024 kB`; lines that say anything else are left out."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        number = parse_number(words[0]) if len(words) == 2 and words[1] == "kB" else None
        if number is not None:
            found[name.strip()] = number * _KIB
    return found


def _sum(numbers: Iterable[int | None]) -> int | None:
    total = 0
    for number in numbers:
        if number is None:
            return None
        total += number
    return total


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
