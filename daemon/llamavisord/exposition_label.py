"""The label `model` of all metrics: who has a value of its own there, and what becomes of those who have none.

A server of metrics keeps each series for months, so ten thousand models must not make a million of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

from prometheus_client.core import Metric

MAX_MODELS = 200
"""So many models have series of their own."""
OTHER = "other"
"""The value that all further models share. A model that is really called so is one of them."""


class ModelLabel:
    """Decides the value for each model: its name for the first that come, `OTHER` for all beyond.

    Who has a value of its own keeps it until the model has gone; then another may have the place.

    Args:
        is_known: whether there is a model of that name.
        room: how many may have one.
    """

    def __init__(self, is_known: Callable[[str], bool], *, room: int = MAX_MODELS) -> None:
        self._is_known = is_known
        self._room = room
        self._own: set[str] = set()
        self._folded: set[str] = set()

    def __repr__(self) -> str:
        return f"<ModelLabel {len(self._own)} of {self._room}, {len(self._folded)} beyond>"

    def of(self, model: str) -> str:
        """The value for a model; quick."""
        if model in self._own:
            return model
        if model == OTHER or len(self._own) >= self._room:
            self._folded.add(model)
            return OTHER
        self._own.add(model)
        self._folded.discard(model)
        return model

    def is_used(self, value: str) -> bool:
        """Whether this is the value of a model."""
        return value in self._own or (value == OTHER and bool(self._folded))

    def forget_vanished(self) -> None:
        """Give the places free of the models that are not there any more."""
        self._own = set(filter(self._is_known, self._own))
        self._folded = set(filter(self._is_known, self._folded))


def folded(family: Metric, join: Callable[[float, float], float] = operator.add) -> Metric:
    """The family with each series in it once: the values of models that share a label are joined, added up as a rule.

    Only for samples without timestamps and exemplars.
    """
    values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for sample in family.samples:
        key = sample.name, tuple(sample.labels.items())
        values[key] = join(values[key], sample.value) if key in values else sample.value
    family.samples = []
    for (name, labels), value in values.items():
        family.add_sample(name, dict(labels), value)
    return family
