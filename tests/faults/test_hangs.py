"""H1 to H3: what hangs, and what is only slow; real processes that are really stopped, or really busy.

How long is waited for which sign is tested on virtual time, in tests/supervisor/test_healing.py.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from fakes.waiting import eventually
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

HANG_AFTER_S = 6
PATIENCE_S = 60.0
CONFIG = """
models_dir = "{models_dir}"
port = {port}
[metrics]
port = {metrics_port}
[defaults]
args = ["--threads", "1"]
hang_after = "{hang_after}s"
{more}
"""


def run(folder: Path, models_dir: Path, llama_server: Path, *, more: str = "") -> RunningDaemon:
    """A daemon that takes a process for hung sooner than by default."""
    daemon = RunningDaemon(folder, models_dir, llama_server, config="")
    text = CONFIG.format(
        models_dir=models_dir,
        port=daemon.port,
        metrics_port=daemon.metrics_port,
        hang_after=HANG_AFTER_S,
        more=more,
    )
    daemon.config.write_text(text, encoding="utf-8")
    return daemon


@pytest.fixture
def daemon(tmp_path: Path, models_dir: Path, llama_server: Path) -> Iterator[RunningDaemon]:
    """A daemon that serves two models."""
    with run(tmp_path, models_dir, llama_server) as running:
        running.wait_for_router("ready")
        for name in ("alpha", "beta"):
            assert running.chat(name) == f"I am {name}"
        yield running


def pid_of(daemon: RunningDaemon, name: str) -> int:
    """The process of a loaded model."""
    return int(eventually(lambda: daemon.model(name)["pid"], what=f"the pid of {name}"))


class Asking(threading.Thread):
    """A client that asks in the background."""

    def __init__(self, daemon: RunningDaemon, model: str, **more: object) -> None:
        super().__init__()
        self.answer: str | None = None
        self.status = 0
        self._port = daemon.port
        self._body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}

    def run(self) -> None:
        """Ask, and keep what came."""
        with closing(HTTPConnection("127.0.0.1", self._port, timeout=150)) as connection:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(self._body), headers)
            response = connection.getresponse()
            text = response.read()
            self.status = response.status
            if self.status == 200:
                self.answer = str(json.loads(text)["choices"][0]["message"]["content"]).strip()


def test_h1_a_stopped_router(daemon: RunningDaemon) -> None:
    """H1: it takes connections, answers nothing, and is restarted with what was loaded; SIGTERM alone would not do."""
    router = daemon.wait_for_router("ready")["pid"]
    os.kill(router, signal.SIGSTOP)
    assert daemon.chat("alpha") == "I am alpha"  # models answer without their router
    hung = daemon.wait_for_event("RouterHung", within_s=PATIENCE_S)
    assert hung["silent_s"] >= HANG_AFTER_S
    assert "its process is suspended" in hung["reason"]
    eventually(lambda: daemon.router()["pid"] not in {None, router}, what="a fresh router")
    daemon.wait_for_router("ready")
    for name in ("alpha", "beta"):
        daemon.wait_for_model(name, "loaded")
        assert daemon.chat(name) == f"I am {name}"
    assert 'llamavisor_router_restarts_total{reason="hung",router="main"} 1.0' in daemon.metrics()
    assert 'llamavisor_router_hangs_total{router="main"} 1.0' in daemon.metrics()
    assert not os.path.exists(f"/proc/{router}")


def test_h2_a_stopped_model(daemon: RunningDaemon) -> None:
    """H2: only that model is ended; who waited for its answer gets one from its next process, others notice nothing."""
    child, other, router = pid_of(daemon, "alpha"), pid_of(daemon, "beta"), daemon.router()["pid"]
    os.kill(child, signal.SIGSTOP)
    waiting = Asking(daemon, "alpha")
    waiting.start()
    assert daemon.chat("beta") == "I am beta"
    hung = daemon.wait_for_event("ModelHung", within_s=PATIENCE_S)
    assert (hung["model"], hung["pid"]) == ("alpha", child)
    assert hung["silent_s"] >= HANG_AFTER_S
    waiting.join()
    assert waiting.answer == "I am alpha"
    assert daemon.wait_for_event("ModelUnloaded")["reason"] == "unresponsive"
    assert pid_of(daemon, "alpha") != child
    assert (pid_of(daemon, "beta"), daemon.router()["pid"]) == (other, router)
    assert 'llamavisor_model_hangs_total{model="alpha",router="main"} 1.0' in daemon.metrics()


def test_h2_a_stopped_model_that_nobody_waits_for(daemon: RunningDaemon) -> None:
    """H2: one that had served for a while is back without anybody's asking."""
    loaded = daemon.wait_for_event("ModelLoaded", lambda event: event["model"] == "alpha")
    eventually(lambda: time.time() > loaded["time"] + 10.5, what="a model that has served for a while")
    child = pid_of(daemon, "alpha")
    os.kill(child, signal.SIGSTOP)
    eventually(
        lambda: daemon.model("alpha")["pid"] not in {None, child}, what="another process of alpha", within_s=PATIENCE_S
    )
    daemon.wait_for_model("alpha", "loaded")
    assert daemon.router()["restarts"] == 0


def test_h3_a_long_prompt(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """H3: a model that computes on a machine that hardly lets it is often silent, makes progress, and is let be.

    llama-server b11434 answers even while it computes; one that is silent all the time is tested on virtual time.
    """
    write_tiny_model(models_dir / "slow.gguf", ["I", "am", "slow"], n_layer=60, n_ctx=32768)
    options = "[model.slow]\nctx_size = 32768\nparallel = 1\n"
    with run(tmp_path, models_dir, llama_server, more=options) as daemon:
        daemon.wait_for_router("ready")
        assert daemon.cli("load", "slow").returncode == 0
        child = pid_of(daemon, "slow")
        asking = Asking(daemon, "slow", messages=[{"role": "user", "content": "x" * 8_000}], max_tokens=4)
        asking.start()
        eventually(lambda: daemon.model("slow")["in_flight"], what="a prompt that is being computed")
        was_silent, until = False, time.monotonic() + 3 * HANG_AFTER_S
        while time.monotonic() < until:  # it runs for a seventh of the time
            os.kill(child, signal.SIGCONT)
            time.sleep(0.4)
            os.kill(child, signal.SIGSTOP)
            time.sleep(2.6)
            was_silent |= daemon.model("slow")["in_flight"] is None
        os.kill(child, signal.SIGCONT)
        asking.join()
        assert was_silent
        assert (asking.status, pid_of(daemon, "slow")) == (200, child)
        assert daemon.events("ModelHung") == []
