"""What a client meets that waits, drains, keys and conversations have to do with, before a true llama-server."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from front import Front
from gateway import Gateway as StagedFleet
from llamavisord.config import GatewaySettings
from llamavisord.gateway.keys import read_keys
from llamavisord.gateway.replies import Trouble
from llamavisord.tiny_model import write_tiny_model

pytestmark = [pytest.mark.anyio, pytest.mark.real]

GIB = 2**30
CHAT = "/v1/chat/completions"


@asynccontextmanager
async def front(tmp_path: Path, llama_server: Path, **settings: Any) -> AsyncIterator[tuple[Front, httpx.AsyncClient]]:
    """A gateway with room for one model at a time, and a client of it."""
    models = tmp_path / "models"
    models.mkdir()
    for name in ("alpha", "beta"):
        write_tiny_model(models / f"{name}.gguf", ["I", "am", name])
    write_tiny_model(models / "endless.gguf", ["on", "and"], loop=True)
    staged = StagedFleet(tmp_path, models, llama_server, memory=8 * GIB, api_key="inner", models_max=1)
    async with (
        staged.running("alpha", "beta", "endless"),
        Front(staged, GatewaySettings(**settings)).running() as it,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{it.port}", trust_env=False, timeout=30) as client,
    ):
        yield it, client


def chat(model: str | None, **more: Any) -> dict[str, Any]:
    """The body of a chat."""
    named = {} if model is None else {"model": model}
    return {**named, "messages": [{"role": "user", "content": "hi"}], **more}


def keyed(key: str) -> dict[str, str]:
    """The header that carries a key."""
    return {"Authorization": f"Bearer {key}"}


async def until_inside(it: Front, count: int) -> None:
    """Wait until so many requests are in the gateway."""
    with anyio.fail_after(15):
        while it.traffic.drain.inside != count:
            await anyio.sleep(0.005)


async def lines_until(lines: AsyncIterator[str], beginning: str) -> str:
    """Read a stream up to the first line that begins so."""
    async for line in lines:
        if line.startswith(beginning):
            return line
    raise AssertionError(f"the stream ended before {beginning!r}")


async def test_a_stream_that_waits_may_have_a_heartbeat(tmp_path: Path, llama_server: Path) -> None:
    """Comments come while its model is waited for, and then the answer as always."""
    async with front(tmp_path, llama_server) as (it, client):
        busy = await it.fleet.leases.acquire("alpha")
        headers = {"X-Llamavisor-Heartbeat": "1"}
        async with client.stream("POST", CHAT, json=chat("beta", stream=True), headers=headers) as answer:
            lines = answer.aiter_lines()
            assert answer.status_code == 200
            assert await lines_until(lines, ":") == ": waiting"
            it.fleet.leases.release(busy)
            said = [json.loads(line[6:]) async for line in lines if line.startswith("data: {")]
        text = "".join(each["choices"][0]["delta"].get("content") or "" for each in said)
        assert text.strip() == "I am beta"


async def test_a_heartbeat_says_who_may_read_it(tmp_path: Path, llama_server: Path) -> None:
    """Its head comes from us: a browser needs leave to read it, a proxy is told not to keep it back."""
    async with front(tmp_path, llama_server) as (it, client):
        busy = await it.fleet.leases.acquire("alpha")
        headers = {"X-Llamavisor-Heartbeat": "1", "Origin": "http://localhost:3000"}
        async with client.stream("POST", CHAT, json=chat("beta", stream=True), headers=headers) as answer:
            assert answer.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
            assert answer.headers["X-Accel-Buffering"] == "no"
        it.fleet.leases.release(busy)
        await it.until_nothing_is_left()


@pytest.mark.parametrize("heartbeat", ["nan", "inf", "often", "-1"])
async def test_a_heartbeat_that_makes_no_sense_does_no_harm(tmp_path: Path, llama_server: Path, heartbeat: str) -> None:
    """The answer comes as without one, or as with the quickest."""
    async with front(tmp_path, llama_server) as (_, client):
        headers = {"X-Llamavisor-Heartbeat": heartbeat}
        answer = await client.post(CHAT, json=chat("beta", stream=True), headers=headers)
        assert answer.status_code == 200
        assert answer.text.endswith("data: [DONE]\n\n")


async def test_what_a_model_refuses_after_a_heartbeat_is_told_in_its_words(tmp_path: Path, llama_server: Path) -> None:
    """It is the client's mistake, and no failure of the server."""
    async with front(tmp_path, llama_server) as (it, client):
        busy = await it.fleet.leases.acquire("alpha")
        headers = {"X-Llamavisor-Heartbeat": "1"}
        asked = {"model": "beta", "stream": True, "messages": "none"}
        async with client.stream("POST", CHAT, json=asked, headers=headers) as answer:
            lines = answer.aiter_lines()
            await lines_until(lines, ":")
            it.fleet.leases.release(busy)
            told = json.loads((await lines_until(lines, "data:")).removeprefix("data: "))
        assert told["error"]["type"] == "invalid_request_error"
        assert told["error"]["code"] == 400


async def test_a_process_that_is_killed_while_it_loads_is_loaded_again(tmp_path: Path, llama_server: Path) -> None:
    """Who waits for it waits a little longer."""
    async with front(tmp_path, llama_server) as (it, client):
        write_tiny_model(tmp_path / "models" / "slow.gguf", ["slow"], n_layer=200, n_ctx=60_000)
        await it.fleet.look(within_s=10)
        with anyio.fail_after(15):
            await it.staged.router.wait_until(lambda: it.staged.router.table.get("slow") is not None)
        told: list[httpx.Response] = []

        async def ask() -> None:
            told.append(await client.post(CHAT, json=chat("slow", max_tokens=1)))

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            with anyio.fail_after(15):
                while not (children := it.staged.children):
                    await anyio.sleep(0.005)
            os.kill(children[0], signal.SIGKILL)
        assert told[0].status_code == 200, told[0].text


async def test_what_goes_wrong_after_a_heartbeat_is_an_event(tmp_path: Path, llama_server: Path) -> None:
    """The status is 200 by then: a client of the API knows the event for an error."""
    async with front(tmp_path, llama_server, wait_s=2.5) as (it, client):
        async with it.fleet.lease("alpha"):
            headers = {"X-Llamavisor-Heartbeat": "1"}
            asked = {**chat("beta", stream=True), "max_tokens": 5}
            async with client.stream("POST", "/v1/messages", json=asked, headers=headers) as answer:
                text = (await answer.aread()).decode()
        assert answer.status_code == 200
        assert ": waiting" in text
        event = text[text.index("event: error") :]
        told = json.loads(event.splitlines()[1].removeprefix("data: "))
        assert told["type"] == "error"
        assert "who holds it is busy: alpha" in told["error"]["message"]


async def test_who_waits_too_long_is_told_when_to_come_again(tmp_path: Path, llama_server: Path) -> None:
    """503, and the other model goes on."""
    async with front(tmp_path, llama_server, wait_s=0.3) as (it, client):
        async with it.fleet.lease("alpha"):
            refused = await client.post(CHAT, json=chat("beta"))
            served = await client.post(CHAT, json=chat("alpha"))
        assert (refused.status_code, served.status_code) == (503, 200)
        assert int(refused.headers["Retry-After"]) >= 1
        assert "beta" in refused.json()["error"]["message"]


async def test_a_default_model_serves_who_names_none(tmp_path: Path, llama_server: Path) -> None:
    """It may be an alias or not be there: then that is said."""
    async with front(tmp_path, llama_server, default_model="beta") as (_, client):
        answer = await client.post(CHAT, json=chat(None))
        assert answer.json()["choices"][0]["message"]["content"].strip() == "I am beta"
        assert (await client.post(CHAT, json=chat("alpha"))).json()["model"] == "alpha"


async def test_a_drain_turns_new_requests_away_and_finishes_the_others(tmp_path: Path, llama_server: Path) -> None:
    """Health says so too, which turns a load balancer away; afterwards all is as before."""
    async with front(tmp_path, llama_server) as (it, client):
        async with client.stream("POST", CHAT, json=chat("endless", stream=True, max_tokens=300)) as stream:
            lines = stream.aiter_lines()
            await lines_until(lines, "data:")
            it.traffic.drain.begin("a test")
            refused = await client.post(CHAT, json=chat("alpha"))
            assert refused.status_code == 503
            assert "Retry-After" in refused.headers
            assert (await client.get("/health")).status_code == 503
            assert await lines_until(lines, "data: [DONE]")
        with anyio.fail_after(15):
            await it.traffic.drain.wait_empty()
        it.traffic.drain.end()
        assert (await client.post(CHAT, json=chat("alpha"))).status_code == 200


async def test_the_end_is_told_to_whoever_is_in_it(tmp_path: Path, llama_server: Path) -> None:
    """A stream ends with an error event, who waits gets 503; nothing is left of either."""
    async with front(tmp_path, llama_server) as (it, client):
        waiting: list[httpx.Response] = []

        async def wait() -> None:
            waiting.append(await client.post(CHAT, json=chat("alpha")))

        async with client.stream("POST", CHAT, json=chat("endless", stream=True, max_tokens=100_000)) as stream:
            lines = stream.aiter_lines()
            await lines_until(lines, "data:")
            async with anyio.create_task_group() as group:
                group.start_soon(wait)
                await until_inside(it, 2)
                assert it.gateway is not None
                it.gateway.end_all(Trouble(503, "the server ends"))
                rest = [line async for line in lines]
        assert "the server ends" in rest[-2]
        assert "error" in json.loads(rest[-2].removeprefix("data: "))
        assert waiting[0].status_code == 503
        await it.until_nothing_is_left()


async def test_a_conversation_is_read_again_by_who_began_it(tmp_path: Path, llama_server: Path) -> None:
    """And by nobody else; a stop ends it."""
    keys = tmp_path / "keys"
    keys.write_text("ann secret-of-ann\nbob secret-of-bob\n", encoding="ascii")
    async with front(tmp_path, llama_server, keys=read_keys(keys)[0]) as (it, client):
        ann, bob = keyed("secret-of-ann"), keyed("secret-of-bob")
        headers = {**ann, "X-Conversation-Id": "c1"}
        async with client.stream("POST", CHAT, json=chat("alpha", stream=True), headers=headers) as stream:
            whole = await stream.aread()
        again = await client.get("/v1/stream", params={"conv_id": "c1", "from": "0"}, headers=ann)
        assert again.status_code == 200
        assert again.content.strip() == whole.strip()
        assert (await client.get("/v1/stream", params={"conv_id": "c1"}, headers=bob)).status_code == 404
        asked = {"conversation_ids": ["c1", "c2", 3]}
        found = (await client.post("/v1/streams/lookup", json=asked, headers=ann)).json()
        assert [each["conversation_id"] for each in found] == ["c1"]
        assert (await client.post("/v1/streams/lookup", json=asked, headers=bob)).json() == []
        assert (await client.delete("/v1/stream", params={"conv_id": "c1"}, headers=ann)).status_code == 204
        assert (await client.get("/v1/stream", params={"conv_id": "c1"}, headers=ann)).status_code == 404
        await it.until_nothing_is_left()


async def test_nobody_reads_a_conversation_by_asking_for_two(tmp_path: Path, llama_server: Path) -> None:
    """What is checked is what is asked for; and the id of another's conversation cannot be taken over."""
    keys = tmp_path / "keys"
    keys.write_text("ann secret-of-ann\nbob secret-of-bob\n", encoding="ascii")
    async with front(tmp_path, llama_server, keys=read_keys(keys)[0]) as (_, client):
        for name in ("ann", "bob"):
            headers = {**keyed(f"secret-of-{name}"), "X-Conversation-Id": f"of-{name}"}
            assert (await client.post(CHAT, json=chat("alpha", stream=True), headers=headers)).status_code == 200
        bob = keyed("secret-of-bob")
        for query in ("conv_id=of-bob&conv_id=of-ann&from=0", "conv_id=of-ann&conv_id=of-bob&from=0"):
            answer = await client.get(f"/v1/stream?{query}", headers=bob)
            own = await client.get("/v1/stream?conv_id=of-bob&from=0", headers=bob)
            assert answer.status_code == 404 or answer.content == own.content
        taken = {**bob, "X-Conversation-Id": "of-ann"}
        assert (await client.post(CHAT, json=chat("alpha", stream=True), headers=taken)).status_code == 403
        ann = keyed("secret-of-ann")
        assert (await client.get("/v1/stream?conv_id=of-ann&from=0", headers=ann)).status_code == 200


async def test_a_conversation_that_failed_is_forgotten(tmp_path: Path, llama_server: Path) -> None:
    """It is not loading, and never will be."""
    async with front(tmp_path, llama_server, wait_s=0.2) as (it, client):
        async with it.fleet.lease("alpha"):
            headers = {"X-Conversation-Id": "lost"}
            assert (await client.post(CHAT, json=chat("beta", stream=True), headers=headers)).status_code == 503
        assert (await client.get("/v1/stream", params={"conv_id": "lost"})).status_code == 404


async def test_a_stop_ends_a_conversation_that_waits(tmp_path: Path, llama_server: Path) -> None:
    """Its request is told so, as llama-server does."""
    async with front(tmp_path, llama_server) as (it, client):
        told: list[httpx.Response] = []

        async def ask() -> None:
            told.append(await client.post(CHAT, json=chat("beta"), headers={"X-Conversation-Id": "c"}))

        async with it.fleet.lease("alpha"), anyio.create_task_group() as group:
            group.start_soon(ask)
            await until_inside(it, 1)
            with anyio.fail_after(15):
                while (await client.get("/v1/stream", params={"conv_id": "c"})).status_code != 503:
                    await anyio.sleep(0.01)
            assert (await client.delete("/v1/stream", params={"conv_id": "c"})).status_code == 204
        assert told[0].status_code == 400
        assert "cancelled" in told[0].json()["error"]["message"]


async def test_keys_say_who_may_do_what(tmp_path: Path, llama_server: Path) -> None:
    """No key, a wrong one, one for some models, one without admin, one with."""
    keys = tmp_path / "keys"
    keys.write_text("boss the-boss-key admin\nguest the-guest-key models=al*\n", encoding="ascii")
    async with front(tmp_path, llama_server, keys=read_keys(keys)[0]) as (it, client):
        boss, guest = keyed("the-boss-key"), {"x-api-key": "the-guest-key"}
        assert (await client.get("/health")).status_code == 200
        assert (await client.post(CHAT, json=chat("alpha"))).status_code == 401
        assert (await client.post(CHAT, json=chat("alpha"), headers=keyed("no"))).status_code == 401
        assert (await client.post(CHAT, json=chat("alpha"), headers=guest)).status_code == 200
        assert (await client.post(CHAT, json=chat("beta"), headers=guest)).status_code == 403
        listed = (await client.get("/v1/models", headers=guest)).json()["data"]
        assert [each["id"] for each in listed] == ["alpha"]
        for path in ("/models/load", "/models/unload"):
            assert (await client.post(path, json={"model": "alpha"}, headers=guest)).status_code == 403
        assert (await client.get("/models?reload=1", headers=guest)).status_code == 403
        assert (await client.get("/models?reload=1", headers=boss)).status_code == 200
        assert (await client.post("/models/unload", json={"model": "alpha"}, headers=boss)).status_code == 200
        # What is no JSON is worded by a router, which does not know the guest: it must not be of any use.
        for end in (b"]", b"\0", b"\0x", b"\0" * 9 + b"{}"):
            odd = json.dumps(chat("beta")).encode() + end
            assert (await client.post(CHAT, content=odd, headers=guest)).status_code in {400, 403}
        assert {slot.key[1] for slot in it.fleet.memory.scheduler.admission.slots()} <= {"alpha"}


async def test_a_body_that_ends_with_a_nul_is_as_good_as_one_without(tmp_path: Path, llama_server: Path) -> None:
    """C programs send their buffers so; llama-server's parser stops there, and so do we, for loads too."""
    async with front(tmp_path, llama_server) as (it, client):
        answer = await client.post(CHAT, content=json.dumps(chat("beta")).encode() + b"\0junk")
        assert answer.json()["choices"][0]["message"]["content"].strip() == "I am beta"
        assert (await client.post("/models/load", content=b'{"model":"beta"}\0')).status_code == 400
        deep = b'{"model":"alpha","x":' + b"[" * 3000 + b"]" * 3000 + b"}"
        assert (await client.post("/models/load", content=deep)).status_code == 200
        with anyio.fail_after(15):
            while not it.fleet.memory.scheduler.where.is_loaded("alpha"):
                await anyio.sleep(0.01)
        assert (await client.head("/models/sse")).status_code == 200
