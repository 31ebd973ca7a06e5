"""Where things are when nobody says: the configuration file, the control socket, the state, the logs.

Both the daemon and the quick commands ask here, so that they meet.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from llamavisord.variables import Variable

SOCKET_NAME = "control.sock"
SOCKET_BYTES_MAX = 107
"""A longer path does not fit into the kernel's `sockaddr_un`, with the NUL at its end."""

_SYSTEM_CONFIG = Path("/etc/llamavisor/llamavisor.toml")
_SYSTEM_RUNTIME = Path("/run/llamavisor")
_SYSTEM_STATE = Path("/var/lib/llamavisor")


class Places:
    """The default places of one user.

    The variables of systemd (RUNTIME_DIRECTORY, STATE_DIRECTORY, LOGS_DIRECTORY) come first. Then root has
    /run and /var/lib, and everybody else the folders of the XDG Base Directory Specification. Nothing is
    created or opened here.

    Args:
        environ: the environment to look at.
        is_root: whether the user is root; None asks the kernel.
    """

    def __init__(self, environ: Mapping[str, str], *, is_root: bool | None = None) -> None:
        self._environ = environ
        self._is_root = os.geteuid() == 0 if is_root is None else is_root

    def __repr__(self) -> str:
        return f"<Places {self.runtime_dir} {self.state_dir}>"

    @property
    def home(self) -> Path:
        """The user's home, `/` where there is none (an unknown uid in a container)."""
        home = self._environ.get(Variable.HOME) or os.path.expanduser("~")  # noqa: PTH111 (Path's raises without a home)
        return Path(home if home.startswith("/") else "/")

    @property
    def config_files(self) -> tuple[Path, ...]:
        """Where a configuration file may be, the one that counts first."""
        if self._is_root:
            return (_SYSTEM_CONFIG,)
        own = self._xdg(Variable.XDG_CONFIG_HOME, ".config") / "llamavisor" / "llamavisor.toml"
        return (own, _SYSTEM_CONFIG)

    @property
    def config_file(self) -> Path | None:
        """The configuration file to read when the command line names none; None if there is none."""
        if named := self._environ.get(Variable.LLAMAVISOR_CONFIG):
            return Path(named)
        return next((path for path in self.config_files if os.path.lexists(path)), None)

    @property
    def runtime_dir(self) -> Path:
        """The folder of the control socket and its lock.

        Without XDG_RUNTIME_DIR it is inside the user's own state: a predictable name under /tmp could be
        somebody else's.
        """
        if (given := self._first_of(Variable.RUNTIME_DIRECTORY)) is not None:
            return given
        if self._is_root:
            return _SYSTEM_RUNTIME
        if (runtime := self._absolute(Variable.XDG_RUNTIME_DIR)) is not None:
            return runtime / "llamavisor"
        return self.state_dir / "run"

    @property
    def state_dir(self) -> Path:
        """The folder for what survives a restart of the daemon, and for generated files."""
        if (given := self._first_of(Variable.STATE_DIRECTORY)) is not None:
            return given
        if self._is_root:
            return _SYSTEM_STATE
        return self._xdg(Variable.XDG_STATE_HOME, ".local/state") / "llamavisor"

    @property
    def history(self) -> Path:
        """What the user has typed in chats; root's is root's own too, and not the daemon's."""
        return self._xdg(Variable.XDG_STATE_HOME, ".local/state") / "llamavisor" / "chat_history"

    @property
    def log_dir(self) -> Path | None:
        """The folder for the routers' output; None leaves it inside the state."""
        return self._first_of(Variable.LOGS_DIRECTORY)

    @property
    def socket(self) -> Path:
        """Where a daemon of this user listens."""
        return self.runtime_dir / SOCKET_NAME

    @property
    def sockets(self) -> tuple[Path, ...]:
        """Where a client looks for a daemon: the user's own first, then the system's."""
        system = _SYSTEM_RUNTIME / SOCKET_NAME
        return (self.socket,) if self.socket == system else (self.socket, system)

    def _xdg(self, variable: str, default: str) -> Path:
        return self._absolute(variable) or self.home / default

    def _absolute(self, variable: str) -> Path | None:
        """The folder in `variable`; the specification has relative ones ignored."""
        value = self._environ.get(variable, "")
        return Path(value) if value.startswith("/") else None

    def _first_of(self, variable: str) -> Path | None:
        """The first folder in `variable`: systemd puts colons between several."""
        value = self._environ.get(variable, "").split(":")[0]
        return Path(value) if value.startswith("/") else None


def has_systemd(root: Path = Path("/")) -> bool:
    """Whether systemd is process 1; see sd_booted(3)."""
    return (root / "run/systemd/system").is_dir()
