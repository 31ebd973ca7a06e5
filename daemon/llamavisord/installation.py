"""What makes llamavisor a service of systemd: files, folders and commands, worked out before any is touched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from ipaddress import ip_address
from pathlib import Path

from llamavisord.addresses import LOOPBACK, is_loopback
from llamavisord.config import Config

PROGRAM = "/usr/bin/llamavisor"
"""Where the shipped units have it."""
GROUP = "llamavisor"
MODELS_DIR = Path("/srv/models")
NEW_SETTINGS = 254
"""The first systemd that knows what stands in systemd-254.conf."""
INSTANCE = re.compile(r"[A-Za-z0-9_.]+")
"""What may stand behind the @ of a unit's name and mean itself."""
_HIDDEN = tuple(map(Path, ("/home", "/root", "/run/user", "/tmp", "/var/tmp")))  # noqa: S108 (by the unit's sandbox)
_WRITTEN = (
    "# Written by `llamavisor install-service`, and anew each time: what you change belongs into a file beside it."
)
_CONFIG = """\
# Everything that can stand here: REFERENCE.md; what is in force: llamavisor config show
models_dir = {models_dir}
"""
_INSTANCE_CONFIG = """\

# Every llamavisor on this machine needs ports of its own.
port = 8081

[metrics]
port = 9156
"""


@dataclass(frozen=True, slots=True)
class Write:
    """A file that is to hold `text`; one that is a person's stays as it is if it is there."""

    path: Path
    text: str
    mode: int = 0o644
    group: str | None = None
    is_theirs: bool = False


@dataclass(frozen=True, slots=True)
class Remove:
    """A file that is not to be there."""

    path: Path


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that is to be there; of one that is, only bits of `added` and the group are changed."""

    path: Path
    mode: int
    group: str | None = None
    added: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """A command; `needs_systemd` if it is of use only where systemd runs, `may_fail` if there may be nothing to do."""

    argv: tuple[str, ...]
    needs_systemd: bool = True
    may_fail: bool = False


Step = Write | Remove | Folder | Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a person wants installed.

    Attributes:
        home: folder of the user whose service it is to be; None for one of the machine.
        instance: the name behind the @, None for the only one.
        has_socket: whether systemd listens for it.
        is_started: whether it is enabled and started, too.
    """

    home: Path | None = None
    instance: str | None = None
    has_socket: bool = True
    is_started: bool = False

    @property
    def unit(self) -> str:
        """What systemd calls it."""
        return f"llamavisor@{self.instance}.service" if self.instance else "llamavisor.service"

    @property
    def config_file(self) -> Path:
        """Where its configuration is."""
        folder = Path("/etc/llamavisor") if self.home is None else self.home / ".config/llamavisor"
        return folder / f"{self.instance or 'llamavisor'}.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the machine is like.

    Attributes:
        program: the command that is to run.
        needs: folders that it and its llama-server are in.
        systemd: the version, such as 252.
        has_gpu: whether the service is to see GPUs.
        llama_server: where it was found if a service would not find it there; else None.
    """

    program: Path
    needs: tuple[Path, ...]
    systemd: int
    has_gpu: bool
    llama_server: Path | None = None


def plan(wish: Wish, machine: Machine, config: Config | None, models_dir: Path) -> Iterator[Step]:
    """What is to be done, in this order.

    Args:
        wish: what is wanted.
        machine: where.
        config: the configuration that is there already, None if there is none.
        models_dir: the models folder of a configuration that is written now.
    """
    is_user = wish.home is not None
    folders = sorted({router.models_dir for router in config.routers}) if config else [models_dir]
    linked = config.link_dirs if config else ()
    if not is_user:
        for name in ("sysusers", "tmpfiles"):
            yield Write(Path(f"/etc/{name}.d/llamavisor.conf"), _shipped(f"llamavisor.{name}"))
        yield Run(("systemd-sysusers", "/etc/sysusers.d/llamavisor.conf"), needs_systemd=False)
        yield Run(("systemd-tmpfiles", "--create", "/etc/tmpfiles.d/llamavisor.conf"), needs_systemd=False)
        yield Folder(Path("/etc/credstore"), 0o700)
    for folder in folders:
        yield Folder(folder, 0o755) if is_user else Folder(folder, 0o2775, GROUP, added=0o2070)
    if config is None:
        yield _config_file(wish, models_dir, machine.llama_server)
    for path, text in _units(wish, machine, [*folders, *linked], config).items():
        yield Remove(path) if text is None else Write(path, text)
    yield from _commands(wish, is_user=is_user)


def removal(wish: Wish) -> Iterator[Step]:
    """What undoes that; configuration, models, state and the user stay."""
    systemctl = _systemctl(is_user=wish.home is not None)
    for unit in [wish.unit] if wish.instance else ["llamavisor.socket", wish.unit]:
        yield Run((*systemctl, "disable", "--now", unit), may_fail=True)
    folder = _unit_folder(wish)
    names = [] if wish.instance else [*_FILES, "llamavisor.socket", "llamavisor.socket.d/10-install.conf"]
    for name in [*names, *(f"{wish.unit}.d/{each}" for each in _DROP_INS)]:
        yield Remove(folder / name)
    yield Run((*systemctl, "daemon-reload"))


_FILES = ("llamavisor.service", "llamavisor@.service", "llamavisor-nvidia.service")
_DROP_INS = ("10-install.conf", "20-no-gpu.conf", "30-systemd-254.conf")


def _units(wish: Wish, machine: Machine, folders: Sequence[Path], config: Config | None) -> dict[Path, str | None]:
    """All unit files by their paths; None for one that does not belong there."""
    at = _unit_folder(wish)
    program = _quoted(machine.program)
    has_socket = wish.has_socket and not wish.instance and (config is None or config.gateway is not None)
    if wish.home is not None:
        files: dict[str, str | None] = {"llamavisor.service": _shipped("user/llamavisor.service")}
        socket = _shipped("user/llamavisor.socket")
    else:
        files = {name: _shipped(name) for name in _FILES}
        files[f"{wish.unit}.d/10-install.conf"] = _drop_in(folders, machine.needs)
        files[f"{wish.unit}.d/20-no-gpu.conf"] = None if machine.has_gpu else _shipped("no-gpu.conf")
        socket = _shipped("llamavisor.socket")
    is_new = machine.systemd >= NEW_SETTINGS
    files[f"{wish.unit}.d/30-systemd-254.conf"] = _shipped("systemd-254.conf") if is_new else None
    if not wish.instance:
        files["llamavisor.socket"] = socket if has_socket else None
        files["llamavisor.socket.d/10-install.conf"] = _listening(config, socket) if has_socket and config else None
    return {at / name: text and text.replace(PROGRAM, program) for name, text in files.items()}


def _drop_in(folders: Sequence[Path], needs: Sequence[Path]) -> str:
    """What is particular to this machine: which folders are mounted first, and seen although others there are not."""
    lines = [
        "[Unit]",
        *(f"RequiresMountsFor={_quoted(path)}" for path in dict.fromkeys([*folders, *needs])),
        "",
        "[Service]",
    ]
    lines += [
        f"BindPaths={_bound(path)}" if _is_hidden(path) else f"ReadWritePaths={_quoted(path, '-')}" for path in folders
    ]
    lines += [f"BindReadOnlyPaths={_bound(path)}" for path in needs if _is_hidden(path)]
    if any(path.is_relative_to("/root") for path in (*folders, *needs)):
        lines.append(
            "TemporaryFileSystem=/root:ro,mode=0755"
        )  # else it has the mode of the true one in later versions of systemd
    return "\n".join([_WRITTEN, *lines, ""])


def _listening(config: Config, shipped: str) -> str | None:
    """Where systemd listens if the configuration says something else than the unit; None if it says the same."""
    gateway = config.gateway
    assert gateway is not None  # noqa: S101 (who calls has looked)
    hosts = LOOPBACK if is_loopback(gateway.host) or gateway.host == "localhost" else (gateway.host,)
    addresses = [f"[{host}]:{gateway.port}" if ":" in host else f"{host}:{gateway.port}" for host in hosts]
    if all(f"ListenStream={address}\n" in shipped for address in addresses):
        return None
    lines = ["[Socket]", "ListenStream=", "ListenStream=%t/llamavisor/control.sock"]
    return "\n".join([_WRITTEN, *lines, *(f"ListenStream={address}" for address in addresses), ""])


def can_listen(config: Config) -> bool:
    """Whether systemd can listen where the configuration says: it takes addresses, and no names."""
    if config.gateway is None:
        return False
    try:
        ip_address(config.gateway.host)
    except ValueError:
        return config.gateway.host == "localhost"
    return True


def _config_file(wish: Wish, models_dir: Path, llama_server: Path | None) -> Write:
    text = _CONFIG.format(models_dir=_toml(models_dir))
    if llama_server is not None:
        text += f"llama_server = {_toml(llama_server)}\n"
    if wish.instance:
        text += _INSTANCE_CONFIG
    if wish.home is not None:
        return Write(wish.config_file, text, 0o600, is_theirs=True)
    return Write(wish.config_file, text, 0o640, GROUP, is_theirs=True)


def _commands(wish: Wish, *, is_user: bool) -> Iterator[Run]:
    systemctl = _systemctl(is_user=is_user)
    yield Run((*systemctl, "daemon-reload"))
    if wish.is_started:
        if not wish.instance:  # it goes on to listen where it did, until it is started again with the service
            yield Run((*systemctl, "stop", "llamavisor.socket"), may_fail=True)
        yield Run((*systemctl, "enable", wish.unit))
        yield Run((*systemctl, "restart", wish.unit))


def _systemctl(*, is_user: bool) -> tuple[str, ...]:
    return ("systemctl", "--user") if is_user else ("systemctl",)


def _unit_folder(wish: Wish) -> Path:
    return Path("/etc/systemd/system") if wish.home is None else wish.home / ".config/systemd/user"


def _is_hidden(path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in _HIDDEN)


def _shipped(name: str) -> str:
    """One of the files of the folder `systemd`, which is a part of the package."""
    return resources.files("llamavisord").joinpath("systemd", name).read_text(encoding="utf-8")


def _quoted(path: Path, prefix: str = "") -> str:
    """A path as systemd reads it back, in lists of paths too; see systemd.syntax(7)."""
    text = prefix + str(path).replace("%", "%%")
    if re.fullmatch(r"[A-Za-z0-9_/.,:@%+\\-]+", text):
        return text
    return '"{}"'.format(text.replace("\\", "\\\\").replace('"', '\\"'))


def _bound(path: Path) -> str:
    """Likewise where a colon would end it; what is not there (yet) is left out."""
    return _quoted(Path(str(path).replace(":", "\\:")), "-")


def _toml(path: Path) -> str:
    return '"{}"'.format(str(path).replace("\\", "\\\\").replace('"', '\\"'))
