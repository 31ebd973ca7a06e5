"""What a client asks a tiny model that goes on for ever, and what became of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from itertools import cycle, islice

import httpx

SHORT, LONG = 3, 200
"""Tokens of an answer that is there at once, and of one that can be killed while it is spoken."""


class End(Enum):
    """How a request has ended."""

    WHOLE = "whole"
    """With all that the model says, and nothing of it twice."""
    BROKEN = "broken"
    """A stream that had begun, and ended with an event that says so."""
    REFUSED = "refused"
    """With a status that is no answer."""
    WRONG = "wrong"
    """In any other way."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a request.

    Attributes:
        how: in one word.
        said: what the model said.
        why: what a person should know if it is not whole.
        status: of a refusal.
        comes_again: whether a refusal says when to come again.
        was_sent_again: whether more than one process was asked.
    """

    how: End
    said: str = ""
    why: str = ""
    status: int = 200
    comes_again: bool = False
    was_sent_again: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """A chat, and what a whole answer to it says."""

    model: str
    tokens: int
    is_stream: bool

    @property
    def kind(self) -> str:
        """In two words."""
        return f"{'long' if self.tokens == LONG else 'short'} {'stream' if self.is_stream else 'answer'}"

    @property
    def body(self) -> dict[str, object]:
        """Of the request."""
        messages = [{"role": "user", "content": "hi"}]
        return {"model": self.model, "messages": messages, "stream": self.is_stream, "max_tokens": self.tokens}

    def is_whole(self, said: str) -> bool:
        """Whether this is all that the model says, and nothing of it twice."""
        return said.split() == list(islice(cycle(("I", "am", self.model)), self.tokens))

    async def send(self, client: httpx.AsyncClient) -> Ended:
        """Send it, and judge the answer.

        Raises:
            httpx.HTTPError: there is no answer.
        """
        return await (self._stream(client) if self.is_stream else self._whole(client))

    async def _whole(self, client: httpx.AsyncClient) -> Ended:
        reply = await client.post("/v1/chat/completions", json=self.body)
        if reply.status_code != 200:
            return refused(reply)
        said = reply.json()["choices"][0]["message"]["content"]
        return self._ended(said, f"it said {said[:80]!r}", reply)

    async def _stream(self, client: httpx.AsyncClient) -> Ended:
        """There are four cases: refused, whole to its [DONE], broken with an event that says so, and all others."""
        said, last = "", ""
        try:
            async with client.stream("POST", "/v1/chat/completions", json=self.body) as reply:
                if reply.status_code != 200:
                    await reply.aread()
                    return refused(reply)
                async for line in reply.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    last = line[5:].strip()
                    if last != "[DONE]" and '"error"' not in last:
                        choices = json.loads(last)["choices"]
                        said += (choices[0]["delta"].get("content") or "") if choices else ""
        except httpx.HTTPError as error:
            if not last:
                raise
            return Ended(End.WRONG, said, f"{error!r} after {said[-40:]!r}, {last[:200]}")
        if last == "[DONE]":
            return self._ended(said, f"[DONE] after {len(said.split())} words: {said[-80:]!r}", reply)
        if '"error"' in last:
            json.loads(last)
            how = End.BROKEN if said else End.WRONG
            return Ended(how, said, f"an error after {len(said.split())} words: {last[:300]}")
        return Ended(End.WRONG, said, f"an end without a word after {len(said.split())} words: {last[:200]}")

    def _ended(self, said: str, why: str, reply: httpx.Response) -> Ended:
        how = End.WHOLE if self.is_whole(said) else End.WRONG
        return Ended(how, said, why, was_sent_again="x-llamavisor-retries" in reply.headers)


def refused(reply: httpx.Response) -> Ended:
    """What became of a request whose answer, of which all is read, has another status than 200."""
    why = f"{reply.status_code} {reply.text[:300]}"
    return Ended(End.REFUSED, "", why, reply.status_code, comes_again="retry-after" in reply.headers)
