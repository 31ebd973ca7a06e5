"""Everything that must be right before a router can be started, and its start: the clean room of one llama-server.

A router starts with an environment of our own making, empty configuration and cache folders (a stray config.ini can
turn it into a single-model server), a generated preset, and explicit values for every option that has ever changed its
default.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio.to_thread
import psutil

from llamavisor import flags, preset
from llamavisor.api import RouterApi
from llamavisor.binary import Binary, Fingerprint, ProbeCache, find, list_devices
from llamavisor.cause import Cause, Verdict
from llamavisor.child import Child
from llamavisor.child import find as find_child
from llamavisor.errors import BinaryError, OptionError
from llamavisor.output import OutputFile
from llamavisor.process import Process, Spawner
from llamavisor.settings import RouterSettings

REQUEST_TIMEOUT_S = 3600
"""llama-server's own read and write timeout, said explicitly: a long prompt is silent for minutes."""
HTTP_THREADS = 256
"""llama-server starves when requests outnumber its HTTP threads; 256 never did in our trials."""

_PASSED_ON = ("PATH", "HOME", "TMPDIR", "LANG", "LD_LIBRARY_PATH")
_PASSED_ON_PREFIXES = ("CUDA_", "NVIDIA_", "HIP_", "ROCR_", "HSA_", "GGML_", "VK_", "OMP_")
_START_LINES = 1000
_SYSTEM_CONFIG = Path("/etc/llama.cpp/config.ini")


@dataclass(frozen=True, slots=True)
class Launch:
    """A router that can be started.

    Attributes:
        found: the llama-server and what it can do.
        options: what its models are told.
        env: the whole environment of the process.
        warnings: what a person should know although the router can start.
        entries: how much is in the models folder; llama-server opens every file before it listens.
    """

    found: Binary
    options: flags.LaunchOptions
    env: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    entries: int = 0


class Launcher:
    """Prepares and starts the processes of one router.

    Args:
        settings: what the router is told to be.
        spawner: starts processes that carry our marker.
        state_dir: folder for the generated files of this router; created when missing.
        log_dir: folder for its output.
        log_size_bytes: size at which its output file is rotated.
        probes: remembers what each llama-server can do.
        environ: the daemon's own environment, of which a short list is passed on.
    """

    def __init__(
        self,
        settings: RouterSettings,
        *,
        spawner: Spawner,
        state_dir: Path,
        log_dir: Path,
        log_size_bytes: int,
        probes: ProbeCache,
        environ: Mapping[str, str],
    ) -> None:
        self.settings = settings
        self.output = OutputFile(log_dir / f"{settings.name}.log", cap_bytes=log_size_bytes)
        self._spawner = spawner
        self._dir = state_dir / "routers" / settings.name
        self._preset = self._dir / "preset.ini"
        self._probes = probes
        self._environ = environ

    def __repr__(self) -> str:
        return f"<Launcher {self.settings.name} in {self._dir}>"

    async def prepare(self) -> Launch | Verdict:
        """Look at everything that a start needs, and change nothing: what can be started, or what stands in the way.

        Called before every start, and every second while a router is FAILED, so that it recovers by itself.
        """
        return await anyio.to_thread.run_sync(self._prepare)

    def _prepare(self) -> Launch | Verdict:
        env = self._env()
        try:
            found = self._probes.probe(find(self.settings.llama_server), env)
            options = flags.resolve(self.settings.layers, found.flags, binary=str(found.path))
        except BinaryError as error:
            return Verdict(Cause.BAD_BINARY, str(error), error.hint, is_obstacle=True)
        except OptionError as error:
            return Verdict(Cause.BAD_OPTION, str(error), error.hint, is_obstacle=True)
        entries = _count_entries(self.settings.models_dir)
        if isinstance(entries, Verdict):
            return entries
        obstacle = _port_obstacle(self.settings.host, self.settings.port)
        if obstacle is not None:
            return obstacle
        warnings = []
        if _SYSTEM_CONFIG.exists():
            warnings.append(f"{_SYSTEM_CONFIG} is read by llama-server too and may change what it does")
        return Launch(found, options, env, tuple(warnings), entries)

    async def missing_devices(self, launch: Launch) -> tuple[str, ...]:
        """The devices that the options ask for and llama-server does not show, seen with the router's own environment.

        A driver may load late at boot; nothing falls back to the CPU silently.
        """
        if not launch.options.needs_gpu:
            return ()
        try:
            visible = await anyio.to_thread.run_sync(list_devices, launch.found.path, launch.env)
        except BinaryError:
            visible = ()
        if launch.options.required_devices:
            return tuple(device for device in launch.options.required_devices if device not in visible)
        return () if visible else ("any GPU",)

    async def is_replaced(self, launch: Launch) -> bool:
        """Whether llama-server or one of its libraries is no longer the file that was started.

        A router starts every model from its own path: the models of a replaced one would be of another build, and
        those of a removed one fail in an endless loop.
        """
        return await anyio.to_thread.run_sync(_is_replaced, launch.found)

    async def spawn(self, launch: Launch, *, autoload: bool) -> Process | Verdict:
        """Write the router's files and start it.

        Args:
            launch: what `prepare` returned.
            autoload: whether a client's request may load a model.

        Raises:
            SpawnError: the process could not be started.
        """
        try:
            await anyio.to_thread.run_sync(self._write_files, launch)
        except OSError as error:
            hint = f"make room, or let this user write to {self._dir} and {self.output.path.parent}"
            return Verdict(Cause.STATE_DIR, f"cannot write the router's files: {error}", hint)
        return await self._spawner.spawn(
            self._argv(launch, autoload=autoload), env=launch.env, output=self.output.path, cwd=self._dir
        )

    async def file_sizes(self, paths: Sequence[Path]) -> dict[Path, int | None]:
        """The sizes of files in bytes, None for one that is not there."""
        return await anyio.to_thread.run_sync(_file_sizes, paths)

    def connect(self) -> RouterApi:
        """A client of this router."""
        return RouterApi(self.settings.url, api_key=self.settings.api_key)

    async def find_child(self, router_pid: int, model: str) -> Child | None:
        """The process that serves `model` under this router's process, None when there is none yet."""
        return await anyio.to_thread.run_sync(find_child, router_pid, model)

    async def is_listening(self, router_pid: int, *, log_mark: int) -> bool:
        """Whether this very process holds the router's port, and not somebody else who answers there.

        Args:
            router_pid: the process.
            log_mark: size of the output in bytes when it was started. What it says of itself since then is the quick
                answer; the kernel's, over ten milliseconds for all of its sockets, is for routers told to be silent.
        """
        if any("listening on" in line for line in self.output.tail(_START_LINES, since=log_mark)):
            return True
        return await anyio.to_thread.run_sync(_listens, router_pid, self.settings.port)

    def _argv(self, launch: Launch, *, autoload: bool) -> list[str]:
        settings = self.settings
        argv = [
            *(str(launch.found.path), "--host", settings.host, "--port", str(settings.port)),
            *("--models-dir", str(settings.models_dir), "--models-preset", str(self._preset)),
            *("--models-max", str(settings.models_max)),
            *("--timeout", str(REQUEST_TIMEOUT_S), "--threads-http", str(HTTP_THREADS)),
        ]
        if launch.found.flags.find("--log-colors") is not None:
            argv += ["--log-colors", "off"]
        if not autoload:
            argv.append("--no-models-autoload")
        # By default llama-server lets every web page that a browser shows talk to it.
        cors = "--cors-origins"
        if launch.found.flags.find(cors) is not None and cors not in launch.options.listener_args:
            argv += [cors, "localhost"]
        return [*argv, *launch.options.listener_args]

    def _env(self) -> dict[str, str]:
        env = {
            name: value
            for name, value in self._environ.items()
            if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)
        }
        # Without this CUDA numbers devices by speed, nvidia-smi by bus: the same name must mean the same card.
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        # Where gdb is installed, a failing assertion runs it: a second of delay and a hundred lines of log.
        env["GGML_NO_BACKTRACE"] = "1"
        env |= dict(self.settings.env)
        env["XDG_CONFIG_HOME"] = str(self._dir / "config")
        env["LLAMA_CACHE"] = str(self._dir / "cache")
        if self.settings.api_key is not None:
            env["LLAMA_API_KEY"] = self.settings.api_key
        return env

    def _write_files(self, launch: Launch) -> None:
        for folder in (self._dir, self._dir / "config", self._dir / "cache", self.output.path.parent):
            folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        preset.write(self._preset, preset.for_router(launch.options))


def _file_sizes(paths: Sequence[Path]) -> dict[Path, int | None]:
    sizes: dict[Path, int | None] = {}
    for path in paths:
        try:
            sizes[path] = path.stat().st_size
        except OSError:
            sizes[path] = None
    return sizes


def _is_replaced(found: Binary) -> bool:
    try:
        return Fingerprint.of(found.path) != found.fingerprint
    except BinaryError:
        return True


def _count_entries(folder: Path) -> int | Verdict:
    """How much is in the models folder, or why it cannot be used."""
    try:
        with os.scandir(folder) as entries:
            return sum(1 for _ in entries)
    except FileNotFoundError:
        reason, hint = "does not exist", "create it, or correct models_dir"
    except NotADirectoryError:
        reason, hint = "is not a folder", "correct models_dir"
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
        hint = f"let uid {os.getuid()} read it, for example with chmod or a group"
    return Verdict(Cause.MODELS_DIR, f"models_dir {folder} {reason}", hint, is_obstacle=True)


def _port_obstacle(host: str, port: int) -> Verdict | None:
    """What keeps us from binding the port, seen by binding it for a moment as llama-server will."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with closing(socket.socket(family, kind, protocol)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        if not isinstance(error, OSError) or error.errno != errno.EADDRINUSE:
            why = error.strerror if isinstance(error, OSError) else error
            hint = "correct `host`; a port below 1024 needs the right to bind it"
            return Verdict(Cause.PORT_TAKEN, f"cannot listen on {host}:{port}: {why}", hint, is_obstacle=True)
        holder = _holder(port)
        reason = f"port {port} on {host} is taken" + (f" by {holder}" if holder else "")
        hint = "choose another port, or end what holds it"
        return Verdict(Cause.PORT_TAKEN, reason, hint, is_obstacle=True)
    return None


def _holder(port: int) -> str | None:
    """Who listens on the port, as `name (pid N)`, None when it cannot be seen (another user's process)."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if _is_listener(connection, port) and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except (psutil.Error, OSError):
        return None
    return None


def _listens(pid: int, port: int) -> bool:
    try:
        connections = psutil.Process(pid).net_connections(kind="tcp")
    except psutil.AccessDenied:  # a hardened system hides descriptors even of our own child: believe the answer
        return True
    except psutil.Error:
        return False
    return any(_is_listener(connection, port) for connection in connections)


def _is_listener(connection: Any, port: int) -> bool:
    return connection.status == psutil.CONN_LISTEN and bool(connection.laddr) and connection.laddr.port == port
