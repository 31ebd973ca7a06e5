"""When a process is taken for hung."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamavisor.health import (
    KILL_AFTER_S,
    PROBES,
    PROGRESS_BYTES,
    PROGRESS_CPU_S,
    PROGRESS_FAULTS,
    RESTART_AFTER_S,
    Pulse,
    Remedy,
    describe,
    remedy,
)
from llamavisor.vitals import Vitals, read_vitals

AFTER_S = 60.0
MAX_S = 600.0
ASLEEP = Vitals(1.0, 0, 0)


def silent(pulse: Pulse, *at: float, vitals: Vitals | None = ASLEEP) -> Pulse:
    """It has not answered at these times."""
    for now in at:
        pulse = pulse.failed(vitals, now)
    return pulse


def is_hung(pulse: Pulse, now: float) -> bool:
    """Whether it is, by the usual limits."""
    return pulse.is_hung(now, after_s=AFTER_S, max_s=MAX_S)


def test_silence_without_progress() -> None:
    """Hung takes all three: 60 s of silence, six questions in a row, and nothing done meanwhile."""
    pulse = silent(Pulse.begin(0.0), *range(10, 61, 10))
    assert not is_hung(pulse, 59.9)
    assert is_hung(pulse, 60.0)
    assert not is_hung(silent(Pulse.begin(0.0), 10.0, 20.0, 30.0, 40.0, 50.0), 1000.0)
    assert not is_hung(pulse.answered(60.0), 61.0)


@pytest.mark.parametrize(
    "done",
    [
        Vitals(1.0 + PROGRESS_CPU_S, 0, 0),
        Vitals(1.0, PROGRESS_FAULTS, 0),
        Vitals(1.0, 0, PROGRESS_BYTES),
    ],
)
def test_whoever_works_is_not_hung(done: Vitals) -> None:
    """CPU, pages read in, and bytes moved are progress, each alone; without more of it the time runs again."""
    pulse = silent(Pulse.begin(0.0), *range(10, 61, 10)).failed(done, 65.0)
    assert not is_hung(pulse, 120.0)
    assert is_hung(pulse, 125.0)


def test_what_a_stuck_process_still_does_is_no_progress() -> None:
    """To take our questions in costs a stuck process a little."""
    pulse = Pulse.begin(0.0)
    for second in range(10, 70, 10):
        pulse = pulse.failed(Vitals(1.0 + second / 1000, 0, second * 100), float(second))
    assert is_hung(pulse, 60.0)


def test_silence_has_an_end_however_busy() -> None:
    """A process that takes CPU and answers nobody is given up in the end."""
    pulse = Pulse.begin(0.0)
    for second in range(10, 700, 10):
        pulse = pulse.failed(Vitals(float(second), 0, 0), float(second))
        assert is_hung(pulse, float(second)) is (second >= MAX_S)


def test_what_nobody_can_look_at_is_not_judged() -> None:
    """Who has no descriptor to ask with, and none to look at /proc, knows nothing of others."""
    pulse = silent(Pulse.begin(0.0), *range(10, 6000, 10), vitals=None)
    assert pulse == Pulse.begin(0.0)
    assert not is_hung(pulse, 6000.0)


def test_never() -> None:
    """Who says so is never given up."""
    pulse = silent(Pulse.begin(0.0), *range(10, 6000, 10))
    assert not pulse.is_hung(1e6, after_s=None, max_s=MAX_S)
    assert not Pulse.begin(0.0).idle(ASLEEP, 10.0).is_stalled(after_s=None)


def test_a_gap_is_no_silence() -> None:
    """T2: what it did not say while we did not run does not count."""
    pulse = silent(Pulse.begin(0.0), *range(10, 61, 10)).later(28800.0)
    assert not is_hung(pulse, 28800.0 + 60.0)
    assert is_hung(silent(pulse, *range(28870, 28940, 10)), 28940.0)


def test_work_that_does_not_get_on() -> None:
    """A process that answers, has requests, and does nothing about them for a minute, is under suspicion."""
    pulse = Pulse.begin(0.0)
    for second in range(2, 62, 2):
        assert not pulse.is_stalled(after_s=AFTER_S)
        pulse = pulse.idle(ASLEEP, float(second))
    assert pulse.is_stalled(after_s=AFTER_S)
    assert not is_hung(pulse, 60.0)
    busy = Pulse.begin(0.0)
    for second in range(2, 62, 2):
        busy = busy.idle(Vitals(float(second), 0, 0), float(second))
    assert not busy.is_stalled(after_s=AFTER_S)


@given(st.lists(st.tuples(st.floats(0.1, 30.0), st.booleans(), st.floats(0.0, 1.0)), max_size=40))
def test_no_pulse_is_hung_sooner_than_it_may(story: list[tuple[float, bool, float]]) -> None:
    """Whatever happens: a process that answered, or did something, within the last minute is never hung."""
    now, cpu_s, pulse, well_at, failures = 0.0, 0.0, Pulse.begin(0.0), 0.0, 0
    for step, answers, work_s in story:
        now, cpu_s = now + step, cpu_s + work_s
        if answers:
            pulse, well_at, failures = pulse.answered(now), now, 0
        else:
            pulse, failures = pulse.failed(Vitals(cpu_s, 0, 0), now), failures + 1
        if is_hung(pulse, now):
            assert failures >= PROBES
            assert now - well_at >= AFTER_S


def test_the_ladder() -> None:
    """Its router ends it, then we do, and in the end its router makes way for another."""
    assert [remedy(each) for each in (0.0, KILL_AFTER_S, RESTART_AFTER_S, 1e6)] == [
        Remedy.UNLOAD,
        Remedy.KILL,
        Remedy.RESTART,
        Remedy.RESTART,
    ]


def test_what_is_told() -> None:
    """A person reads for how long, and that somebody has stopped the process."""
    pulse = silent(Pulse.begin(0.0), *range(10, 61, 10))
    assert describe(pulse, 61.0) == "no answer for 61 s to 6 questions, and no progress for 61 s"
    stopped = silent(Pulse.begin(0.0), 10.0, vitals=Vitals(1.0, 0, 0, is_stopped=True))
    assert describe(stopped, 61.0) == "no answer for 61 s: its process is suspended (SIGSTOP, or a debugger)"


def test_vitals_of_real_processes() -> None:
    """A process that works takes CPU and moves bytes, one that is stopped does nothing, one that has ended is none."""
    code = "while True:\n  with open('/proc/self/stat') as file: file.read()"
    busy = subprocess.Popen([sys.executable, "-c", code])
    try:
        first = read_vitals(busy.pid)
        assert first is not None
        deadline = time.monotonic() + 20
        while (now := read_vitals(busy.pid)) is not None and time.monotonic() < deadline:
            if now.cpu_s > first.cpu_s + 0.02 and now.moved_bytes > first.moved_bytes:
                break
            time.sleep(0.01)
        assert now is not None
        assert now.cpu_s > first.cpu_s
        assert now.moved_bytes > first.moved_bytes
        os.kill(busy.pid, signal.SIGSTOP)
        while (now := read_vitals(busy.pid)) is not None and not now.is_stopped and time.monotonic() < deadline:
            time.sleep(0.01)
        assert now is not None
        assert now.is_stopped
    finally:
        busy.kill()
        busy.wait()
    assert read_vitals(busy.pid) is None
