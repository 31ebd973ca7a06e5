"""From what is written to the configuration in force: sources laid over each other, everything checked.

Flags of `serve` win over the environment, the environment over the file, the file over the defaults. One
variable stands at the other end: LLAMAVISOR_LLAMA_SERVER counts where no llama_server is written.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamavisor import flags
from llamavisor.errors import OptionError
from llamavisor.eviction import MIN_RESIDENCY_S
from llamavisor.flags import ModelOptions, OptionLayer
from llamavisor.helptext import normal
from llamavisor.reserved import check_env, find_reserved
from llamavisor.settings import MemoryBudget, OnOverwrite, Oversize, RouterSettings, Serve
from llamavisord import gateway_table, model_tables
from llamavisord.activation import SOURCE, Activation
from llamavisord.addresses import LOOPBACK, is_loopback, listened_on, overlap
from llamavisord.api_key import read_api_key
from llamavisord.config import Config, GatewaySettings, Metrics, Setting
from llamavisord.document import Document, RouterKeys, RouterTable
from llamavisord.picking import Picked, Picker, Scope, View
from llamavisord.places import SOCKET_BYTES_MAX, Places
from llamavisord.problems import DEFAULT, ConfigError, Origin, Problem
from llamavisord.redaction import HIDDEN, is_secret, without_secrets
from llamavisord.sources import (
    Overrides,
    Source,
    read_activation,
    read_environment,
    read_file,
    read_overrides,
    unknown_variables,
)
from llamavisord.toml_lines import Location

HOST = "127.0.0.1"
PORT = 8080
MODELS_MAX = 4
METRICS_PORT = 9155
LOG_LEVEL = "info"
LOG_SIZE_BYTES = 64 * 1024 * 1024
ON_OVERWRITE: OnOverwrite = "reload"
SERVE: Serve = "gateway"
OVERSIZE: Oversize = "fit"
_RENEW = "`llamavisor install-service --now`"
SERVE_FLAGS = frozenset({"--host", "--port", "--models-dir", "--models-max"})
"""What llama-server takes, the supervisor keeps for itself, and `serve` has a flag of the same name for."""


def load(
    path: Path | None,
    environ: Mapping[str, str],
    overrides: Overrides | None = None,
    *,
    activation: Activation | None = None,
    places: Places | None = None,
) -> Config:
    """Read and check everything that is written.

    Reads files, changes nothing. A models folder or a llama-server that is missing is no error here: the
    daemon comes up, the router says what is missing, and recovers by itself.

    Args:
        path: the configuration file; None takes LLAMAVISOR_CONFIG, else the first default place with one.
        environ: the environment.
        overrides: what the flags of `serve` say.
        activation: sockets that the service manager listens on; what they say of addresses wins over all else.
        places: where things are by default; None takes those of this user.

    Raises:
        ConfigError: with everything that is wrong.
    """
    places = places or Places(environ)
    problems: list[Problem] = []
    path = path or places.config_file
    file = read_file(path, problems) if path else Source(Document(), Path("/"))
    above, below = read_environment(environ, problems)
    given = read_overrides(overrides or Overrides(), problems)
    handed = read_activation(activation or Activation(), problems)
    if problems:
        raise ConfigError(problems)
    return _Assembly(
        handed=handed,
        given=given,
        above=above,
        file=file,
        below=below,
        places=places,
        environ=environ,
    ).finish()


@dataclass(frozen=True, slots=True)
class _Address:
    """Where a router listens, and the key that it asks for."""

    host: str
    port: int
    api_key: str | None


class _Assembly:
    """Lays the sources over each other, and collects what is wrong with the result.

    Args:
        handed: the sockets that the service manager listens on.
        given: the flags of `serve`.
        above: variables that win over the file.
        file: the file, or an empty document.
        below: variables that fill what the file leaves open.
        places: where things are by default.
        environ: the environment, for what is no setting of ours: credentials, and variables that nothing reads.
    """

    def __init__(
        self,
        *,
        handed: Source,
        given: Source,
        above: Source,
        file: Source,
        below: Source,
        places: Places,
        environ: Mapping[str, str],
    ) -> None:
        self._handed = handed
        self._given = given
        self._above = above
        self._file = file
        self._below = below
        self._places = places
        self._environ = environ
        self._picker = Picker(unknown_variables(environ))
        self._listeners: list[tuple[str, str, Picked[int]]] = []  # who, on which host and port

    def finish(self) -> Config:
        """The configuration.

        Raises:
            ConfigError: it contradicts itself.
        """
        sources = (self._handed, self._given, self._above, self._file, self._below)
        top = Scope("", [View(source.document, source) for source in sources])
        serve = self._picker.pick(top, "serve", lambda table: table.serve, SERVE)
        socket = self._picker.path(top, "socket", lambda table: table.socket, self._places.socket)
        state_dir = self._picker.path(top, "state_dir", lambda table: table.state_dir, self._places.state_dir)
        log_level = self._picker.pick(top, "log_level", lambda table: table.log_level, LOG_LEVEL)
        log_size = self._picker.pick(top, "log_size", lambda table: table.log_size, LOG_SIZE_BYTES)
        on_overwrite = self._picker.pick(top, "on_overwrite", lambda table: table.on_overwrite, ON_OVERWRITE)
        min_residency = self._picker.pick(top, "min_residency", lambda table: table.min_residency, MIN_RESIDENCY_S)
        oversize = self._picker.pick(top, "oversize", lambda table: table.oversize, OVERSIZE)
        link_dirs = self._link_dirs(top)
        metrics = self._metrics(top)
        self._check_socket(socket)
        self._check_options("[defaults]", self._file.document.defaults, self._file, ("defaults",))
        self._check_given()
        gateway = self._gateway(top) if serve.value == "gateway" else None
        self._check_handed(serve)
        if gateway is None and (unused := gateway_table.unused(self._file)):
            self._picker.warnings.append(str(unused))
        routers = tuple(self._routers(has_gateway=gateway is not None))
        self._check_names(routers)
        self._check_ports()
        models = model_tables.read(self._file, [router.name for router in routers])
        self._picker.problems += models.problems
        self._picker.settings += models.settings
        if self._picker.problems:
            raise ConfigError(dict.fromkeys(self._picker.problems))
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
            gateway=gateway,
            rules=models.rules,
            link_dirs=link_dirs,
            on_overwrite=on_overwrite.value,
            min_residency_s=min_residency.value,
            oversize=oversize.value,
            warnings=tuple(dict.fromkeys(self._picker.warnings)),
            settings=tuple(self._picker.settings),
        )

    def _link_dirs(self, top: Scope[Document]) -> tuple[Path, ...]:
        found = top.find("link_dirs", lambda table: table.link_dirs)
        paths: tuple[Path, ...] = ()
        if found is not None:
            paths = tuple(self._picker.resolved(Picked(path, found.location, found.source)) for path in found.value)
        self._picker.show(top, "link_dirs", tuple(map(str, paths)), found.origin if found else DEFAULT)
        return paths

    def _metrics(self, top: Scope[Document]) -> Metrics:
        enabled = self._picker.pick(top, "metrics.enabled", lambda table: table.metrics.enabled, default=True)
        host = self._picker.pick(top, "metrics.host", lambda table: table.metrics.host, HOST)
        port = self._picker.pick(top, "metrics.port", lambda table: table.metrics.port, METRICS_PORT)
        if enabled.value:
            self._listeners.append(("the metrics", host.value, port))
        return Metrics(enabled.value, host.value, port.value)

    def _gateway(self, top: Scope[Document]) -> GatewaySettings:
        host = self._picker.pick(top, "host", lambda table: table.host, HOST)
        port = self._picker.pick(top, "port", lambda table: table.port, PORT)
        for address in listened_on(host.value):
            self._listeners.append(("the gateway", address, port))
        return gateway_table.read(self._picker, top, host, port, self._environ)

    def _routers(self, *, has_gateway: bool) -> Iterator[RouterSettings]:
        tables = self._file.document.router
        if not tables:
            yield self._router(RouterTable(), (), is_alone=True, has_gateway=has_gateway)
        for index, table in enumerate(tables):
            yield self._router(table, ("router", index), is_alone=len(tables) == 1, has_gateway=has_gateway)

    def _router(self, table: RouterTable, at: Location, *, is_alone: bool, has_gateway: bool) -> RouterSettings:
        """One router; `at` is the location of its table, () if none is written."""
        name = table.name or "main"
        scope = self._router_scope(name, table, at)
        if table.name is None and not is_alone:
            self._picker.problems.append(self._file.problem(at, "has no name; several routers need one each"))
        self._picker.show(scope, "name", name, self._file.origin((*at, "name")) if table.name else DEFAULT)
        if has_gateway:
            self._refuse_address(table, at)
            address = _Address(LOOPBACK[0], 0, None)
        else:
            address = self._address(scope, name, is_alone=is_alone)
        models_max = self._picker.pick(scope, "models_max", lambda keys: keys.models_max, MODELS_MAX)
        memory = self._memory(scope)
        models_dir = self._models_dir(scope)
        layers = self._layers(scope, name, table, at)
        if has_gateway:
            self._doubt_cors(layers)
        return RouterSettings(
            name=name,
            host=address.host,
            port=address.port,
            models_dir=models_dir,
            models_max=models_max.value,
            memory=memory,
            llama_server=self._llama_server(scope),
            api_key=address.api_key,
            autoload=not has_gateway,
            layers=layers,
            env=self._env(scope, table, at),
        )

    def _address(self, scope: Scope[RouterKeys], name: str, *, is_alone: bool) -> _Address:
        """Where clients reach the router itself."""
        host = self._picker.pick(scope, "host", lambda keys: keys.host, HOST)
        port = self._picker.pick(scope, "port", lambda keys: keys.port, PORT)
        if is_alone or port.source not in (self._given, self._above):
            self._listeners.append((f"router {name}", host.value, port))
        else:
            text = "means nothing to several routers: each [[router]] table has a port of its own"
            self._picker.problems.append(port.problem(text))
        api_key = self._api_key(scope)
        if api_key is None and not is_loopback(host.value):
            text = "everybody who reaches its port can use its models: set api_key_file"
            self._picker.warnings.append(f"router {name} listens on {host.value} without a key: {text}")
        return _Address(host.value, port.value, api_key)

    def _doubt_cors(self, layers: Sequence[OptionLayer]) -> None:
        """Web pages talk to the gateway, and it says which of them may."""
        for layer in layers:
            for word in layer.options.args:
                if normal(word.partition("=")[0]).startswith("--cors-"):
                    text = f"{layer.source}: {word} has no effect: allow_origins in [gateway] says which web pages may"
                    self._picker.warnings.append(f"{text} use it")

    def _refuse_address(self, table: RouterTable, at: Location) -> None:
        """Behind the gateway nobody but llamavisor talks to a router."""
        for key in sorted(table.model_fields_set & {"host", "port", "api_key_file"}):
            text = (
                "clients talk to the gateway, whose address and keys stand at the top of the file; its routers listen"
                ' where only llamavisor reaches them: delete this, or write serve = "router" at the top'
            )
            self._picker.problems.append(self._file.problem((*at, key), text))

    def _router_scope(self, name: str, table: RouterTable, at: Location) -> Scope[RouterKeys]:
        """A flag or a variable speaks for every router; its own table comes before the top of the file."""
        views: list[View[RouterKeys]] = [
            View(self._given.document, self._given),
            View(self._above.document, self._above),
            View(table, self._file, at),
            View(self._file.document, self._file),
            View(self._below.document, self._below),
        ]
        return Scope(f"router.{name}", views)

    def _memory(self, scope: Scope[RouterKeys]) -> MemoryBudget:
        """The nearest table that speaks of it says it all: one table's devices are not added to another's."""
        found = scope.find("memory", lambda keys: keys.memory)
        budget = found.value if found else MemoryBudget()
        if found is None or not budget.devices:
            shown = "auto" if budget.size is None else budget.size
            self._picker.show(scope, "memory", shown, found.origin if found else DEFAULT)
            return budget
        for device, size_bytes in budget.devices:
            picked = Picked(size_bytes, (*found.location, device), found.source)
            self._picker.show(scope, f"memory.{device}", picked.value, picked.origin)
        return budget

    def _models_dir(self, scope: Scope[RouterKeys]) -> Path:
        nowhere = Path("/")
        picked = self._picker.path(scope, "models_dir", lambda keys: keys.models_dir, nowhere)
        if picked.source is None:
            file = self._file.path or self._places.config_files[0]
            text = f'is not set: write models_dir = "/srv/models" into {file}, or use --models-dir DIR'
            self._picker.problems.append(picked.problem(text))
        return picked.value

    def _llama_server(self, scope: Scope[RouterKeys]) -> str | None:
        """A path if it has a slash; else the name of a command, looked for on PATH."""
        picked = scope.find("llama_server", lambda keys: keys.llama_server)
        if picked is None:
            return None
        value = str(self._picker.resolved(picked)) if "/" in picked.value else picked.value
        self._picker.show(scope, "llama_server", value, picked.origin)
        return value

    def _api_key(self, scope: Scope[RouterKeys]) -> str | None:
        picked = scope.find("api_key_file", lambda keys: keys.api_key_file)
        if picked is None:
            return None
        path = self._picker.resolved(picked)
        self._picker.show(scope, "api_key_file", path, picked.origin)
        try:
            key, is_public = read_api_key(path)
        except ValueError as exc:
            self._picker.problems.append(picked.problem(str(exc)))
            return None
        if is_public:
            self._picker.warnings.append(f"{path} holds an API key and every user can read it: chmod o-r {path}")
        self._picker.show(scope, "api_key", HIDDEN, Origin(str(path)))
        return key

    def _layers(self, scope: Scope[RouterKeys], name: str, table: RouterTable, at: Location) -> tuple[OptionLayer, ...]:
        own = f"[[router]] {name}"
        self._check_options(own, table, self._file, at)
        written: list[tuple[str, ModelOptions, Source, Location]] = [
            ("[defaults]", self._file.document.defaults, self._file, ("defaults",)),
            (own, table, self._file, at),
            ("command line", self._given.document.defaults, self._given, ("defaults",)),
        ]
        layers = []
        effective: dict[tuple[str, str], Setting] = {}
        for label, options, source, location in written:
            layer = OptionLayer(label, _only_options(options))
            layers += [layer] if layer.options.model_fields_set else []
            for key in sorted(layer.options.model_fields_set):
                value: object = getattr(layer.options, key)
                origin = source.origin((*location, key))
                if key == "args":  # those of one table do not replace those of another
                    shown = Setting(f"{scope.label}.args", without_secrets(layer.options.args), origin)
                    effective[key, label] = shown
                else:
                    effective[key, ""] = Setting(f"{scope.label}.{key}", value, origin)
        self._picker.settings += effective.values()
        return tuple(layers)

    def _env(self, scope: Scope[RouterKeys], table: RouterTable, at: Location) -> tuple[tuple[str, str], ...]:
        env = {**self._file.document.defaults.env, **table.env}
        for variable, value in sorted(env.items()):
            where = at if variable in table.env else ("defaults",)
            origin = self._file.origin((*where, "env", variable))
            self._picker.show(scope, f"env.{variable}", HIDDEN if is_secret(variable) else value, origin)
        return tuple(sorted(env.items()))

    # What contradicts itself

    def _check_handed(self, serve: Picked[Serve]) -> None:
        """Nobody may wait at a door that is never opened; what is written and has no effect is told."""
        handed = self._handed.document
        if serve.value == "router" and handed.port is not None:
            text = f"{SOURCE} listens on port {handed.port} for the gateway, and there is none: {_RENEW} leaves it out"
            self._picker.problems.append(serve.problem(text))
        for key in ("host", "port", "socket"):
            value: object = getattr(handed, key)
            for source in (self._given, self._above, self._file) if value is not None else ():
                written: object = getattr(source.document, key)
                if written not in {None, value}:
                    text = f"{written} has no effect: {SOURCE} listens on {value}; {_RENEW} changes that"
                    self._picker.warnings.append(str(source.problem((key,), text)))

    def _check_socket(self, socket: Picked[Path]) -> None:
        length = len(os.fsencode(socket.value))
        if length > SOCKET_BYTES_MAX:
            self._picker.problems.append(
                socket.problem(
                    f"AF_UNIX path too long: {socket.value} has {length} bytes and {SOCKET_BYTES_MAX} fit;"
                    " choose a shorter one with socket or --socket"
                )
            )

    def _check_options(self, label: str, options: ModelOptions, source: Source, at: Location) -> None:
        """Have the library refuse what no llama-server makes good; its messages begin with `label`."""
        env: Mapping[str, str] = getattr(options, "env", {})
        checks: dict[str, Callable[[], None]] = {
            "args": lambda: flags.check([OptionLayer(label, _only_options(options))]),
            "env": lambda: check_env(env, source=label),
        }
        for key, check in checks.items():
            try:
                check()
            except OptionError as exc:
                where = (*at, key) if key in options.model_fields_set else at
                text = f"{exc}. {exc.hint}" if exc.hint else str(exc)
                self._picker.problems.append(Problem(text, source.origin(where) if source.path else None))

    def _check_given(self) -> None:
        """The words after the `--` of `serve`: what `serve` itself takes is told apart from what nobody may say."""
        label, options = "command line", self._given.document.defaults
        for word in options.args:
            flag, reserved = normal(word), find_reserved((word,))
            if flag in SERVE_FLAGS and reserved is not None:
                text = f"{label}: {word} after -- is refused: {reserved.reason}. Write it before the --: serve {flag} …"
                self._picker.problems.append(Problem(text))
                return
        self._check_options(label, options, self._given, ())

    def _check_names(self, routers: Sequence[RouterSettings]) -> None:
        for name, count in Counter(router.name for router in routers).items():
            if count > 1:
                last = max(index for index, router in enumerate(routers) if router.name == name)
                text = f"{count} routers are called {name}; each needs a name of its own"
                self._picker.problems.append(self._file.problem(("router", last, "name"), text))

    def _check_ports(self) -> None:
        for (one, host, port), (other, other_host, other_port) in itertools.combinations(self._listeners, 2):
            if port.value == other_port.value and overlap(host, other_host):
                text = f"both {one} and {other} would listen on port {port.value}; each needs its own"
                self._picker.problems.append(other_port.problem(text))


def _only_options(table: ModelOptions) -> ModelOptions:
    """The options among the keys of a table, and of those the ones that are written."""
    written = table.model_fields_set & ModelOptions.model_fields.keys()
    return ModelOptions.model_validate({key: getattr(table, key) for key in sorted(written)})
