"""The preset file of a router: what all models are told, and what single models are told besides.

One bad line stops a router from starting, and met in a reload it can block every later load for ever: nothing
is written that `lint` has not passed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from llamavisor import ini
from llamavisor.errors import OptionError
from llamavisor.helptext import FlagSet
from llamavisor.reserved import find_reserved, find_reserved_key
from llamavisor.spellings import typed_name

STOP_TIMEOUT_S = 3
"""How long the router waits for a model to stop before it kills it.

The router's default, 10 s, is as long as we wait for the router itself: it would be killed while it waits.
"""
ALWAYS: Mapping[str, str] = {"metrics": "1", "stop-timeout": str(STOP_TIMEOUT_S)}
"""Entries of every preset. Metrics are how it is seen that a model is used, and that it is alive."""

FILE_MODE = 0o600

_PRESET_ONLY = frozenset({"stop-timeout"})
"""Keys that no `--help` shows, because only a preset knows them (`common_params_add_preset_options`)."""
_OURS = frozenset({*ALWAYS, "model", "alias", "tags"})
"""Reserved keys that are refused to a configuration, and written by us."""
_PER_MODEL = frozenset({"model", "alias", "tags"})
_FLAG_VALUES = frozenset({"on", "enabled", "true", "1", "off", "disabled", "false", "0"})
"""What the router reads as a truth value; anything else is off (`is_truthy` in `common/arg.cpp`)."""
_SEVERAL_OPTIONS = frozenset({"load_mode", "cont_batching", "chat_template", "lora"})
"""Typed options whose spellings are several options in some build."""


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


def for_router(sections: Mapping[str, Mapping[str, str]]) -> Preset:
    """The preset of a router: the sections of its models, and what every preset says."""
    return Preset(common=dict(sorted(ALWAYS.items())), sections=sections)


def lint(preset: Preset, flags: FlagSet | None = None) -> None:
    """Refuses whatever would keep the router from starting, or wedge it in a reload.

    Args:
        preset: what is to be written.
        flags: the options of the build that will read it, None to leave them unchecked.

    Raises:
        OptionError: names the section and the key.
    """
    keys = _Keys(flags)
    _lint_table("[*]", preset.common, keys)
    for key in preset.common:
        if key in _PER_MODEL:
            raise OptionError(f"preset [*]: {key} would be the same for every model")
    for name, table in preset.sections.items():
        if problem := ini.section_problem(name):
            raise OptionError(f"preset: the model name {name!r} {problem}")
        _lint_table(f"[{name}]", table, keys)
        # A section that names no model is accepted, and loading it starts a router within the router.
        if not table.get("model", "").startswith("/"):
            raise OptionError(f"preset [{name}]: needs model = …, an absolute path")
    _lint_aliases(preset)


def write(path: Path, preset: Preset) -> None:
    """Lints `preset` and puts it at `path` in one step: a reader sees the old file or the new one.

    The file is readable by its owner alone (0600). A crash leaves at most a `.NAME.tmp` behind, which the
    next call replaces. Nothing is forced to the disk: it is looked at before every start. What stands there already is
    not written again: a full disk keeps no router from coming back. One writer at a time.

    Raises:
        OptionError: the preset must not be written; the old file stays.
        OSError: the folder cannot be written; the old file stays.
    """
    lint(preset)
    if stands(path, preset):
        return
    draft = path.with_name(f".{path.name}.tmp")
    draft.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE), "wb") as file:
            file.write(preset.render().encode())
        draft.replace(path)
    except OSError as exc:
        with suppress(OSError):
            draft.unlink(missing_ok=True)  # half of it would take room that others need
        raise OSError(exc.errno, exc.strerror, str(path)) from exc  # of a write the kernel does not say where


def stands(path: Path, preset: Preset) -> bool:
    """Whether the file at `path` says exactly this, to its owner alone."""
    try:
        return stat.S_IMODE(path.stat().st_mode) == FILE_MODE and path.read_bytes() == preset.render().encode()
    except OSError:
        return False


class _Keys:
    """What there is to say of each key, found out once for all sections.

    Args:
        flags: the options of the build, None if it is not known.
    """

    def __init__(self, flags: FlagSet | None) -> None:
        self._flags = flags
        self._known: dict[str, tuple[str, bool]] = {}

    def look(self, where: str, key: str) -> tuple[str, bool]:
        """The name of the option that `key` stands for, and whether it is a flag.

        Raises:
            OptionError: a preset must not have that key.
        """
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._find(where, key)
        return known

    def _find(self, where: str, key: str) -> tuple[str, bool]:
        if problem := ini.key_problem(key):
            raise OptionError(f"preset {where}: {key!r} {problem}")
        if key not in _OURS and (reserved := find_reserved_key(key)):
            raise OptionError(f"preset {where}: {key} is refused: {reserved.reason}", hint=reserved.instead)
        if key in _PRESET_ONLY:
            return key, False
        if self._flags is None:
            return _typed_key(key), False
        option = self._flags.find_key(key)
        if option is None:
            raise OptionError(f"preset {where}: {key} is not an option of this llama-server")
        if option.values > 1:
            raise OptionError(f"preset {where}: {key} takes two values, with which the router does not start")
        if key not in _OURS and (reserved := find_reserved(option.spellings)):
            raise OptionError(f"preset {where}: {key} is refused: {reserved.reason}", hint=reserved.instead)
        if option.is_download:
            raise OptionError(f"preset {where}: {key} is refused: it downloads a model and makes every model be that")
        has_own_name = option.has_separate_off and f"--{key}" in option.negations
        return key if has_own_name else option.key, option.values == 0


def _typed_key(key: str) -> str:
    """One name for all spellings of a typed option, as far as they are one option in every build."""
    name = typed_name(f"--{key}") or typed_name(f"-{key}")
    return key if name is None or name in _SEVERAL_OPTIONS else name


def _lint_table(where: str, table: Mapping[str, str], keys: _Keys) -> None:
    written: dict[str, str] = {}
    for key, value in table.items():
        name, is_flag = keys.look(where, key)
        if problem := ini.value_problem(value):
            raise OptionError(f"preset {where}: the value {value!r} of {key} {problem}")
        if is_flag and value not in _FLAG_VALUES:
            raise OptionError(f"preset {where}: {key} = {value} would be read as off; it takes 1 or 0")
        if key in _PRESET_ONLY and not (value.isascii() and value.isdecimal()):
            raise OptionError(f"preset {where}: {key} = {value} is no whole number of seconds")
        # Of two spellings of one option the router takes the one that sorts last, not the one written last.
        if name in written:
            raise OptionError(f"preset {where}: {written[name]} and {key} are the same option")
        written[name] = key


def _lint_aliases(preset: Preset) -> None:
    """Refuses two models of one name: no start, or a reload that stops half-way and blocks every load."""
    owners: dict[str, str] = {name: name for name in preset.sections}
    for name, table in preset.sections.items():
        for alias in filter(None, (part.strip() for part in table.get("alias", "").split(","))):
            owner = owners.setdefault(alias, name)
            if owner != name:
                raise OptionError(f"preset [{name}]: the alias {alias!r} already names the model {owner!r}")
