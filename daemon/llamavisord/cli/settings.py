"""`llamavisor config`: what is wrong with the configuration, and what is in force."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

from llamavisor import binary, flags
from llamavisor.errors import BinaryError, OptionError
from llamavisor.settings import RouterSettings
from llamavisord.cli.errors import with_hint
from llamavisord.cli.render import Screen
from llamavisord.config import Config, Setting
from llamavisord.exit_codes import ExitCode
from llamavisord.loading import load
from llamavisord.plain import plain
from llamavisord.problems import ConfigError


def run(arguments: Namespace) -> int:
    """`check` or `show`."""
    try:
        config = load(arguments.config or arguments.file, os.environ)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return ExitCode.BAD_CONFIG
    for warning in config.warnings:
        _say(f"warning: {warning}")
    return _check(config) if arguments.verb == "check" else _show(config, as_json=arguments.json)


def _check(config: Config) -> int:
    """Ask the llama-server of each router, too, whether it knows the options."""
    probes = binary.ProbeCache()
    problems = [problem for router in config.routers if (problem := _resolve(router, probes))]
    for problem in problems:
        print(plain(problem), file=sys.stderr)
    if problems:
        return ExitCode.BAD_CONFIG
    names = ", ".join(router.name for router in config.routers)
    Screen().line(f"{plain(config.path or 'no file')}: ok, routers: {plain(names)}")
    return ExitCode.OK


def _resolve(router: RouterSettings, probes: binary.ProbeCache) -> str | None:
    """What is wrong with a router's options. That no llama-server is there is no fault of the configuration."""
    if not os.path.isdir(router.models_dir):  # noqa: PTH112 (Path's raises where it may not look)
        _say(f"warning: router {router.name}: {router.models_dir} is no folder yet")
    try:
        found = probes.probe(binary.find(router.llama_server), {**os.environ, **dict(router.env)})
    except BinaryError as error:
        _say(f"warning: router {router.name}: options not checked: {with_hint(str(error), error.hint)}")
        return None
    try:
        flags.resolve(router.layers, found.flags, binary=str(found.path))
    except OptionError as error:
        return f"router {router.name}: {with_hint(str(error), error.hint)}"
    return None


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
