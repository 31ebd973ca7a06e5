"""What one router is to serve, what it has been told to serve, and what follows from the difference.

A pure table of the router's owner. The difference is closed step by step and never by force: a reload tells a router of
everything but the models that run, for it would stop what has changed; those wait until they run no more, or until
nobody is being answered and they can be refreshed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from llamavisor.models import ModelTable
from llamavisor.sections import ModelSpec
from llamavisor.states import HAS_CHILD, RESIDENT, Change


@dataclass(frozen=True, slots=True)
class Offered:
    """One model as a router was told of it.

    Attributes:
        spec: what it is to be.
        section: the entries of its section in the preset, as this llama-server spells them.
    """

    spec: ModelSpec
    section: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Withheld:
    """One model that a router is not told of, because it would not take it; with the reason."""

    spec: ModelSpec
    reason: str


@dataclass(frozen=True, slots=True)
class Offer:
    """All that one router was told of its models.

    Attributes:
        models: what it may serve, by name.
        withheld: what it may not, by name.
        notes: what a person should know of models that it may serve, by name.
        waits_for: models that run under names that others are to have; these are told when they run no more.
    """

    models: Mapping[str, Offered] = field(default_factory=dict)
    withheld: Mapping[str, Withheld] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    waits_for: frozenset[str] = frozenset()

    def specs(self) -> dict[str, ModelSpec]:
        """What was considered when it was made, by name."""
        considered = {name: each.spec for name, each in self.withheld.items()}
        considered.update((name, each.spec) for name, each in self.models.items())
        return considered


class Shelf:
    """The models of one router, wanted and told. Written by the router's owner alone."""

    def __init__(self) -> None:
        self.wanted: Mapping[str, ModelSpec] = {}
        self.offer = Offer()
        self.is_forced = False  # somebody wants a reload although nothing may have changed
        self._leaving: Mapping[str, Change] = {}
        self.is_blocked = False  # the last reload did not work, and nothing has changed since
        self._aliases: dict[str, str] = {}  # of the offer: alias to name
        self._pending: set[str] = set()  # Invariant: the names whose wanted spec is not the one of the offer

    def __repr__(self) -> str:
        return f"<Shelf {len(self.offer.models)} told, {len(self._pending)} pending>"

    def want(self, specs: Mapping[str, ModelSpec], leaving: Mapping[str, Change] | None = None) -> None:
        """Take note of what the router is to serve from now on, and why some of what it served is not in there."""
        self.wanted = specs
        self._leaving = leaving or {}
        self.is_blocked = False
        self._compare()

    def told(self, offer: Offer) -> None:
        """The router has read this offer."""
        self.offer = offer
        self._aliases = {
            alias: name for name, each in offer.models.items() for alias in _words(each.section.get("alias", ""))
        }
        self._compare()

    def name_of(self, word: str) -> str:
        """The name of the model that a person calls `word`: an alias leads to its model, all else is a name itself."""
        return word if word in self.offer.models else self._aliases.get(word, word)

    def spec(self, name: str) -> ModelSpec | None:
        """What a model should be, or was when the router was told of it; None of one that it never was."""
        if (wanted := self.wanted.get(name)) is not None:
            return wanted
        offered = self.offer.models.get(name)
        return offered.spec if offered is not None else None

    def look_again(self) -> None:
        """Try again what did not work: a file that a table names may have come meanwhile."""
        self.is_blocked = False
        self._pending |= {name for name in self.offer.withheld if name in self.wanted}

    def _compare(self) -> None:
        told, wanted = self.offer.specs(), self.wanted
        # Ten thousand specs are compared by identity first: what did not change is the same object.
        self._pending = {
            name
            for name, spec in wanted.items()
            if (known := told.get(name)) is not spec and (known is None or known != spec)
        }
        self._pending |= {name for name in told if name not in wanted}

    def is_due(self, table: ModelTable) -> bool:
        """Whether a reload would tell the router something new."""
        changed = any(not _runs(name, table) for name in self._pending)
        freed = any(not _runs(name, table) for name in self.offer.waits_for)
        return not self.is_blocked and (changed or freed)

    def is_pending(self, name: str) -> bool:
        """Whether the router has yet to be told of a change of this model."""
        return name in self._pending

    def kept(self, table: ModelTable) -> dict[str, Offered]:
        """What must stand in the next offer exactly as in the last: the models that run, changed or not."""
        running = (model.name for model in table.running())
        return {name: offered for name in running if (offered := self.offer.models.get(name)) is not None}

    def stale(self, table: ModelTable) -> Iterator[tuple[str, Change]]:
        """The models in memory that are not what they should be, and why."""
        for name in sorted(self._pending):
            model, offered = table.get(name), self.offer.models.get(name)
            if model is not None and model.state in RESIDENT and offered is not None:
                yield name, self._change(offered.spec)

    def was_overwritten(self, name: str) -> bool:
        """Whether a model's file is known to be another, or none, than the one that the router was told of."""
        offered = self.offer.models.get(name)
        if offered is None or name not in self._pending:
            return False
        return self._change(offered.spec) in {Change.OVERWRITTEN, Change.GONE}

    def _change(self, told: ModelSpec) -> Change:
        new = self.wanted.get(told.name)
        return self._leaving.get(told.name, Change.GONE) if new is None else change(told, new)

    def size_bytes(self, name: str) -> int | None:
        """Bytes of the files of a model that the router was told of."""
        offered = self.offer.models.get(name)
        return None if offered is None else sum(file.size for file in offered.spec.files)

    def to_load_on_start(self) -> list[str]:
        """The models that are to be loaded when the router starts, by name."""
        return sorted(name for name, each in self.offer.models.items() if each.spec.load_on_start)


def change(old: ModelSpec, new: ModelSpec) -> Change:
    """What has happened to a model whose spec was `old` and is `new`."""
    if old.files == new.files:
        return Change.OPTIONS
    inodes = [[(file.device, file.inode) for file in spec.files] for spec in (old, new)]
    return Change.OVERWRITTEN if inodes[0] == inodes[1] else Change.REPLACED


def told_names(offered: Iterable[Offered]) -> dict[str, str]:
    """All names by which a router knows these models, and whose they are."""
    return {
        name: each.spec.name for each in offered for name in (each.spec.name, *_words(each.section.get("alias", "")))
    }


def _words(text: str) -> list[str]:
    return text.split(",") if text else []


def _runs(name: str, table: ModelTable) -> bool:
    model = table.get(name)
    return model is not None and model.state in HAS_CHILD
