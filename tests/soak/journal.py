"""Everything that the daemon tells, over its ends and starts, and who waits for some of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import httpx

AGAIN_S = 0.1
"""So soon a stream that has ended is opened again."""
SILENCE_S = 60.0
"""A stream says more often that it is still there."""

Event = dict[str, Any]


class Journal:
    """Events in their order.

    Args:
        socket: of the daemon.
    """

    def __init__(self, socket: Path) -> None:
        self.events: list[Event] = []
        self._socket = socket
        self._last_id = 0
        self._news = anyio.Event()

    def __repr__(self) -> str:
        return f"<Journal of {len(self.events)}>"

    @property
    def mark(self) -> int:
        """How many there are."""
        return len(self.events)

    def forget_ids(self) -> None:
        """Another daemon counts its events from the beginning."""
        self._last_id = 0

    async def follow(self) -> None:
        """Listen until cancelled."""
        transport = httpx.AsyncHTTPTransport(uds=str(self._socket))
        timeout = httpx.Timeout(5.0, read=SILENCE_S)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=timeout) as client:
            while True:
                with suppress(httpx.HTTPError):  # the daemon has ended, or has stopped
                    await self._listen(client)
                await anyio.sleep(AGAIN_S)

    async def _listen(self, client: httpx.AsyncClient) -> None:
        async with client.stream("GET", f"/control/v1/events?since={self._last_id}") as reply:
            async for line in reply.aiter_lines():
                if line.startswith("data:"):
                    event = json.loads(line[5:])
                    self._last_id = event["id"]
                    self.events.append(event)
                    self._news.set()
                    self._news = anyio.Event()

    async def first(self, is_wanted: Callable[[Event], bool], since: int, within_s: float) -> Event | None:
        """The first event after the first `since` ones that is wanted, None if it does not come in time."""
        at = since
        with anyio.move_on_after(within_s):
            while True:
                while at < len(self.events):
                    if is_wanted(self.events[at]):
                        return self.events[at]
                    at += 1
                await self._news.wait()
        return None

    def about(self, unix: float, within_s: float = 10.0) -> list[str]:
        """What was told around a time, one line each."""
        return [
            f"{event['time'] - unix:+8.3f} s  {event['event']}: {event['message']}"
            for event in self.events
            if abs(event["time"] - unix) <= within_s
        ]
