"""End to end on the real llama-server, as a user sees it: the command line, HTTP, signals, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import psutil
import pytest

from fakes.bare_router import free_port
from fakes.waiting import eventually
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon

pytestmark = pytest.mark.real


@pytest.fixture
def daemon(tmp_path: Path, models_dir: Path, llama_server: Path) -> Iterator[RunningDaemon]:
    """A daemon with three models and room for two."""
    with RunningDaemon(tmp_path, models_dir, llama_server, flags=["--models-max", "2"]) as running:
        running.wait_for_router("ready")
        yield running


def test_load_chat_unload(daemon: RunningDaemon) -> None:
    """A model is loaded by a command, answers any client, and leaves by a command, its process with it."""
    assert daemon.cli("load", "alpha").returncode == 0
    loaded = daemon.model("alpha")
    assert loaded["state"] == "loaded"
    assert loaded["n_ctx"] == 4096
    eventually(lambda: daemon.model("alpha")["pid"], what="the pid of the child")
    child = psutil.Process(daemon.model("alpha")["pid"])
    assert str(daemon.model("alpha")["port"]) in child.cmdline()
    assert daemon.chat("alpha") == "I am alpha"
    assert daemon.cli("unload", "alpha").returncode == 0
    assert daemon.model("alpha")["state"] == "unloaded"
    eventually(lambda: not child.is_running(), what="the end of the child")
    assert daemon.events("ModelUnloaded")[-1]["reason"] == "requested"


def test_client_loads_by_asking(daemon: RunningDaemon) -> None:
    """A client's request loads a model without a command, and the daemon knows of it."""
    assert daemon.chat("beta") == "I am beta"
    assert daemon.wait_for_model("beta", "loaded")["error"] is None
    assert daemon.events("ModelLoading")[-1]["is_requested"] is True  # by admission


def test_client_of_a_router_loads_by_asking_it(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """With `serve = "router"` nobody else has asked the router for it."""
    with RunningDaemon(tmp_path, models_dir, llama_server, serve="router") as daemon:
        daemon.wait_for_router("ready")
        assert daemon.chat("beta") == "I am beta"
        daemon.wait_for_model("beta", "loaded")
        assert daemon.events("ModelLoading")[-1]["is_requested"] is False


def test_models_max_evicts_the_least_recently_used(daemon: RunningDaemon) -> None:
    """With room for two, a third model pushes out the one that was used least recently."""
    for name in ("alpha", "beta", "gamma"):
        assert daemon.chat(name) == f"I am {name}"
    daemon.wait_for_model("alpha", "unloaded")
    assert daemon.events("ModelUnloaded")[-1]["reason"] == "evicted"
    assert {name: daemon.model(name)["state"] for name in ("beta", "gamma")} == {"beta": "loaded", "gamma": "loaded"}


def test_killed_child_is_seen(daemon: RunningDaemon) -> None:
    """A killed model is told as crashed, the router goes on, and the next request has it back."""
    daemon.cli("load", "alpha")
    eventually(lambda: daemon.model("alpha")["pid"], what="the pid of the child")
    router = daemon.router()["pid"]
    os.kill(daemon.model("alpha")["pid"], signal.SIGKILL)
    assert daemon.wait_for_event("ModelUnloaded")["reason"] == "crashed"
    assert daemon.chat("alpha") == "I am alpha"
    assert daemon.router()["pid"] == router


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_end_leaves_nothing(daemon: RunningDaemon, number: signal.Signals) -> None:
    """A signal ends the daemon, its router and its models, with exit code 0 and no socket left."""
    daemon.cli("load", "alpha")
    assert len(list(daemon.processes())) == 3  # the folder's worker, the router, the model
    daemon.signal(number)
    assert daemon.wait() == 0
    assert list(daemon.processes()) == []
    assert not daemon.socket.exists()


def test_broken_model_says_why(daemon: RunningDaemon, models_dir: Path) -> None:
    """A model that llama-server cannot load fails with its own reason, in one line, and harms no other."""
    write_tiny_model(models_dir / "broken.gguf", ["I"], n_layer=0)
    daemon.wait_for_model("broken", "unloaded")
    failed = daemon.cli("load", "broken")
    assert failed.returncode == 1
    assert "GGML_ASSERT" in failed.stderr
    assert daemon.model("broken")["state"] == "failed"
    assert daemon.chat("alpha") == "I am alpha"


def test_new_file_appears_by_itself(daemon: RunningDaemon, models_dir: Path) -> None:
    """A file that is put into the folder is servable without a command, and what was loaded is not disturbed."""
    daemon.cli("load", "alpha")
    child = eventually(lambda: daemon.model("alpha")["pid"], what="the pid of the child")
    write_tiny_model(models_dir / "delta.gguf", ["I", "am", "delta"])
    assert daemon.wait_for_event("ModelAdded", lambda event: event["model"] == "delta")["wait_s"] > 0
    assert daemon.chat("delta") == "I am delta"
    assert daemon.model("alpha")["pid"] == child


def test_reload_returns_when_new_files_are_servable(daemon: RunningDaemon, models_dir: Path) -> None:
    """Who does not want to wait for the folder's watch says `reload`, and can use the model when that returns."""
    write_tiny_model(models_dir / "delta.gguf", ["I", "am", "delta"])
    assert daemon.cli("reload").returncode == 0
    assert daemon.chat("delta") == "I am delta"


def test_api_key_reaches_router_and_models(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """With a key nobody gets an answer without it, and the key is on no command line, in no log, in no status."""
    key = "secret-0123456789"
    (tmp_path / "key").write_text(f"{key}\n")
    (tmp_path / "key").chmod(0o600)
    port = free_port()
    config = f"""
models_dir = "{models_dir}"
port = {port}
api_key_file = "{tmp_path / "key"}"
[defaults]
threads = 1
[metrics]
enabled = false
"""
    with RunningDaemon(tmp_path, models_dir, llama_server, config=config) as daemon:
        daemon.wait_for_router("ready")
        assert daemon.cli("load", "alpha").returncode == 0
        eventually(lambda: daemon.model("alpha")["pid"], what="the pid of the child")
        with pytest.raises(AssertionError, match="Invalid API Key"):
            daemon.chat("alpha", port=port)
        with pytest.raises(AssertionError, match="Invalid API Key"):
            daemon.chat("alpha", port=daemon.model("alpha")["port"])
        shown = json.dumps(daemon.status()) + daemon.cli("config", "show").stdout + daemon.log.read_text()
        shown += daemon.cli("logs").stdout + "".join(str(process.cmdline()) for process in daemon.processes())
    assert key not in shown


def test_two_routers_side_by_side(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """Two routers each have their own port and options; one of them can be stopped while the other serves."""
    one, two = free_port(), free_port()
    config = f"""
models_dir = "{models_dir}"
[defaults]
threads = 1
[metrics]
enabled = false
[[router]]
name = "one"
port = {one}
ctx_size = 512
[[router]]
name = "two"
port = {two}
"""
    with RunningDaemon(tmp_path, models_dir, llama_server, config=config, serve="router") as daemon:
        daemon.wait_for_router("ready", "one")
        daemon.wait_for_router("ready", "two")
        assert daemon.chat("alpha", port=one) == "I am alpha"
        assert daemon.chat("beta", port=two) == "I am beta"
        loaded = {model["name"]: model for model in daemon.status()["models"] if model["state"] == "loaded"}
        assert (loaded["alpha"]["router"], loaded["beta"]["router"]) == ("one", "two")
        eventually(
            lambda: {m["n_ctx"] for m in daemon.status()["models"] if m["state"] == "loaded"} == {512, 4096}, what=""
        )
        assert daemon.cli("stop", "one").returncode == 0
        assert daemon.router("one")["state"] == "stopped"
        assert daemon.call("GET", "/readyz")[0] == 200
        assert daemon.chat("beta", port=two) == "I am beta"
        assert daemon.cli("stop", "two").returncode == 0
        assert daemon.call("GET", "/readyz")[0] == 503
        assert daemon.cli("start", "one").returncode == 0
        assert daemon.chat("gamma", port=one) == "I am gamma"


def test_restart_keeps_what_is_loaded(daemon: RunningDaemon) -> None:
    """A restart by hand gives a fresh process with the same models, and is no failure."""
    daemon.cli("load", "beta")
    before = daemon.router()["pid"]
    assert daemon.cli("restart", "main").returncode == 0
    daemon.wait_for_event("RouterRecovered")
    assert daemon.model("beta")["state"] == "loaded"
    after = daemon.router()
    assert after["pid"] != before
    assert (after["failures"], after["restarts"]) == (0, 1)


def test_empty_folder_is_ready_with_a_hint(tmp_path: Path, llama_server: Path) -> None:
    """Every new user's first state: an empty folder is READY and says what to do; a file is all that it takes."""
    empty = tmp_path / "empty"
    empty.mkdir()
    with RunningDaemon(tmp_path, empty, llama_server) as daemon:
        daemon.wait_for_router("ready")
        assert f"put GGUF files into {empty}" in daemon.cli("status").stdout + daemon.cli("status").stderr
        write_tiny_model(empty / "first.gguf", ["hello"])
        daemon.wait_for_model("first", "unloaded")
        assert daemon.chat("first") == "hello"


def test_unload_by_a_client_is_no_crash(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """A busy model that a client has unloaded is killed by its router, told as gone by choice, and stays unloaded."""
    write_tiny_model(models_dir / "loop.gguf", ["on", "and"], loop=True, n_ctx=1_000_000)
    running = RunningDaemon(tmp_path, models_dir, llama_server, serve="router")
    with running as daemon, closing(HTTPConnection("127.0.0.1", daemon.port)) as talker:
        daemon.wait_for_router("ready")
        body = {"model": "loop", "stream": True, "max_tokens": 900_000, "messages": [{"role": "user", "content": "x"}]}
        talker.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = talker.getresponse()
        answer.readline()
        with closing(HTTPConnection("127.0.0.1", daemon.port)) as other:
            other.request("POST", "/models/unload", json.dumps({"model": "loop"}))
            assert other.getresponse().status == 200
        assert daemon.wait_for_event("ModelUnloaded")["reason"] == "evicted"
        assert daemon.model("loop")["state"] == "unloaded"


def test_foreign_web_pages_are_kept_out(daemon: RunningDaemon) -> None:
    """A browser may talk to the router for a page of this machine, not for any page of the web."""

    def allowed(origin: str) -> str | None:
        with closing(HTTPConnection("127.0.0.1", daemon.port)) as connection:
            connection.request("GET", "/v1/models", headers={"Origin": origin})
            return connection.getresponse().getheader("Access-Control-Allow-Origin")

    assert allowed("http://localhost:3000") == "http://localhost:3000"
    assert allowed("https://example.org") is None


def test_logs_are_llama_servers_own(daemon: RunningDaemon) -> None:
    """`logs` shows what llama-server prints, its models' lines included."""
    daemon.cli("load", "alpha")
    shown = daemon.cli("logs").stdout
    assert "server in router mode" in shown
    assert "model loaded" in shown


def test_an_embedding_model_by_itself(daemon: RunningDaemon, models_dir: Path) -> None:
    """A model that its header makes out to embed does so without a word of configuration, for long texts too."""
    write_tiny_model(models_dir / "vectors.gguf", ["I"], pooling=1, n_ctx=2048)
    daemon.wait_for_model("vectors", "unloaded")
    assert daemon.model("vectors")["kind"] == "embedding"
    with closing(HTTPConnection("127.0.0.1", daemon.port)) as client:
        body = {"model": "vectors", "input": "x " * 400}  # over 512 tokens: each letter and blank is one
        client.request("POST", "/v1/embeddings", json.dumps(body), {"Content-Type": "application/json"})
        answer = client.getresponse()
        told = json.load(answer)
    assert answer.status == 200, told
    assert told["usage"]["prompt_tokens"] > 512
    assert len(told["data"][0]["embedding"]) == 32


def test_tables_of_single_models(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """Options, aliases, a template and a draft reach the model that they are for, and a changed table only that one."""
    (tmp_path / "shout.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}!")
    daemon = RunningDaemon(tmp_path, models_dir, llama_server, config="")
    config = f"""
models_dir = "{models_dir}"
port = {daemon.port}
[metrics]
enabled = false
[defaults]
threads = 1
ctx_size = 1024
[model."a*"]
ctx_size = 2048
[model."alpha"]
aliases = ["best"]
tags = ["small"]
draft = "{models_dir}/beta.gguf"
chat_template = "shout.jinja"
chat_template_kwargs = {{ loud = true }}
load_on_start = true
[model."gamma"]
ctx_size = %d
"""
    daemon.config.write_text(config % 512, encoding="utf-8")
    with daemon:
        daemon.wait_for_router("ready")
        assert daemon.wait_for_model("alpha", "loaded")["n_ctx"] == 2048
        assert daemon.chat("best") == "I am alpha"
        assert daemon.cli("load", "gamma").returncode == 0
        assert daemon.model("gamma")["n_ctx"] == 512
        eventually(lambda: daemon.model("alpha")["pid"], what="the pid of alpha")
        pid, router = daemon.model("alpha")["pid"], daemon.router()["pid"]
        shown = daemon.cli("show", "best").stdout
        assert "shout.jinja" in shown
        assert '[model."alpha"]' in shown
        told = daemon.cli("config", "show", "--config", str(daemon.config), "--model", "alpha")
        assert '[model."a*"]' in told.stdout or "llamavisor.toml" in told.stdout, told.stderr
        daemon.config.write_text(config % 768, encoding="utf-8")
        assert daemon.cli("reload").returncode == 0
        eventually(lambda: daemon.model("gamma")["n_ctx"] == 768, what="the changed table of gamma")
        assert (daemon.model("alpha")["pid"], daemon.router()["pid"]) == (pid, router)
        assert daemon.cli("unload", "best").returncode == 0
        daemon.config.write_text(config.replace("draft =", "no_such_key =") % 768, encoding="utf-8")
        refused = daemon.cli("reload")
        assert refused.returncode == 78
        assert "no_such_key" in refused.stderr
        assert daemon.router()["pid"] == router
