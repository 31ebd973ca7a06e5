"""Metrics of llama-server itself, `llamacpp:*`: what the process of each model last said, with whose it is.

Nobody is asked for it: what a process says when it is asked how busy it is has been kept, and is read only when
somebody scrapes. It is taken for what a stranger wrote: a line that is not well formed is left out. The parser of
prometheus_client gives up at the first such line, calls `n_tokens_max` another name, and takes twice as long.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import Metric

from llamavisor.fleet import Fleet
from llamavisord.exposition_label import ModelLabel

MAX_SERIES = 100
"""What one process may add; b11434 says 15, and one for each position of a draft."""
LEFT_OUT = frozenset({"llamacpp:prompt_tokens_seconds", "llamacpp:predicted_tokens_seconds"})
"""Averages since somebody last asked, and we ask every second: they would be zero whenever it matters."""

_NAME = r"llamacpp:[a-zA-Z0-9_:]+"
# In none of these can a character belong to two parts: a long line that nearly matches would take minutes.
_COMMENT = re.compile(rf"#[ \t]+(HELP|TYPE)[ \t]+({_NAME})(?:[ \t]+(.*))?")
_SAMPLE = re.compile(
    rf"({_NAME})(?:[ \t]*\{{(.*)\}})?"
    r"[ \t]+([-+]?(?:[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|(?i:inf|nan)))"
    r"(?:[ \t]+-?[0-9]+)?"  # a time; what was said is at most a second old
)
_LABEL = re.compile(r'[ \t]*([a-zA-Z_][a-zA-Z0-9_]*)[ \t]*=[ \t]*"((?:[^"\\]|\\.)*)"[ \t]*(?:,[ \t]*|$)')
_ESCAPED = re.compile(r'\\([\\"n])')
_SUFFIXES = {
    "counter": ("",),
    "gauge": ("",),
    "untyped": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
    "summary": ("", "_sum", "_count"),
}
"""What the samples of each type are called."""

_Labels = tuple[tuple[str, str], ...]


def child_metrics(fleet: Fleet, label: ModelLabel) -> Iterator[Metric]:
    """What the processes of all models last said; those of models that share a label are added up."""
    gathered = Gathered()
    for router in fleet:
        for model in router.table.running():
            if model.metrics:
                gathered.take(model.metrics, router=router.name, model=label.of(model.name))
    return gathered.metrics()


@dataclass(slots=True)
class _Family:
    """One metric of all models.

    Attributes:
        name: as the processes call it.
        kind: its TYPE, as the first one said it that named it.
        values: by the names and labels of the samples.
    """

    name: str
    kind: str
    values: dict[tuple[str, _Labels], float] = field(default_factory=dict)


class Gathered:
    """What many processes say, each metric once."""

    def __init__(self) -> None:
        self._families: dict[str, _Family] = {}
        self._by_sample: dict[str, _Family] = {}
        self._helps: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"<Gathered {len(self._families)} metrics>"

    def take(self, text: bytes, *, router: str, model: str) -> None:
        """Add what one process says to what others with these labels have said."""
        said: set[tuple[str, _Labels]] = set()
        for line in map(_decoded, text.split(b"\n")):
            if comment := _COMMENT.fullmatch(line):
                self._explain(*comment.groups(default=""))
            elif sample := _SAMPLE.fullmatch(line):
                name, own, value = sample.groups(default="")
                labels = _labels(own)
                if name in LEFT_OUT or labels is None:
                    continue
                key = name, _with_owner(labels, {"router": router, "model": model})
                family = self._family_of(name)
                # The quantiles of summaries cannot be added up.
                if family is None or family.kind == "summary" or key in said:
                    continue
                if len(said) >= MAX_SERIES:
                    break
                said.add(key)
                family.values[key] = family.values.get(key, 0.0) + float(value)

    def metrics(self) -> Iterator[Metric]:
        """All of it."""
        for family in self._families.values():
            if not family.values:
                continue
            name, kind = family.name, family.kind
            if kind == "counter":
                # The library gives counters that ending. One without it, such as n_tokens_max, is none: it is a peak.
                name, kind = (name[:-6], kind) if name.endswith("_total") else (name, "untyped")
            metric = Metric(name, self._helps.get(family.name, ""), kind)
            for (sample, labels), value in family.values.items():
                metric.add_sample(sample, dict(labels), value)
            yield metric

    def _explain(self, what: str, name: str, text: str) -> None:
        if what == "HELP":
            self._helps.setdefault(name, _unescaped(text))
        elif text in _SUFFIXES:
            self._declare(name, text)

    def _declare(self, name: str, kind: str) -> None:
        """There is such a metric, if nobody has said something else of it."""
        if name not in self._families and not any(name + suffix in self._by_sample for suffix in _SUFFIXES[kind]):
            family = self._families[name] = _Family(name, kind)
            self._by_sample |= {name + suffix: family for suffix in _SUFFIXES[kind]}

    def _family_of(self, sample: str) -> _Family | None:
        """Whose sample that is; None when it does not go with what was said of its metric before."""
        if sample not in self._by_sample:
            self._declare(sample, "untyped")
        return self._by_sample.get(sample)


def _decoded(line: bytes) -> str:
    """A line; an empty one for what is no text."""
    try:
        return line.decode().strip()
    except UnicodeDecodeError:
        return ""


def _labels(text: str) -> dict[str, str] | None:
    """The labels between the braces; None if they are not well formed."""
    labels: dict[str, str] = {}
    at = 0
    while at < len(text):
        label = _LABEL.match(text, at)
        if label is None or label[1] in labels or label[1].startswith("__"):
            return None
        labels[label[1]] = _unescaped(label[2])
        at = label.end()
    return labels


def _with_owner(own: Mapping[str, str], owner: Mapping[str, str]) -> _Labels:
    """All labels, in order; one of the process's own that is called like one of ours is renamed as Prometheus would.

    An empty value is no label to Prometheus.
    """
    labels = dict(owner)
    for name, value in own.items():
        exported = name
        while exported in owner or (exported != name and exported in own):
            exported = f"exported_{exported}"
        if value:
            labels[exported] = value
    return tuple(sorted(labels.items()))


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda found: "\n" if found[1] == "n" else found[1], text)
