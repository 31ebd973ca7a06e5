"""N1 to N4: ports, clients that leave, routers that die, and streams at the end, with the real llama-server."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from fakes.bare_router import free_port
from fakes.waiting import PATIENCE_S, eventually
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon

pytestmark = pytest.mark.real

FREED_S = 1.0
"""How long a generation may go on that nobody waits for; undisturbed it takes half a minute."""
LATE_S = 5.0
"""How long that of a whole answer may."""
LOOK_S = 1.5
"""llama-server looks whether the client of a whole answer is still there when no request of this model has got a result
for a second: asked more often for its slots, it never looks."""
CLIENTS = 200
DRAIN_S = 2
ENDS_S = 5
"""How long the daemon may take to end besides."""
CONFIG = """
serve = "gateway"
port = {port}
models_dir = "{models_dir}"
models_max = 0
[defaults]
threads = 1
[metrics]
port = {metrics_port}
[gateway]
drain = "{drain_s}s"
[model.ever]
parallel = 1
"""


def gateway(folder: Path, models_dir: Path, llama_server: Path, *, port: int | None = None) -> RunningDaemon:
    """A daemon over three quick models and one that goes on for ever."""
    write_tiny_model(models_dir / "ever.gguf", ["on", "and"], loop=True, n_layer=100, n_ctx=20_000)
    port, metrics_port = port or free_port(), free_port()
    config = CONFIG.format(port=port, metrics_port=metrics_port, models_dir=models_dir, drain_s=DRAIN_S)
    daemon = RunningDaemon(folder, models_dir, llama_server, config=config)
    daemon.port, daemon.metrics_port = port, metrics_port
    return daemon


@pytest.fixture
def daemon(tmp_path: Path, models_dir: Path, llama_server: Path) -> Iterator[RunningDaemon]:
    """A daemon that serves through its gateway."""
    with gateway(tmp_path, models_dir, llama_server) as running:
        running.wait_for_router("ready")
        yield running


@contextmanager
def asked(daemon: RunningDaemon, model: str = "ever", **fields: object) -> Iterator[tuple[socket.socket, HTTPResponse]]:
    """A chat that was sent, its socket and its answer, of which nothing was read yet."""
    with closing(HTTPConnection("127.0.0.1", daemon.port, timeout=PATIENCE_S)) as line:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": True, **fields}
        line.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        with ExitStack() as stack:
            response = stack.enter_context(closing(HTTPResponse(line.sock, method="POST")))
            yield line.sock, response


def begun(response: HTTPResponse) -> None:
    """Read a stream up to its first data."""
    response.begin()
    assert response.status == 200, response.read()
    for line in response:
        if line.startswith(b"data:"):
            return
    raise AssertionError("a stream without data")


def last_data(response: HTTPResponse) -> str:
    """The last event of a stream, which is read to the end of its body; one that is cut off raises IncompleteRead."""
    return [line for line in response.read().decode("utf-8").splitlines() if line.startswith("data:")][-1][5:].strip()


def is_generating(daemon: RunningDaemon) -> bool:
    """Whether the only slot of the model that goes on for ever is taken."""
    with closing(HTTPConnection("127.0.0.1", daemon.port, timeout=PATIENCE_S)) as line:
        line.request("GET", "/slots?model=ever")
        return bool(json.loads(line.getresponse().read())[0]["is_processing"])


def reset(line: socket.socket) -> None:
    """Have the connection cut when it is closed, without a proper end."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def leases(daemon: RunningDaemon) -> int:
    """Requests that hold a model."""
    return sum(model["leases"] for model in daemon.call("GET", "/control/v1/ps")[1]["models"])


def is_at_rest(daemon: RunningDaemon) -> bool:
    """Whether no request holds a model or waits for one."""
    return not leases(daemon) and not daemon.call("GET", "/control/v1/ps")[1]["queues"]


# --- N1: a port that is taken -----------------------------------------------------------------------------------------


def test_n1_behind_the_gateway_another_port_is_taken(daemon: RunningDaemon) -> None:
    """N1: behind the gateway nobody knows the router's port, so that one that is taken is in nobody's way."""
    port = urlsplit(daemon.router()["url"]).port
    with closing(socket.socket()) as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        daemon.cli("stop", "main")
        daemon.wait_for_router("stopped")
        squatter.bind(("127.0.0.1", port))
        squatter.listen()
        assert daemon.cli("start", "main").returncode == 0
        daemon.wait_for_router("ready")
        assert daemon.chat("alpha") == "I am alpha"


def test_n1_a_stranger_on_the_gateways_port(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """N1: what clients cannot reach is said with the one who has the port, and served as soon as it is free."""
    with closing(socket.socket()) as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        port = squatter.getsockname()[1]
        with gateway(tmp_path, models_dir, llama_server, port=port) as daemon:
            daemon.wait_for_router("ready")
            said = eventually(
                lambda: [line for line in daemon.log.read_text(encoding="utf-8").splitlines() if f":{port}" in line],
                what="a word of the port",
            )
            assert f"taken by python (pid {os.getpid()})" in said[0]
            squatter.close()
            daemon.wait_for_event("GatewayListening")
            assert daemon.chat("alpha") == "I am alpha"


# --- N2: clients that leave -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_reset", [False, True])
def test_n2_a_client_leaves_a_stream(daemon: RunningDaemon, *, is_reset: bool) -> None:
    """N2: a client that closes or cuts its connection ends the generation, and nobody makes a fuss about it."""
    with asked(daemon) as (line, response):
        begun(response)
        assert is_generating(daemon)
        if is_reset:
            reset(line)
    eventually(lambda: not is_generating(daemon), what="a free slot", within_s=FREED_S)
    eventually(lambda: is_at_rest(daemon), what="a daemon at rest")
    assert "Traceback" not in daemon.log.read_text(encoding="utf-8")


def test_n2_a_client_leaves_without_a_stream(daemon: RunningDaemon) -> None:
    """N2: so does a client that waits for a whole answer, of which it has got nothing yet."""
    with asked(daemon, stream=False) as (line, _):
        eventually(lambda: is_generating(daemon), what="a generation")
        reset(line)

    def is_free() -> bool:
        time.sleep(LOOK_S)
        return not is_generating(daemon)

    eventually(is_free, what="a free slot", within_s=LATE_S)
    eventually(lambda: is_at_rest(daemon), what="a daemon at rest")
    assert "Traceback" not in daemon.log.read_text(encoding="utf-8")


def test_n2_a_client_that_does_not_read(daemon: RunningDaemon) -> None:
    """N2: a client that stops reading holds up its own generation and nothing else, and can leave."""
    with asked(daemon, stream=True, n_probs=200) as (line, response):
        begun(response)
        assert daemon.chat("alpha") == "I am alpha"
        assert leases(daemon) == 1
        reset(line)
    eventually(lambda: not is_generating(daemon), what="a free slot", within_s=FREED_S)


def test_n2_a_client_leaves_the_queue(daemon: RunningDaemon, models_dir: Path) -> None:
    """N2: a client that leaves while its model is loaded for it leaves the queue, and the daemon is at rest."""
    write_tiny_model(models_dir / "slow.gguf", ["slow"], n_layer=200, n_ctx=60_000)
    daemon.wait_for_model("slow", "unloaded")
    with asked(daemon, "slow"):
        eventually(lambda: daemon.call("GET", "/control/v1/ps")[1]["queues"], what="a request that waits")
    eventually(lambda: not daemon.call("GET", "/control/v1/ps")[1]["queues"], what="nobody who waits", within_s=LATE_S)
    assert "Traceback" not in daemon.log.read_text(encoding="utf-8")


# --- N3: routers and models that die ----------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["router", "model"])
def test_n3_death_in_the_middle_of_a_stream(daemon: RunningDaemon, victim: str) -> None:
    """N3: a stream whose router or model dies ends with an event that says so and a proper end, and is not repeated."""
    with asked(daemon) as (_, response):
        begun(response)
        pid = daemon.router()["pid"] if victim == "router" else daemon.model("ever")["pid"]
        os.kill(pid, signal.SIGKILL)
        error = json.loads(last_data(response))["error"]
    assert error["message"]
    assert error["code"] >= 500
    eventually(lambda: is_at_rest(daemon), what="a daemon at rest")
    assert daemon.chat("alpha") == "I am alpha"
    assert not is_generating(daemon)
    counted = [line for line in daemon.metrics().splitlines() if line.startswith("llamavisor_requests_total{")]
    assert any('model="ever"' in line and 'route="v1/chat/completions"' in line for line in counted), counted


def test_n3_a_router_dies_under_requests_that_wait(daemon: RunningDaemon) -> None:
    """N3: who has got nothing yet notices nothing: the router comes back, the model too, and the answer is whole."""
    daemon.chat("alpha")
    os.kill(daemon.router()["pid"], signal.SIGKILL)
    with asked(daemon, "alpha") as (_, response):
        response.begin()
        assert response.status == 200, response.read()
        assert last_data(response) == "[DONE]"


# --- N4: many idle streams at the end ---------------------------------------------------------------------------------


def followers(daemon: RunningDaemon, stack: ExitStack) -> list[HTTPResponse]:
    """Clients that follow the events of models, which is a stream that never ends by itself."""
    found = []
    for _ in range(CLIENTS):
        line = stack.enter_context(closing(HTTPConnection("127.0.0.1", daemon.port, timeout=PATIENCE_S)))
        line.request("GET", "/models/sse")
        response = stack.enter_context(closing(line.getresponse()))
        assert response.status == 200
        found.append(response)
    return found


def test_n4_a_stop_with_idle_streams(daemon: RunningDaemon) -> None:
    """N4: streams that never end hold the daemon up no longer than the drain's deadline, and all of them are closed."""
    with ExitStack() as stack:
        clients = followers(daemon, stack)
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        for client in clients:
            client.read()
        assert daemon.wait() == 0
        assert time.monotonic() - began < DRAIN_S + ENDS_S
    assert "Traceback" not in daemon.log.read_text(encoding="utf-8")


def test_n4_a_reload_with_idle_streams(daemon: RunningDaemon, models_dir: Path) -> None:
    """N4: a reload closes none of them, and they are told what comes after it."""
    with ExitStack() as stack:
        clients = followers(daemon, stack)
        write_tiny_model(models_dir / "delta.gguf", ["I", "am", "delta"])
        assert daemon.cli("reload").returncode == 0
        assert daemon.chat("delta") == "I am delta"
        for client in clients:
            assert any(b'"delta"' in line and b'"loaded"' in line for line in client)


def test_n4_a_stop_lets_answers_end(daemon: RunningDaemon) -> None:
    """N4: what ends before the deadline ends whole, while nobody new is let in."""
    with asked(daemon, max_tokens=100) as (_, response):
        begun(response)
        daemon.signal(signal.SIGTERM)
        assert last_data(response) == "[DONE]"
    assert daemon.wait() == 0
    with pytest.raises(ConnectionRefusedError), asked(daemon, "alpha"):
        pass


def test_n4_a_stop_ends_answers_at_the_deadline(daemon: RunningDaemon) -> None:
    """N4: what is not done by then ends with an event that says so and a proper end of the body; the exit code is 0."""
    with asked(daemon) as (_, response):
        begun(response)
        models = [psutil.Process(each.pid) for each in daemon.processes()]
        daemon.signal(signal.SIGTERM)
        assert json.loads(last_data(response))["error"]["message"]
    assert daemon.wait() == 0
    assert not any(process.is_running() for process in models)
    assert "Traceback" not in daemon.log.read_text(encoding="utf-8")
