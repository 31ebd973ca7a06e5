"""The metrics, from the registry of a daemon that does not run."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import anyio
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

import llamavisord
from llamavisord.reference.markdown import code, prose, table
from llamavisord.reference.specimen import exposition

_ABOUT = """\
Of a histogram there are `NAME_bucket`, `NAME_sum` and `NAME_count`. Series of what is not there, or not known, are left
out; those of the gateway are there with `serve = "gateway"`. What `state`, `cause` and `reason` say is among the
[words](#words). The model of requests that name none, or one that nobody has, is `""`."""
_OURS = "llamavisor_"
_SUFFIXES = {"counter": "_total", "info": "_info"}
"""What Prometheus has at the end of a name beyond that of the family. A histogram has three: _bucket, _sum, _count."""


@dataclass(frozen=True, slots=True)
class Family:
    """What is known of a metric without a value of it.

    Attributes:
        name: as Prometheus reads it; of a histogram without the ends of its series.
        type: "counter", "gauge", "histogram" or "info".
        labels: their names.
        meaning: one line for a person.
    """

    name: str
    type: str
    labels: tuple[str, ...]
    meaning: str


def metrics() -> Iterator[str]:
    """Every metric with its labels."""
    families = sorted(anyio.run(_families), key=lambda family: (not family.name.startswith(_OURS), family.name))
    yield _ABOUT
    yield ""
    yield from (f"- {prose(subject)}" for subject in _subjects())
    yield ""
    rows = [(code(each.name), each.type, ", ".join(map(code, each.labels)), prose(each.meaning)) for each in families]
    yield from table(("metric", "type", "labels", "meaning"), rows)


def _subjects() -> Iterator[str]:
    """What there are metrics of, by the modules that make them; some are known by name only once a model runs."""
    for module in pkgutil.iter_modules(llamavisord.__path__):
        if module.name.startswith("exposition"):
            about = inspect.getdoc(importlib.import_module(f"llamavisord.{module.name}")) or ""
            if about.startswith("Metrics of "):
                yield about.partition("\n\n")[0]


async def _families() -> list[Family]:
    shown, _ = exposition()
    labels = _labels_of_counted(shown.registry)
    return [_family(metric, labels.get(metric.name)) for metric in shown.registry.collect()]


def _labels_of_counted(registry: CollectorRegistry) -> dict[str, Sequence[str]]:
    """The labels of what is counted as it happens: its families do not tell them before there is a value."""
    counted = registry._collector_to_names  # noqa: SLF001 (the library shows labels in no other way)
    return {names[0]: getattr(each, "_labelnames", ()) for each, names in counted.items() if names}


def _family(metric: Metric, labels: Sequence[str] | None) -> Family:
    known = getattr(metric, "_labelnames", ()) if labels is None else labels
    if metric.type == "info":  # its labels are what it tells
        known = [label for sample in metric.samples for label in sample.labels]
    name = f"{metric.name}{_SUFFIXES.get(metric.type, '')}"
    return Family(name, metric.type, tuple(known), metric.documentation)
