"""How long the Hub is waited for, and when it is asked again: pure decisions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import anyio

from llamavisor.hub.failure import HubError

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long the Hub is waited for.

    Attributes:
        connect_s: for a connection.
        stall_s: for the next byte, however long all of them take.
        answer_s: for what a repository holds, all in all; for the headers of all its models again.
        delays_s: before it is tried again, after the first failure in a row, the second, and so on; then no more.
        max_retry_after_s: a server that wants to be left alone for longer is told of instead.
        questions: how many failures in a row a question may have, to which a person waits for the answer.
        max_question_delay_s: the same as `max_retry_after_s`, of a question.
    """

    connect_s: float = 10.0
    stall_s: float = 30.0
    answer_s: float = 60.0
    delays_s: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 60.0, 60.0, 60.0)
    max_retry_after_s: float = 300.0
    questions: int = 2
    max_question_delay_s: float = 20.0

    def delay_s(self, error: HubError, failures: int) -> float | None:
        """Seconds until the next attempt, None for never.

        Args:
            error: how the last one ended.
            failures: how many have failed in a row without anything gained, that one included.
        """
        if not error.is_passing or failures > len(self.delays_s):
            return None
        asked_s = error.retry_after_s or 0.0
        return max(asked_s, self.delays_s[failures - 1]) if asked_s <= self.max_retry_after_s else None

    async def keep_trying(self, ask: Callable[[], Awaitable[_T]]) -> _T:
        """The answer to a question.

        Raises:
            HubError: there is none.
        """
        failures = 0
        while True:
            try:
                return await ask()
            except HubError as exc:
                failures += 1
                delay_s = self.delay_s(exc, failures) if failures <= self.questions else None
                if delay_s is None or delay_s > self.max_question_delay_s:
                    raise
            await anyio.sleep(delay_s)
