"""What of quarantines outlives the daemon: a model that ends a router, or the machine, is not tried again at once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from llamavisor.ledger import read_records
from llamavisor.quarantine import FORGIVEN_AFTER_S, MAX_S, Quarantine
from llamavisor.sections import ModelSpec
from llamavisor.slots import Key

MAX_RECORDS = 1000
REASON_CHARS = 500


class _Record(BaseModel):
    """One model on one router; `until` in Unix seconds, `of` names its files and options."""

    model_config = ConfigDict(extra="ignore", strict=True)

    router: str
    model: str
    until: float
    failures: Annotated[int, Field(ge=1)]
    reason: Annotated[str, Field(max_length=REASON_CHARS)]
    of: Annotated[str, Field(max_length=64)]


class QuarantineRecords:
    """A section of the ledger: which models are left alone, for how long, and what they were then.

    Args:
        clock: monotonic seconds.
        wall: Unix seconds.
    """

    name = "quarantine"

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._wall = wall
        self._records: dict[Key, _Record] = {}
        self._before: dict[Key, _Record] = {}  # as the file says, of models that were not seen yet
        self._changes = 0

    def __repr__(self) -> str:
        return f"<QuarantineRecords {sorted(self._records)}>"

    @property
    def changes(self) -> int:
        """A number that grows with every change."""
        return self._changes

    def note(self, quarantine: Quarantine, spec: ModelSpec | None) -> None:
        """A model is left alone from now on; one that is not known by its files is not remembered."""
        if spec is None:
            return
        key = quarantine.router, quarantine.model
        left_s = quarantine.until - self._clock()
        self._records.pop(key, None)
        self._records[key] = _Record(
            router=quarantine.router,
            model=quarantine.model,
            until=self._wall() + left_s,
            failures=quarantine.failures,
            reason=quarantine.reason[:REASON_CHARS],
            of=_identity(spec),
        )
        while len(self._records) > MAX_RECORDS:
            del self._records[next(iter(self._records))]
        self._changes += 1

    def forget(self, model: str) -> None:
        """It is another model now, or a person says so."""
        for known in (self._records, self._before):
            for key in [key for key in known if key[1] == model]:
                del known[key]
                self._changes += 1

    def recall(self, spec_of: Callable[[Key], ModelSpec | None]) -> list[Quarantine]:
        """What an earlier daemon knew of the models that are known by now; each is told once.

        One whose file or options have changed since is another model. However wrong a clock was, nobody is left alone
        for longer than at most.
        """
        recalled = []
        for key, record in list(self._before.items()):
            spec = spec_of(key)
            if spec is None:
                continue
            del self._before[key]
            self._changes += 1
            if record.of == _identity(spec) and self._wall() - record.until < FORGIVEN_AFTER_S:
                self._records[key] = record
                left_s = min(MAX_S, max(0.0, record.until - self._wall()))
                recalled.append(
                    Quarantine(*key, until=self._clock() + left_s, failures=record.failures, reason=record.reason)
                )
        return recalled

    def load(self, raw: object, now: float) -> str:  # noqa: ARG002 (ledger.Section)
        """Takes over what the file says, record by record."""
        records, problem = read_records(raw, _Record, slice(-MAX_RECORDS, None))
        self._before |= {(record.router, record.model): record for record in records}
        return problem

    def dump(self) -> object:
        """What the file is to say."""
        return [record.model_dump() for record in [*list(self._before.values()), *list(self._records.values())]]


def _identity(spec: ModelSpec) -> str:
    """Names the files of a model and the way it is run."""
    files = [(each.device, each.inode, each.size, each.mtime_ns) for each in spec.files]
    options = [each.options.model_dump_json(exclude_none=True) for each in (*spec.base, *spec.layers)]
    return hashlib.sha256(repr((spec.path, files, options)).encode(errors="surrogateescape")).hexdigest()[:32]
