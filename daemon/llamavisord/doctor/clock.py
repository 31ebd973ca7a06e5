"""The clock: whether it is kept, as far as the kernel tells, and whether it was set while the daemon ran."""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass

from llamavisor.units import format_duration
from llamavisord.doctor.case import Case
from llamavisord.doctor.finding import Findings, note, ok, problem, warning

TIME_ERROR = 5
"""What adjtimex(2) returns when the clock is not synchronised."""
STA_UNSYNC = 0x40
EARLIEST_UNIX = 1_735_689_600
"""The beginning of 2025: no machine that runs this is older, and certificates are not valid yet."""
JUMP_S = 5.0
"""Two clocks that are asked one after the other, and a daemon that is slow to answer, differ by less."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What the kernel says of the clock: whether somebody keeps it, and by how much it may be wrong at most."""

    is_synchronised: bool
    error_s: float


class _Timex(ctypes.Structure):
    """`struct timex` of adjtimex(2), as far as it is read; the rest is room."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


def kept() -> Kept:
    """Ask the kernel; with no modes set adjtimex changes nothing and needs no right.

    Raises:
        OSError: it does not say, as in some containers.
    """
    timex = _Timex()
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex))
    if state < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    is_synchronised = state != TIME_ERROR and not timex.status & STA_UNSYNC
    return Kept(is_synchronised, timex.maxerror / 1e6)


def look(case: Case) -> Findings:
    """Now, and since the daemon has begun."""
    try:
        told: Kept | OSError = kept()
    except OSError as error:
        told = error
    yield from judge(told, now=time.time(), has_systemd=case.has_systemd)
    if case.status is not None:
        slept_s = time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
        jumped_s = time.time() - case.status["started_unix"] - case.status["uptime_s"]
        yield from judge_jump(jumped_s, slept_s)


def judge(told: Kept | OSError, *, now: float, has_systemd: bool) -> Findings:
    """What is to be said of the clock at `now`, in Unix seconds. Pure."""
    if now < EARLIEST_UNIX:
        year = time.gmtime(now).tm_year
        setting = "timedatectl set-time" if has_systemd else "date -s"
        yield problem(f"the clock says {year}: certificates are not valid, downloads fail", f"set it: `{setting}`")
    if isinstance(told, OSError):
        yield note(f"whether the clock is kept cannot be seen: {told.strerror}")
    elif told.is_synchronised:
        yield ok(f"synchronised, at most {told.error_s:.2f} s off")
    else:
        text = "the clock is kept by nobody: times in logs drift, and it may jump when somebody sets it"
        keeper = "`timedatectl set-ntp true`, or install chrony" if has_systemd else "install chrony"
        yield warning(text, f"{keeper}; in a virtual machine its host may keep it")


def judge_jump(jumped_s: float, slept_s: float) -> Findings:
    """What is to be said of a clock that has gone `jumped_s` further than the daemon has lived. Pure.

    Args:
        jumped_s: seconds, below zero if it was set back.
        slept_s: how long the machine has slept since it was booted, which is no jump.
    """
    if -JUMP_S <= jumped_s <= JUMP_S + slept_s:
        return
    way = "forth" if jumped_s > 0 else "back"
    text = f"the clock was set {way} by {format_duration(abs(jumped_s))} since the daemon began"
    yield note(text, "nothing is late or unloaded for that; times in its logs do not go on evenly")
