"""Why models are lost, on the true llama-server and real signals: what is told, and how it is counted."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.waiting import eventually
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon

pytestmark = pytest.mark.real

MEMORY_BYTES = 3_000_000_000


@pytest.fixture
def daemon(tmp_path: Path, models_dir: Path, llama_server: Path) -> Iterator[RunningDaemon]:
    """A daemon whose llama-server may map no more than 3 GB, and models that cannot be loaded."""
    server = tmp_path / "llama-server"
    server.write_text(f'#!/bin/sh\nexec prlimit --as={MEMORY_BYTES} {shlex.quote(str(llama_server))} "$@"\n')
    server.chmod(0o755)
    write_tiny_model(models_dir / "big.gguf", ["I", "am", "big"], n_ctx=100_000_000)
    write_tiny_model(models_dir / "empty.gguf", ["I", "am", "empty"], n_layer=0)
    config = tmp_path / "more.toml"
    config.touch()
    running = RunningDaemon(tmp_path, models_dir, server, config="")
    running.config.write_text(
        f'models_dir = "{models_dir}"\nport = {running.port}\n[metrics]\nport = {running.metrics_port}\n'
        '[defaults]\nargs = ["--threads", "1"]\n'
        "[model.big]\nctx_size = 50000000\nfit = false\n"
        '[model.gamma]\nargs = ["--ubatch-size", "x"]\n',
        encoding="utf-8",
    )
    with running:
        running.wait_for_router("ready")
        yield running


def failures(daemon: RunningDaemon, model: str, cause: str) -> str:
    """The line of the metric that says that a model was lost once for this cause."""
    return f'llamavisor_model_failures_total{{cause="{cause}",model="{model}",router="main"}} 1.0'


@pytest.mark.parametrize(
    ("model", "cause", "reason"),
    [
        ("big", "no_memory", "alloc"),
        ("empty", "exit", "GGML_ASSERT"),
        ("gamma", "bad_option", "--ubatch-size"),
    ],
)
def test_loads_that_fail(daemon: RunningDaemon, model: str, cause: str, reason: str) -> None:
    """llama-server's own words are the reason, the class of them is counted, and the router goes on."""
    told = daemon.cli("load", model)
    assert told.returncode != 0
    assert reason in told.stderr.splitlines()[0]
    assert 1 <= len([line for line in told.stderr.splitlines() if line.startswith("  | ")]) <= 5  # the end of its log
    failed = daemon.wait_for_event("ModelLoadFailed", lambda event: event["model"] == model)
    assert (failed["cause"], reason in failed["reason"]) == (cause, True)
    assert f'llamavisor_model_failures_total{{cause="{cause}",model="{model}",router="main"}}' in daemon.metrics()
    assert daemon.chat("alpha") == "I am alpha"
    assert daemon.router()["restarts"] == 0


@pytest.mark.parametrize(
    ("number", "cause", "reason"),
    [
        (signal.SIGSEGV, "signal", "crashed"),
        (signal.SIGABRT, "signal", "crashed"),
        (signal.SIGKILL, "killed", "crashed"),
        (signal.SIGBUS, "file_changed", "file_changed"),
    ],
)
def test_signals(daemon: RunningDaemon, number: signal.Signals, cause: str, reason: str) -> None:
    """The kernel tells which signal has ended a process that is not our child; its router says 1 for any of them."""
    assert daemon.chat("alpha") == "I am alpha"
    pid = int(eventually(lambda: daemon.model("alpha")["pid"], what="the pid of alpha"))
    os.kill(pid, number)
    lost = daemon.wait_for_event("ModelUnloaded")
    assert (lost["reason"], lost["cause"]) == (reason, cause)
    assert number.name in lost["detail"]
    assert failures(daemon, "alpha", cause) in daemon.metrics()
    assert daemon.chat("alpha") == "I am alpha"
