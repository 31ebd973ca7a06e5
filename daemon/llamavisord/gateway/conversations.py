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
import anyio

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
        cancel: ends its request while no process has it; None once that has ended.
        endpoint: the process that has it, None while there is none.
    """

    key: str | None
    cancel: Callable[[], None] | None = field(repr=False)
    endpoint: Endpoint | None = None


class TakenError(Exception):
    """Raised when somebody uses the id of a conversation that another key has begun."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the conversation {name[:80]!r} belongs to another key")


class Conversations:
    """Those that were begun and are not known to be over.

    Args:
        lives: whether the process behind an endpoint is still there.
    """

    def __init__(self, lives: Callable[[Endpoint], bool]) -> None:
        self._lives = lives
        self._known: OrderedDict[str, Conversation] = OrderedDict()  # the least recently used first

    def __repr__(self) -> str:
        return f"<Conversations {len(self._known)}>"

    def begin(self, name: str, caller: Caller, cancel: Callable[[], None]) -> Conversation:
        """A request with this id has come; it takes the place of an earlier one.

        Raises:
            TakenError: somebody else has a conversation of that id.
        """
        known = self._known.get(name)
        if known is not None and known.key != caller.name:
            raise TakenError(name)
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
            if known.endpoint is None and known.cancel is not None:
                known.cancel()
        return known

    def ended(self, conversation: Conversation) -> None:
        """Its request has ended; what no process has got is forgotten."""
        conversation.cancel = None
        if conversation.endpoint is None:
            for name in [name for name, known in self._known.items() if known is conversation]:
                del self._known[name]

    async def look_up(self, names: Iterable[object], caller: Caller) -> list[object]:
        """What their processes say of these conversations, each asked only for those that it has. Waits."""
        asked: dict[Endpoint, list[str]] = {}
        for name in names:
            known = self.find(name, caller) if isinstance(name, str) else None
            endpoint = known.endpoint if known is not None else None
            if isinstance(name, str) and endpoint is not None and self._lives(endpoint):
                asked.setdefault(endpoint, []).append(name)
        found: list[object] = []
        if asked:
            limits = aiohttp.ClientTimeout(LOOKUP_S)
            async with (
                aiohttp.ClientSession(timeout=limits, trust_env=False) as session,
                anyio.create_task_group() as group,
            ):
                for endpoint, those in asked.items():
                    group.start_soon(_ask, session, endpoint, those, found)
        return found


async def _ask(session: aiohttp.ClientSession, endpoint: Endpoint, names: list[str], found: list[object]) -> None:
    headers = {} if endpoint.api_key is None else {"Authorization": f"Bearer {endpoint.api_key}"}
    body = {"conversation_ids": names}
    try:
        async with session.post(f"{endpoint.url}/v1/streams/lookup", json=body, headers=headers) as response:
            if response.status != HTTPStatus.OK:
                return
            content = b""
            async for piece in response.content.iter_any():
                content += piece
                if len(content) > LOOKUP_BYTES:
                    return
            told = json.loads(content)
    except (aiohttp.ClientError, TimeoutError, ValueError, RecursionError):
        return  # as llama-server's router: who does not answer keeps nothing
    if isinstance(told, list):
        found += [each for each in told if isinstance(each, dict)]
