"""One model on its way from the Hub: how far it is, and how it ends."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import anyio

from llamavisor.hub.failure import HubError
from llamavisor.hub.progress import Progress, Stage
from llamavisor.hub.record import Record


class PullState(Enum):
    """How it is with a pull."""

    UNDER_WAY = "under_way"
    """Its files come, or wait for their turn."""
    DONE = "done"
    """The model is in its place."""
    FAILED = "failed"
    """It does not come; what came is kept."""
    CANCELLED = "cancelled"
    """A person has ended it."""


class Pull:
    """One model on its way. It is changed by its task alone.

    Args:
        record: what it brings.

    Attributes:
        files: how far each file is.
        state: how it is.
        error: why it failed, None if it did not.
        path: where the model is, once it is done.
        was_there: whether it was there before.
        noted: set when it is written down, or has ended.
        ended: set when nothing more happens.
        wanted_by: who asked for it; empty for a person.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.files = tuple(Progress(file.name, file.size) for file in record.files)
        self.state = PullState.UNDER_WAY
        self.error: HubError | None = None
        self.path: Path | None = None
        self.was_there = False
        self.noted = anyio.Event()
        self.ended = anyio.Event()
        self.wanted_by: set[str] = set()
        self.scope = anyio.CancelScope()
        self.is_dropped = False

    def __repr__(self) -> str:
        return f"<Pull {self.id} {self.state.value} {self.done_bytes} of {self.total_bytes}>"

    @property
    def is_gone(self) -> bool:
        """Whether nothing is left of it: it was cancelled, and what came dropped."""
        return self.state is PullState.CANCELLED and self.is_dropped

    @property
    def id(self) -> str:
        """The same for all that bring the same."""
        return self.record.key

    @property
    def name(self) -> str:
        """What the model is going to be called."""
        return self.record.name

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return self.record.size_bytes

    @property
    def done_bytes(self) -> int:
        """What is here of them."""
        return sum(file.done for file in self.files)

    @property
    def speed(self) -> float:
        """Bytes in a second, of all files together."""
        return sum(file.speed for file in self.files) if self.state is PullState.UNDER_WAY else 0.0

    @property
    def silent_s(self) -> float:
        """Seconds for which no byte has come of any file, of those that should come."""
        return min((file.silent_s for file in self.files if file.stage is Stage.RECEIVING), default=0.0)

    @property
    def left_s(self) -> float | None:
        """Seconds until all of it is here, None when that cannot be told."""
        speed = self.speed
        return (self.total_bytes - self.done_bytes) / speed if speed > 0 else None

    async def wait(self) -> Path | None:
        """Where the model is, once it is there; None if the pull was cancelled. Who stops waiting stops nothing else.

        Raises:
            HubError: it failed.
        """
        await self.ended.wait()
        if self.error is not None:
            raise self.error
        return self.path
