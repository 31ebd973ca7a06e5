"""Who comes to the gateway's door, and how: addresses, crowds, and what is no proper HTTP."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest

from fakes.bare_router import free_port
from fakes.waiting import PATIENCE_S, eventually
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon

pytestmark = pytest.mark.real

ROOM = 3
CHAT = "/v1/chat/completions"


@pytest.fixture
def daemon(tmp_path: Path, models_dir: Path, llama_server: Path) -> Iterator[RunningDaemon]:
    """A daemon whose gateway has room for three connections and bodies of a megabyte."""
    # Slow, and with much to say: its answers go on while others come.
    write_tiny_model(models_dir / "endless.gguf", ["on", "and"], loop=True, n_layer=60, n_ctx=20_000)
    port = free_port()
    config = f"""
models_dir = "{models_dir}"
llama_server = "{llama_server}"
port = {port}
[defaults]
threads = 1
[metrics]
enabled = false
[gateway]
max_connections = {ROOM}
max_body = "1MiB"
"""
    running = RunningDaemon(tmp_path, models_dir, llama_server, config=config)
    running.port = port
    with running:
        running.wait_for_model("alpha", "unloaded")
        running.wait_for_model("endless", "unloaded")
        yield running


def line_to(daemon: RunningDaemon) -> socket.socket:
    """A connection of the most primitive client."""
    return socket.create_connection(("127.0.0.1", daemon.port), timeout=PATIENCE_S)


def chat(model: str, **more: object) -> bytes:
    """The body of a chat."""
    return json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], **more}).encode()


def post(body: bytes, *headers: str, path: str = CHAT) -> bytes:
    """A whole request."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def answer_of(line: socket.socket) -> tuple[int, bytes]:
    """Status and body of the next answer on a connection."""
    response = HTTPResponse(line)
    response.begin()
    return response.status, response.read()


def said(body: bytes) -> str:
    """What the model has said."""
    return str(json.loads(body)["choices"][0]["message"]["content"]).strip()


def test_both_addresses_of_this_machine_lead_to_it(daemon: RunningDaemon) -> None:
    """A client that resolves "localhost" may take either."""
    for host in ("127.0.0.1", "::1"):
        with closing(HTTPConnection(host, daemon.port, timeout=PATIENCE_S)) as connection:
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200
    assert len(daemon.status()["gateway"]["urls"]) == 2


def test_who_says_nothing_makes_way(daemon: RunningDaemon) -> None:
    """However many connect and are silent, the next one is served."""
    with ExitStack() as lines:
        silent = [lines.enter_context(line_to(daemon)) for _ in range(5 * ROOM)]
        assert daemon.chat("alpha") == "I am alpha"
        assert silent[0].recv(1) == b""  # the oldest was ended


def test_whoever_is_answered_does_not_make_way(daemon: RunningDaemon) -> None:
    """One more than there is room for is told so, and no answer is cut off for it."""
    with ExitStack() as lines:
        streams = []
        for _ in range(ROOM):
            line = lines.enter_context(line_to(daemon))
            line.sendall(post(chat("endless", stream=True, max_tokens=100_000)))
            response = lines.enter_context(closing(HTTPResponse(line)))
            response.begin()
            assert response.readline().startswith(b"data:")
            streams.append(response)
        late = lines.enter_context(line_to(daemon))
        status, body = answer_of(late)
        assert status == 503
        assert "max_connections" in json.loads(body)["error"]["message"]
        for stream in streams:
            assert any(stream.readline().startswith(b"data:") for _ in range(5))
    eventually(lambda: daemon.status()["gateway"]["connections"] == 0, what="an empty room")
    assert daemon.chat("alpha") == "I am alpha"


def test_requests_that_come_together_are_answered_in_order(daemon: RunningDaemon) -> None:
    """Pipelining: each gets its own model's answer, and one that streams ends before the next begins."""
    with line_to(daemon) as line:
        asked = [post(chat("alpha")), post(chat("beta", stream=True)), post(chat("gamma"))]
        line.sendall(b"".join(asked))
        first, second, third = (answer_of(line) for _ in range(3))
        assert (first[0], second[0], third[0]) == (200, 200, 200)
        assert said(first[1]) == "I am alpha"
        assert second[1].endswith(b"data: [DONE]\n\n")
        assert said(third[1]) == "I am gamma"


def test_a_client_that_asks_first_is_told_to_go_on(daemon: RunningDaemon) -> None:
    """`Expect: 100-continue`, as curl sends it with large bodies; another expectation is refused."""
    body = chat("alpha")
    with line_to(daemon) as line:
        whole = post(body, "Expect: 100-continue")
        line.sendall(whole[: -len(body)])
        assert line.recv(1024).startswith(b"HTTP/1.1 100 ")
        line.sendall(body)
        assert said(answer_of(line)[1]) == "I am alpha"
    with line_to(daemon) as line:
        line.sendall(post(body, "Expect: a-miracle"))
        assert answer_of(line)[0] == 417


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        pytest.param(post(b"{}", "Transfer-Encoding: chunked"), 400, id="a length and chunks"),
        pytest.param(post(b"{}", "Content-Length: 3"), 400, id="two lengths"),
        pytest.param(
            post(b"{}", "Transfer-Encoding: chunked, identity"), 400, id="chunks that are not the last coding"
        ),
        pytest.param(post(b"{}", "X: y", " folded"), 400, id="a folded header"),
        pytest.param(post(b"{}", "X Y: z"), 400, id="a blank in a header's name"),
        pytest.param(post(b"{}", "X: a\rb"), 400, id="a bare CR"),
        pytest.param(post(b"{}", "X: a\0b"), 400, id="a NUL"),
        pytest.param(post(b"{}", f"X: {'x' * 10_000}"), 400, id="a header that is too long"),
        pytest.param(post(b"{}", *(f"X{n}: y" for n in range(200))), 400, id="too many headers"),
        pytest.param(post(b"{}", *(f"X{n}: {'y' * 4000}" for n in range(40))), 431, id="headers too large together"),
        pytest.param(b"GET /health HTTP/0.9\r\nHost: localhost\r\n\r\n", 400, id="another version"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", 400, id="no host"),
        pytest.param(b"GET http://localhost/v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, id="absolute form"),
        pytest.param(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n", 400, id="connect"),
        pytest.param(b"GARBAGE\r\n\r\n", 400, id="no request line"),
        pytest.param(b"GET /v1/models HTTP/1.1\r\nHost: evil.example.org\r\n\r\n", 403, id="a foreign host"),
        pytest.param(post(b"x" * 2_000_000), 413, id="a body that is too large"),
    ],
)
def test_what_is_no_proper_request_is_refused(daemon: RunningDaemon, request_text: bytes, status: int) -> None:
    """In JSON, once, and the connection ends: what follows may be read as another request by nobody."""
    with line_to(daemon) as line:
        line.sendall(request_text)
        told, body = answer_of(line)
        assert told == status, body
        assert json.loads(body)["error"]["code"] == status
        if status != 403:
            assert line.recv(1024) == b""
    assert daemon.chat("alpha") == "I am alpha"
    assert "Traceback" not in daemon.log.read_text(encoding="utf-8")


def test_a_header_of_a_client_reaches_no_other_header(daemon: RunningDaemon) -> None:
    """What it says of itself for one hop, and whose key it has, stays here."""
    with line_to(daemon) as line:
        line.sendall(post(chat("alpha"), "Authorization: Bearer nonsense", "Connection: X-Own", "X-Own: 1"))
        assert answer_of(line)[0] == 200  # the child has been sent our key


def test_a_reload_cuts_no_answer_off(daemon: RunningDaemon) -> None:
    """A cap is nothing that a router is told of; what needs another process waits until nobody is being answered."""
    before = daemon.router()["pid"]
    with ExitStack() as lines:
        line = lines.enter_context(line_to(daemon))
        line.sendall(post(chat("endless", stream=True, max_tokens=100_000)))
        response = lines.enter_context(closing(HTTPResponse(line)))
        response.begin()
        assert response.readline().startswith(b"data:")
        text = daemon.config.read_text(encoding="utf-8")
        capped = text.replace("[defaults]", "models_max = 3\n[defaults]")
        daemon.config.write_text(f"{capped}retries = 1\n", encoding="utf-8")
        told = daemon.cli("reload").stdout
        assert "gateway retries" in told
        assert "router" not in told
        daemon.config.write_text(f'{capped}[defaults.env]\nMARK = "1"\n', encoding="utf-8")
        assert "router main" in daemon.cli("reload").stdout
        assert "settings have changed" in daemon.wait_for_router("degraded")["reason"]
        assert any(response.readline().startswith(b"data:") for _ in range(5))
        assert daemon.router()["pid"] == before
    eventually(lambda: daemon.router()["pid"] not in {None, before}, what="a fresh process")
    assert daemon.chat("alpha") == "I am alpha"


def test_an_unload_by_a_person_lets_the_answer_end(daemon: RunningDaemon) -> None:
    """And says that it is not done while that takes; who asks for the model next waits."""
    with line_to(daemon) as line:
        line.sendall(post(chat("endless", stream=True, max_tokens=100_000)))
        with closing(HTTPResponse(line)) as response:
            response.begin()
            assert response.readline().startswith(b"data:")
            assert daemon.call("POST", "/control/v1/models/endless/unload?wait=0.5")[0] == 504
            assert any(response.readline().startswith(b"data:") for _ in range(5))
            ps = daemon.call("GET", "/control/v1/ps")[1]
            assert next(model["in_flight"] for model in ps["models"] if model["model"] == "endless") == 1
    daemon.wait_for_model("endless", "unloaded")
    assert daemon.events("ModelUnloaded")[-1]["reason"] == "requested"
