"""Is it hung? Three questions, never one: does it exist, does it answer, does it progress (FAULTS.md, liveness).

That a process exists is seen by its pidfd, elsewhere. This is about one that does and does not answer: slow is not
dead. A prompt may take minutes, a disk may be asleep; whatever works is left alone for long. A connection that is
accepted proves nothing: the kernel accepts for a process that is stopped.

Pure: a `Pulse` is what is known of one process, and every method returns what is known after it. Times are monotonic
seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from llamavisor.vitals import Vitals

PROBES = 6
"""Hung is what has been silent for `hang_after_s`, 60 s as a rule, to so many questions in a row, and without
progress."""
PROGRESS_CPU_S = 0.1
PROGRESS_BYTES = 64 * 1024
PROGRESS_FAULTS = 16
"""Less than each of these in that time is no progress: a process that is stuck still takes our questions in."""
ROUTER_MAX_S = 600.0
MODEL_MAX_S = 1800.0
"""What is silent for so long is hung however busy it is. A router computes nothing; a process that serves a model may,
on a slow machine, take many minutes for one batch, between which it says nothing."""
KILL_AFTER_S = 15.0
"""A hung process that its router has not ended by then is killed: three seconds of stop-timeout, and time to notice."""
RESTART_AFTER_S = 30.0
"""One that is there even then makes its router unsound."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """What is known of the health of one process.

    Attributes:
        answered_at: when it last answered; at first, when it was known to be there.
        progressed_at: when it last answered, or was last seen to do something.
        failures: how many questions in a row it has not answered.
        mark: what it had done when that was last taken for progress; None until it was looked at.
    """

    answered_at: float
    progressed_at: float
    failures: int = 0
    mark: Vitals | None = None

    @classmethod
    def begin(cls, now: float) -> Pulse:
        """It is there."""
        return cls(now, now)

    def answered(self, now: float) -> Pulse:
        """It has answered."""
        return Pulse(now, now)

    def failed(self, vitals: Vitals | None, now: float) -> Pulse:
        """It has not answered; `vitals` tell what it has done so far, None if nobody can say.

        Then it may have ended, which is seen elsewhere, or it is we who lack a descriptor to ask with: that counts as
        nothing.
        """
        if vitals is None:
            return self
        pulse = replace(self, failures=self.failures + 1)
        if self.mark is None:  # there is nothing to compare with: what it did before counts as nothing
            return replace(pulse, mark=vitals)
        return replace(pulse, mark=vitals, progressed_at=now) if _is_progress(self.mark, vitals) else pulse

    def idle(self, vitals: Vitals | None, now: float) -> Pulse:
        """It answers, but has work and does not get further with it: that is no progress, if it does nothing."""
        return replace(self.failed(vitals, now), answered_at=now, failures=0)

    def later(self, gap_s: float) -> Pulse:
        """We did not run for so long, nor perhaps did it: what it did not say then is no silence."""
        return Pulse(self.answered_at + gap_s, self.progressed_at + gap_s)

    def silent_s(self, now: float) -> float:
        """For how long it has not answered."""
        return now - self.answered_at

    def is_hung(self, now: float, *, after_s: float | None, max_s: float) -> bool:
        """Whether it is beyond hope.

        Args:
            now: monotonic seconds.
            after_s: how long it may be silent without progress, None for ever.
            max_s: how long it may be silent however busy it is.
        """
        if after_s is None or self.failures < PROBES or self.silent_s(now) < after_s:
            return False
        return now - self.progressed_at >= after_s or self.silent_s(now) >= max_s

    def is_stalled(self, *, after_s: float | None) -> bool:
        """Whether it answers, and has had work for so long without doing anything about it."""
        return after_s is not None and self.failures == 0 and self.answered_at - self.progressed_at >= after_s


def describe(pulse: Pulse, now: float) -> str:
    """Why it is taken for hung, for a person."""
    silent = f"no answer for {pulse.silent_s(now):.0f} s"
    if pulse.mark is not None and pulse.mark.is_stopped:
        return f"{silent}: its process is suspended (SIGSTOP, or a debugger)"
    idle_s = now - pulse.progressed_at
    return f"{silent} to {pulse.failures} questions, and no progress for {idle_s:.0f} s"


class Remedy(Enum):
    """What is done next about the hung process of a model."""

    UNLOAD = "unload"  # its router ends it
    KILL = "kill"  # we do
    RESTART = "restart"  # its router makes way for another


def remedy(hung_for_s: float) -> Remedy:
    """The next step for a process that was found to be hung so long ago, and is still there."""
    if hung_for_s >= RESTART_AFTER_S:
        return Remedy.RESTART
    return Remedy.KILL if hung_for_s >= KILL_AFTER_S else Remedy.UNLOAD


def _is_progress(before: Vitals, after: Vitals) -> bool:
    return (
        after.cpu_s - before.cpu_s >= PROGRESS_CPU_S
        or after.moved_bytes - before.moved_bytes >= PROGRESS_BYTES
        or after.major_faults - before.major_faults >= PROGRESS_FAULTS
    )
