"""What llamavisor relies on when it asks a model's process how much it is used, of the fake one and the true one."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from http.client import HTTPConnection
from pathlib import Path

import anyio
import psutil
import pytest

from fakes import FakeLlamaServer
from fakes.bare_router import PRESET, BareRouter, ModelProcess, make_slow
from fakes.waiting import PATIENCE_S, eventually
from llamavisor.usage import Usage, UsageError, UsageReader, parse
from llamavisord.tiny_model import write_tiny_model

pytestmark = pytest.mark.anyio

ENDLESS = f"{PRESET}context-shift = 1\nparallel = 1\n"
"""With context-shift an answer goes on when the context is full; one slot, so that a second request has to wait."""
METRICS = [
    ("prompt_tokens_total", "counter"),
    ("prompt_tokens_cached_total", "counter"),
    ("prompt_seconds_total", "counter"),
    ("tokens_predicted_total", "counter"),
    ("tokens_predicted_seconds_total", "counter"),
    ("n_decode_total", "counter"),
    ("n_tokens_max", "counter"),
    ("spec_decode_num_draft_tokens_total", "counter"),
    ("spec_decode_num_accepted_tokens_total", "counter"),
    ("spec_decode_num_drafts_total", "counter"),
    ("prompt_tokens_seconds", "gauge"),
    ("predicted_tokens_seconds", "gauge"),
    ("requests_processing", "gauge"),
    ("requests_deferred", "gauge"),
    ("n_busy_slots_per_decode", "gauge"),
]


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.real)])
def program(request: pytest.FixtureRequest, fake_llama_server: Callable[..., FakeLlamaServer]) -> str:
    """A llama-server: first the fake, which speaks slowly, then the true one."""
    if request.param == "real":
        return str(request.getfixturevalue("llama_server"))
    return str(fake_llama_server(model={"token_s": 0.002}, models={"slow": {"load_s": 3.0}}))


@asynccontextmanager
async def reading(process: ModelProcess, api_key: str | None = None) -> AsyncIterator[UsageReader]:
    """A reader of one process."""
    async with aclosing(UsageReader(process.port, api_key=api_key)) as reader:
        yield reader


@contextmanager
def streaming(router: BareRouter, name: str) -> Iterator[None]:
    """A client that has asked for an answer as a stream, and waits for it."""
    connection = HTTPConnection("127.0.0.1", router.port, timeout=PATIENCE_S)
    body = {"model": name, "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    try:
        yield
    finally:
        connection.close()


async def usage_that(reader: UsageReader, wanted: Callable[[Usage], bool]) -> Usage:
    """The first usage that is wanted; it is read until then."""
    with anyio.fail_after(PATIENCE_S):
        while not wanted(usage := await reader.read()):
            await anyio.sleep(0.01)
    return usage


def test_the_metrics_that_there_are(router: BareRouter) -> None:
    """A model's process tells these numbers, in this order and notation, its work in the counters."""
    process = router.load("alpha")
    assert router.chat("alpha").status == 200
    answer = router.call("GET", "/metrics", port=process.port)
    assert answer.headers["Keep-Alive"] == "timeout=5, max=100"
    assert answer.headers["Process-Start-Time-Unix"].isdigit()
    comments = [line.split() for line in answer.text.splitlines() if line.startswith("# TYPE ")]
    assert [(name, kind) for _, _, name, kind in comments] == [(f"llamacpp:{name}", kind) for name, kind in METRICS]
    numbers = [line.split() for line in answer.text.splitlines() if not line.startswith("#")]
    values = {name.removeprefix("llamacpp:"): float(number) for name, number in numbers}
    assert [*values] == [name for name, _ in METRICS]
    for name in ("prompt_tokens_total", "tokens_predicted_total", "n_decode_total"):
        assert values[name] >= 3
    assert parse(answer.text.encode()).in_flight == 0


def test_the_rates_begin_anew_when_somebody_asks(router: BareRouter) -> None:
    """The rates tell of what was done since the last time that anybody asked; the counters go on."""
    process = router.load("alpha")

    def rates() -> list[bool]:
        text = router.call("GET", "/metrics", port=process.port).text
        names = ("prompt_tokens_seconds", "predicted_tokens_seconds")
        lines = (line.split() for line in text.splitlines())
        return [float(value) > 0 for name, value, *_ in lines if name.removeprefix("llamacpp:") in names]

    assert rates() == [False, False]
    for _ in range(2):
        assert router.chat("alpha").status == 200
        assert rates() == [True, True]
        assert rates() == [False, False]


async def test_an_idle_model(router: BareRouter) -> None:
    """Nothing is in flight and no work is done, however often it is read; an answer is work."""
    async with reading(router.load("alpha")) as reader:
        first = await reader.read()
        assert first.in_flight == 0
        for _ in range(20):
            assert await reader.read() == first
        for _ in range(3):
            before = await reader.read()
            assert router.chat("alpha").status == 200
            after = await usage_that(reader, lambda usage: usage.in_flight == 0)
            assert after.work > before.work


async def test_requests_in_flight(start: Callable[..., BareRouter], models_dir: Path) -> None:
    """An answer that streams is in flight and its work grows; so is one that waits for a slot, until both are left."""
    write_tiny_model(models_dir / "endless.gguf", ["on", "and"], loop=True)
    with start(preset=ENDLESS) as router:
        async with reading(router.load("endless")) as reader:
            with streaming(router, "endless"):
                usage = await usage_that(reader, lambda usage: usage.in_flight == 1)
                for _ in range(3):
                    before = usage.work
                    usage = await usage_that(reader, lambda usage, before=before: usage.work > before)
                    assert usage.in_flight == 1
                with streaming(router, "endless"):
                    await usage_that(reader, lambda usage: usage.in_flight == 2)
                # That client has left; its request waits on all the same, until it gets the slot.
            await usage_that(reader, lambda usage: usage.in_flight == 0)


async def test_reading_neither_wakes_a_model_nor_keeps_it_awake(start: Callable[..., BareRouter]) -> None:
    """A model that is read all the time falls asleep in its time, stays asleep, and has done nothing meanwhile."""
    with start(preset=f"{PRESET}sleep-idle-seconds = 1\n") as router, router.events() as events:
        process = router.load("alpha")
        async with reading(process) as reader:
            assert router.chat("alpha").status == 200
            used = await reader.read()
            began = anyio.current_time()
            while router.status("alpha") != "sleeping":
                assert (await reader.read()) == used
                assert anyio.current_time() - began < PATIENCE_S
                await anyio.sleep(0.1)
            told = len(events.all)
            for _ in range(10):
                assert await reader.read() == used
                assert router.status("alpha") == "sleeping"
                await anyio.sleep(0.3)
            assert events.all[told:] == []
            assert router.chat("alpha").status == 200
            assert (await usage_that(reader, lambda usage: usage.work > used.work)).in_flight in {0, 1}
        assert router.processes() == [process]


async def test_the_api_key(start: Callable[..., BareRouter]) -> None:
    """With LLAMA_API_KEY the process asks for the key; without the right one it answers 401."""
    with start(env={"LLAMA_API_KEY": "sesame-0451"}) as router:
        process = router.load("alpha")
        async with reading(process, "sesame-0451") as reader:
            for _ in range(2):
                assert (await reader.read()).in_flight == 0
        for key in (None, "sesame-0452"):
            async with reading(process, key) as reader:
                with pytest.raises(UsageError, match="refuses the API key") as caught:
                    await reader.read()
            assert caught.value.status == 401
            assert "sesame" not in str(caught.value)


async def test_a_key_that_nobody_asks_for(router: BareRouter) -> None:
    """Without LLAMA_API_KEY a key does no harm."""
    async with reading(router.load("alpha"), "sesame-0451") as reader:
        assert (await reader.read()).in_flight == 0


async def test_metrics_that_are_off(start: Callable[..., BareRouter]) -> None:
    """Without `metrics = 1` the answer is 501."""
    with start(preset="[*]\nthreads = 1\n") as router:
        async with reading(router.load("alpha")) as reader:
            with pytest.raises(UsageError, match="metrics = 1") as caught:
                await reader.read()
            assert caught.value.status == 501


async def test_a_model_that_is_loading(start: Callable[..., BareRouter], models_dir: Path) -> None:
    """A process answers 503 until it has loaded, and is then read by the same reader."""
    make_slow(models_dir, "slow")
    with start() as router, router.events() as events:
        assert router.call("POST", "/models/load", {"model": "slow"}).status == 200
        events.wait_for(lambda event: "progress" in event["data"])
        async with reading(router.process_of("slow")) as reader:
            with pytest.raises(UsageError, match="still loading") as caught:
                await reader.read()
            assert caught.value.status == 503
            events.wait_for_status("slow", "loaded")
            assert (await reader.read()).in_flight == 0


async def test_many_reads(router: BareRouter) -> None:
    """The process ends a connection after some number of answers; no read fails for that."""
    async with reading(router.load("alpha")) as reader:
        for _ in range(250):
            assert (await reader.read()).in_flight == 0


async def test_the_process_hangs_up_after_five_seconds(router: BareRouter) -> None:
    """An idle connection is closed by the process after 5 s, and the next read does not mind."""
    async with reading(router.load("alpha")) as reader:
        await reader.read()
        connection = reader._connection
        assert connection is not None
        began = anyio.current_time()
        with anyio.fail_after(PATIENCE_S):
            await anyio.wait_readable(connection._plug)
        assert anyio.current_time() - began > 4
        assert (await reader.read()).in_flight == 0
        assert reader._connection is not connection


async def test_a_process_that_is_stopped(router: BareRouter) -> None:
    """A hanging process is unknown after the deadline, and read again when it goes on; one that has gone, at once."""
    process = router.load("alpha")
    async with reading(process) as reader:
        await reader.read()
        child = psutil.Process(process.pid)
        child.send_signal(signal.SIGSTOP)
        try:
            eventually(lambda: child.status() == psutil.STATUS_STOPPED)
            for _ in range(2):
                with pytest.raises(UsageError, match=r"no answer within 0\.2 s"):
                    await reader.read(timeout_s=0.2)
        finally:
            child.send_signal(signal.SIGCONT)
        assert (await reader.read()).in_flight == 0
        router.unload("alpha")
        eventually(lambda: not psutil.pid_exists(process.pid))
        with pytest.raises(UsageError, match="refused"):
            await reader.read()
