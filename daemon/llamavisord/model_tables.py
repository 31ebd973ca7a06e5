"""From the `[model."…"]` tables of a file to the rules in force, each checked as far as that needs no llama-server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llamavisor import flags
from llamavisor.errors import OptionError
from llamavisor.rules import ModelRule, ModelSettings
from llamavisord.config import Setting
from llamavisord.document import ModelTable, nearest
from llamavisord.problems import Problem
from llamavisord.redaction import without_secrets
from llamavisord.sources import Source


@dataclass(frozen=True, slots=True)
class ModelTables:
    """What the tables of a file come to.

    Attributes:
        rules: one for each table, in the order of the file.
        problems: what is wrong with them.
        settings: every value and its origin, for people.
    """

    rules: tuple[ModelRule, ...] = ()
    problems: list[Problem] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)


def read(source: Source, routers: Sequence[str]) -> ModelTables:
    """The rules that a file holds.

    Args:
        source: the file. Relative paths in it start at its folder.
        routers: the names of all routers.
    """
    found = ModelTables()
    rules = []
    for pattern, table in source.document.model.items():
        rule = _rule(source, pattern, table, found.problems)
        rules.append(rule)
        found.problems.extend(_misfits(source, rule, routers))
        found.settings.extend(_shown(source, rule))
    found.problems.extend(_clashes(source, rules))
    return ModelTables(tuple(rules), found.problems, found.settings)


def _rule(source: Source, pattern: str, table: ModelTable, problems: list[Problem]) -> ModelRule:
    written = {key: getattr(table, key) for key in sorted(table.model_fields_set)}
    settings = ModelSettings.model_validate(written)
    try:
        settings = settings.anchored(lambda path: str(source.resolve(path)))
    except ValueError as exc:
        problems.append(source.problem(("model", pattern), str(exc)))
    return ModelRule.of(pattern, settings)


def _misfits(source: Source, rule: ModelRule, routers: Sequence[str]) -> Iterator[Problem]:
    """What is wrong with one table."""
    at = ("model", rule.pattern)
    if not rule.pattern:
        yield source.problem(at, 'names no model: write [model."NAME"], or [model."*"] for all')
    settings = rule.settings
    try:
        flags.check([rule.layer])
    except OptionError as exc:
        where = (*at, "args") if "args" in settings.model_fields_set else at
        yield Problem(f"{exc}. {exc.hint}" if exc.hint else str(exc), source.origin(where))
    if settings.aliases and rule.name is None:
        text = "one alias cannot name several models: write a table with the exact name"
        yield source.problem((*at, "aliases"), text)
    for name in settings.router or ():
        if name not in routers:
            text = f"no router is called {name}{nearest(name, routers)}"
            yield source.problem((*at, "router"), text)


def _clashes(source: Source, rules: Sequence[ModelRule]) -> Iterator[Problem]:
    """Aliases that one router could not tell from another model's name or alias."""
    exact = [rule for rule in rules if rule.name is not None]
    taken: dict[str | None, list[ModelRule]] = {}
    for rule in exact:
        taken.setdefault(rule.name, []).append(rule)
    for rule in exact:
        for alias in dict.fromkeys(rule.settings.aliases):
            others = [other for other in taken.get(alias, ()) if other.name != rule.name and _meet(rule, other)]
            if others:
                other = others[0]
                what = "the name" if other.name == alias else "an alias"
                text = f"{alias!r} is {what} of the model of {other.source} too; each needs its own"
                yield source.problem(("model", rule.pattern, "aliases"), text)
            else:
                taken.setdefault(alias, []).append(rule)


def _meet(one: ModelRule, other: ModelRule) -> bool:
    """Whether some router may hold the models of both."""
    routers = one.settings.router, other.settings.router
    return routers[0] is None or routers[1] is None or not set(routers[0]).isdisjoint(routers[1])


def _shown(source: Source, rule: ModelRule) -> Iterator[Setting]:
    for key in sorted(rule.settings.model_fields_set):
        value: object = without_secrets(rule.settings.args) if key == "args" else getattr(rule.settings, key)
        yield Setting(f"{rule.source[1:-1]}.{key}", value, source.origin(("model", rule.pattern, key)))
