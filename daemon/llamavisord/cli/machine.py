"""What `install-service` has to know of the machine: where llamavisor itself is, and what else the service needs."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import llamavisor
import llamavisord
from llamavisor import binary
from llamavisor.errors import BinaryError
from llamavisord.cli.errors import CommandError
from llamavisord.config import Config
from llamavisord.installation import Machine

_SERVICE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"
"""Where a service looks for commands."""
_SIGNS_OF_GPUS = (
    "/dev/nvidiactl",
    "/proc/driver/nvidia",
    "/usr/bin/nvidia-modprobe",
    "/dev/dri",
    "/dev/kfd",
    "/dev/dxg",
)
"""On a machine without a screen NVIDIA's driver makes its devices only when somebody uses a GPU."""
_SHARED = frozenset(
    map(Path, ("/", "/etc", "/home", "/media", "/mnt", "/opt", "/root", "/run", "/srv", "/tmp", "/usr", "/var"))  # noqa: S108
)


def look(config: Config | None, *, has_gpu: bool | None) -> Machine:
    """What this machine is like; `has_gpu` is what a person says of it, None to look."""
    found = _llama_server(config)
    packages = [Path(str(module.__file__)).resolve().parents[1] for module in (llamavisor, llamavisord)]
    needs = [Path(sys.prefix), Path(sys.base_prefix), *packages, *(_around(found) if found is not None else ())]
    is_found_there = found is not None and shutil.which(binary.NAME, path=_SERVICE_PATH) is not None
    is_odd = found is not None and not is_found_there and not found.is_relative_to(sys.prefix)
    return Machine(
        program=_program(),
        needs=tuple(_outermost(needs)),
        systemd=_systemd_version(),
        has_gpu=any(map(os.path.lexists, _SIGNS_OF_GPUS)) if has_gpu is None else has_gpu,
        has_socket=_is_active("llamavisor.socket"),
        llama_server=found if is_odd else None,
    )


def is_shared(folder: Path) -> bool:
    """Whether there is much else in a folder: somebody's home, or one of the system's."""
    homes = {Path(entry.pw_dir) for entry in pwd.getpwall()}
    return folder in _SHARED | homes or folder.resolve() in _SHARED | homes


def is_roots_alone(path: Path) -> bool:
    """Whether nobody but root can have `path` lead elsewhere: all folders on the way to it are root's to change."""
    for way in (path, path.resolve()):
        for folder in way.parents:
            try:
                known = folder.lstat()
            except FileNotFoundError:
                continue
            if known.st_uid != 0 or known.st_mode & 0o022:
                return False
    return not path.is_symlink() or path.lstat().st_uid == 0


def _llama_server(config: Config | None) -> Path | None:
    try:
        return binary.find(config.routers[0].llama_server if config else None)
    except BinaryError as error:
        print(f"llamavisor: no llama-server yet: {error}. {error.hint}", file=sys.stderr)
        return None


def _around(found: Path) -> Sequence[Path]:
    """The folders that a llama-server needs; it alone where those hold much else, such as a home."""
    folders = [found.parent] if found.parent.name != "bin" else [found.parent, found.parent.parent / "lib"]
    return [found] if any(map(is_shared, folders)) else [folder for folder in folders if folder.is_dir()]


def _program() -> Path:
    """The command as it was installed here, whatever the name is by which it was called."""
    program = Path(sysconfig.get_path("scripts"), "llamavisor")
    if not program.exists():
        text = f"the command {program} is not there"
        raise CommandError(text, hint="install llamavisor with pip, into a folder such as /opt/llamavisor")
    return program


def _outermost(paths: Sequence[Path]) -> Iterator[Path]:
    """Each folder once, and none that is in another; what every service sees is left out."""
    wanted = sorted({path for path in paths if not path.is_relative_to("/usr")})
    for path in wanted:
        if not any(path != other and path.is_relative_to(other) for other in wanted):
            yield path


def _is_active(unit: str) -> bool:
    return _systemctl("is-active", unit).strip() == "active"


def _systemctl(*words: str) -> str:
    """What it says, whatever its exit code is."""
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False, timeout=10)  # noqa: S607
    return done.stdout


def _systemd_version() -> int:
    words = _systemctl("--version").split()
    return int(words[1]) if len(words) > 1 and words[1].isdecimal() else 0
