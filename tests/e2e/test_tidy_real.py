"""Models that leave the disk under the real llama-server: what is served is what is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

from fakes.waiting import PATIENCE_S, eventually
from hub_cache import HubCache
from running import RunningDaemon

pytestmark = pytest.mark.real


@pytest.fixture
def daemon(tmp_path: Path, models_dir: Path, llama_server: Path) -> Iterator[RunningDaemon]:
    """A daemon with three models, and one in a cache of the hub."""
    cache = HubCache(models_dir)
    cache.blob("b1")
    cache.link("r1", "tiny-Q8_0.gguf", "b1")
    cache.ref("main", "r1")
    with RunningDaemon(tmp_path, models_dir, llama_server) as running:
        running.wait_for_router("ready")
        yield running


def test_a_loaded_model_leaves_and_the_others_serve_on(daemon: RunningDaemon, models_dir: Path) -> None:
    """The model is unloaded and gone from disk and lists, the router is the same, and another answers as before."""
    assert daemon.chat("alpha") == "I am alpha"
    pid = daemon.router()["pid"]
    assert daemon.cli("rm", "--yes", "--force", "alpha").returncode == 0
    assert not (models_dir / "alpha.gguf").exists()
    assert daemon.events("ModelUnloaded")[-1]["reason"] == "requested"
    assert daemon.chat("beta") == "I am beta"
    eventually(lambda: "alpha" not in daemon.models(), what="a list without alpha")
    assert daemon.router()["pid"] == pid


def test_a_model_of_the_hub_leaves_with_its_repository(daemon: RunningDaemon, models_dir: Path) -> None:
    """By DELETE /models of the gateway, whose readers of events are told `model_remove`."""
    assert daemon.chat("user/repo") == "I am b1"
    with closing(HTTPConnection("127.0.0.1", daemon.port, timeout=PATIENCE_S)) as news:
        news.request("GET", "/models/sse")
        events = news.getresponse()
        with closing(HTTPConnection("127.0.0.1", daemon.port, timeout=PATIENCE_S)) as connection:
            connection.request("DELETE", "/models?model=user/repo")
            response = connection.getresponse()
            assert (response.status, response.read()) == (200, b'{"success":true}')
        line = b""
        while b"model_remove" not in line:
            line = events.readline()
        assert line == b'data: {"model":"user/repo:Q8_0","event":"model_remove"}\n'
    assert {path.name for path in models_dir.iterdir()} == {"alpha.gguf", "beta.gguf", "gamma.gguf"}
