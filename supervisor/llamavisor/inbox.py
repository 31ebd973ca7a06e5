"""Where the owner of some state finds what others tell it."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import anyio
import anyio.lowlevel

_M = TypeVar("_M")


class Inbox(Generic[_M]):
    """Messages of many to one reader, in order. Used from one event loop.

    It has no bound of its own: what is posted is bounded by connections, models and processes. Unlike a stream it has
    nothing to close, so one may post to an owner that has ended.
    """

    def __init__(self) -> None:
        self._messages: deque[_M] = deque()
        self._arrived = anyio.Event()

    def __repr__(self) -> str:
        return f"<Inbox of {len(self._messages)}>"

    def __len__(self) -> int:
        return len(self._messages)

    def post(self, message: _M) -> None:
        """Leave a message; never blocks."""
        self._messages.append(message)
        self._arrived.set()

    async def take(self) -> _M:
        """The oldest message; waits for one. A message is not lost when the reader is cancelled."""
        await anyio.lowlevel.checkpoint()
        while not self._messages:
            self._arrived = anyio.Event()
            await self._arrived.wait()
        return self._messages.popleft()
