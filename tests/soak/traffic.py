"""Clients that ask, all the time and at random, some of whom leave; and what became of each request."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import anyio
import httpx
from fault import EVERYTHING, Record
from stage import CHAT_MODELS, EMBEDS, Stage, router_of

from asking import LONG, SHORT, Ask, End, Ended, refused

CLIENTS = 6
AT_ONCE = 2
"""So many ask one model at a time: one that hangs would hold them all."""
REQUEST_S = 120.0
"""Whatever happens to a request: longer is a hang."""
PAUSE_S = 0.3
"""On the average, between two requests of a client."""
LEAVES, EMBEDDINGS = 0.08, 0.08
"""Of all requests."""
LEAVE_S = 0.3
"""Within so long a client leaves that does."""
AFTERMATH_S = 3.0
"""A request that began so soon after a fault may still be one of its."""


@dataclass(slots=True)
class Tally:
    """What became of all requests.

    Attributes:
        ended: how many ended how.
        left: clients that did not wait.
        slowest_s: the longest that any took.
    """

    ended: Counter[str] = field(default_factory=Counter)
    left: int = 0
    slowest_s: float = 0.0


class Traffic:
    """The clients.

    Args:
        stage: what they ask.
        records: of the faults.
        seed: of their choices.
    """

    def __init__(self, stage: Stage, records: Sequence[Record], seed: int) -> None:
        self.tally = Tally()
        self._stage = stage
        self._records = records
        self._seed = seed
        self._is_over = False
        self._asked: Counter[str] = Counter()  # requests under way

    def __repr__(self) -> str:
        return f"<Traffic {self.tally.ended}>"

    def stop(self) -> None:
        """Let each client end its last request."""
        self._is_over = True

    async def run(self) -> None:
        """Ask until told to stop."""
        limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
        url = f"http://127.0.0.1:{self._stage.port}"
        async with (
            httpx.AsyncClient(base_url=url, timeout=REQUEST_S, limits=limits, trust_env=False) as client,
            anyio.create_task_group() as group,
        ):
            for at in range(CLIENTS):
                group.start_soon(self._visit, client, Random(f"{self._seed} {at}"))

    async def _visit(self, client: httpx.AsyncClient, choose: Random) -> None:
        while not self._is_over:
            if choose.random() < EMBEDDINGS:
                await self._send(client, None, choose)
            else:
                tokens = choose.choice((SHORT, SHORT, LONG))
                models = [model for model in CHAT_MODELS if self._asked[model] < AT_ONCE]
                models = [model for model in models if model not in self._stage.quiet]
                ask = Ask(choose.choice(models), tokens, is_stream=choose.random() < 0.5)
                await self._send(client, ask, choose)
            await anyio.sleep(choose.expovariate(1 / PAUSE_S))

    async def _send(self, client: httpx.AsyncClient, ask: Ask | None, choose: Random) -> None:
        """Send one request, or of None one for a vector, and see to what became of it."""
        leaves = choose.random() < LEAVES
        patience_s = choose.uniform(0.0, LEAVE_S) if leaves else REQUEST_S
        model = EMBEDS if ask is None else ask.model
        began, ended = time.time(), None
        self._asked[model] += 1
        with anyio.move_on_after(patience_s):
            try:
                ended = await (_embed(client) if ask is None else ask.send(client))
            except httpx.HTTPError as error:
                ended = Ended(End.WRONG, why=repr(error), status=0)
        self._asked[model] -= 1
        now = time.time()
        self.tally.slowest_s = max(self.tally.slowest_s, now - began)
        if ended is None and leaves:
            self.tally.left += 1
        elif ended is None:
            self._stage.findings.broken("every request ends", f"{ask or model}: not within {REQUEST_S} s")
        else:
            self._judge(model, "embedding" if ask is None else ask.kind, ended, began, now)

    def _judge(self, model: str, kind: str, ended: Ended, began: float, now: float) -> None:
        """There are four cases: as promised, the daemon was down, a fault took it, nothing explains it."""
        touching = [each for each in self._records if _touches(each, model, began)]
        if ended.how in {End.WHOLE, End.BROKEN} or _is_documented(ended, model, touching):
            self.tally.ended[ended.how.value] += 1
        elif self._stage.was_down(began - 1.0, now):
            self.tally.ended["daemon down"] += 1
        elif touching:
            self.tally.ended["lost"] += 1
            touching[-1].lost.append(f"{kind} of {model} after {now - began:.2f} s: {ended.why}")
        else:
            self.tally.ended["lost"] += 1
            what = f"{kind} of {model} after {now - began:.2f} s: {ended.why}"
            self._stage.findings.broken("no request is lost without a fault", what)


def _touches(record: Record, model: str, began: float) -> bool:
    """Whether a fault was done to a model, or to its router, while a request for it was under way or right before."""
    mine = {EVERYTHING, router_of(model), f"{router_of(model)}/{model}"}
    return not mine.isdisjoint(record.claims) and began < record.ended + AFTERMATH_S


def _is_documented(ended: Ended, model: str, touching: Sequence[Record]) -> bool:
    """Whether it was refused as promised.

    There are three cases: with a time to come again, because there is no such model now, and because a person has
    pinned so much that there is no room for it, which no time changes.
    """
    if ended.how is not End.REFUSED:
        return False
    is_missing = ended.status in {400, 404} and f"model '{model}' not found" in ended.why
    is_pinned_out = ended.status == 500 and "what is pinned leaves too little" in ended.why
    return (ended.status == 503 and ended.comes_again) or (is_missing and bool(touching)) or is_pinned_out


async def _embed(client: httpx.AsyncClient) -> Ended:
    reply = await client.post("/v1/embeddings", json={"model": EMBEDS, "input": "hi"})
    if reply.status_code != 200:
        return refused(reply)
    vector = json.loads(reply.content)["data"][0]["embedding"]
    is_whole = bool(vector) and all(isinstance(number, int | float) for number in vector)
    return Ended(End.WHOLE if is_whole else End.WRONG, why=reply.text[:200])
