"""The places where configuration is written (file, environment, flags), each read into the same document."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llamavisord.activation import SOURCE, Activation
from llamavisord.document import Document, nearest, spell, validate
from llamavisord.problems import Origin, Problem
from llamavisord.toml_lines import Location, key_lines, line_of
from llamavisord.variables import FALLBACKS, KEYS, Variable

FILE_BYTES = 1024 * 1024
"""A longer file is no configuration."""

_NUMBERS = frozenset({"port", "models_max"})
FLAGS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "host": ("--host", ("host",)),
    "port": ("--port", ("port",)),
    "models_dir": ("--models-dir", ("models_dir",)),
    "models_max": ("--models-max", ("models_max",)),
    "memory": ("--memory", ("memory",)),
    "llama_server": ("--llama-server", ("llama_server",)),
    "socket": ("--socket", ("socket",)),
    "state_dir": ("--state-dir", ("state_dir",)),
    "log_level": ("--log-level", ("log_level",)),
    "metrics_port": ("--metrics-port", ("metrics", "port")),
    "metrics": ("--no-metrics", ("metrics", "enabled")),
    "gpu_layers": ("--gpu-layers", ("defaults", "gpu_layers")),
    "args": ("the words after --", ("defaults", "args")),
}
"""For each of the `Overrides` the flag of `serve`, and the key that it stands for."""
_WHERE = re.compile(r"\s*\(at (?:line (\d+), column \d+|end of document)\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """What the flags of `serve` say; None is not given.

    Attributes:
        memory: "auto" or a size.
        gpu_layers: "auto", "all" or a number.
        metrics: False turns them off.
        args: everything after `--`.
    """

    host: str | None = None
    port: int | None = None
    models_dir: str | None = None
    models_max: int | None = None
    memory: str | None = None
    llama_server: str | None = None
    gpu_layers: str | None = None
    socket: str | None = None
    state_dir: str | None = None
    metrics_port: int | None = None
    metrics: bool | None = None
    log_level: str | None = None
    args: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Source:
    """One place where configuration is written.

    Attributes:
        document: what it says; empty if it could not be understood.
        base: folder that relative paths start at.
        names: where each value stands, unless it stands in a file.
        path: the file, None for the environment and the flags.
        lines: the lines of the file's keys.
    """

    document: Document
    base: Path
    names: Mapping[Location, str] = field(default_factory=dict)
    path: Path | None = None
    lines: Mapping[Location, int] = field(default_factory=dict)

    def origin(self, location: Location) -> Origin:
        """Where the value at `location` was written."""
        if self.path is not None:
            return Origin(str(self.path), line_of(self.lines, location))
        return Origin(next((self.names[at] for at in _upwards(location) if at in self.names), ""))

    def problem(self, location: Location, text: str) -> Problem:
        """What is wrong with the value at `location`. Only in a file a key says more than the origin."""
        return Problem(text, self.origin(location), spell(location) if self.path is not None else "")

    def resolve(self, path: str) -> Path:
        """The absolute path that `path` means here.

        Raises:
            ValueError: it begins with the home of a user who does not exist.
        """
        expanded = os.path.expanduser(path)  # noqa: PTH111 (Path's raises RuntimeError for the same)
        if expanded.startswith("~"):
            raise ValueError(f"no such user: {expanded.partition('/')[0]}")
        return self.base / expanded


def read_file(path: Path, problems: list[Problem]) -> Source:
    """A TOML file; what is wrong with it is added to `problems`."""
    path = _cwd() / path
    nothing = Source(Document(), path.parent, path=path)
    try:
        raw = _read(path)
        text = raw.decode("utf-8").replace("\r\n", "\n")
        tables = tomllib.loads(text)
    except OSError as exc:
        problems.append(Problem(f"cannot be read: {exc.strerror}", Origin(str(path))))
    except UnicodeDecodeError as exc:
        line = raw.count(b"\n", 0, exc.start) + 1
        problems.append(Problem("not TOML: a byte that is not UTF-8", Origin(str(path), line)))
    except tomllib.TOMLDecodeError as exc:
        found = _WHERE.search(str(exc))
        line = int(found[1]) if found and found[1] else text.count("\n") + 1
        problems.append(Problem(f"not TOML: {_WHERE.sub('', str(exc))}", Origin(str(path), line)))
    except (ValueError, RecursionError) as exc:
        # Too long a file, a number of thousands of digits, a list in a list in a list.
        text = "nested too deeply" if isinstance(exc, RecursionError) else str(exc)
        problems.append(Problem(f"not TOML: {text}", Origin(str(path))))
    else:
        source = Source(Document(), path.parent, path=path, lines=key_lines(text))
        return _checked(source, tables, problems)
    return nothing


def read_environment(environ: Mapping[str, str], problems: list[Problem]) -> tuple[Source, Source]:
    """What the LLAMAVISOR_ variables say above the file, and below it. An empty one is not set."""
    above, below = ({name: at for name, at in table.items() if environ.get(name)} for table in (KEYS, FALLBACKS))
    return _from_variables(above, environ, problems), _from_variables(below, environ, problems)


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """A warning for every LLAMAVISOR_ variable that nothing reads: most likely it was misspelt."""
    known = {*KEYS, *FALLBACKS, *Variable}
    strange = sorted(name for name in environ if name.startswith("LLAMAVISOR_") and name not in known)
    return [f"{name} is set, and nothing reads it{nearest(name, known)}" for name in strange]


def read_overrides(overrides: Overrides, problems: list[Problem]) -> Source:
    """What the flags of `serve` say."""
    values = {name: getattr(overrides, name) for name in FLAGS}
    given = {at: (flag, values[name]) for name, (flag, at) in FLAGS.items() if values[name] not in (None, ())}
    source = Source(Document(), _cwd(), names={at: flag for at, (flag, _) in given.items()})
    return _checked(source, _nested({at: value for at, (_, value) in given.items()}), problems)


def read_activation(activation: Activation, problems: list[Problem]) -> Source:
    """Where the service manager listens for the daemon: nobody can listen elsewhere and be found."""
    host, port = activation.address or (None, None)
    told: dict[tuple[str, ...], object] = {("host",): host, ("port",): port, ("socket",): activation.path}
    given = {at: value for at, value in told.items() if value is not None}
    return _checked(Source(Document(), Path("/"), names=dict.fromkeys(given, SOURCE)), _nested(given), problems)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        raw = file.read(FILE_BYTES + 1)
    if len(raw) > FILE_BYTES:
        raise ValueError(f"longer than {FILE_BYTES} bytes")
    return raw


def _from_variables(
    wanted: Mapping[str, tuple[str, ...]], environ: Mapping[str, str], problems: list[Problem]
) -> Source:
    source = Source(Document(), _cwd(), names={at: name for name, at in wanted.items()})
    return _checked(source, _nested({at: _typed(at, environ[name]) for name, at in wanted.items()}), problems)


def _typed(at: tuple[str, ...], text: str) -> str | int:
    """A variable's text, as a number where one is wanted and it is one."""
    is_number = at[-1] in _NUMBERS and text.isascii() and text.isdecimal() and len(text) < 19
    return int(text) if is_number else text


def _nested(values: Mapping[tuple[str, ...], object]) -> dict[str, object]:
    keys: dict[str, object] = {}
    tables: dict[str, dict[str, object]] = {}
    for (*table, key), value in values.items():
        (tables.setdefault(table[0], {}) if table else keys)[key] = value
    return {**keys, **tables}


def _cwd() -> Path:
    try:
        return Path.cwd()
    except OSError:  # it was removed
        return Path("/")


def _checked(source: Source, tables: Mapping[str, object], problems: list[Problem]) -> Source:
    outcome = validate(tables)
    if isinstance(outcome, Document):
        return Source(outcome, source.base, source.names, source.path, source.lines)
    found = [source.problem(location, text) for location, text in outcome]
    problems += sorted(found, key=lambda problem: problem.origin.line or 0 if problem.origin else 0)
    return source


def _upwards(location: Location) -> Sequence[Location]:
    return [location[:depth] for depth in range(len(location), 0, -1)]
