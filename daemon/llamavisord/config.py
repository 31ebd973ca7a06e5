"""From what is written to what is in force: one configuration, complete, checked, and frozen.

Flags of `serve` win over the environment, the environment over the file, the file over the defaults. One variable
stands at the other end: LLAMAVISOR_LLAMA_SERVER counts where no llama_server is written.
"""

from __future__ import annotations

import ipaddress
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from llamavisor import flags
from llamavisor.errors import OptionError
from llamavisor.flags import ModelOptions, OptionLayer
from llamavisor.reserved import check_env
from llamavisor.settings import RouterSettings
from llamavisord.api_key import read_api_key
from llamavisord.document import Document, RouterKeys, RouterTable, spell
from llamavisord.places import SOCKET_BYTES_MAX, Places
from llamavisord.problems import DEFAULT, ConfigError, Origin, Problem
from llamavisord.sources import (
    Overrides,
    Source,
    read_environment,
    read_file,
    read_overrides,
    unknown_variables,
)
from llamavisord.toml_lines import Location

__all__ = ["Config", "ConfigError", "Metrics", "Overrides", "Setting", "load"]

HOST = "127.0.0.1"
PORT = 8080
MODELS_MAX = 4
METRICS_PORT = 9155
LOG_LEVEL = "info"
LOG_SIZE_BYTES = 64 * 1024 * 1024

_SECRET_WORDS = ("key", "token", "secret", "password", "passwd", "credential", "auth")
_HIDDEN = "(set)"


@dataclass(frozen=True, slots=True)
class Metrics:
    """Where Prometheus reads, and whether it can."""

    enabled: bool
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Setting:
    """One effective value, for people: its key, what it is, and where it comes from. A secret is only "(set)"."""

    key: str
    value: object
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole configuration that holds together.

    Attributes:
        path: the file that was read, None without one.
        serve: "router".
        routers: what each router is told to be, in the order of the file.
        metrics: the Prometheus endpoint.
        socket: the control socket.
        state_dir: the folder for generated files and for what survives a restart.
        log_dir: the folder for the routers' output.
        log_level: "debug", "info", "warning" or "error".
        log_size_bytes: size at which a router's log file is rotated.
        warnings: what a person should know although it works.
        settings: every effective value and its origin.
    """

    path: Path | None
    serve: str
    routers: tuple[RouterSettings, ...]
    metrics: Metrics
    socket: Path
    state_dir: Path
    log_dir: Path
    log_level: str
    log_size_bytes: int
    warnings: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = field(default=(), repr=False, compare=False)

    @property
    def runtime_dir(self) -> Path:
        """The folder of the control socket."""
        return self.socket.parent

    def router_settings(self) -> tuple[RouterSettings, ...]:
        """What each router is told to be."""
        return self.routers


def load(
    path: Path | None,
    environ: Mapping[str, str],
    overrides: Overrides | None = None,
    *,
    places: Places | None = None,
) -> Config:
    """Read and check everything that is written.

    Reads files, changes nothing. A models folder or a llama-server that is missing is no error here: the daemon comes
    up, the router says what is missing, and recovers by itself.

    Args:
        path: the configuration file; None takes LLAMAVISOR_CONFIG, else the first default place that has one.
        environ: the environment.
        overrides: what the flags of `serve` say.
        places: where things are by default; None takes those of this user.

    Raises:
        ConfigError: with everything that is wrong.
    """
    places = places or Places(environ)
    problems: list[Problem] = []
    path = path or find_file(environ, places)
    file = read_file(path, problems) if path else Source(Document(), Path("/"))
    above, below = read_environment(environ, problems)
    given = read_overrides(overrides or Overrides(), problems)
    if problems:
        raise ConfigError(problems)
    return _Assembly(given, above, file, below, places, unknown_variables(environ)).finish()


def find_file(environ: Mapping[str, str], places: Places) -> Path | None:
    """The configuration file to read when none is named on the command line, None if there is none."""
    if named := environ.get("LLAMAVISOR_CONFIG"):
        return Path(named)
    return next((path for path in places.config_files if os.path.lexists(path)), None)


_K = TypeVar("_K", bound=RouterKeys)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _View(Generic[_K]):
    """One table that may hold a key: the table, where it was read from, and its location there."""

    keys: _K
    source: Source
    at: Location = ()


@dataclass(frozen=True, slots=True)
class _Picked(Generic[_T]):
    """The value that won, and where it was written; `source` is None for a default."""

    value: _T
    location: Location
    source: Source | None = None

    @property
    def origin(self) -> Origin:
        return self.source.origin(self.location) if self.source else DEFAULT

    def problem(self, text: str) -> Problem:
        return self.source.problem(self.location, text) if self.source else Problem(text, key=spell(self.location))


class _Assembly:
    """Lays the sources over each other, and collects what is wrong with the result.

    Args:
        given: the flags of `serve`.
        above: variables that win over the file.
        file: the file, or an empty document.
        below: variables that fill what the file leaves open.
        places: where things are by default.
        warnings: what is known so far.
    """

    def __init__(
        self, given: Source, above: Source, file: Source, below: Source, places: Places, warnings: Sequence[str]
    ) -> None:
        self._given = given
        self._above = above
        self._file = file
        self._below = below
        self._top = [_View(source.document, source) for source in (given, above, file, below)]
        self._places = places
        self._warnings = list(warnings)
        self._problems: list[Problem] = []
        self._settings: list[Setting] = []
        self._listeners: list[tuple[str, str, _Picked[int]]] = []  # who, host, port

    def finish(self) -> Config:
        """The configuration.

        Raises:
            ConfigError: it contradicts itself.
        """
        top = self._top
        serve = self._pick(top, "serve", lambda table: table.serve, "router")
        socket = self._pick_path(top, "socket", lambda table: table.socket, self._places.socket)
        state_dir = self._pick_path(top, "state_dir", lambda table: table.state_dir, self._places.state_dir)
        log_level = self._pick(top, "log_level", lambda table: table.log_level, LOG_LEVEL)
        log_size = self._pick(top, "log_size", lambda table: table.log_size, LOG_SIZE_BYTES)
        metrics = self._metrics()
        if (length := len(os.fsencode(socket.value))) > SOCKET_BYTES_MAX:
            text = f"AF_UNIX path too long: {socket.value} has {length} bytes, at most {SOCKET_BYTES_MAX} fit"
            self._problems.append(socket.problem(f"{text}; choose a shorter one with socket or --socket"))
        defaults = self._file.document.defaults
        self._check(self._file, ("defaults",), "[defaults]", defaults, defaults.env)
        self._check(self._given, (), "command line", self._given.document.defaults, {})
        routers = tuple(self._routers())
        self._refuse_twins(routers)
        self._refuse_clashes()
        if self._problems:
            raise ConfigError(dict.fromkeys(self._problems))
        return Config(
            path=self._file.path,
            serve=serve.value,
            routers=routers,
            metrics=metrics,
            socket=socket.value,
            state_dir=state_dir.value,
            log_dir=self._places.log_dir or state_dir.value / "logs",
            log_level=log_level.value,
            log_size_bytes=log_size.value,
            warnings=tuple(dict.fromkeys(self._warnings)),
            settings=tuple(self._settings),
        )

    def _metrics(self) -> Metrics:
        top = self._top
        enabled = self._pick(top, "metrics.enabled", lambda table: table.metrics.enabled, default=True)
        host = self._pick(top, "metrics.host", lambda table: table.metrics.host, HOST)
        port = self._pick(top, "metrics.port", lambda table: table.metrics.port, METRICS_PORT)
        if enabled.value:
            self._listeners.append(("the metrics", host.value, port))
        return Metrics(enabled.value, host.value, port.value)

    def _routers(self) -> Iterator[RouterSettings]:
        tables = self._file.document.router
        if not tables:
            yield self._router(RouterTable(), (), is_alone=True)
        for index, table in enumerate(tables):
            yield self._router(table, ("router", index), is_alone=len(tables) == 1)

    def _router(self, table: RouterTable, at: Location, *, is_alone: bool) -> RouterSettings:
        """One router; `at` is where its table stands, () if none is written."""
        name = table.name or "main"
        if table.name is None and not is_alone:
            self._problems.append(self._file.problem(at, "name is missing: several routers need one each"))
        self._show(f"router.{name}.name", name, self._file.origin((*at, "name")) if table.name else DEFAULT)
        # A flag or a variable speaks for every router; a router's own table before the top of the file.
        own = [_View[RouterKeys](table, self._file, at)] if at else []
        outer: Sequence[_View[RouterKeys]] = self._top
        views = [*outer[:2], *own, *outer[2:]]
        label = f"router.{name}"
        host = self._pick(views, "host", lambda keys: keys.host, HOST, label=label)
        port = self._pick(views, "port", lambda keys: keys.port, PORT, label=label)
        if not is_alone and port.source in (self._given, self._above):
            text = "cannot be given for several routers: each [[router]] table has a port of its own"
            self._problems.append(port.problem(text))
        else:
            self._listeners.append((f"router {name}", host.value, port))
        models_max = self._pick(views, "models_max", lambda keys: keys.models_max, MODELS_MAX, label=label)
        models_dir = self._pick_path(views, "models_dir", lambda keys: keys.models_dir, Path("/"), label=label)
        if models_dir.source is None:
            file = self._file.path or self._places.config_files[0]
            text = f'is not set: write models_dir = "/srv/models" into {file}, or use --models-dir DIR'
            self._problems.append(models_dir.problem(text))
        return RouterSettings(
            name=name,
            host=host.value,
            port=port.value,
            models_dir=models_dir.value,
            models_max=models_max.value,
            llama_server=self._llama_server(views, label),
            layers=self._layers(table, at, name),
            env=self._env(table, at, name),
            api_key=self._api_key(views, label),
        )

    def _llama_server(self, views: Sequence[_View[RouterKeys]], label: str) -> str | None:
        """A path if it has a slash; else the name of a command, to be looked for on PATH."""
        picked = self._pick(views, "llama_server", lambda keys: keys.llama_server or None, "", label=label)
        if picked.source is None:
            return None
        return str(self._resolved(picked)) if "/" in picked.value else picked.value

    def _api_key(self, views: Sequence[_View[RouterKeys]], label: str) -> str | None:
        picked = self._pick(views, "api_key_file", lambda keys: keys.api_key_file, "", label=label)
        if picked.source is None:
            return None
        path = self._resolved(picked)
        try:
            key, is_public = read_api_key(path)
        except ValueError as exc:
            self._problems.append(picked.problem(str(exc)))
            return None
        if is_public:
            self._warnings.append(f"{path} holds an API key and every user can read it: chmod o-r {path}")
        self._show(f"{label}.api_key", _HIDDEN, Origin(str(path)))
        return key

    def _layers(self, table: RouterTable, at: Location, name: str) -> tuple[OptionLayer, ...]:
        source = f"[[router]] {name}"
        self._check(self._file, at, source, table, table.env)
        written = (
            ("[defaults]", self._file.document.defaults, self._file, ("defaults",)),
            (source, table, self._file, at),
            ("command line", self._given.document.defaults, self._given, ("defaults",)),
        )
        effective: dict[str, Setting] = {}
        layers = []
        for named, options, place, location in written:
            layer = OptionLayer(named, _only_options(options))
            for option in layer.options.model_fields_set:
                value = getattr(layer.options, option)
                is_args = option == "args"  # those of several tables stand side by side
                effective[f"{option} {named}" if is_args else option] = Setting(
                    f"router.{name}.{option}",
                    _without_secrets(value) if is_args else value,
                    place.origin((*location, option)),
                )
            if layer.options.model_fields_set:
                layers.append(layer)
        self._settings += effective.values()
        return tuple(layers)

    def _env(self, table: RouterTable, at: Location, name: str) -> tuple[tuple[str, str], ...]:
        defaults = self._file.document.defaults.env
        env = {**defaults, **table.env}
        for variable, value in sorted(env.items()):
            location = (*at, "env", variable) if variable in table.env else ("defaults", "env", variable)
            shown = _HIDDEN if _is_secret(variable) else value
            self._show(f"router.{name}.env.{variable}", shown, self._file.origin(location))
        return tuple(sorted(env.items()))

    def _check(
        self, source: Source, at: Location, name: str, options: ModelOptions, env: Mapping[str, str]
    ) -> None:
        """What the library refuses; it names the table itself, so only a file has more to say about the place."""
        try:
            flags.check([OptionLayer(name, _only_options(options))])
            location = (*at, "env")
            check_env(env, source=name)
        except OptionError as exc:
            if source.path is None:
                location = ()
            ...

    def _refuse_twins(self, routers: Sequence[RouterSettings]) -> None:
        for name, count in Counter(router.name for router in routers).items():
            if count > 1:
                index = max(at for at, router in enumerate(routers) if router.name == name)
                text = f'"{name}" is the name of {count} routers; each needs its own'
                self._problems.append(self._file.problem(("router", index, "name"), text))

    def _refuse_clashes(self) -> None:
        for (first, host, port), (second, other_host, other) in itertools.combinations(self._listeners, 2):
            if port.value == other.value and _overlap(host, other_host):
                self._problems.append(other.problem(f"port {port.value} of {second} is taken by {first}"))
