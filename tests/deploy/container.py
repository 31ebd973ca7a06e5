"""An image built from deploy/Containerfile, and containers of it in namespaces, without an engine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from fakes.waiting import PATIENCE_S, eventually
from llamavisor import procfs

ROOT = Path(__file__).parents[2]
START_S = 30.0
"""How long a container may take until its daemon answers, on a busy machine."""
_LAUNCH = Path(__file__).with_name("container.sh")
_TOOLS = ("buildah", "mmdebstrap", "unshare", "nsenter", "setpriv", "ip")
_PIP = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_DEFAULT_TIMEOUT")
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


@dataclass(frozen=True, slots=True)
class Image:
    """What was built.

    Attributes:
        root: its root, unpacked.
        config: what it says of its containers, with Docker's names.
    """

    root: Path
    config: Mapping[str, Any]


class Builder:
    """A context manager that builds images with buildah, and removes all of it in the end.

    Args:
        folder: an empty one for some 600 MB.
    """

    def __init__(self, folder: Path) -> None:
        missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
        if missing:
            pytest.skip(f"no image can be built: {', '.join(missing)} is not installed here")
        if os.geteuid() != 0:
            pytest.skip("no image can be built: it takes root")
        self.folder = folder

    def __repr__(self) -> str:
        return f"<Builder {self.folder}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._buildah("rm", "--all")  # and what of it is mounted
        finally:
            shutil.rmtree(self.folder)

    def make_base(self, llama_server: Path) -> str:
        """An image as llama.cpp publishes them: a small Debian with llama-server and its libraries in /app."""
        context = self.folder / "base"
        context.mkdir()
        tar = str(context / "root.tar")
        suite = _os_release()["VERSION_CODENAME"]
        _run("mmdebstrap", "--quiet", "--variant=apt", "--include=ca-certificates,curl,libgomp1,libssl3", suite, tar)
        shutil.copytree(llama_server.parent, context / "app", symlinks=True)
        shutil.copy(_CERTIFICATES, context / "certificates")  # and whom this machine trusts, and where pip looks
        told = "".join(f"ENV {name}={os.environ[name]}\n" for name in _PIP if name in os.environ)
        (context / "Containerfile").write_text(
            f"FROM scratch\nADD root.tar /\nCOPY app /app\nCOPY certificates {_CERTIFICATES}\n{told}"
            'ENV LLAMA_ARG_HOST=0.0.0.0\nENTRYPOINT ["/app/llama-server"]\n',
            encoding="utf-8",
        )
        self._buildah("bud", "--isolation=chroot", "--tag=llama-base", str(context))
        shutil.rmtree(context)
        return "localhost/llama-base"

    def build(self, **arguments: str) -> Image:
        """The image of deploy/Containerfile, with these build arguments."""
        told = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        file = f"--file={ROOT}/deploy/Containerfile"
        self._buildah("bud", "--isolation=chroot", "--format=docker", "--tag=llamavisor", *told, file, str(ROOT))
        inspected = json.loads(self._buildah("inspect", "--type=image", "llamavisor"))
        container = self._buildah("from", "llamavisor").strip()
        return Image(Path(self._buildah("mount", container).strip()), inspected["Docker"]["config"])

    def _buildah(self, *words: str) -> str:
        store = (f"--root={self.folder}/store", f"--runroot={self.folder}/run", "--storage-driver=vfs")
        return _run("buildah", *store, *words)


class Container:
    """A context manager that runs an image as deploy/compose.yaml has it run, with a network of its own.

    Args:
        image: whose entry point becomes process 1.
        folder: an empty one for its files.
        tmpfs: where memory is mounted.
        binds: what of this machine is mounted where.
    """

    def __init__(self, image: Image, folder: Path, tmpfs: Sequence[str], binds: Mapping[Path, str]) -> None:
        self.image = image
        self.folder = folder
        folder.mkdir()
        lines = [f"tmpfs - {path}" for path in tmpfs] + [f"bind {source} {path}" for source, path in binds.items()]
        (folder / "mounts").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self._popen: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<Container {self._popen and self._popen.pid}>"

    def __enter__(self) -> Self:
        config = self.image.config
        # It dies with this process, however that ends.
        argv = ["setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork"]
        argv += ["--kill-child=KILL", "--", "sh", str(_LAUNCH), str(self.image.root), str(self.folder)]
        argv += [config["User"], *config["Env"], *config["Entrypoint"], *config["Cmd"]]
        with (self.folder / "log").open("wb") as log:
            env = {"PATH": os.environ["PATH"], "WORKDIR": config["WorkingDir"]}
            self._popen = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._popen is not None
        if self._popen.poll() is None:
            for pid in self._children() or [self._popen.pid]:
                os.kill(pid, signal.SIGKILL)  # process 1, and with it all others
        self._popen.wait(PATIENCE_S)

    @property
    def log(self) -> str:
        """What it has printed."""
        return (self.folder / "log").read_text(encoding="utf-8")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as `docker exec` does."""
        (init,) = self._children()
        user, group = self.image.config["User"].split(":")
        spaces = (
            "--root",
            "--wd",
            "--mount",
            "--pid",
            "--net",
            "--ipc",
            "--uts",
            f"--setuid={user}",
            f"--setgid={group}",
        )
        argv = ["nsenter", f"--target={init}", *spaces, "--", "env", "-i", *self.image.config["Env"], *command]
        return subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=PATIENCE_S
        )

    def is_healthy(self) -> bool:
        """What the image's health check says."""
        if not self._children():
            return False
        kind, *command = self.image.config["Healthcheck"]["Test"]
        assert kind == "CMD"
        return self.run(*command).returncode == 0

    def wait_until_healthy(self) -> None:
        """Wait for that; it must not end meanwhile."""
        assert self._popen is not None
        popen = self._popen
        eventually(lambda: popen.poll() is not None or self.is_healthy(), what="a healthy container", within_s=START_S)
        assert popen.poll() is None, self.log

    def stop(self) -> int:
        """End it as an engine does; the exit code."""
        (init,) = self._children()
        os.kill(init, signal.Signals[self.image.config["StopSignal"]])
        return self.wait()

    def wait(self) -> int:
        """Wait for its end; the exit code."""
        assert self._popen is not None
        return self._popen.wait(START_S)

    def _children(self) -> list[int]:
        """Its process 1, if there is one."""
        assert self._popen is not None
        return procfs.children(self._popen.pid)


def _os_release() -> dict[str, str]:
    lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    return {name: value.strip('"') for name, _, value in (line.partition("=") for line in lines)}


def _run(*argv: str) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout
