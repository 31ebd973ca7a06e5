"""Which process keeps which conversation: llama-server's resumable streams (`/v1/stream`), for a whole fleet.

A request with an `X-Conversation-Id` outlives its client: the process goes on with the answer and keeps it, and whoever
comes back with the id reads it from where they were. Only the process that was asked knows it, so what is remembered
here is where that is. The keeper of a conversation is whoever began it: no other key can read or stop it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http import HTTPStatus

import aiohttp

from llamavisor.endpoint import Endpoint
from llamavisord.gateway.guard import Caller

KEPT = 4096
"""So many conversations are remembered; the one that was asked for least recently is forgotten."""
LOOKUP_S = 2.0
"""How long a process may take to say which conversations it keeps; one that is busy does not."""
LOOKUP_BYTES = 1024 * 1024


@dataclass(eq=False, slots=True)
class Conversation:
    """One conversation.

    Attributes:
        key: the name of the key that began it, None where none was needed.
        cancel: ends the request if no process has it yet.
        endpoint: the process that has it, None before.
    """

    key: str | None
    cancel: Callable[[], None] = field(repr=False)
    endpoint: Endpoint | None = None


class Conversations:
    """Those that were begun and are not known to be over."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Conversation] = OrderedDict()  # the least recently used first

    def __repr__(self) -> str:
        return f"<Conversations {len(self._known)}>"

    def begin(self, name: str, caller: Caller, cancel: Callable[[], None]) -> Conversation:
        """A request with this id has come; it takes the place of an earlier one."""
        conversation = self._known[name] = Conversation(caller.name, cancel)
        self._known.move_to_end(name)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return conversation

    def find(self, name: str, caller: Caller) -> Conversation | None:
        """The conversation of that id, None if there is none that this caller began."""
        known = self._known.get(name)
        if known is None or known.key != caller.name:
            return None
        self._known.move_to_end(name)
        return known

    def end(self, name: str, caller: Caller) -> Conversation | None:
        """Forget a conversation; ends its request if that has not reached a process. None if there is none."""
        known = self.find(name, caller)
        if known is not None:
            del self._known[name]
            if known.endpoint is None:
                known.cancel()
        return known

    async def look_up(self, names: Iterable[object], caller: Caller) -> list[object]:
        """What their processes say of these conversations, each asked only for those that it has. Waits."""
        asked: dict[Endpoint, list[str]] = {}
        for name in names:
            known = self.find(name, caller) if isinstance(name, str) else None
            if isinstance(name, str) and known is not None and known.endpoint is not None:
                asked.setdefault(known.endpoint, []).append(name)
        found: list[object] = []
        if asked:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(LOOKUP_S), trust_env=False) as session:
                for endpoint, those in asked.items():
                    found += await _ask(session, endpoint, those)
        return found


async def _ask(session: aiohttp.ClientSession, endpoint: Endpoint, names: list[str]) -> list[object]:
    headers = {} if endpoint.api_key is None else {"Authorization": f"Bearer {endpoint.api_key}"}
    body = {"conversation_ids": names}
    try:
        async with session.post(f"{endpoint.url}/v1/streams/lookup", json=body, headers=headers) as response:
            if response.status != HTTPStatus.OK:
                return []
            told = json.loads(await response.content.read(LOOKUP_BYTES))
    except (aiohttp.ClientError, TimeoutError, ValueError, RecursionError):
        return []  # as llama-server's router: who does not answer keeps nothing
    return [each for each in told if isinstance(each, dict)] if isinstance(told, list) else []
