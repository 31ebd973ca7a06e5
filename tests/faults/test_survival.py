"""D5 and D11: what a daemon that was killed knew, the next one knows; and takes no stranger for its own by it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fakes.waiting import eventually
from llamavisor import procfs
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon

pytestmark = pytest.mark.real

WRITTEN_S = 30.0
"""How long what was learned may take to reach the disk, on a busy machine."""


def ledger(daemon: RunningDaemon) -> dict[str, object]:
    """What the daemon has written down."""
    path = daemon.state_dir / "ledger.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))["sections"]) if path.exists() else {}


def wait_for_ledger(daemon: RunningDaemon, section: str, said: object) -> None:
    """Wait until the disk says so."""
    eventually(lambda: ledger(daemon).get(section) == said, what=f"{section} on disk", within_s=WRITTEN_S)


def start_again(daemon: RunningDaemon) -> None:
    """The next daemon of this installation."""
    daemon.start()
    eventually(daemon.is_live, what="a daemon that answers")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_d5_what_was_in_memory_is_back(
    tmp_path: Path, models_dir: Path, llama_server: Path, number: signal.Signals
) -> None:
    """D5: however the daemon ended, models are loaded again and pins hold; what a person had unloaded stays away."""
    with RunningDaemon(tmp_path, models_dir, llama_server) as daemon:
        daemon.wait_for_router("ready")
        for name in ("alpha", "gamma", "beta"):
            assert daemon.cli("load", name).returncode == 0
        assert daemon.cli("pin", "alpha").returncode == 0
        assert daemon.cli("unload", "gamma").returncode == 0
        wait_for_ledger(daemon, "residents", {"main": ["beta", "alpha"]})
        daemon.signal(number)
        daemon.wait()
        start_again(daemon)
        recovered = daemon.wait_for_event("RouterRecovered")
        assert recovered["models"] == ["alpha", "beta"]  # who is pinned comes first
        assert daemon.model("gamma")["state"] == "unloaded"
        held = json.loads(daemon.cli("ps", "--json").stdout)["models"]
        assert {each["model"]: each["pinned"] for each in held} == {"alpha": True, "beta": False}
        deaths = 1.0 if number is signal.SIGKILL else 0.0
        assert f"llamavisor_daemon_deaths_total {deaths}" in daemon.metrics()
        assert "llamavisor_daemon_starts_total 2.0" in daemon.metrics()
        assert daemon.cli("stop", "main").returncode == 0
        wait_for_ledger(daemon, "residents", {})


def test_d5_a_model_that_was_left_alone(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """D5: a model that cannot be loaded is not tried again by the next daemon at once; another file of it is."""
    broken = models_dir / "broken.gguf"
    write_tiny_model(broken, ["I", "am", "broken"], n_layer=0)
    with RunningDaemon(tmp_path, models_dir, llama_server) as daemon:
        daemon.wait_for_router("ready")
        assert daemon.cli("load", "broken").returncode != 0
        eventually(lambda: ledger(daemon).get("quarantine"), what="a quarantine on disk", within_s=WRITTEN_S)
        daemon.signal(signal.SIGKILL)
        daemon.wait()
        start_again(daemon)
        daemon.wait_for_router("ready")
        eventually(lambda: "broken" in daemon.cli("ps").stdout, what="a model that is left alone")
        with pytest.raises(AssertionError, match="GGML_ASSERT"):
            daemon.chat("broken")
        assert daemon.events("ModelLoading") == []
        daemon.signal(signal.SIGKILL)
        daemon.wait()
        write_tiny_model(models_dir / "new", ["I", "am", "mended"])
        (models_dir / "new").rename(broken)
        start_again(daemon)
        daemon.wait_for_router("ready")
        eventually(lambda: daemon.chat("broken") == "I am mended", what="an answer of the mended model")


@contextmanager
def stranger() -> Iterator[procfs.Identity]:
    """A process without our mark."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        identity = procfs.identify(process.pid)
        assert identity is not None
        yield identity
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("is_it", [True, False])
def test_d11_a_pid_that_means_another_process_now(
    tmp_path: Path, models_dir: Path, llama_server: Path, is_it: bool
) -> None:
    """D11: the ledger knows a process by pid, start time and boot: only if all three agree it is ours, and ended."""
    with stranger() as identity, RunningDaemon(tmp_path, models_dir, llama_server) as daemon:
        daemon.wait_for_router("ready")
        daemon.signal(signal.SIGTERM)
        daemon.wait()
        path = daemon.state_dir / "ledger.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        ticks = identity.start_ticks + (0 if is_it else 1)
        record = {"pid": identity.pid, "start_ticks": ticks, "boot_id": identity.boot_id}
        other = {**record, "start_ticks": identity.start_ticks, "boot_id": "another boot"}
        content["sections"]["processes"] = [other] if not is_it else [record]
        path.write_text(json.dumps(content), encoding="utf-8")
        start_again(daemon)
        daemon.wait_for_router("ready")
        known = procfs.stat(identity.pid)
        assert known is not None
        assert known.is_zombie is is_it
        assert os.path.exists(f"/proc/{identity.pid}")
