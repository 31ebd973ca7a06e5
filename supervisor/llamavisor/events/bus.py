"""The bus: it numbers events, keeps the last of them, and tells whoever listens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from llamavisor.events.base import Event

KEPT = 1000
"""How many events can be replayed."""


@dataclass(frozen=True, slots=True)
class Published:
    """An event with its number (from 1, without gaps) and the wall-clock time in Unix seconds."""

    id: int
    time: float
    event: Event

    def as_dict(self) -> dict[str, object]:
        """The event as the control API shows it."""
        return {"id": self.id, "time": self.time, **self.event.as_dict()}


class Bus:
    """Numbers events, keeps the last `KEPT`, and passes them on. Used from one event loop.

    Args:
        wall: clock for what a person reads; policy never looks at it.
    """

    def __init__(self, *, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._last_id = 0
        self._kept: deque[Published] = deque(maxlen=KEPT)
        self._listeners: list[Callable[[Published], None]] = []
        self._hearing_all: list[Callable[[Published], None]] = []  # those of them that hear of frequent events too
        self._subscribers: set[MemoryObjectSendStream[Published]] = set()

    def __repr__(self) -> str:
        return f"<Bus last_id={self._last_id} subscribers={len(self._subscribers)}>"

    @property
    def last_id(self) -> int:
        """The number of the newest event, 0 before the first."""
        return self._last_id

    def listen(self, listener: Callable[[Published], None], *, hears_frequent: bool = True) -> None:
        """Have `listener` called with every event, at once; it must not block and not raise.

        Args:
            listener: what is called.
            hears_frequent: whether it wants those too of which there may be thousands in a second.
        """
        self._listeners.append(listener)
        if hears_frequent:
            self._hearing_all.append(listener)

    def publish(self, event: Event) -> None:
        """Number the event and pass it on. Never blocks: a subscriber that does not keep up is cut off."""
        self._last_id += 1
        published = Published(self._last_id, self._wall(), event)
        if event.is_news:
            self._kept.append(published)
        for listener in self._hearing_all if event.is_frequent else self._listeners:
            listener(published)
        for subscriber in tuple(self._subscribers) if self._subscribers else ():
            try:
                subscriber.send_nowait(published)
            except (anyio.WouldBlock, anyio.BrokenResourceError):
                self._subscribers.discard(subscriber)
                subscriber.close()

    def replay(self, since: int) -> list[Published]:
        """The kept events with a number above `since`; all of them if `since` is of an earlier daemon."""
        if since > self._last_id:
            since = 0
        return [published for published in self._kept if published.id > since]

    @asynccontextmanager
    async def subscribe(
        self, *, since: int | None = None
    ) -> AsyncIterator[tuple[list[Published], MemoryObjectReceiveStream[Published]]]:
        """The kept events after `since` (none for None), and a stream of all that follow, without a gap between them.

        The stream ends when its reader falls `KEPT` events behind; a reader comes back with the last number it saw.
        """
        send, receive = anyio.create_memory_object_stream[Published](KEPT)
        self._subscribers.add(send)
        try:
            with receive:
                yield ([] if since is None else self.replay(since)), receive
        finally:
            self._subscribers.discard(send)
            send.close()
