"""The preset file of a router: what all models are told, and what single models are told besides.

One bad line stops a router from starting, and met in a reload it can block every later load for ever: nothing
is written that `lint` has not passed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llamavisor import ini
from llamavisor.errors import OptionError
from llamavisor.flags import LaunchOptions
from llamavisor.helptext import FlagSet
from llamavisor.reserved import find_reserved_key

STOP_TIMEOUT_S = 3
"""How long the router waits for a model to stop before it kills it.

The router's default, 10 s, is as long as we wait for the router itself: it would be killed while it waits.
"""
ALWAYS: Mapping[str, str] = {"metrics": "1", "stop-timeout": str(STOP_TIMEOUT_S)}
"""Entries of every preset. Metrics are how it is seen that a model is used, and that it is alive."""

_PRESET_ONLY = frozenset({"stop-timeout"})
"""Keys that no `--help` shows, because only a preset knows them (`common_params_add_preset_options`)."""
_OURS = frozenset({*ALWAYS, "model", "alias", "tags"})
"""Reserved keys that are refused to a configuration, and written by us."""
_PER_MODEL = frozenset({"model", "alias", "tags"})


@dataclass(frozen=True, slots=True)
class Preset:
    """What one router's models are told.

    Attributes:
        common: entries for every model, `[*]`.
        sections: entries for single models, by the model's name; each needs an absolute `model`.
    """

    common: Mapping[str, str] = field(default_factory=dict)
    sections: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def render(self) -> str:
        """The file's text, unchecked. Equal presets give equal text."""
        return ini.render(self.common, self.sections)


def for_router(options: LaunchOptions, sections: Mapping[str, Mapping[str, str]] | None = None) -> Preset:
    """The preset of a router: what its options say, and what every preset says."""
    return Preset(common=dict(sorted({**options.preset, **ALWAYS}.items())), sections=sections or {})


def lint(preset: Preset, flags: FlagSet | None = None) -> None:
    """Refuses whatever would keep the router from starting, or wedge it in a reload.

    Args:
        preset: what is to be written.
        flags: the options of the build that will read it, None to leave them unchecked.

    Raises:
        OptionError: names the section and the key.
    """
    _lint_table("[*]", preset.common, flags)
    for key in preset.common:
        if key in _PER_MODEL:
            raise OptionError(f"preset [*]: {key} would be the same for every model")
    for name, table in preset.sections.items():
        if problem := ini.section_problem(name):
            raise OptionError(f"preset: the model name {name!r} {problem}")
        _lint_table(f"[{name}]", table, flags)
        # A section that names no model is accepted, and loading it starts a router within the router.
        if not table.get("model", "").startswith("/"):
            raise OptionError(f"preset [{name}]: needs model = …, an absolute path")
    _lint_aliases(preset)


def write(path: Path, preset: Preset) -> None:
    """Lints `preset` and puts it at `path` in one step: a reader sees the old file or the new one.

    The file is readable by its owner alone (0600). A crash leaves at most a `.NAME.tmp` behind, which the
    next call replaces. Nothing is forced to the disk: it is written anew before every start. One writer at a time.

    Raises:
        OptionError: the preset must not be written; the old file stays.
        OSError: the folder cannot be written; the old file stays.
    """
    lint(preset)
    draft = path.with_name(f".{path.name}.tmp")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(preset.render().encode())
    draft.replace(path)


def _lint_table(where: str, table: Mapping[str, str], flags: FlagSet | None) -> None:
    written: dict[str, str] = {}
    for key, value in table.items():
        if problem := ini.key_problem(key):
            raise OptionError(f"preset {where}: {key!r} {problem}")
        if problem := ini.value_problem(value):
            raise OptionError(f"preset {where}: the value {value!r} of {key} {problem}")
        if key not in _OURS and (reserved := find_reserved_key(key)):
            raise OptionError(f"preset {where}: {key} is refused: {reserved.reason}", hint=reserved.instead)
        if flags is None or key in _PRESET_ONLY:
            continue
        option = flags.find_key(key)
        if option is None:
            raise OptionError(f"preset {where}: {key} is not an option of this llama-server")
        if option.values > 1:
            raise OptionError(f"preset {where}: {key} takes two values, with which the router does not start")
        # Of two spellings of one option the router takes the one that sorts last, not the one written last.
        if option.key in written:
            raise OptionError(f"preset {where}: {written[option.key]} and {key} are the same option")
        written[option.key] = key


def _lint_aliases(preset: Preset) -> None:
    """Refuses two models of one name: no start, or a reload that stops half-way and blocks every load."""
    owners: dict[str, str] = {name: name for name in preset.sections}
    for name, table in preset.sections.items():
        for alias in filter(None, (part.strip() for part in table.get("alias", "").split(","))):
            owner = owners.setdefault(alias, name)
            if owner != name:
                raise OptionError(f"preset [{name}]: the alias {alias!r} already names the model {owner!r}")
