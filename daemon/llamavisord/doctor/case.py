"""What the doctor is called to: a configuration, the daemon that runs on it if one answers, and the user it runs as."""

from __future__ import annotations

import os
import pwd
import socket as socket_module
import struct
import subprocess
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llamavisor import binary
from llamavisor.binary import Binary
from llamavisor.settings import RouterSettings
from llamavisord.cli.client import Client, find_socket
from llamavisord.cli.errors import CommandError, SilentError
from llamavisord.config import Config
from llamavisord.doctor.account import Account
from llamavisord.exit_codes import ExitCode
from llamavisord.loading import load
from llamavisord.places import Places, has_systemd
from llamavisord.problems import ConfigError, Problem
from llamavisord.variables import Variable

UNIT = "llamavisor.service"
USER = "llamavisor"
"""Whom `install-service` has it run as."""
STATUS_S = 5.0
"""How long the daemon may take to say how it is, for which it waits for nothing."""
SYSTEMD_S = 5.0
"""How long systemd may take to answer."""
Ask = Callable[..., str]
_CREDENTIALS = struct.Struct("3i")
"""`struct ucred` of unix(7): the ids of the process, its user and its group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is examined; nothing in it changes while that is done.

    Attributes:
        environ: the environment of who asks.
        root: where /proc, /run and /dev are.
        config_file: the file that is meant, None without one.
        config: the configuration, None if it cannot be used.
        mistakes: why not.
        socket: where a daemon is looked for.
        status: what it says of itself, None if none answers that runs with this configuration.
        silence: why none answers.
        other: what one says of itself that answers and runs with another configuration.
        pid: the process of the daemon, also of one that does not answer; None if it cannot be seen.
        account: the user that the daemon runs as, or would.
        is_service: whether it is, or would be, the service of the machine, whose places are not those of who asks.
        systemctl: asks systemd; raises OSError if it cannot be asked.
        probes: remembers what each llama-server can do.
    """

    environ: Mapping[str, str]
    root: Path = Path("/")
    config_file: Path | None = None
    config: Config | None = None
    mistakes: tuple[Problem, ...] = ()
    socket: Path
    status: Mapping[str, Any] | None = None
    silence: CommandError | None = None
    other: Mapping[str, Any] | None = None
    pid: int | None = None
    account: Account
    is_service: bool = False
    systemctl: Ask
    probes: binary.ProbeCache = field(default_factory=binary.ProbeCache)

    @property
    def is_barred(self) -> bool:
        """Whether there is a daemon, most likely, that who asks may not speak to."""
        return self.silence is not None and self.silence.exit_code is ExitCode.NOT_PERMITTED

    @property
    def has_systemd(self) -> bool:
        """Whether systemd is process 1."""
        return has_systemd(self.root)

    @property
    def is_hung(self) -> bool:
        """Whether there is a daemon that does not answer."""
        return isinstance(self.silence, SilentError)

    @property
    def owner(self) -> str | None:
        """Whose daemon it is, most likely, that who asks may not speak to; None if it is no one else's."""
        if not self.is_barred or self.account != Account.mine():
            return None
        for place in (self.socket, self.socket.parent):
            with suppress(OSError):
                return Account.of(place.stat().st_uid, frozenset()).name
        return "another user"

    def env_of(self, router: RouterSettings) -> dict[str, str]:
        """The environment that a router's llama-server is asked in."""
        return {**self.environ, **dict(router.env)}

    def binary_of(self, router: RouterSettings) -> Binary:
        """The llama-server of a router: the one that the daemon found, whose PATH is another, if one runs.

        Raises:
            BinaryError: there is none, or it is none.
        """
        env = self.env_of(router)
        told = self.router_status(router.name)
        if told is not None and told["build"] is not None:
            return self.probes.probe(Path(told["llama_server"]), env)
        return self.probes.probe(binary.find(router.llama_server, self.environ), env)

    def router_status(self, name: str) -> Mapping[str, Any] | None:
        """A router as the daemon tells of it, None if it does not."""
        routers = self.status["routers"] if self.status is not None else ()
        return next((each for each in routers if each["name"] == name), None)


def open_case(environ: Mapping[str, str], *, config_file: Path | None = None, socket: str | None = None) -> Case:
    """Find out what there is to be examined. Blocking; a configuration on a dead mount takes for ever.

    Args:
        environ: the environment.
        config_file: as `--config` said, None takes that of the daemon that answers, else the default place.
        socket: as `--socket` said.
    """
    if config_file is not None:
        environ = {**environ, Variable.LLAMAVISOR_CONFIG: str(config_file.absolute())}  # it may say where the socket is
    path = find_socket(socket, environ)
    case = Case(environ=environ, socket=path, account=Account.mine(), systemctl=_systemctl)
    try:
        status = Client(path).call("GET", "/control/v1/status", {}, timeout_s=STATUS_S)
        is_meant = config_file is None or _is_same(config_file, status["config_path"])
        case = replace(case, status=status) if is_meant else replace(case, other=status)
        case = replace(case, pid=status["pid"])
    except SilentError as error:
        case = replace(case, silence=error, pid=_listener(path))
    except CommandError as error:
        case = replace(case, silence=error)
    if config_file is None and case.status is not None and case.status["config_path"] is not None:
        config_file = Path(case.status["config_path"])
    config_file = config_file or Places(environ).config_file
    is_service = config_file is not None and config_file.is_relative_to("/etc/llamavisor")
    account = _account(case, is_service=is_service)
    case = replace(case, is_service=is_service, account=account, config_file=config_file)
    places = Places(environ, is_root=True) if is_service else Places(environ)
    try:
        return replace(case, config=load(config_file, environ, places=places))
    except ConfigError as error:
        return replace(case, mistakes=error.problems)


def _is_same(file: Path, other: str | None) -> bool:
    return other is not None and file.resolve() == Path(other).resolve()


def _listener(path: Path) -> int | None:
    """The process behind a socket, which may well be asleep: who began to listen, or for whom systemd did."""
    try:
        with closing(socket_module.socket(socket_module.AF_UNIX)) as asking:
            asking.settimeout(STATUS_S)
            asking.connect(str(path))
            raw = asking.getsockopt(socket_module.SOL_SOCKET, socket_module.SO_PEERCRED, _CREDENTIALS.size)
        pid: int = _CREDENTIALS.unpack(raw)[0]
        if pid == 1 and has_systemd():
            return int(_systemctl("show", "--property=MainPID", "--value", UNIT)) or None
    except (OSError, ValueError):
        return None
    return pid


def _account(case: Case, *, is_service: bool) -> Account:
    """The user of the daemon that runs, else of the unit if the configuration is the machine's, else who asks."""
    if case.pid is not None and case.other is None:
        try:
            proc = Path("/proc", str(case.pid))
            text = (proc / "status").read_text(encoding="ascii", errors="replace")
            fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
            uid, gid = (int(fields[key].split()[1]) for key in ("Uid", "Gid"))  # the effective ones
            return Account.of(uid, frozenset({gid, *map(int, fields["Groups"].split())}))
        except (OSError, ValueError, KeyError, IndexError):
            return case.account  # it has just ended, or is in another pid namespace
    if is_service:
        try:
            user = _systemctl("show", "--property=User", "--value", UNIT).strip()
        except OSError:  # nobody but root can ask it here
            user = ""
        for name in filter(None, (user, USER)):
            with suppress(KeyError):
                return Account.of(pwd.getpwnam(name).pw_uid)
    return case.account


def _systemctl(*words: str) -> str:
    """What systemd says.

    Raises:
        OSError: it does not answer, or not in time.
    """
    try:
        done = subprocess.run(
            ["systemctl", "--no-pager", *words],  # noqa: S607
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=SYSTEMD_S,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"systemd does not answer within {SYSTEMD_S:.0f} s") from None
    if done.returncode not in (0, 3, 4):  # not active, no such unit
        raise OSError(done.stderr.strip() or f"systemctl: exit code {done.returncode}")
    return done.stdout
