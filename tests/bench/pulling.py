"""How quickly a model comes from a Hub on this machine, over `hf download`, and what a look at a large one costs."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from gguf_header import large_model
from report import Row, timed_s

from fakes.hub_server import HubFile, HubServer, Repository
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon

RUNS = 3
SIZE = 1024**3
RATIO = 0.95
"""Of the throughput of `hf download`, which neither checks what came nor brings it to the disk."""
HUGE = 40 * 10**9
REQUESTS, LOOK_BYTES = 5, 4 * 1024**2
_MIB = 1024**2


def measure(folder: Path, llama_server: Path) -> Iterator[Row]:
    """Pulls and downloads by turns, then one look.

    Args:
        folder: where files go, 2 GiB at once.
        llama_server: for a daemon to have.
    """
    folder.mkdir()
    write_tiny_model(folder / "tiny", ["tiny"])
    content = (folder / "tiny").read_bytes() + os.urandom(SIZE)
    repositories = {
        "user/large": Repository({"Large-Q4_K_M.gguf": HubFile(content)}),
        "user/huge": Repository({"Huge-Q4_K_M.gguf": HubFile(large_model().encode(), size=HUGE)}),
    }
    models_dir = folder / "models"
    models_dir.mkdir()
    with HubServer(repositories) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        with RunningDaemon(folder, models_dir, llama_server, env=env) as daemon:
            daemon.wait_for_router("ready")
            ours, theirs = [], []
            for run in range(RUNS + 1):
                took_s = timed_s(lambda: _pull(daemon))
                (models_dir / "Large-Q4_K_M.gguf").unlink()
                hf_s = timed_s(lambda: _download({**daemon.env, "HF_HOME": str(folder / "hf")}, folder / "hub"))
                (folder / "hub" / "Large-Q4_K_M.gguf").unlink()
                if run:  # the first one warms up
                    ours.append(took_s)
                    theirs.append(hf_s)
            alone = [event["duration_s"] for event in daemon.events("PullEnded")[1:]]
            hub.asked.clear()
            daemon.call("GET", "/control/v1/hub?repo=user/huge")
            requests, sent = len(hub.asked), sum(asked.sent[0] for asked in hub.asked)
    yield from _throughput("a pull of 1 GiB, over `hf download`", ours, theirs)
    yield from _throughput("the same without the command around it", alone, theirs)
    yield Row("a look at a remote model of 40 GB, requests", str(requests), "", f"< {REQUESTS}", requests < REQUESTS)
    is_little = sent < LOOK_BYTES
    yield Row("the same, bytes of the model", f"{sent / 1024:.0f} KiB", "", f"< {LOOK_BYTES // _MIB} MiB", is_little)


def _throughput(what: str, ours: list[float], theirs: list[float]) -> Iterator[Row]:
    size = SIZE / _MIB
    measured, yardstick = size / statistics.median(ours), size / statistics.median(theirs)
    allowed = RATIO * yardstick
    shown = (f"{each:.0f} MiB/s" for each in (measured, yardstick))
    yield Row(what, *shown, f">{allowed:.0f} MiB/s", measured >= allowed)


def _pull(daemon: RunningDaemon) -> None:
    done = daemon.cli("pull", "user/large", timeout_s=300)
    assert done.returncode == 0, done.stderr


def _download(env: dict[str, str], folder: Path) -> None:
    hf = [sys.executable, "-m", "huggingface_hub.cli.hf"]
    command = [*hf, "download", "user/large", "Large-Q4_K_M.gguf", "--local-dir", folder]
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=300)
