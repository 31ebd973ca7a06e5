"""Waiting until the memory of a process that has ended is back.

A GPU's driver frees what a process held some time after it has ended, up to seconds. RAM is back, but for rare cases,
before the end of the process is seen at all: the kernel takes its memory apart first.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping

import anyio

from llamavisor.gauge.device import RAM_ID, Reading

GPU_S = 5.0
"""How long the memory of a device is waited for."""
RAM_S = 0.25
"""How long RAM is waited for. What has not come by then does not come soon: somebody else has it, or it was shared."""
ENOUGH = 0.9
"""Others go on taking and giving memory: what has come back by this fraction is back."""
FIRST_PAUSE_S = 0.002
MAX_PAUSE_S = 0.25
"""Between two readings: twice as long each time, up to this."""
_PER_CPU_FRACTION = 8
"""Since Linux 6.7 each processor may keep its share of an eighth of the memory at hand for its next allocations (high
of the per-cpu page lists, MIN_PERCPU_PAGELIST_HIGH_FRACTION in mm/page_alloc.c), and gives it back over a minute, or
at once when memory gets short. What a process on it frees goes there first, and the kernel does not count that as free:
of 512 MiB that came back 55 MiB were seen at first, on a machine with 24 GiB and two processors."""


async def await_reclaim(
    read: Callable[[float], Awaitable[Mapping[str, Reading]]],
    before: Mapping[str, int | None],
    expected: Mapping[str, int],
    *,
    gpu_s: float = GPU_S,
    ram_s: float = RAM_S,
    processors: int | None = None,
) -> dict[str, int]:
    """Wait until free memory has risen as expected on every device, or for long enough; returns what is missing.

    As a rule this returns after one reading. It is to be called when the process has ended.

    Args:
        read: reads all devices within so many seconds, as `Meter.read_now`; its readings are by `Device.memory_id`.
        before: the free bytes of each device before the process was asked to end; None for one that was unknown.
        expected: the bytes of each device that come back. Of RAM only what ends with the process, as
            `Meter.freed_by` tells: the file of a model stays in the page cache, and counts as free before and after.
        gpu_s: how long to wait for devices.
        ram_s: how long to wait for RAM.
        processors: how many this machine has; found out if it is not told.

    Returns:
        For each device of `expected` the bytes that have not come back, 0 where they have. A device of which nothing
        is known, or no longer, counts as 0 at once: nothing can be said of it, and waiting would not change that.
    """
    began = anyio.current_time()
    share = _PER_CPU_FRACTION * (processors or os.cpu_count() or 1)
    missing = dict.fromkeys(expected, 0)
    # When each is given up: what is left until then is exact, and what has passed since `began` may never be enough.
    ends = {device: began + (ram_s if device == RAM_ID else gpu_s) for device, size in expected.items() if size > 0}
    pause_s = FIRST_PAUSE_S
    while ends:
        readings = await read(max(ends.values()) - anyio.current_time())
        now = anyio.current_time()
        is_new = any(reading.at >= began for reading in readings.values())  # else the gauge is slow
        for device, end in tuple(ends.items()):
            if is_new:
                kept = share if device == RAM_ID else None
                missing[device] = _missing(readings.get(device), before.get(device), expected[device], began, kept)
            if now >= end or (is_new and not missing[device]):
                del ends[device]
        if ends:
            await anyio.sleep(min(pause_s, max(0.0, min(ends.values()) - now)))
            pause_s = min(2 * pause_s, MAX_PAUSE_S)
    return missing


def _missing(reading: Reading | None, before: int | None, expected: int, began: float, share: int | None) -> int:
    """How much of what is expected is not there; 0 also if nothing can be said.

    Args:
        reading: of the device; one of before `began` is of a gauge that asks but seldom.
        before: what was free before.
        expected: what should have come free since.
        began: when the wait began.
        share: of RAM, the part of the whole that a processor may keep.
    """
    if reading is None or before is None or reading.free_bytes is None or reading.at < began:
        return 0
    risen = reading.free_bytes - before
    kept = 0 if share is None or reading.total_bytes is None else reading.total_bytes // share
    return 0 if risen + kept >= ENOUGH * expected else min(expected, expected - risen)
