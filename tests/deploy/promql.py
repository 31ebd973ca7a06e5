"""What a query of Prometheus names: the series, and the labels by which it selects, groups and matches them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

Known = Mapping[str, set[str]]
"""The labels of each series by its name."""

_TOKEN = re.compile(
    r'(?P<string>"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\')'
    r"|(?P<range>\[[^\]]*\]|\boffset\s+-?\w+)"
    r"|(?P<number>\b\d[\w.]*)"
    r"|(?P<word>[a-zA-Z_:][\w:]*)"
    r"|(?P<sign>[(){},]|[-+*/%^=!<>~@]+)"
)
_OPERATORS = frozenset({"and", "or", "unless", "bool"})
_LISTS = frozenset({"by", "without", "on", "ignoring", "group_left", "group_right"})


@dataclass(slots=True)
class Query:
    """One expression.

    Attributes:
        text: as it is written.
        selected: each series that it names, with the labels that its selector uses.
        grouped: what stands in each `by (…)`, with the series that are grouped so.
        listed: the labels in all other lists.
        dropped: those of them that `without (…)` takes away, and `le` where a quantile is made of it.
    """

    text: str
    selected: list[tuple[str, frozenset[str]]] = field(default_factory=list)
    grouped: list[tuple[frozenset[str], list[str]]] = field(default_factory=list)
    listed: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)

    @property
    def series(self) -> set[str]:
        """The names of all series in it."""
        return {name for name, _ in self.selected}

    def problems(self, known: Known) -> Iterator[str]:
        """What it names that there is not."""
        for name, labels in self.selected:
            if name not in known:
                yield f"{name}: no such series, in {self.text}"
            elif labels - known[name]:
                yield f"{name} has no label {', '.join(sorted(labels - known[name]))}, in {self.text}"
        for labels, names in self.grouped:
            for name in names:
                if labels - known.get(name, labels):
                    yield f"{name} has no label {', '.join(sorted(labels - known[name]))} to group by, in {self.text}"
        if lost := self.listed - self._labels(known):
            yield f"nothing has the label {', '.join(sorted(lost))}, in {self.text}"

    def result(self, known: Known) -> set[str]:
        """The labels that what it finds has, at most."""
        grouped = {name: labels for labels, names in self.grouped for name in names}
        return set().union(*(grouped.get(name, known.get(name, set())) for name in self.series)) - self.dropped

    def _labels(self, known: Known) -> set[str]:
        return set().union(*(known.get(name, set()) for name in self.series))


def read(text: str) -> Query:
    """What an expression names; whether it is well-formed is promtool's to say."""
    query = Query(text)
    tokens = [(found.lastgroup, found[0]) for found in _TOKEN.finditer(text)]
    _read(query, tokens)
    return query


def _read(query: Query, tokens: list[tuple[str | None, str]]) -> None:
    at = 0
    while at < len(tokens):
        kind, word = tokens[at]
        following = tokens[at + 1][1] if at + 1 < len(tokens) else ""
        at += 1
        if kind != "word" or word in _OPERATORS:
            continue
        if word in _LISTS:
            end = _end(tokens, at)
            labels = frozenset(each for kind, each in tokens[at:end] if kind == "word")
            at = end
            if word == "by":
                assert tokens[at][1] == "(", f"what is grouped stands behind `by`: {query.text}"
                inner = Query(query.text)
                _read(inner, tokens[at : _end(tokens, at)])
                query.grouped.append((labels, [name for name, _ in inner.selected]))
            else:
                query.listed |= labels
                query.dropped |= labels if word == "without" else set()
        elif following == "(" or following in {"by", "without"}:
            query.dropped |= {"le"} if word == "histogram_quantile" else set()
        elif following == "{":
            end = _end(tokens, at)
            query.selected.append((word, frozenset(each for kind, each in tokens[at:end] if kind == "word")))
            at = end
        else:
            query.selected.append((word, frozenset()))


def _end(tokens: list[tuple[str | None, str]], at: int) -> int:
    """Behind the bracket that closes the one at `at`."""
    depth = 0
    for end in range(at, len(tokens)):
        depth += tokens[end][1] in {"(", "{"}
        depth -= tokens[end][1] in {")", "}"}
        if not depth:
            return end + 1
    raise AssertionError("a bracket that nothing closes")
