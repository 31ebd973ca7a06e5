"""A configuration held against what is there: a build of llama-server, the files that tables name, the models."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from llamavisor import flags
from llamavisor.binary import Binary
from llamavisor.errors import OptionError
from llamavisor.options import OptionLayer
from llamavisor.rules import ModelRule
from llamavisor.sections import named_files, try_rule
from llamavisor.settings import RouterSettings
from llamavisord.config import Config
from llamavisord.problems import Origin
from llamavisord.unmatched import unmatched


def refused(config: Config, router: RouterSettings, found: Binary) -> Iterator[tuple[str, str]]:
    """What a build refuses of the options of a router and its models, each with what to do."""
    path = str(found.path)
    try:
        flags.resolve(router.layers, found.flags, binary=path)
    except OptionError as error:
        yield f"router {router.name}: {error}", error.hint
        return
    for rule in config.rules:
        if rule.settings.router is not None and router.name not in rule.settings.router:
            continue
        try:
            try_rule(rule, router.layers, found.flags, binary=path)
        except OptionError as error:
            yield f"{_origin(config, rule, str(error))}: router {router.name}: {error}", error.hint


def doubts(config: Config) -> Iterator[str]:
    """What may be wrong with the tables of single models, or right once files have come. Looks into the folders."""
    if not config.rules:
        return
    for rule in config.rules:
        for key in sorted(rule.settings.model_fields_set):
            if problem := _missing(rule, key):
                yield f"{_origin(config, rule, problem)}: {problem}"
    for rule, text in unmatched(config.rules, config.routers, partial(_names_in, config)):
        yield f"{_origin(config, rule, text)}: {text}"


def _origin(config: Config, rule: ModelRule, text: str) -> Origin:
    """Where in a table that stands which a message is about; where the table begins if that is not clear."""
    keys = sorted(rule.settings.model_fields_set)
    spoken = text.removeprefix(f"{rule.source}: ").partition(" ")[0]
    key = spoken if spoken in keys else "args" if "args" in keys and " in args " in text else next(iter(keys), "")
    name = f"{rule.source[1:-1]}.{key}"
    return next((setting.origin for setting in config.settings if setting.key == name), Origin(str(config.path)))


def _missing(rule: ModelRule, key: str) -> str | None:
    """What is to be said of the files that a table names with one key, None if they are there."""
    others = rule.settings.model_fields_set - {key}
    alone = OptionLayer(rule.source, rule.settings.model_copy(update=dict.fromkeys(others)))
    problems = (file.problem() for file in named_files((alone,)))
    return next(filter(None, problems), None)


def _names_in(config: Config, models_dir: Path) -> Collection[str] | None:
    from llamavisor.catalog.scanner import Scanner  # noqa: PLC0415 (a configuration without tables does not pay for it)

    scanner = Scanner(str(models_dir), link_dirs=tuple(map(str, config.link_dirs)))
    return None if scanner.scan().problem else {entry.name for entry in scanner.entries}
