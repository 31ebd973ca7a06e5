"""A real systemd to throw away: process 1 of its own namespaces; what it writes to its root is kept in memory."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from fakes.waiting import PATIENCE_S, eventually
from llamavisor import procfs

BOOT_S = 30.0
"""It takes one second; two cores that are busy with other tests may need more."""
END_S = 5.0
_BOOT = Path(__file__).with_name("boot.sh")
_SYSTEMD = (Path("/usr/lib/systemd/systemd"), Path("/lib/systemd/systemd"))
_TOOLS = ("unshare", "nsenter", "setpriv", "pivot_root", "systemctl", "journalctl")
_numbers = itertools.count()


class Systemd:
    """A context manager that boots one and in the end kills it, with all that runs in it; the test may have failed.

    Inside is what is installed here, Python and this checkout included, and nothing that is started here. What is
    written there is gone afterwards, but for what is written to the folder. The network is the machine's own: take free
    ports.

    Where the machine cannot have one, the test is skipped.

    Args:
        folder: an existing folder of the test; it has the same path inside and outside.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._popen: subprocess.Popen[bytes] | None = None
        self._cgroup: Path | None = None
        self._init = 0  # pid of its process 1, outside

    def __repr__(self) -> str:
        return f"<Systemd {self._init or 'down'}>"

    def __enter__(self) -> Self:
        systemd = _find_systemd()
        try:
            self._cgroup = _make_cgroup()
        except OSError as error:
            pytest.skip(f"no systemd: {error}")
        try:
            self._boot(systemd)
        except BaseException:
            self.halt()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            with suppress(subprocess.SubprocessError, OSError):
                sys.stderr.write(self.run("journalctl", "--no-pager", "--output=short-monotonic", check=False).stdout)
        self.halt()

    def _boot(self, systemd: Path) -> None:
        (self.folder / "root").mkdir()
        said = self.folder / "boot.log"
        with said.open("wb") as log:
            # It dies with this process, however that ends.
            argv = ["setpriv", "--pdeathsig=KILL", "unshare", "--pid", "--fork", "--kill-child=KILL", "--"]
            argv += ["sh", str(_BOOT), str(self._cgroup), str(systemd), str(self.folder), *map(str, _elsewhere())]
            self._popen = popen = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        booting = self.folder / "booting"
        eventually(lambda: booting.exists() or popen.poll() is not None, what="namespaces", within_s=BOOT_S)
        if not booting.exists():
            pytest.skip(f"no systemd: {said.read_text(encoding='utf-8', errors='replace').strip()}")
        (self._init,) = self._children()
        eventually(self._is_up, what=f"systemd that runs (see {said})", within_s=BOOT_S)

    def _children(self) -> list[int]:
        """Its process 1, if there is one yet."""
        assert self._popen is not None
        return procfs.children(self._popen.pid)

    def _is_up(self) -> bool:
        return self.run("systemctl", "is-system-running", check=False).stdout.strip() == "running"

    def run(
        self, *command: str | os.PathLike[str], check: bool = True, timeout_s: float = PATIENCE_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as root; it must succeed if `check`."""
        done = subprocess.run(
            ["nsenter", f"--target={self._init}", "--pid", "--mount", "--cgroup", "--ipc", "--uts", "--", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def write(self, path: str, text: str) -> None:
        """Write a file inside, "/etc/..." for example."""
        draft = self.folder / f"draft-{next(_numbers)}"
        draft.write_text(text, encoding="utf-8")
        self.run("install", "-D", "--mode=644", draft, path)
        draft.unlink()

    def write_unit(self, name: str, text: str) -> None:
        """Make a unit known, one that was known by this name included."""
        self.write(f"/etc/systemd/system/{name}", text)
        self.run("systemctl", "daemon-reload")

    def show(self, unit: str, *names: str) -> dict[str, str]:
        """What systemd knows of a unit, all of it or properties by name."""
        shown = self.run("systemctl", "show", unit, *(f"--property={name}" for name in names)).stdout
        return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)

    def journal(self, unit: str) -> str:
        """What was written by and about a unit, one message a line."""
        return self.run("journalctl", "--no-pager", "--output=cat", f"--unit={unit}").stdout

    def journal_entries(self, unit: str) -> list[dict[str, Any]]:
        """The same with all fields of each."""
        told = self.run("journalctl", "--no-pager", "--output=json", f"--unit={unit}").stdout
        return [json.loads(line) for line in told.splitlines()]

    def halt(self) -> None:
        """Kill it, and wait until nothing of it is left. More than once is once."""
        if self._popen is not None:
            for pid in self._children() or [self._popen.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)  # process 1, and with it all others; who waits for it ends then
            self._popen.wait(END_S)
        if self._cgroup is not None:
            _remove_cgroup(self._cgroup)
        for name in ("booting", "boot.log"):
            (self.folder / name).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            (self.folder / "root").rmdir()
        self._popen, self._cgroup, self._init = None, None, 0


def _find_systemd() -> Path:
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    found = next((path for path in _SYSTEMD if path.exists()), None)
    if found is None or missing:
        pytest.skip(f"no systemd: {', '.join(missing) or 'none'} is installed here")
    if os.geteuid() != 0:
        pytest.skip("no systemd: it takes root")
    return found


def _make_cgroup() -> Path:
    """An empty cgroup v2 below that of this process."""
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines())
    mount = next((Path(words[1]) for words in mounts if words[2] == "cgroup2"), None)
    if mount is None:
        raise OSError("cgroup v2 is not mounted")
    memberships = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    own = next(line.removeprefix("0::/") for line in memberships if line.startswith("0::/"))
    cgroup = mount / own / f"llamavisor-systemd-{os.getpid()}-{next(_numbers)}"
    cgroup.mkdir()
    return cgroup


def _remove_cgroup(cgroup: Path) -> None:
    """Kill whatever is in it, and remove it; the kernel takes its time for both."""
    deadline = time.monotonic() + END_S
    while True:
        levels = list(_levels(cgroup))
        for level in levels:
            for pid in map(int, (level / "cgroup.procs").read_text(encoding="ascii").split()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        try:
            for level in levels:
                level.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _levels(cgroup: Path) -> Iterator[Path]:
    """A cgroup and all within, the innermost first."""
    for path, _, _ in os.walk(cgroup, topdown=False):
        yield Path(path)


_EMPTY_INSIDE = ("/tmp", "/var/tmp", "/run", "/var/log", "/dev")


def _elsewhere() -> Sequence[Path]:
    """What Python needs that is not on the root file system, of which alone the inside is made, or in its way there."""
    root = Path("/").stat().st_dev
    needed = {Path(path).resolve() for path in (sys.base_prefix, sys.prefix, Path(__file__).parents[2])}
    return [
        path
        for path in sorted(needed)
        if path.stat().st_dev != root or any(path.is_relative_to(folder) for folder in _EMPTY_INSIDE)
    ]
