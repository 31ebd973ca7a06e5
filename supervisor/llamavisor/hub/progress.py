"""How far a file has come, how fast, and how long it still takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum

import anyio

WINDOW_S = 10.0
"""Speed is what came in the last so many seconds: steady enough to be read, quick enough to be true."""
_STEP_S = 0.25


class Stage(Enum):
    """What is being done for a file."""

    WAITING = "waiting"
    """Nothing yet, or somebody else brings it, or the next attempt is due later."""
    CHECKING = "checking"
    """What is here of it is read, or has come and is being made sure of."""
    RECEIVING = "receiving"
    """It comes."""
    DONE = "done"
    """It is here, whole and as it should be."""


class Progress:
    """One file on its way.

    Args:
        name: its name.
        size: its bytes.
        clock: monotonic seconds.

    Attributes:
        stage: what is being done.
        done: bytes that are here.
        trouble: why it is tried again, empty when all is well.
        is_again: whether all of it had come, and was not what the Hub had promised.
    """

    def __init__(self, name: str, size: int, *, clock: Callable[[], float] = anyio.current_time) -> None:
        self.name = name
        self.size = size
        self.stage = Stage.WAITING
        self.done = 0
        self.trouble = ""
        self.is_again = False
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()
        self._moved_at = clock()

    def __repr__(self) -> str:
        return f"<Progress {self.name} {self.stage.value} {self.done} of {self.size}>"

    def reach(self, done: int) -> None:
        """So many bytes are here; fewer than before when it begins anew."""
        now = self._clock()
        if done != self.done or not self._seen:
            self._moved_at = now
        if done < self.done or self.stage is not Stage.RECEIVING:
            self._seen.clear()
        if not self._seen or now - self._seen[-1][0] >= _STEP_S:
            self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > WINDOW_S:
            self._seen.popleft()
        self.done = done

    @property
    def speed(self) -> float:
        """Bytes in a second, 0 when nothing comes."""
        if self.stage is not Stage.RECEIVING or not self._seen:
            return 0.0
        now = self._clock()
        since, before = next((seen for seen in self._seen if now - seen[0] <= WINDOW_S), (now, self.done))
        return max(0.0, (self.done - before) / (now - since)) if now > since else 0.0

    @property
    def silent_s(self) -> float:
        """Seconds for which nothing has come, 0 when nothing should."""
        return self._clock() - self._moved_at if self.stage is Stage.RECEIVING else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds until it is here, None when that cannot be told."""
        if self.stage is Stage.DONE:
            return 0.0
        speed = self.speed
        return (self.size - self.done) / speed if speed > 0 else None
