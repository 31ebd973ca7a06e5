"""An event loop on virtual time that runs only while something is done in it: between two deeds time stands still."""

from __future__ import annotations

import queue
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar, cast

import anyio
import trio
from trio.testing import MockClock

DEED_S = 60.0
"""Real seconds that one deed may take."""

_T = TypeVar("_T")


class Stepwise:
    """Runs what lives in a context manager, and deeds beside it, one at a time; for tests that are no coroutines.

    The loop has a thread of its own, which waits for the next deed and runs nothing meanwhile: so whoever drives it may
    look at everything that lives there, and the same deeds always have the same consequences.

    Args:
        life: what lives there, until `end`.
        instruments: of the loop.
    """

    def __init__(
        self, life: Callable[[], AbstractAsyncContextManager[None]], *instruments: trio.abc.Instrument
    ) -> None:
        self.clock = MockClock(autojump_threshold=0)
        self._life = life
        self._instruments = instruments
        self._deeds: queue.SimpleQueue[Callable[[], Awaitable[object]] | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="stepwise", daemon=True)
        self._has_ended = False
        self._thread.start()
        self._outcome()

    def __repr__(self) -> str:
        return f"<Stepwise at {self.clock.current_time():.3f}>"

    def do(self, deed: Callable[[], Awaitable[_T]]) -> _T:
        """Have something done there; returns what came of it, or raises what it, or what lives there, has raised."""
        self._deeds.put(deed)
        return cast("_T", self._outcome())

    def end(self) -> None:
        """End what lives there; nothing if that has happened."""
        if not self._has_ended:
            self._has_ended = True
            self._deeds.put(None)
            self._outcome()
        self._thread.join(DEED_S)

    def _outcome(self) -> object:
        try:
            outcome = self._outcomes.get(timeout=DEED_S)
        except queue.Empty:
            raise TimeoutError(self._whereabouts()) from None
        if isinstance(outcome, _Failure):
            self._has_ended = self._has_ended or outcome.is_the_end
            raise outcome.error
        return outcome

    def _whereabouts(self) -> str:
        """Where its thread is."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        where = "".join(traceback.format_stack(frame)) if frame is not None else "nowhere"
        return f"no answer within {DEED_S:.0f} s, {self!r} is at\n{where}"

    def _run(self) -> None:
        options: dict[str, Any] = {"clock": self.clock, "instruments": self._instruments}
        try:
            anyio.run(self._live, backend="trio", backend_options=options)
        except BaseException as error:  # noqa: BLE001 (it is raised where somebody waits for it)
            self._outcomes.put(_Failure(error, is_the_end=True))
        else:
            self._outcomes.put(None)

    async def _live(self) -> None:
        async with self._life():
            self._outcomes.put(None)
            while (deed := self._deeds.get()) is not None:
                try:
                    outcome = await deed()
                except Exception as error:  # noqa: BLE001 (likewise)
                    self._outcomes.put(_Failure(error, is_the_end=False))
                else:
                    self._outcomes.put(outcome)


class _Failure:
    """What was raised."""

    def __init__(self, error: BaseException, *, is_the_end: bool) -> None:
        self.error = error
        self.is_the_end = is_the_end
