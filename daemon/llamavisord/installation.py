"""What makes llamavisor a service of systemd: files, folders and commands, worked out before any is touched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from ipaddress import ip_address
from pathlib import Path

from llamavisord.addresses import listened_on
from llamavisord.config import Config
from llamavisord.loading import METRICS_PORT, PORT

PROGRAM = "/usr/bin/llamavisor"
"""Where the shipped units have it."""
GROUP = "llamavisor"
MODELS_DIR = Path("/srv/models")
NEW_SETTINGS = 254
"""The first systemd that knows what stands in systemd-254.conf."""
INSTANCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""What may stand behind the @ of a unit's name, and be a part of names of files."""
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
port = {port}

[metrics]
port = {metrics_port}
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
    """A folder that is to be there; one that is, is a person's, and stays as it is."""

    path: Path
    mode: int
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """A command.

    Attributes:
        argv: its words.
        needs_systemd: it is of use only where systemd runs.
        may_fail: there may be nothing to do for it.
        only_after: it is run only if one of these files was written or removed; always without any.
    """

    argv: tuple[str, ...]
    needs_systemd: bool = True
    may_fail: bool = False
    only_after: tuple[Path, ...] = ()


Step = Write | Remove | Folder | Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a person wants installed.

    Attributes:
        home: folder of the user whose service it is to be; None for one of the machine.
        instance: the name behind the @, None for the only one.
        number: how many other instances there are.
        has_socket: whether systemd listens for it.
        is_started: whether it is enabled and started, too.
    """

    home: Path | None = None
    instance: str | None = None
    number: int = 0
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
        has_socket: whether systemd listens for it now.
        llama_server: where it was found if a service would not find it there; else None.
    """

    program: Path
    needs: tuple[Path, ...]
    systemd: int
    has_gpu: bool
    has_socket: bool = False
    llama_server: Path | None = None


def unit_folder(home: Path | None) -> Path:
    """Where the units are: the machine's, or those of the user whose home that is."""
    return Path("/etc/systemd/system") if home is None else home / ".config/systemd/user"


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
    units = _units(wish, machine, folders, linked, config)
    if not is_user:
        for name in ("sysusers", "tmpfiles"):
            yield Write(Path(f"/etc/{name}.d/llamavisor.conf"), _shipped(f"llamavisor.{name}"))
        yield Run(("systemd-sysusers", "/etc/sysusers.d/llamavisor.conf"), needs_systemd=False)
        yield Run(("systemd-tmpfiles", "--create", "/etc/tmpfiles.d/llamavisor.conf"), needs_systemd=False)
        yield Folder(Path("/etc/credstore"), 0o700)
        yield Folder(Path("/etc/llamavisor"), 0o755)
    for folder in folders:
        yield Folder(folder, 0o755) if is_user else Folder(folder, 0o2775, GROUP)
    if config is None:
        yield _config_file(wish, models_dir, machine.llama_server)
    sockets = [path for path in units if "llamavisor.socket" in str(path)]
    # A socket that systemd is told of amid its life is neither what it was nor what it is to be.
    later = sockets if machine.has_socket and not wish.is_started else []
    for path, text in units.items():
        if path not in later:
            yield Remove(path) if text is None else Write(path, text)
    yield from _commands(wish, sockets)


def removal(wish: Wish, *, is_last: bool) -> Iterator[Step]:
    """What undoes that; configuration, models, state and the user stay.

    Args:
        wish: what is to go.
        is_last: whether no other instance needs what all share.
    """
    systemctl = _systemctl(is_user=wish.home is not None)
    for unit in [wish.unit] if wish.instance else ["llamavisor.socket", wish.unit]:
        yield Run((*systemctl, "disable", "--now", unit), may_fail=True)
    folder = unit_folder(wish.home)
    names = [] if wish.instance else ["llamavisor.service", "llamavisor.socket", "llamavisor.socket.d/10-install.conf"]
    names += _SHARED if is_last else ()
    for name in [*names, *(f"{wish.unit}.d/{each}" for each in _DROP_INS)]:
        yield Remove(folder / name)
    yield Run((*systemctl, "daemon-reload"))


_SHARED = ("llamavisor@.service", "llamavisor-nvidia.service")
_DROP_INS = ("10-install.conf", "20-no-gpu.conf", "30-systemd-254.conf")


def _units(
    wish: Wish, machine: Machine, folders: Sequence[Path], linked: Sequence[Path], config: Config | None
) -> dict[Path, str | None]:
    """All unit files by their paths; None for one that does not belong there."""
    at = unit_folder(wish.home)
    program = _quoted(machine.program)
    has_socket = wish.has_socket and not wish.instance and (config is None or config.gateway is not None)
    if wish.home is not None:
        files: dict[str, str | None] = {"llamavisor.service": _shipped("user/llamavisor.service")}
        socket = _shipped("user/llamavisor.socket")
    else:
        names = _SHARED if wish.instance else ("llamavisor.service", *_SHARED)
        files = {name: _shipped(name) for name in names}
        files[f"{wish.unit}.d/10-install.conf"] = _drop_in(folders, linked, machine.needs)
        files[f"{wish.unit}.d/20-no-gpu.conf"] = None if machine.has_gpu else _shipped("no-gpu.conf")
        socket = _shipped("llamavisor.socket")
    is_new = machine.systemd >= NEW_SETTINGS
    files[f"{wish.unit}.d/30-systemd-254.conf"] = _shipped("systemd-254.conf") if is_new else None
    if not wish.instance:
        files["llamavisor.socket"] = socket if has_socket else None
        files["llamavisor.socket.d/10-install.conf"] = _listening(config, socket) if has_socket and config else None
    return {at / name: text and text.replace(PROGRAM, program) for name, text in files.items()}


def _drop_in(folders: Sequence[Path], linked: Sequence[Path], needs: Sequence[Path]) -> str:
    """What is particular to this machine: which folders are mounted first, and seen although others there are not."""
    models, seen = _with_targets(folders), [*_with_targets(linked), *needs]
    lines = [
        "[Unit]",
        *(f"RequiresMountsFor={_quoted(path)}" for path in dict.fromkeys([*models, *seen])),
        "",
        "[Service]",
    ]
    lines += [
        f"BindPaths={_bound(path)}" if _is_hidden(path) else f"ReadWritePaths={_quoted(path, '-')}" for path in models
    ]
    lines += [f"BindReadOnlyPaths={_bound(path)}" for path in seen if _is_hidden(path)]
    if any(path.is_relative_to("/root") for path in (*models, *seen)):
        lines.append("TemporaryFileSystem=/root:ro,mode=0755")  # else it has the mode of the true one in later versions
    return "\n".join([_WRITTEN, *lines, ""])


def _with_targets(folders: Sequence[Path]) -> list[Path]:
    """These folders, and where they are if they are links."""
    return list(dict.fromkeys(each for folder in folders for each in (folder, folder.resolve())))


def _listening(config: Config, shipped: str) -> str | None:
    """Where systemd listens if the configuration says something else than the unit; None if it says the same."""
    gateway = config.gateway
    assert gateway is not None  # noqa: S101 (who calls has looked)
    hosts = (f"[{host}]" if ":" in host else host for host in listened_on(gateway.host))
    addresses = [f"{host}:{gateway.port}" for host in hosts]
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
    text = _CONFIG.format(models_dir=_in_quotes(str(models_dir)))
    if llama_server is not None:
        text += f"llama_server = {_in_quotes(str(llama_server))}\n"
    if wish.instance:
        text += _INSTANCE_CONFIG.format(port=PORT + 1 + wish.number, metrics_port=METRICS_PORT + 1 + wish.number)
    if wish.home is not None:
        return Write(wish.config_file, text, 0o600, is_theirs=True)
    return Write(wish.config_file, text, 0o640, GROUP, is_theirs=True)


def _commands(wish: Wish, sockets: Sequence[Path]) -> Iterator[Run]:
    systemctl = _systemctl(is_user=wish.home is not None)
    yield Run((*systemctl, "daemon-reload"))
    if wish.is_started:
        # It goes on to listen where it did, until it is started again with the service.
        if sockets:
            yield Run((*systemctl, "stop", "llamavisor.socket"), may_fail=True, only_after=tuple(sockets))
        yield Run((*systemctl, "enable", wish.unit))
        yield Run((*systemctl, "restart", wish.unit))


def _systemctl(*, is_user: bool) -> tuple[str, ...]:
    return ("systemctl", "--user") if is_user else ("systemctl",)


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
    return _in_quotes(text)


def _bound(path: Path) -> str:
    """Likewise where a colon would end it; what is not there (yet) is left out."""
    return _quoted(Path(str(path).replace(":", "\\:")), "-")


def _in_quotes(text: str) -> str:
    """As systemd and TOML read it alike."""
    return '"{}"'.format(text.replace("\\", "\\\\").replace('"', '\\"'))
