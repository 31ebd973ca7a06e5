"""When a model whose process has grown beyond its bound is loaded anew: whatever leaks is given back that way.

Pure. Times are monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from llamavisor.slots import Key

LOOK_S = 10.0
"""How often is looked: nothing leaks that quickly."""
LOOKS = 2
"""A prompt may need much for a moment: so many looks in a row have to find it."""
AGAIN_S = 600.0
"""A model is not loaded anew for this more often: a bound below what it takes at once must not keep it busy."""
PATIENCE_S = 600.0
"""How long a moment is waited for in which nobody uses it; after that it takes no more requests until it is loaded."""


@dataclass(slots=True)
class _Over:
    """A process that was found beyond its bound."""

    loaded_at: float
    since: float
    looks: int = 1
    told_at: float | None = None


class Growth:
    """What is known of the models that have a bound."""

    def __init__(self) -> None:
        self._over: dict[Key, _Over] = {}

    def __repr__(self) -> str:
        return f"<Growth {sorted(self._over)}>"

    def forget_all_but(self, keys: Collection[Key]) -> None:
        """Keep nothing of models that are not loaded, or have no bound."""
        self._over = {key: over for key, over in self._over.items() if key in keys}

    def is_due(self, key: Key, *, loaded_at: float, is_over: bool, is_busy: bool, now: float) -> bool:
        """Whether a model is to be loaded anew, after a look at its process; again later if it could not be unloaded.

        Args:
            key: which model on which router.
            loaded_at: when it was loaded.
            is_over: whether its process was found beyond its bound.
            is_busy: whether somebody uses it.
            now: the time of the look.
        """
        over = self._over.get(key)
        if not is_over:
            self._over.pop(key, None)
            return False
        if over is None or over.loaded_at != loaded_at:
            self._over[key] = _Over(loaded_at, now)
            return False
        over.looks += 1
        is_told = over.told_at is not None and now - over.told_at < AGAIN_S
        if is_told or over.looks < LOOKS or now - loaded_at < AGAIN_S:
            return False
        if is_busy and now - over.since < PATIENCE_S:
            return False
        over.told_at = now
        return True
