"""Which models a person wants to stay in memory: what was said at run time, over what the configuration says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llamavisor.rules import ModelRule, matching
from llamavisor.sections import ModelSpec

MAX_WISHES = 10_000
"""More models than anybody pins by hand."""


class Pins:
    """A section of the ledger: who was pinned or unpinned by name. Such a word outlives the daemon."""

    name = "pins"

    def __init__(self) -> None:
        self._wishes: dict[str, bool] = {}
        self._changes = 0

    def __repr__(self) -> str:
        return f"<Pins {self._wishes}>"

    @property
    def changes(self) -> int:
        """A number that grows with every change."""
        return self._changes

    def wish(self, model: str, *, is_pinned: bool) -> bool:
        """Somebody wants the model to stay, or does not care any more; returns whether that is new."""
        if self._wishes.get(model) is is_pinned:
            return False
        self._wishes[model] = is_pinned
        self._changes += 1
        return True

    def forget(self, model: str) -> None:
        """Nobody wants anything else of the model than what is written."""
        if self._wishes.pop(model, None) is not None:
            self._changes += 1

    def expected(self, model: str, rules: Sequence[ModelRule]) -> bool:
        """Whether a model is to stay that is not known yet, by what was said and what is written."""
        written = [rule.settings.pin for rule in matching(rules, model) if rule.settings.pin is not None]
        return self._wishes.get(model, bool(written) and written[-1])

    def among(self, specs: Iterable[ModelSpec]) -> frozenset[str]:
        """The names of the models that are to stay: all that were pinned by name, and of these what is written."""
        written = {spec.name for spec in specs if spec.is_pinned}
        return frozenset({*written, *(name for name, wish in self._wishes.items() if wish)}) - {
            name for name, wish in self._wishes.items() if not wish
        }

    def load(self, raw: object, now: float) -> str:  # noqa: ARG002 (ledger.Section)
        """Takes over what the file says, name by name."""
        if not isinstance(raw, dict):
            return "it is no table, and was left out"
        good = {name: wish for name, wish in raw.items() if isinstance(name, str) and isinstance(wish, bool)}
        self._wishes = dict(list(good.items())[:MAX_WISHES])
        lost = len(raw) - len(self._wishes)
        return f"{lost} damaged entries were left out" if lost else ""

    def dump(self) -> object:
        """What the file is to say."""
        return dict(self._wishes)
