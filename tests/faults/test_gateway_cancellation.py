"""X1: a client may leave at any moment of its request, and nothing of that request is left behind."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc
import pytest

from front import Front
from gateway import Gateway as StagedFleet
from llamavisor.events import RequestEnded, RequestOutcome
from llamavisord.tiny_model import write_tiny_model

pytestmark = [pytest.mark.anyio, pytest.mark.real]

GIB = 2**30
MOMENTS = 40
"""So many moments are tried of each kind of request."""
STEP_S = 0.002
"""Between two of them where the clock and not the event loop moves a request on: a load takes about 40 ms."""
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset


@asynccontextmanager
async def front(tmp_path: Path, llama_server: Path) -> AsyncIterator[Front]:
    """A gateway with a model that says a sentence, and one that never stops."""
    models = tmp_path / "models"
    models.mkdir()
    write_tiny_model(models / "alpha.gguf", ["I", "am", "alpha"])
    write_tiny_model(models / "endless.gguf", ["on", "and"], loop=True)
    staged = StagedFleet(tmp_path, models, llama_server, memory=8 * GIB, api_key="k")
    async with staged.running("alpha", "endless"), Front(staged).running() as running:
        yield running


def request(model: str, *, stream: bool, headers: str = "") -> bytes:
    """A whole request for a chat."""
    asked = {"model": model, "stream": stream, "max_tokens": 4000, "messages": [{"role": "user", "content": "hi"}]}
    body = json.dumps(asked).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body


async def ask_and_leave(port: int, said: bytes, *, ticks: int, wait_s: float, with_reset: bool) -> None:
    """Send something, and hang up after so many turns of the event loop and so many seconds."""
    async with await anyio.connect_tcp("127.0.0.1", port) as client:
        await client.send(said)
        for _ in range(ticks):
            await anyio.lowlevel.checkpoint()
        await anyio.sleep(wait_s)
        if with_reset:
            raw = client.extra(anyio.abc.SocketAttribute.raw_socket)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


@pytest.mark.parametrize("stream", [False, True])
async def test_x1_leaving_a_loaded_model(tmp_path: Path, llama_server: Path, stream: bool) -> None:
    """X1: at the k-th turn of the event loop, for every k: its lease, its bytes and its place are given back."""
    async with front(tmp_path, llama_server) as it:
        async with it.fleet.lease("endless"):
            pass
        said = request("endless", stream=stream)
        for moment in range(MOMENTS):
            await ask_and_leave(it.port, said, ticks=moment, wait_s=0.0, with_reset=bool(moment % 2))
            await it.until_nothing_is_left()
        assert {slot.key[1] for slot in it.fleet.memory.scheduler.admission.slots()} == {"endless"}
        ended = [event for event in it.staged.events if isinstance(event, RequestEnded)]
        assert {event.outcome for event in ended} == {RequestOutcome.LEFT}


async def test_x1_leaving_a_load(tmp_path: Path, llama_server: Path) -> None:
    """X1: while the model is loaded, and right after, nobody is in the way of the next."""
    async with front(tmp_path, llama_server) as it:
        said = request("endless", stream=True)
        for moment in range(MOMENTS):
            await ask_and_leave(it.port, said, ticks=0, wait_s=moment * STEP_S, with_reset=bool(moment % 2))
            await it.until_nothing_is_left()
            await it.fleet.unload(it.staged.router, "endless")
        async with it.fleet.lease("alpha"):
            pass


async def test_x1_leaving_in_the_middle_of_a_request(tmp_path: Path, llama_server: Path) -> None:
    """X1: what has come of its body is not held, and no model is asked."""
    async with front(tmp_path, llama_server) as it:
        said = request("alpha", stream=False)
        for cut in range(1, len(said), 7):
            await ask_and_leave(it.port, said[:cut], ticks=3, wait_s=0.0, with_reset=bool(cut % 2))
            await it.until_nothing_is_left()
        assert it.fleet.memory.scheduler.admission.slots() == []


async def test_x1_a_conversation_outlives_its_client_at_any_moment(tmp_path: Path, llama_server: Path) -> None:
    """X1: its answer is finished all the same, and then nothing is left of it."""
    async with front(tmp_path, llama_server) as it:
        async with it.fleet.lease("alpha"):
            pass
        for moment in range(0, MOMENTS, 2):
            said = request("alpha", stream=True, headers=f"X-Conversation-Id: c{moment}\r\n")
            await ask_and_leave(it.port, said, ticks=moment + 8, wait_s=0.0, with_reset=bool(moment % 4))
            await it.until_nothing_is_left()
        ended = [event for event in it.staged.events if isinstance(event, RequestEnded)]
        assert ended
        assert {event.outcome for event in ended} <= {RequestOutcome.OK, RequestOutcome.LEFT}
        assert any(event.outcome is RequestOutcome.OK and event.tokens_out == 4 for event in ended)
