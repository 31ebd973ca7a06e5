"""The official clients of OpenAI and Anthropic use the gateway as their users do."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import anthropic
import anyio
import openai
import pytest
from anthropic.types import MessageParam, ToolParam
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from fakes.bare_router import free_port
from fakes.waiting import PATIENCE_S, eventually
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon

pytestmark = pytest.mark.real

KEY = "not-wanted"
HI: Sequence[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
HELLO: Sequence[MessageParam] = [{"role": "user", "content": "hi"}]
FREED_S = 5.0
"""How long a generation may go on that nobody waits for. A second is promised; undisturbed it takes half a minute."""
LOOK_S = 1.5
"""llama-server looks whether the client of a whole answer is still there when no request of this model has got a result
for a second: asked more often for its slots, it never looks."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, llama_server: Path) -> Iterator[RunningDaemon]:
    """A gateway over models that say who they are, one that goes on for ever, and one that cannot be loaded."""
    folder = tmp_path_factory.mktemp("clients")
    models = folder / "models"
    models.mkdir()
    for name in ("alpha", "beta"):
        write_tiny_model(models / f"{name}.gguf", ["I", "am", name])
    write_tiny_model(models / "emb.gguf", ["I"], pooling=1)
    write_tiny_model(models / "ever.gguf", ["on", "and"], loop=True, n_layer=100, n_ctx=20_000)
    write_tiny_model(models / "broken.gguf", ["I"], n_layer=0)
    port = free_port()
    config = f"""
serve = "gateway"
port = {port}
models_dir = "{models}"
models_max = 0
[defaults]
threads = 1
[metrics]
enabled = false
[model.emb]
embeddings = true
[model.ever]
parallel = 1
"""
    with RunningDaemon(folder, models, llama_server, config=config) as running:
        running.port = port
        running.wait_for_router("ready")
        yield running


@pytest.fixture
def openai_client(daemon: RunningDaemon) -> Iterator[openai.OpenAI]:
    """OpenAI's client, which does not try again by itself."""
    with openai.OpenAI(base_url=_v1(daemon), api_key=KEY, max_retries=0, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
def anthropic_client(daemon: RunningDaemon) -> Iterator[anthropic.Anthropic]:
    """Anthropic's client, which does not try again by itself."""
    url = f"http://127.0.0.1:{daemon.port}"
    with anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0, timeout=PATIENCE_S) as client:
        yield client


def _v1(daemon: RunningDaemon) -> str:
    return f"http://127.0.0.1:{daemon.port}/v1"


def _openai(daemon: RunningDaemon) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=_v1(daemon), api_key=KEY, max_retries=0, timeout=PATIENCE_S)


def _slots(daemon: RunningDaemon, model: str) -> list[bool]:
    """Of each slot of a model whether it is generating."""
    with closing(HTTPConnection("127.0.0.1", daemon.port, timeout=PATIENCE_S)) as line:
        line.request("GET", f"/slots?model={model}")
        return [slot["is_processing"] for slot in json.loads(line.getresponse().read())]


def _kill(daemon: RunningDaemon, model: str) -> None:
    pid = eventually(lambda: daemon.model(model)["pid"], what=f"the pid of {model}")
    os.kill(pid, signal.SIGKILL)


# --- OpenAI -----------------------------------------------------------------------------------------------------------


def test_openai_chat(openai_client: openai.OpenAI) -> None:
    """A chat gets what the model says, with the count of tokens."""
    answer = openai_client.chat.completions.create(model="alpha", messages=HI)
    assert answer.choices[0].message.content == " I am alpha"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


def test_openai_stream(openai_client: openai.OpenAI) -> None:
    """A stream comes in pieces, and the last one has the usage that was asked for."""
    stream = openai_client.chat.completions.create(
        model="alpha", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    with stream:
        chunks = list(stream)
    said = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(said) == " I am alpha"
    assert len([piece for piece in said if piece]) == 3
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4


@pytest.mark.anyio
async def test_openai_many_at_once(daemon: RunningDaemon) -> None:
    """Many clients at once, of models that are loaded and not, each get the answer of theirs."""
    said: list[tuple[str, str]] = []

    async def ask(client: openai.AsyncOpenAI, model: str) -> None:
        async with await client.chat.completions.create(model=model, messages=HI, stream=True) as stream:
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        said.append((model, "".join(pieces)))

    async with _openai(daemon) as client, anyio.create_task_group() as group:
        for at in range(24):
            group.start_soon(ask, client, ("alpha", "beta")[at % 2])
    assert sorted(said) == [("alpha", " I am alpha")] * 12 + [("beta", " I am beta")] * 12


def test_openai_completions(openai_client: openai.OpenAI) -> None:
    """The older API answers too, streamed and not."""
    assert openai_client.completions.create(model="alpha", prompt="hi").choices[0].text == " I am alpha"
    with openai_client.completions.create(model="alpha", prompt="hi", stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == " I am alpha"


def test_openai_embeddings(openai_client: openai.OpenAI) -> None:
    """Texts become vectors, one each."""
    answer = openai_client.embeddings.create(model="emb", input=["one", "two"])
    assert [len(each.embedding) for each in answer.data] == [32, 32]


def test_openai_models(openai_client: openai.OpenAI) -> None:
    """All models are listed, loaded or not, each once."""
    assert sorted(model.id for model in openai_client.models.list()) == ["alpha", "beta", "broken", "emb", "ever"]


def test_openai_responses(openai_client: openai.OpenAI) -> None:
    """The newer API answers too, and its stream ends with the whole answer."""
    answer = openai_client.responses.create(model="alpha", input="hi")
    assert answer.output_text == " I am alpha"
    with openai_client.responses.create(model="alpha", input="hi", stream=True) as stream:
        events = list(stream)
    assert events[-1].type == "response.completed"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == " I am alpha"


def test_openai_tools(openai_client: openai.OpenAI) -> None:
    """Definitions of tools are no hindrance; this model cannot call any, and says what it always says."""
    weather: ChatCompletionToolParam = {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
    answer = openai_client.chat.completions.create(model="alpha", messages=HI, tools=[weather], tool_choice="auto")
    assert answer.choices[0].message.content == " I am alpha"


def test_openai_errors_are_typed(openai_client: openai.OpenAI) -> None:
    """What goes wrong is an exception of the client's own, with the message that llama-server has for it."""
    with pytest.raises(openai.BadRequestError, match="model 'nobody' not found"):
        openai_client.chat.completions.create(model="nobody", messages=HI)
    with pytest.raises(openai.BadRequestError, match="model 'nobody' not found"):
        openai_client.chat.completions.create(model="nobody", messages=HI, stream=True)
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("alpha")
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.chat.completions.create(model="alpha", messages=[{"role": "user", "content": "x " * 9000}])
    assert caught.value.type == "exceed_context_size_error"
    with pytest.raises(openai.InternalServerError, match="embeddings"):
        openai_client.embeddings.create(model="alpha", input="hi")


def test_openai_model_that_cannot_load(openai_client: openai.OpenAI) -> None:
    """A model that cannot be loaded is a server's error that says why, in llama-server's words."""
    with pytest.raises(openai.InternalServerError, match=r"broken.*GGML_ASSERT"):
        openai_client.chat.completions.create(model="broken", messages=HI)


def test_openai_stream_that_breaks(openai_client: openai.OpenAI, daemon: RunningDaemon) -> None:
    """A model that dies in the middle of a stream is an exception in its reader, not an end that looks whole."""
    stream = openai_client.chat.completions.create(model="ever", messages=HI, stream=True, max_tokens=10_000)
    with stream:
        next(iter(stream))
        _kill(daemon, "ever")
        with pytest.raises(openai.APIError, match="ever"):
            list(stream)


def test_openai_killed_before_the_answer(openai_client: openai.OpenAI, daemon: RunningDaemon) -> None:
    """A request whose model dies before it said anything is answered all the same, and tells of the second try."""
    openai_client.chat.completions.create(model="beta", messages=HI)
    _kill(daemon, "beta")
    answer = openai_client.chat.completions.create(model="beta", messages=HI)
    assert answer.choices[0].message.content == " I am beta"


def test_openai_headers_tell_of_the_way(openai_client: openai.OpenAI) -> None:
    """Who asks for the raw answer learns which router it was, and how long the model was waited for."""
    raw = openai_client.chat.completions.with_raw_response.create(model="alpha", messages=HI)
    assert raw.headers["x-llamavisor-router"] == "main"
    assert float(raw.headers["x-llamavisor-queue-seconds"]) >= 0
    assert float(raw.headers["x-llamavisor-load-seconds"]) >= 0
    assert raw.parse().choices[0].message.content == " I am alpha"


def test_openai_closed_stream_frees_the_slot(openai_client: openai.OpenAI, daemon: RunningDaemon) -> None:
    """Who closes a stream ends its generation: the slot is free for the next."""
    with openai_client.chat.completions.create(model="ever", messages=HI, stream=True) as stream:
        next(iter(stream))
        assert _slots(daemon, "ever") == [True]
    eventually(lambda: _slots(daemon, "ever") == [False], what="a free slot", within_s=FREED_S)


@pytest.mark.anyio
async def test_openai_cancelled_request_frees_the_slot(daemon: RunningDaemon) -> None:
    """So does who gives up waiting for a whole answer."""
    async with _openai(daemon) as client, anyio.create_task_group() as group:
        group.start_soon(lambda: client.chat.completions.create(model="ever", messages=HI))
        with anyio.fail_after(PATIENCE_S):
            while await anyio.to_thread.run_sync(_slots, daemon, "ever") != [True]:
                await anyio.sleep(0.01)
        group.cancel_scope.cancel()

    def is_free() -> bool:
        time.sleep(LOOK_S)
        return _slots(daemon, "ever") == [False]

    eventually(is_free, what="a free slot", within_s=FREED_S)


# --- Anthropic --------------------------------------------------------------------------------------------------------


def _text(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_anthropic_message(anthropic_client: anthropic.Anthropic) -> None:
    """A message gets what the model says, with the count of tokens."""
    message = anthropic_client.messages.create(model="alpha", max_tokens=16, messages=HELLO, system="be brief")
    assert _text(message) == " I am alpha"
    assert message.usage.output_tokens == 4


def test_anthropic_stream(anthropic_client: anthropic.Anthropic) -> None:
    """A stream comes in pieces, and ends with the whole message."""
    with anthropic_client.messages.stream(model="alpha", max_tokens=16, messages=HELLO) as stream:
        pieces = list(stream.text_stream)
        message = stream.get_final_message()
    assert pieces == [" I", " am", " alpha"]
    assert _text(message) == " I am alpha"


@pytest.mark.anyio
async def test_anthropic_async_stream(daemon: RunningDaemon) -> None:
    """So does the client for asyncio."""
    url = f"http://127.0.0.1:{daemon.port}"
    asking = anthropic.AsyncAnthropic(base_url=url, api_key=KEY, max_retries=0, timeout=PATIENCE_S)
    async with asking as client, client.messages.stream(model="alpha", max_tokens=16, messages=HELLO) as stream:
        assert "".join([piece async for piece in stream.text_stream]) == " I am alpha"


def test_anthropic_counts_tokens(anthropic_client: anthropic.Anthropic) -> None:
    """Tokens are counted without an answer, and with the definitions of tools."""
    weather: ToolParam = {"name": "weather", "input_schema": {"type": "object"}}
    plain = anthropic_client.messages.count_tokens(model="alpha", messages=HELLO).input_tokens
    system = anthropic_client.messages.count_tokens(model="alpha", messages=HELLO, system="x", tools=[weather])
    assert 0 < plain < system.input_tokens


def test_anthropic_errors_are_typed(anthropic_client: anthropic.Anthropic) -> None:
    """What goes wrong is an exception of the client's own."""
    with pytest.raises(anthropic.BadRequestError, match="model 'nobody' not found"):
        anthropic_client.messages.create(model="nobody", max_tokens=16, messages=HELLO)
    with pytest.raises(anthropic.APIStatusError, match="GGML_ASSERT") as caught:
        anthropic_client.messages.create(model="broken", max_tokens=16, messages=HELLO)
    assert caught.value.status_code >= 500
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["type"] == "error"


def test_anthropic_stream_that_breaks(anthropic_client: anthropic.Anthropic, daemon: RunningDaemon) -> None:
    """A model that dies in the middle of a stream is an exception in its reader."""
    with anthropic_client.messages.stream(model="ever", max_tokens=10_000, messages=HELLO) as stream:
        next(stream.text_stream)
        _kill(daemon, "ever")
        with pytest.raises(anthropic.APIError, match="ever"):
            list(stream.text_stream)


def test_anthropic_closed_stream_frees_the_slot(anthropic_client: anthropic.Anthropic, daemon: RunningDaemon) -> None:
    """Who closes a stream ends its generation."""
    with anthropic_client.messages.stream(model="ever", max_tokens=19_000, messages=HELLO) as stream:
        next(stream.text_stream)
        assert _slots(daemon, "ever") == [True]
    eventually(lambda: _slots(daemon, "ever") == [False], what="a free slot", within_s=FREED_S)


# --- daemons of their own ---------------------------------------------------------------------------------------------


def test_keys(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """Both clients send their key each in its own way; without the right one they get their exception for that."""
    keys = tmp_path / "keys"
    keys.write_text("boss top-secret-1 admin\nguest top-secret-2 models=alpha\n", encoding="ascii")
    keys.chmod(0o600)
    port = free_port()
    config = f"""
serve = "gateway"
port = {port}
models_dir = "{models_dir}"
api_key_file = "{keys}"
[defaults]
threads = 1
[metrics]
enabled = false
"""

    def ask(key: str, model: str) -> str | None:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0) as client:
            return client.chat.completions.create(model=model, messages=HI).choices[0].message.content

    def message(key: str, model: str) -> str:
        with anthropic.Anthropic(base_url=f"http://127.0.0.1:{port}", api_key=key, max_retries=0) as client:
            return _text(client.messages.create(model=model, max_tokens=16, messages=HELLO))

    with RunningDaemon(tmp_path, models_dir, llama_server, config=config) as daemon:
        daemon.wait_for_router("ready")
        assert ask("top-secret-1", "beta") == message("top-secret-1", "beta") == " I am beta"
        assert ask("top-secret-2", "alpha") == message("top-secret-2", "alpha") == " I am alpha"
        with pytest.raises(openai.AuthenticationError):
            ask("top-secret-3", "alpha")
        with pytest.raises(anthropic.AuthenticationError):
            message("top-secret-3", "alpha")
        with pytest.raises(openai.PermissionDeniedError, match="beta"):
            ask("top-secret-2", "beta")
        with pytest.raises(anthropic.PermissionDeniedError, match="beta"):
            message("top-secret-2", "beta")


def test_retry_after_a_full_queue(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """Where only one may wait for a model, the others are told when to come again; the client does that by itself."""
    write_tiny_model(models_dir / "slow.gguf", ["slow"], n_layer=200, n_ctx=60_000)
    port = free_port()
    config = f"""
serve = "gateway"
port = {port}
models_dir = "{models_dir}"
[defaults]
threads = 1
[metrics]
enabled = false
[gateway]
max_waiting_per_model = 1
"""
    retries: list[int] = []

    def ask() -> None:
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key=KEY, max_retries=10, timeout=60.0) as client:
            raw = client.chat.completions.with_raw_response.create(model="slow", messages=HI)
            assert raw.parse().choices[0].message.content == " slow"
            retries.append(raw.retries_taken)

    with RunningDaemon(tmp_path, models_dir, llama_server, config=config) as daemon:
        daemon.wait_for_router("ready")
        threads = [threading.Thread(target=ask, name=f"client-{at}") for at in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(retries) == 3
    assert min(retries) == 0
    assert max(retries) > 0
