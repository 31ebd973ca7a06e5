"""What becomes of the requests of clients."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from llamavisor.events.base import Event


class RequestOutcome(Enum):
    """How a request ended; the status that its client was sent does not always tell."""

    OK = "ok"
    """It was answered, by a model or by us."""
    REFUSED = "refused"
    """We did not take it: no key, no such model, too large, too many wait."""
    FAILED = "failed"
    """It was taken and could not be answered; the client was told so by the status."""
    BROKEN = "broken"
    """Its answer had begun and could not be finished; the client was told so by the end of it."""
    LEFT = "left"
    """The client did not wait for the whole answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEnded(Event):
    """A request of a client has ended: the entry of the access log. There is exactly one for each.

    Attributes:
        route: what was asked for, one of a fixed table, such as "chat/completions".
        model: the model that was asked for, None if none was or none was named.
        router: the router of the model that answered last, None if none did.
        client: the address that it came from; that of a proxy, if there is one.
        key: the name of the key that the client has shown, never the key itself.
        status: what the client was sent, or would have been.
        outcome: how it ended.
        queue_s: seconds that it waited for its model, loading included.
        load_s: how many of these were the load's own.
        first_data_s: from its arrival to the first data of the answer, None if there were none.
        duration_s: from its arrival to its end.
        retries: how many times it was sent again because a model's process had died.
        bytes_in: of its body.
        bytes_out: of the answer, with its head.
        tokens_in: of the prompt, as the answer says, None if it does not.
        tokens_out: of the completion, likewise.
        is_stream: whether the answer was a stream of events.
        body: what was asked, cut off by whoever publishes this; None unless the configuration asks for it.
        is_logged: whether the configuration asks for a line in the log.
    """

    level: ClassVar[int] = logging.DEBUG
    is_kept: ClassVar[bool] = False
    is_frequent: ClassVar[bool] = True

    route: str
    model: str | None
    router: str | None
    client: str | None
    key: str | None
    status: int
    outcome: RequestOutcome
    queue_s: float
    load_s: float
    first_data_s: float | None
    duration_s: float
    retries: int
    bytes_in: int
    bytes_out: int
    tokens_in: int | None
    tokens_out: int | None
    is_stream: bool
    body: str | None = field(default=None, repr=False)
    is_logged: bool = False

    @property
    def log_level(self) -> int:
        """Thousands in a second would bury what happens, unless somebody wants to see them."""
        return logging.INFO if self.is_logged else self.level

    def message(self) -> str:
        """One line of an access log, without what was asked; what is nothing or not known is left out."""
        told = [self.route]
        if self.model is not None:
            told.append(f"model {self.model}" + ("" if self.router is None else f" on {self.router}"))
        how = {RequestOutcome.OK: "", RequestOutcome.LEFT: ", the client left"}.get(
            self.outcome, f" {self.outcome.value}"
        )
        told.append(f"{self.status}{how} after {self.duration_s:.3f} s")
        if self.queue_s >= _WORTH_TELLING_S:
            told.append(f"queued {self.queue_s:.3f} s")
        if self.load_s >= _WORTH_TELLING_S:
            told.append(f"load {self.load_s:.3f} s")
        if self.first_data_s is not None and self.is_stream:
            told.append(f"first data after {self.first_data_s:.3f} s")
        if self.tokens_in is not None or self.tokens_out is not None:
            told.append(f"{_count(self.tokens_in)} + {_count(self.tokens_out)} tokens")
        told.append(f"{self.bytes_in} bytes in, {self.bytes_out} out")
        if self.retries:
            told.append(f"sent again {self.retries}x")
        if self.key is not None:
            told.append(f"key {self.key}")
        if self.client is not None:
            told.append(f"from {self.client}")
        return ", ".join(told)


_WORTH_TELLING_S = 0.001
_HOW = {RequestOutcome.OK: "", RequestOutcome.LEFT: ", the client left"}


def _count(tokens: int | None) -> str:
    return "?" if tokens is None else str(tokens)
