"""`llamavisor config`: what is wrong with the configuration, and what is in force."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from llamavisor import binary
from llamavisor.errors import BinaryError
from llamavisor.settings import RouterSettings
from llamavisord.cli.errors import CommandError, with_hint
from llamavisord.cli.render import Screen
from llamavisord.config import Config, Setting
from llamavisord.exit_codes import ExitCode
from llamavisord.loading import load
from llamavisord.plain import plain
from llamavisord.problems import ConfigError
from llamavisord.trial import doubts, refused


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
    for warning in doubts(config):
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
    for text, hint in refused(config, router, found):
        yield with_hint(text, hint)


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
