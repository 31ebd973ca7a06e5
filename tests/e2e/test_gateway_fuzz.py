"""Requests that were damaged at random: the gateway answers or hangs up, and goes on."""

from __future__ import annotations

import json
import re
import socket
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from fakes.waiting import eventually
from running import RunningDaemon

pytestmark = pytest.mark.real

RUNS = 400
LISTEN_S = 0.1
"""How long more is waited for: a request that was cut off has no answer."""
_PIECES = (
    b"\r\n",
    b"\r",
    b"\n",
    b"\0",
    b"\xff",
    b" ",
    b":",
    b"{",
    b'"',
    b"\\",
    b"%",
    b"Content-Length: 5\r\n",
    b"chunked",
)
_STATUS = re.compile(rb"HTTP/\d\.\d (\d{3}) ")


def _requests() -> list[bytes]:
    """Proper requests of every kind."""
    chat = json.dumps({"model": "alpha", "max_tokens": 3, "messages": [{"role": "user", "content": "hi"}]}).encode()
    stream = chat[:-1] + b', "stream": true}'
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nalpha\r\n--b--\r\n'

    def post(path: str, body: bytes, *headers: str) -> bytes:
        lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers, "", ""]
        return "\r\n".join(lines).encode() + body

    def chunked(path: str, body: bytes) -> bytes:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        return head.encode() + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)

    return [
        post("/v1/chat/completions", chat),
        post("/v1/chat/completions", stream, "X-Conversation-Id: c", "X-Llamavisor-Heartbeat: 1"),
        post("/v1/messages", chat, "Expect: 100-continue"),
        chunked("/v1/chat/completions", stream),
        post("/v1/audio/transcriptions", form, "Content-Type: multipart/form-data; boundary=b"),
        post("/models/load", b'{"model": "beta"}', "Connection: close"),
        post("/v1/streams/lookup", b'{"conversation_ids": ["c"]}'),
        b"GET /v1/models?reload=1 HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n\r\n",
        b"GET /props?model=alpha&autoload=true HTTP/1.0\r\n\r\n",
        b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n\r\n",
    ]


def _damaged(request: bytes, choose: Random) -> bytes:
    """The same with some bytes changed, left out, put in or said twice."""
    for _ in range(choose.randint(1, 4)):
        at = choose.randrange(len(request) + 1)
        upto = min(len(request), at + choose.randint(1, 30))
        match choose.randrange(5):
            case 0:
                request = request[:at] + choose.randbytes(1) + request[at + 1 :]
            case 1:
                request = request[:at] + request[upto:]
            case 2:
                request = request[:at] + choose.choice(_PIECES) + request[at:]
            case 3:
                request = request[:upto] + request[at:]
            case _:
                request = request[:at]
    return request


def _ask(port: int, said: bytes) -> bytes:
    """What comes back until the other end hangs up, or says nothing for a while."""
    with socket.create_connection(("127.0.0.1", port), timeout=LISTEN_S) as line:
        heard = b""
        with suppress(ConnectionError, TimeoutError):
            line.sendall(said)
            while piece := line.recv(65536):
                heard += piece
        return heard


@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_requests_do_no_harm(tmp_path: Path, models_dir: Path, llama_server: Path, seed: int) -> None:
    """Each gets an answer of HTTP or none; then the daemon is at rest, has told of no bug, and serves."""
    choose, requests = Random(seed), _requests()
    with RunningDaemon(tmp_path, models_dir, llama_server) as daemon:
        for name in ("alpha", "beta", "gamma"):
            daemon.wait_for_model(name, "unloaded")
        statuses = set()
        for _ in range(RUNS):
            heard = _ask(daemon.port, _damaged(choose.choice(requests), choose))
            found = _STATUS.match(heard)
            assert heard == b"" or found, heard[:200]
            statuses |= {int(found[1])} if found else set()
        assert {200, 400} <= statuses

        def is_at_rest() -> bool:
            ps = daemon.call("GET", "/control/v1/ps")[1]
            gateway = daemon.status()["gateway"]
            busy = [model for model in ps["models"] if model["leases"]]
            return not busy and not ps["queues"] and not gateway["in_flight"] and not gateway["held_bytes"]

        eventually(is_at_rest, what="a daemon at rest")
        for name in ("alpha", "beta"):
            assert daemon.chat(name) == f"I am {name}"
        log = daemon.log.read_text(encoding="utf-8")
        assert "Traceback" not in log, log
        assert "a bug in llamavisor" not in log
