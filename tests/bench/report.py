"""The lines of the table, and how times are taken."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import psutil


class Row(NamedTuple):
    """A line of the table: what, measured, its yardstick, what is allowed, and whether it is."""

    what: str
    measured: str
    yardstick: str
    allowed: str
    is_good: bool


def show(row: Row) -> None:
    """Print a line."""
    verdict = "ok" if row.is_good else "TOO MUCH"
    print(f"{row.what:<52} {row.measured:>12} {row.yardstick:>12} {row.allowed:>12}  {verdict}", flush=True)


def median_s(work: Callable[[], object], runs: int = 21) -> float:
    """The median wall time in seconds, after one run to warm up."""
    work()
    return statistics.median(timed_s(work) for _ in range(runs))


def fastest_s(work: Callable[[], object], runs: int = 2) -> float:
    """The shortest wall time in seconds: of what takes long, and in its favour."""
    return min(timed_s(work) for _ in range(runs))


def timed_s(work: Callable[[], object]) -> float:
    """The wall time of one run in seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def cpu_s(*processes: psutil.Process) -> float:
    """Seconds of CPU that these have taken so far."""
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def ms(seconds: float) -> str:
    """Seconds as milliseconds."""
    return f"{seconds * 1000:.0f} ms"
