"""nginx and Caddy with the examples of deploy/ pass on what the gateway promises, unbuffered and unchanged."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from http.client import HTTPConnection
from pathlib import Path

import psutil
import pytest

from deploy.proxy import NAME, Caddy, Nginx, Proxy
from fakes.bare_router import free_port
from fakes.waiting import PATIENCE_S, eventually
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon

PROXIES = pytest.mark.parametrize("kind", [Nginx, Caddy])
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
MAX_BODY = 40 << 20
KEY = "sk-0123456789"
FREED_S = 5.0
"""How long a generation may go on that nobody waits for; undisturbed it takes half a minute."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, llama_server: Path) -> Iterator[RunningDaemon]:
    """A gateway without keys that answers to the name of the proxy, over two quick models and an endless one."""
    folder = tmp_path_factory.mktemp("behind")
    models = folder / "models"
    models.mkdir()
    write_tiny_model(models / "alpha.gguf", ["I", "am", "alpha"])
    write_tiny_model(models / "ever.gguf", ["on", "and"], loop=True, n_layer=100, n_ctx=20_000)
    write_tiny_model(models / "beta.gguf", ["I", "am", "beta"])
    with _behind(folder, models, llama_server, f'allow_hosts = ["{NAME}"]\nmax_body = {MAX_BODY}') as running:
        for name in ("alpha", "ever", "beta"):
            running.wait_for_model(name, "unloaded")
        yield running


def _behind(folder: Path, models: Path, llama_server: Path, gateway: str, top: str = "") -> RunningDaemon:
    port = free_port()
    config = f"""
port = {port}
models_dir = "{models}"
models_max = 0
{top}
[defaults]
threads = 1
[metrics]
enabled = false
[model.ever]
parallel = 1
[gateway]
{gateway}
"""
    running = RunningDaemon(folder, models, llama_server, config=config)
    running.port = port
    return running


def chat(model: str, **more: object) -> bytes:
    """The body of a chat."""
    return json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], **more}).encode()


@PROXIES
def test_the_example_is_valid(tmp_path: Path, kind: type[Proxy]) -> None:
    """The proxy itself has nothing to say against it, not even a warning."""
    checked = kind(tmp_path, free_port()).check()
    assert checked.returncode == 0, checked.stderr
    assert "warn" not in checked.stderr.lower()


class Upstream:
    """A server of one connection that a test drives by hand: nothing is sent or read before the test says so."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(PATIENCE_S)
        self.port: int = self._listener.getsockname()[1]
        self.line: socket.socket | None = None

    def __repr__(self) -> str:
        return f"<Upstream {self.port}>"

    def close(self) -> None:
        """Close what is open."""
        self._listener.close()
        if self.line is not None:
            self.line.close()

    def take(self) -> bytes:
        """Accept the connection, and read up to the end of the head; what has come by then."""
        self.line, _ = self._listener.accept()
        self.line.settimeout(PATIENCE_S)
        return self.read_until(b"\r\n\r\n")

    def read_until(self, mark: bytes, had: bytes = b"") -> bytes:
        """Read until this has come, and return all of it."""
        assert self.line is not None
        while mark not in had:
            piece = self.line.recv(65536)
            assert piece, f"the proxy hung up after {had!r}"
            had += piece
        return had

    def send(self, data: bytes) -> None:
        """Send it now."""
        assert self.line is not None
        self.line.sendall(data)


@PROXIES
@pytest.mark.parametrize("content_type", ["text/event-stream", "application/octet-stream"])
def test_an_answer_comes_piece_by_piece(tmp_path: Path, kind: type[Proxy], content_type: str) -> None:
    """The client has each piece before the next one is sent, without any hint in the headers of the answer."""
    with closing(Upstream()) as upstream, kind(tmp_path, upstream.port) as proxy, closing(proxy.connect()) as client:
        client.request("GET", "/stream")
        upstream.take()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n"
        upstream.send(head.encode())
        with closing(client.getresponse()) as answer:
            for number in range(20):
                event = f"data: {number}\n\n".encode()
                upstream.send(b"%x\r\n%s\r\n" % (len(event), event))
                assert answer.readline() + answer.readline() == event
            upstream.send(b"0\r\n\r\n")
            assert answer.read() == b""


@PROXIES
def test_a_body_passes_piece_by_piece(tmp_path: Path, kind: type[Proxy]) -> None:
    """The gateway has the beginning of a body before the client has sent its end: no disk is written to first."""
    with closing(Upstream()) as upstream, kind(tmp_path, upstream.port) as proxy, closing(proxy.connect()) as client:
        client.putrequest("POST", CHAT)
        client.putheader("Content-Length", "12")
        client.endheaders()
        client.send(b"first.")
        had = upstream.read_until(b"first.", upstream.take())
        client.send(b"second")
        upstream.read_until(b"first.second", had)
        upstream.send(b"HTTP/1.1 204 No Content\r\n\r\n")
        with closing(client.getresponse()) as answer:
            assert answer.status == 204


@PROXIES
def test_a_client_that_gives_up_waiting_is_noticed(tmp_path: Path, kind: type[Proxy]) -> None:
    """The gateway sees its connection end when a client leaves that has no data of its answer yet."""
    with closing(Upstream()) as upstream, kind(tmp_path, upstream.port) as proxy:
        with closing(proxy.connect()) as client:
            client.request("POST", CHAT, b"{}", JSON)
            upstream.read_until(b"{}", upstream.take())
        assert upstream.line is not None
        assert upstream.line.recv(1) == b""


@PROXIES
def test_the_gateway_is_told_who_asks_and_for_what(tmp_path: Path, kind: type[Proxy]) -> None:
    """It gets the client's Host, address and scheme, and connections are kept for the next request."""
    with closing(Upstream()) as upstream, kind(tmp_path, upstream.port) as proxy, closing(proxy.connect()) as client:
        for _ in range(2):  # the second one comes on the same connection: nobody accepts another
            client.request("GET", "/v1/models")
            head = upstream.read_until(b"\r\n\r\n") if upstream.line else upstream.take()
            lines = head.decode().lower().split("\r\n")
            assert lines[0] == "get /v1/models http/1.1"
            assert f"host: {NAME}:{proxy.port}" in lines
            assert f"x-forwarded-host: {NAME}:{proxy.port}" in lines
            assert "x-forwarded-for: 127.0.0.1" in lines
            assert "x-forwarded-proto: https" in lines
            assert "connection: close" not in lines
            upstream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            with closing(client.getresponse()) as answer:
                assert answer.read() == b"{}"


@PROXIES
@pytest.mark.real
def test_a_streamed_chat(tmp_path: Path, kind: type[Proxy], daemon: RunningDaemon) -> None:
    """A chat streams to its end through proxy, gateway and llama-server, under the public name."""
    with kind(tmp_path, daemon.port) as proxy, closing(proxy.connect()) as client:
        client.request("POST", CHAT, chat("alpha", stream=True), JSON)
        with closing(client.getresponse()) as answer:
            assert answer.status == 200
            events = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: ")]
        deltas = (json.loads(event)["choices"][0]["delta"] for event in events[:-1])
        assert "".join(delta.get("content") or "" for delta in deltas).strip() == "I am alpha"
        assert events[-1] == "[DONE]"


@PROXIES
@pytest.mark.real
def test_a_client_that_leaves_is_noticed(tmp_path: Path, kind: type[Proxy], daemon: RunningDaemon) -> None:
    """The generation of a client that hangs up on the proxy is cancelled."""
    with kind(tmp_path, daemon.port) as proxy:
        with closing(proxy.connect()) as client:
            client.request("POST", CHAT, chat("ever", stream=True, max_tokens=19_000), JSON)
            with closing(client.getresponse()) as answer:
                assert answer.readline().startswith(b"data:")
                assert _is_busy(daemon)
        eventually(lambda: not _is_busy(daemon), what="a cancelled generation", within_s=FREED_S)


def _is_busy(daemon: RunningDaemon) -> bool:
    """Whether the only slot of the endless model is generating."""
    with closing(HTTPConnection("127.0.0.1", daemon.port, timeout=PATIENCE_S)) as connection:
        connection.request("GET", "/slots?model=ever")
        (slot,) = json.loads(connection.getresponse().read())
        return bool(slot["is_processing"])


@PROXIES
@pytest.mark.real
def test_a_large_body_passes(tmp_path: Path, kind: type[Proxy], daemon: RunningDaemon) -> None:
    """A body of 30 MB, as pictures make it, is answered."""
    with kind(tmp_path, daemon.port) as proxy, closing(proxy.connect()) as client:
        client.request("POST", CHAT, chat("alpha", padding="x" * 30_000_000), JSON)
        with closing(client.getresponse()) as answer:
            said = json.loads(answer.read())
            assert answer.status == 200, said
        assert said["choices"][0]["message"]["content"].strip() == "I am alpha"


@PROXIES
@pytest.mark.real
def test_a_heartbeat_passes(tmp_path: Path, kind: type[Proxy], daemon: RunningDaemon) -> None:
    """Who waits for a model to load hears of it through the proxy, comment by comment."""
    router = psutil.Process(daemon.router()["pid"])
    with kind(tmp_path, daemon.port) as proxy, closing(proxy.connect()) as client:
        headers = {**JSON, "X-Llamavisor-Heartbeat": "1"}
        router.suspend()  # nothing is loaded before it goes on
        try:
            client.request("POST", CHAT, chat("beta", stream=True, max_tokens=1), headers)
            answer = client.getresponse()
            assert answer.readline().startswith(b":")
        finally:
            router.resume()
        with closing(answer):
            assert b"data: [DONE]" in answer.read()
    assert daemon.cli("unload", "beta").returncode == 0


@PROXIES
@pytest.mark.real
def test_errors_pass_unchanged(tmp_path: Path, kind: type[Proxy], daemon: RunningDaemon) -> None:
    """What the gateway or the model refuses is told through the proxy word for word: no page of its own."""
    refused = {
        "no such model": (chat("nobody"), {}, 400),
        "no JSON": (b"{", {}, 400),
        "too large": (bytes(MAX_BODY + 1), {}, 413),
    }
    with kind(tmp_path, daemon.port) as proxy:
        for what, (body, headers, status) in refused.items():
            with ExitStack() as lines:
                direct = HTTPConnection("127.0.0.1", daemon.port, timeout=PATIENCE_S)
                answers = [
                    _refusal(lines.enter_context(closing(client)), body, headers)
                    for client in (direct, proxy.connect())
                ]
            assert answers[0] == answers[1], what
            assert answers[0][0] == status, (what, answers)


def _refusal(client: HTTPConnection, body: bytes, headers: dict[str, str]) -> tuple[int, str | None, str]:
    client.putrequest("POST", CHAT)
    for name, value in {"Content-Length": str(len(body)), **JSON, **headers}.items():
        client.putheader(name, value)
    client.endheaders()
    with suppress(BrokenPipeError, ConnectionResetError, ssl.SSLError):  # who refuses a body need not read all of it
        client.send(body)
    with closing(client.getresponse()) as answer:
        return answer.status, answer.getheader("Content-Type"), answer.read().decode()


@PROXIES
@pytest.mark.real
def test_keys_pass(tmp_path: Path, kind: type[Proxy], models_dir: Path, llama_server: Path) -> None:
    """With keys, no name has to be allowed: who shows one through the proxy is served, who does not gets a 401."""
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n", encoding="ascii")
    keys.chmod(0o600)
    running = _behind(tmp_path, models_dir, llama_server, "", f'api_key_file = "{keys}"')
    with running, kind(tmp_path, running.port) as proxy:
        running.wait_for_model("alpha", "unloaded")
        for headers, status in ((JSON, 401), ({**JSON, "Authorization": f"Bearer {KEY}"}, 200)):
            with closing(proxy.connect()) as client:
                client.request("POST", CHAT, chat("alpha"), headers)
                with closing(client.getresponse()) as answer:
                    answer.read()
                    assert answer.status == status


@PROXIES
@pytest.mark.real
def test_without_keys_the_name_has_to_be_allowed(
    tmp_path: Path, kind: type[Proxy], models_dir: Path, llama_server: Path
) -> None:
    """A proxy before a gateway that knows neither keys nor its name gets the 403 that says what to do."""
    running = _behind(tmp_path, models_dir, llama_server, "")
    with running, kind(tmp_path, running.port) as proxy, closing(proxy.connect()) as client:
        running.wait_for_gateway()
        client.request("GET", "/v1/models")
        with closing(client.getresponse()) as answer:
            assert answer.status == 403
            assert b"allow_hosts" in answer.read()
