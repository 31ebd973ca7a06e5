"""Less RAM for models for a while, after the kernel has killed something of ours for want of it.

Whatever we believed of the memory was too much then, and nobody knows by how much: the next try is made with less. A
kill that was somebody else's fault costs a little room for a few minutes.
"""

from __future__ import annotations

from collections import deque

FACTOR = 0.9
"""What is left of the budget after each kill."""
LEAST = 0.5
"""What is left at least: a budget that came down to nothing would end all service for what may not be its fault."""
LASTS_S = 600.0
"""How long each kill counts: as long as a user may take to come back to the model that was too much."""
_COUNTED = 7
"""More kills than this change nothing: 0.9^7 < 0.5."""


class Penalty:
    """How much of the RAM budget models may take. Times are monotonic seconds."""

    def __init__(self) -> None:
        # Invariant: in the order of time. The oldest of more than `_COUNTED` can be forgotten: as long as it counted,
        # so would all the others, which are enough.
        self._killed_at: deque[float] = deque(maxlen=_COUNTED)

    def __repr__(self) -> str:
        return f"<Penalty for {len(self._killed_at)} kills>"

    def note(self, kills: int, now: float) -> None:
        """The kernel has killed so many processes of ours since the last time that it was asked."""
        self._killed_at.extend([now] * min(kills, _COUNTED))

    def lowered(self, budget_bytes: int, now: float) -> int:
        """What is left of the RAM budget: all of it when there was no kill for a while."""
        while self._killed_at and now - self._killed_at[0] >= LASTS_S:
            self._killed_at.popleft()
        return int(budget_bytes * max(LEAST, FACTOR ** len(self._killed_at)))
