"""Times in which this process did not run: stopped, frozen with its container or its machine, or held up by a bug.

What it waited for was not late then; nobody looked. While a machine sleeps the monotonic clock of Linux stands still,
so that most suspensions are no gap at all; one that stops this process and not the clock is seen here.
"""

from __future__ import annotations

import math

GAP_S = 5.0
"""Less than this is a busy machine."""


class Gaps:
    """Notices gaps from the times at which something happened that happens regularly.

    Args:
        every_s: how long it may be at most from one time to the next.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._last = math.inf
        self._ended_at = -math.inf  # when the last gap ended

    def __repr__(self) -> str:
        return f"<Gaps in {self._every_s:g} s>"

    def pass_s(self, now: float) -> float:
        """It is `now`, in monotonic seconds; returns how long this process did not run since it was last told, or 0.

        By so much whatever was waited for may come later.
        """
        gap_s = now - self._last - self._every_s
        self._last = now
        if gap_s <= GAP_S:
            return 0.0
        self._ended_at = now
        return gap_s

    def has_disturbed(self, began: float, *, within_s: float = 0.0) -> bool:
        """Whether what began then has met with a gap, or begun less than `within_s` after one."""
        return began < self._ended_at + within_s


def was_missed(deadline: float, now: float) -> bool:
    """Whether a deadline that is seen to have passed only now passed in a gap: it says nothing then."""
    return now - deadline > GAP_S
