"""A pull in a process that is killed: the next process goes on with what is on the disk."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.hub_server import Fault, HubFile, HubServer, Repository
from fakes.waiting import eventually
from llamavisor.hub.staging import NAME

FILE = HubFile(hashlib.shake_128(b"a large model").digest(5_000_000))
PULL = """
import os, sys, anyio
from pathlib import Path
from llamavisor.events import Bus
from llamavisor.hub import Hub, Pulls, parse

async def run(models_dir, *asked):
    pulls = Pulls(Hub(os.environ), Path(models_dir), Bus())
    async with pulls.opened():
        for text in asked:
            await pulls.start(parse(text))
        for pull in pulls.all:
            print(await pull.wait())

anyio.run(run, *sys.argv[1:])
"""


@pytest.fixture
def server() -> Iterator[HubServer]:
    """A Hub with one model."""
    with HubServer({"user/repo": Repository({"M-Q4_K_M.gguf": FILE})}) as hub:
        yield hub


def begin(server: HubServer, models_dir: Path, *asked: str) -> subprocess.Popen[str]:
    """Starts a process that goes on with what was under way, and pulls these."""
    environ = {"HF_ENDPOINT": server.url, "PYTHONPATH": ":".join(filter(None, sys.path)), "HOME": str(models_dir)}
    command = [sys.executable, "-c", PULL, str(models_dir), *asked]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)


def test_m10_a_killed_process_is_gone_on_from(server: HubServer, tmp_path: Path) -> None:
    """SIGKILL leaves nothing that anybody sees, no lock that anybody waits for, and what came for the next process."""
    server.faults = [Fault(stall_after=4_000_000)]
    first = begin(server, tmp_path, "user/repo")
    with first:
        eventually(lambda: any(path.stat().st_size == 4_000_000 for path in tmp_path.glob(f"{NAME}/files/*.part")))
        first.send_signal(signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir() if path.name != NAME and not path.name.startswith(".")] == []
    second = begin(server, tmp_path)
    out, _ = second.communicate(timeout=60)
    assert out == f"{tmp_path}/M-Q4_K_M.gguf\n"
    assert second.returncode == 0
    assert (tmp_path / "M-Q4_K_M.gguf").read_bytes() == FILE.content
    assert [asked.range for asked in server.downloads()] == ["bytes=0-4999999", "bytes=4000000-4999999"]
    assert [path.name for path in (tmp_path / NAME).rglob("*")] == ["files"]


def test_m8_two_processes_bring_one_model_once(server: HubServer, tmp_path: Path) -> None:
    """Two daemons that pull the same into one folder share it by the locks of the kernel."""
    server.faults = [Fault(cut_after=1_000_000)]
    both = [begin(server, tmp_path, "user/repo") for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert said == [f"{tmp_path}/M-Q4_K_M.gguf\n"] * 2
    assert sum(asked.sent[0] for asked in server.downloads()) == FILE.length
