"""The HTTP API of one llama-server router, typed; the only module that speaks HTTP to it.

What it answers is read leniently (a newer build may say more) and boundedly (a broken one may say anything). See
llama.cpp's tools/server/README.md, "Using multiple models"; checked against build b11434.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

import anyio
import anyio.lowlevel
import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from llamavisor import procfs
from llamavisor.errors import ApiError
from llamavisor.states import ModelState

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 10.0
LOAD_TIMEOUT_S = 60.0
"""/models/load answers after a model that has to leave has stopped, which takes up to its stop-timeout."""
RELOAD_TIMEOUT_S = 120.0
"""A reload opens the header of every GGUF in the folder."""
TRIAL_TIMEOUT_S = 30.0
"""How long an idle model may take for one token: longer than the slowest, and shorter than anybody's patience."""
ANSWER_BYTES = 64 * 1024 * 1024
"""A longer answer is no answer; 3,000 models make 2 MB."""
HEALTH_BYTES = 64 * 1024
EVENT_BYTES = 1024 * 1024

_LIST = re.compile(rb'\s*\{\s*"data"\s*:\s*\[\s*')
_COMMA = re.compile(r"\s*,?\s*")
_SLICE_BYTES = 256 * 1024
_SLICE = 64
"""A list longer than `_SLICE_BYTES` is read in pieces of so many models, a few milliseconds each."""

_STATES = {
    "unloaded": ModelState.UNLOADED,
    "downloaded": ModelState.UNLOADED,
    "loading": ModelState.LOADING,
    "loaded": ModelState.LOADED,
    "sleeping": ModelState.SLEEPING,
    "downloading": ModelState.DOWNLOADING,
}


_LIVE = frozenset({"unloaded", "loading", "loaded", "sleeping"})
"""What an event may tell of a model that the list knows; a download is no model yet."""


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


_A = TypeVar("_A", bound=_Answer)


class _Status(_Answer):
    value: str
    args: tuple[str, ...] = ()
    exit_code: int = 0
    failed: bool = False


class _Meta(_Answer):
    model_config = ConfigDict(extra="allow", frozen=True)  # clients are shown it as it came

    n_ctx: int | None = None


class _Info(_Answer):
    architecture: object = None
    meta: _Meta | None = None


class _Model(_Info):
    id: str
    status: _Status


class _Models(_Answer):
    data: tuple[_Model, ...]


class _Health(_Answer):
    status: Literal["ok"]


class _Props(_Answer):
    model_config = ConfigDict(extra="allow", frozen=True)

    role: str = ""
    build_info: str | None = None


class _Progress(_Answer):
    current: str = ""
    value: float = 0.0


class _EventData(_Answer):
    status: str | None = None
    exit_code: int | None = None
    progress: _Progress | None = None  # of a download it has other fields; the defaults stand then
    info: _Info | None = None


class _Event(_Answer):
    model: str
    event: str
    data: _EventData | None = None


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One entry of GET /models.

    Attributes:
        name: the router's name of the model.
        state: its state; a word that this version does not know is `ModelState.UNKNOWN`.
        failed: whether its last process ended with anything but success.
        path: file that it is loaded from, None when the router does not say.
        n_ctx: context length in tokens that it really got, None while it is not loaded.
        info: what its process says of it, as it came: `architecture` and `meta`; None while it is not loaded.
    """

    name: str
    state: ModelState
    failed: bool
    path: Path | None
    n_ctx: int | None
    info: Mapping[str, object] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class StatusEvent:
    """One message of GET /models/sse that tells of a model's state.

    Attributes:
        model: name of the model.
        state: its new state.
        exit_code: with UNLOADED: 0 for a clean end, 1 for any signal.
        stage: with LOADING: what is being loaded, for example "text_model".
        progress: with LOADING: fraction of the stage, 0 to 1.
        n_ctx: with LOADED: context length in tokens.
        info: with LOADED: what its process says of it, as for `ListedModel`.
    """

    model: str
    state: ModelState
    exit_code: int | None = None
    stage: str | None = None
    progress: float | None = None
    n_ctx: int | None = None
    info: Mapping[str, object] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Props:
    """What GET /props says: whether this is a router, which build, and all of it as it came."""

    is_router: bool
    build: str | None
    document: Mapping[str, object] = field(default_factory=dict, repr=False)


class RouterApi:
    """A client of one router, with a small pool of its own. Use it as an async context manager.

    Proxy variables of the environment are ignored: the router is on this machine.

    Args:
        url: address of the router, without a path.
        api_key: the key that it asks for, if any.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            # llama-server closes a connection that was idle for 5 s; ours are given up before that.
            limits=httpx.Limits(max_connections=16, max_keepalive_connections=2, keepalive_expiry=3.0),
            trust_env=False,
            # Plain HTTP to this machine: loading the certificates of the world would take 30 ms of every restart.
            verify=False,  # noqa: S501
        )
        self.url = url

    def __repr__(self) -> str:
        return f"<RouterApi {self.url}>"

    async def __aenter__(self) -> Self:
        """Open the pool."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the pool."""
        await self._client.aclose()

    async def check_health(self, *, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """Ask whether the router answers at all; says nothing of its models.

        Raises:
            ApiError: it does not, or not as llama-server does.
        """
        _parse(_Health, await self._call("GET", "/health", timeout_s=timeout_s, limit=HEALTH_BYTES), "/health")

    async def props(self) -> Props:
        """What the router says of itself.

        Raises:
            ApiError: no understandable answer.
        """
        answer = _parse(_Props, await self._call("GET", "/props"), "/props")
        return Props(answer.role == "router", answer.build_info, answer.model_dump())

    async def models(self, *, reload: bool = False) -> list[ListedModel]:
        """The models that the router knows, after it has read its folder and preset again if `reload`.

        A reload stops running models that are gone or changed and blocks until they have stopped: see to that first.

        Raises:
            ApiError: no understandable answer, or the reload was refused (its message says why).
        """
        path = "/models?reload=1" if reload else "/models"
        body = await self._call("GET", path, timeout_s=RELOAD_TIMEOUT_S if reload else ANSWER_TIMEOUT_S)
        return [_listed(model) async for model in _parse_models(body, path)]

    async def command_line(self, name: str) -> tuple[str, ...] | None:
        """The words by which the router starts, or would start, a model; None if it does not list it.

        Raises:
            ApiError: no understandable answer.
        """
        body = await self._call("GET", "/models")
        found = [model.status.args async for model in _parse_models(body, "/models") if model.id == name]
        return found[0] if found else None

    async def load(self, name: str) -> None:
        """Have the router start loading a model. It is not loaded when this returns.

        Raises:
            ApiError: refused; status 400 also means that it runs already, 500 that no place could be made.
        """
        await self._call("POST", "/models/load", json_body={"model": name}, timeout_s=LOAD_TIMEOUT_S)

    async def unload(self, name: str) -> None:
        """Have the router start unloading a model. It is not gone when this returns. A loading model is killed.

        Raises:
            ApiError: refused; status 400 also means that it does not run.
        """
        await self._call("POST", "/models/unload", json_body={"model": name})

    async def complete(self) -> None:
        """Have a model make one token; asked of the process of a model.

        Raises:
            ApiError: it did not; status 501 when it is a model that makes none.
        """
        asked: dict[str, object] = {"prompt": "a", "n_predict": 1, "cache_prompt": False}
        await self._call("POST", "/completion", json_body=asked, timeout_s=TRIAL_TIMEOUT_S)

    async def embed(self) -> None:
        """Have an embedding model embed one letter; asked of the process of a model.

        Raises:
            ApiError: it did not; status 501 when it is a model that does not.
        """
        await self._call("POST", "/embedding", json_body={"content": "a"}, timeout_s=TRIAL_TIMEOUT_S)

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[StatusEvent | None]]:
        """Follow the router's events; entered once the subscription exists, so nothing after that is missed.

        None stands for an event that tells of something else than a model's state, or in words of a future build: a
        reason to read the list again.

        There is no heartbeat and no replay: a quiet stream is normal, and after a reconnect the list is read again.

        Raises:
            ApiError: status 404 when this build has no event stream, None when the connection broke.
        """
        timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S, read=None)
        try:
            async with self._client.stream("GET", "/models/sse", timeout=timeout) as response:
                if response.status_code != 200:
                    raise ApiError("GET /models/sse was refused", status=response.status_code)
                yield _status_events(response)
        except httpx.HTTPError as exc:
            raise ApiError(f"GET /models/sse broke: {_reason(exc)}") from exc

    async def _call(
        self,
        method: str,
        path: str,
        *,
        json_body: Mapping[str, object] | None = None,
        timeout_s: float = ANSWER_TIMEOUT_S,
        limit: int = ANSWER_BYTES,
    ) -> bytes:
        """The body of a 200 answer, at most `limit` bytes, within `timeout_s` in all."""
        body = bytearray()
        try:
            with anyio.fail_after(timeout_s):
                async with self._client.stream(method, path, json=json_body, timeout=timeout_s) as response:
                    async for chunk in response.aiter_bytes():
                        body += chunk
                        if len(body) > limit:
                            raise ApiError(f"{method} {path}: the answer exceeds {limit} bytes")
        except TimeoutError as exc:
            raise ApiError(f"{method} {path}: no answer within {timeout_s:.0f} s") from exc
        except httpx.HTTPError as exc:
            raise ApiError(f"{method} {path}: {_reason(exc)}") from exc
        if response.status_code != 200:
            raise ApiError(f"{method} {path}: {_message(bytes(body))}", status=response.status_code)
        return bytes(body)


async def try_model(port: int, *, api_key: str | None) -> str | None:
    """Have the process of a model do the least that it can do: one token, or what an embedding model does instead.

    Args:
        port: where it listens on 127.0.0.1.
        api_key: the key that it asks for, if any.

    Returns:
        What went wrong; None if it works.
    """
    async with RouterApi(f"http://127.0.0.1:{port}", api_key=api_key) as api:
        try:
            try:
                await api.complete()
            except ApiError as error:
                if error.status != 501:
                    return str(error)
                await api.embed()
        except ApiError as error:
            return None if error.status == 501 else str(error)  # a reranker does neither
    return None


async def _status_events(response: httpx.Response) -> AsyncIterator[StatusEvent | None]:
    """Read `data:` lines."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > EVENT_BYTES:
            raise ApiError(f"GET /models/sse: a line exceeds {EVENT_BYTES} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                yield _status_event(line[5:])


def _status_event(raw: bytes) -> StatusEvent | None:
    try:
        event = _Event.model_validate_json(raw)
    except ValidationError:
        return None
    # Three names have been used for the same thing over time: model_status, status_update, status_change.
    if event.data is None or event.data.status not in _LIVE:
        return None
    progress, info = event.data.progress, event.data.info
    return StatusEvent(
        model=event.model,
        state=_STATES[event.data.status],
        exit_code=event.data.exit_code,
        stage=progress.current if progress else None,
        progress=progress.value if progress else None,
        n_ctx=info.meta.n_ctx if info and info.meta else None,
        info=_as_it_came(info) if info else None,
    )


def _listed(model: _Model) -> ListedModel:
    path = procfs.option_value(list(model.status.args), "--model")
    return ListedModel(
        name=model.id,
        state=_STATES.get(model.status.value, ModelState.UNKNOWN),
        failed=model.status.failed,
        path=Path(path) if path else None,
        n_ctx=model.meta.n_ctx if model.meta else None,
        info=_as_it_came(model),
    )


def _as_it_came(info: _Info) -> Mapping[str, object] | None:
    """What the process of a model has said of it; None if it has not spoken yet."""
    if info.meta is None:
        return None
    said = {"architecture": info.architecture, "meta": info.meta.model_dump(exclude_unset=True)}
    return {key: value for key, value in said.items() if value is not None}


async def _parse_models(body: bytes, path: str) -> AsyncIterator[_Model]:
    """The models of a list. One of thousands is taken apart piece by piece, so that nothing else waits for long."""
    begin = _LIST.match(body[:100])
    if len(body) <= _SLICE_BYTES or begin is None:
        for model in _parse(_Models, body, path).data:
            yield model
        return
    count = 0
    decoder = json.JSONDecoder()
    try:
        text, at = body.decode(), begin.end()
        while not text.startswith("]", at):
            piece, at = decoder.raw_decode(text, at)
            yield _Model.model_validate(piece)
            at = _COMMA.match(text, at).end()  # type: ignore[union-attr] # it matches the empty text too
            count += 1
            if count % _SLICE == 0:
                await anyio.lowlevel.checkpoint()
    except (ValueError, RecursionError) as exc:  # a ValidationError and a JSONDecodeError are ValueErrors, too
        raise ApiError(f"{path}: the answer is not what a llama-server router says: {_excerpt(body)}") from exc


def _parse(kind: type[_A], body: bytes, path: str) -> _A:
    try:
        return kind.model_validate_json(body)
    except ValidationError as exc:
        raise ApiError(f"{path}: the answer is not what a llama-server router says: {_excerpt(body)}") from exc


def _message(body: bytes) -> str:
    """The message of an error body, which is JSON in most cases and plain text labelled JSON in some."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return _excerpt(body) or "an empty answer"


def _excerpt(body: bytes) -> str:
    text = bytes(body[:200]).decode("utf-8", "replace")
    return "".join(char if char.isprintable() else " " for char in text).strip()


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
