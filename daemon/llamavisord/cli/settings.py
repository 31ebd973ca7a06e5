"""`llamavisor config`: what is wrong with the configuration, and what is in force."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from llamavisor import binary, flags
from llamavisor.errors import BinaryError, OptionError
from llamavisor.options import OptionLayer
from llamavisor.rules import ModelRule
from llamavisor.sections import named_files, try_rule
from llamavisor.settings import RouterSettings
from llamavisord.cli.errors import CommandError, with_hint
from llamavisord.cli.render import Screen
from llamavisord.config import Config, Setting
from llamavisord.exit_codes import ExitCode
from llamavisord.loading import load
from llamavisord.plain import plain
from llamavisord.problems import ConfigError, Origin
from llamavisord.unmatched import unmatched


def run(arguments: Namespace) -> int:
    """`check` or `show`."""
    try:
        config = load(arguments.config or arguments.file, os.environ)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return ExitCode.BAD_CONFIG
    for warning in config.warnings:
        _say(f"warning: {warning}")
    if arguments.verb == "check":
        return _check(config)
    if arguments.model is not None:
        return _show_model(config, arguments.model, arguments.router, as_json=arguments.json)
    if arguments.router is not None:
        raise CommandError("--router goes with --model", exit_code=ExitCode.USAGE)
    return _show(config, as_json=arguments.json)


def _check(config: Config) -> int:
    """Ask the llama-server of each router, too, whether it knows the options."""
    probes = binary.ProbeCache()
    problems = [problem for router in config.routers for problem in _resolve(config, router, probes)]
    for warning in _doubts(config):
        _say(f"warning: {warning}")
    for problem in problems:
        print(plain(problem), file=sys.stderr)
    if problems:
        return ExitCode.BAD_CONFIG
    names = ", ".join(router.name for router in config.routers)
    Screen().line(f"{plain(config.path or 'no file')}: ok, routers: {plain(names)}")
    return ExitCode.OK


def _resolve(config: Config, router: RouterSettings, probes: binary.ProbeCache) -> Iterator[str]:
    """What is wrong with the options of a router and its models.

    That no llama-server is there is no fault of the configuration.
    """
    if not os.path.isdir(router.models_dir):  # noqa: PTH112 (Path's raises where it may not look)
        _say(f"warning: router {router.name}: {router.models_dir} is no folder yet")
    try:
        found = probes.probe(binary.find(router.llama_server), {**os.environ, **dict(router.env)})
    except BinaryError as error:
        _say(f"warning: router {router.name}: options not checked: {with_hint(str(error), error.hint)}")
        return
    path = str(found.path)
    try:
        flags.resolve(router.layers, found.flags, binary=path)
    except OptionError as error:
        yield f"router {router.name}: {with_hint(str(error), error.hint)}"
        return
    for rule in config.rules:
        if rule.settings.router is not None and router.name not in rule.settings.router:
            continue
        try:
            try_rule(rule, router.layers, found.flags, binary=path)
        except OptionError as error:
            text = with_hint(str(error), error.hint)
            yield f"{_origin(config, rule, text)}: router {router.name}: {text}"


def _origin(config: Config, rule: ModelRule, text: str) -> Origin:
    """Where in a table that stands which a message is about; where the table begins if that is not clear."""
    keys = sorted(rule.settings.model_fields_set)
    spoken = text.removeprefix(f"{rule.source}: ").partition(" ")[0]
    key = spoken if spoken in keys else "args" if "args" in keys and " in args " in text else next(iter(keys), "")
    name = f"{rule.source[1:-1]}.{key}"
    return next((setting.origin for setting in config.settings if setting.key == name), Origin(str(config.path)))


def _doubts(config: Config) -> Iterator[str]:
    """What may be wrong with the tables of single models, or right once files have come."""
    if not config.rules:
        return
    for rule in config.rules:
        for key in sorted(rule.settings.model_fields_set):
            if problem := _missing(rule, key):
                yield f"{_origin(config, rule, problem)}: {problem}"
    for rule, text in unmatched(config.rules, config.routers, partial(_names_in, config)):
        yield f"{_origin(config, rule, text)}: {text}"


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


def _show_model(config: Config, model: str, router: str | None, *, as_json: bool) -> int:
    from llamavisord.cli.model_options import settings_of  # noqa: PLC0415 (no other verb pays for the catalog)

    found = settings_of(config, model, router)
    screen = Screen()
    if as_json:
        screen.json([{"router": name, **_as_json(setting)} for name, setting in found])
        return ExitCode.OK
    rows = [(f"router.{name}.{each.key}", _toml(each.value), str(each.origin)) for name, each in found]
    screen.table(("KEY", "VALUE", "FROM"), rows)
    return ExitCode.OK


def _show(config: Config, *, as_json: bool) -> int:
    screen = Screen()
    if as_json:
        screen.json([_as_json(setting) for setting in config.settings])
        return ExitCode.OK
    rows = [(each.key, _toml(each.value), str(each.origin)) for each in config.settings]
    screen.table(("KEY", "VALUE", "FROM"), rows)
    return ExitCode.OK


def _as_json(setting: Setting) -> dict[str, object]:
    return {"key": setting.key, "value": _plain_value(setting.value), "from": str(setting.origin)}


def _plain_value(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _toml(value: object) -> str:
    """A value as it would be written in a file; JSON and TOML agree on numbers, text and lists."""
    return json.dumps(_plain_value(value), ensure_ascii=False)


def _say(text: str) -> None:
    print(f"llamavisor: {plain(text)}", file=sys.stderr)
