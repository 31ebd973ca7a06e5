"""Which processes were started: the next daemon knows them for its own even where their environment is hidden."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from llamavisor.ledger import read_records
from llamavisor.procfs import Identity

MAX_PROCESSES = 1000


class _Record(BaseModel):
    """One process."""

    model_config = ConfigDict(extra="ignore", strict=True)

    pid: Annotated[int, Field(ge=2)]
    start_ticks: int
    boot_id: Annotated[str, Field(max_length=64)]


class Started:
    """A section of the ledger: the processes that were started and have not been reaped.

    A pid alone means nothing after a restart: with its start time and the boot it is one process, or none.

    Attributes:
        before: those of an earlier daemon, as the file says; some may live.
    """

    name = "processes"

    def __init__(self) -> None:
        self.before: tuple[Identity, ...] = ()
        self._now: dict[int, Identity] = {}
        self._changes = 0

    def __repr__(self) -> str:
        return f"<Started {sorted(self._now)}>"

    @property
    def changes(self) -> int:
        """A number that grows with every change."""
        return self._changes

    def add(self, identity: Identity) -> None:
        """A process was started."""
        self._now[identity.pid] = identity
        self._changes += 1

    def remove(self, identity: Identity) -> None:
        """It was reaped."""
        if self._now.pop(identity.pid, None) is not None:
            self._changes += 1

    def load(self, raw: object, now: float) -> str:  # noqa: ARG002 (ledger.Section)
        """Takes over what the file says, process by process."""
        records, problem = read_records(raw, _Record, slice(MAX_PROCESSES))
        self.before = tuple(Identity(record.pid, record.start_ticks, record.boot_id) for record in records)
        self._changes += bool(records)  # they are gone when the next file is written
        return problem

    def dump(self) -> object:
        """What the file is to say."""
        return [
            {"pid": each.pid, "start_ticks": each.start_ticks, "boot_id": each.boot_id}
            for each in list(self._now.values())
        ]
