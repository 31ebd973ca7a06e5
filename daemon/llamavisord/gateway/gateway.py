"""The way of a request: who asks, for what, of which model; then it is sent on, or answered here.

One handler serves every path and method. Nothing of a request is trusted, and all that it can make grow is bounded: its
head by the server, its body by `intake`, its wait by admission and by time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import socket
import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from urllib.parse import parse_qs, urlencode

import anyio
import anyio.abc
from aiohttp import web

from llamavisor.events import Bus, RequestOutcome, Warned
from llamavisor.fleet import Fleet
from llamavisor.states import ModelState
from llamavisord.config import GatewaySettings
from llamavisord.gateway.conversations import Conversations, TakenError
from llamavisord.gateway.forward import Forwarder
from llamavisord.gateway.guard import Caller, Guard
from llamavisord.gateway.intake import Body, IntakeError, Stock, take_in
from llamavisord.gateway.management import Management, named_in
from llamavisord.gateway.peek import JsonPeek, Peek, peek_for
from llamavisord.gateway.relay import Relay
from llamavisord.gateway.replies import (
    GONE,
    LOADING,
    MISSING,
    NOT_LOADED,
    RETRY_S,
    SERVER,
    Reply,
    Trouble,
    TroubleError,
    not_found,
    ok,
)
from llamavisord.gateway.routes import (
    DOWNLOAD,
    HEALTH,
    LIST,
    LOAD,
    LOOKUP,
    NEWS,
    PREFLIGHT,
    PROPS,
    REMOVE,
    UNLOAD,
    Kind,
)
from llamavisord.gateway.visit import BODY_SHOWN, Visit
from llamavisord.traffic import Traffic

STALL_S = 60.0
"""A body of which nothing has come for so long is given up."""
SMALL_BYTES = 1024 * 1024
"""No body that is answered here is larger."""
WRONG_KEY_S = 60.0
OUTLIVING_MAX = 256
"""So many requests may outlive their clients at once; the next one ends with its client."""

HEARTBEAT = "X-Llamavisor-Heartbeat"
"""A client that streams asks with it for a sign of life every so many seconds while its model is waited for."""
HEARTBEAT_MIN_S, HEARTBEAT_MAX_S = 1.0, 300.0
CONVERSATION = "X-Conversation-Id"

FEW_HEADERS = 16
"""So many cannot be too large together: each is bounded by the server."""
HEAD_BYTES = 64 * 1024
"""A head is kept as long as its request waits, and counts nowhere else."""

_OK = Reply(200, b'{"status":"ok"}')
_NEWS_HEADERS = {"Server": SERVER, "Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}
_HEAD_TOO_LARGE = Trouble(431, f"the headers of the request take more than {HEAD_BYTES // 1024} KiB", closes=True)
_DRAINING = Trouble(503, "the server takes no requests for now", retry_after_s=RETRY_S, closes=True)
_ENDING = Trouble(503, "the server is about to end", retry_after_s=RETRY_S, closes=True)
_NOT_UNDERSTOOD = Trouble(400, "the body of the request is no JSON object or form that names a model", is_native=True)
_STOPPED = Trouble(400, "request cancelled by a stop while the model was loading", is_native=True)

_log = logging.getLogger("llamavisor")


class Gateway:
    """All requests of all clients.

    Args:
        fleet: the models.
        bus: hears of every request that has ended.
        settings: what it is told to be.
        traffic: counts what is in it.
        stock: bounds what bodies take.
        tasks: where what outlives a request goes on.
        spare: as for `Relay`.
    """

    def __init__(
        self,
        fleet: Fleet,
        bus: Bus,
        settings: GatewaySettings,
        *,
        traffic: Traffic,
        stock: Stock,
        tasks: anyio.abc.TaskGroup,
        spare: Callable[[], bool] = lambda: False,
    ) -> None:
        self._fleet = fleet
        self._bus = bus
        self._traffic = traffic
        self._stock = stock
        self._tasks = tasks
        self._relay = Relay(spare=spare)
        self._forwarder = Forwarder(fleet, settings, self._relay)
        self._management = Management(fleet, bus, tasks)
        self._conversations = Conversations(fleet.leases.is_there)
        self._visits: set[Visit] = set()
        self._outliving = 0
        self._wrong_keys, self._wrong_key_told_at = 0, -math.inf
        self.follow(settings)

    def __repr__(self) -> str:
        return f"<Gateway {self._traffic!r}>"

    def follow(self, settings: GatewaySettings) -> None:
        """Go by other settings from the next request on."""
        self._settings = self._forwarder.settings = settings
        self._guard = Guard(settings, own_names=(socket.gethostname(),))
        self._stock.limit_bytes = settings.max_held_bytes

    async def aclose(self) -> None:
        """Let go of all connections to children. Nobody is being answered any more."""
        self._management.close()
        await self._relay.aclose()

    def end_all(self, trouble: Trouble) -> None:
        """End all requests: each client is told the trouble, in its stream if that has begun."""
        self._management.close()
        for visit in tuple(self._visits):
            visit.end(trouble)

    # --- one request ----------------------------------------------------------------------------------------------

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; what aiohttp calls, and cancels when the client leaves."""
        visit = Visit(request)
        outlives = request.headers.get(CONVERSATION) and visit.route.kind is Kind.BODY
        if not outlives or self._outliving >= OUTLIVING_MAX:
            return await self._attend(visit)
        visit.answer.outlives_client = True
        outcome: list[web.StreamResponse] = []
        has_ended = anyio.Event()

        async def outlive() -> None:
            self._outliving += 1
            try:
                outcome.append(await self._attend(visit))
            except ConnectionError:
                pass  # the client left before its request was here
            finally:
                self._outliving -= 1
                has_ended.set()

        self._tasks.start_soon(outlive)
        try:
            await has_ended.wait()
        except BaseException:
            visit.answer.detach()
            raise
        if not outcome:
            raise ConnectionResetError
        return outcome[0]

    async def _attend(self, visit: Visit) -> web.StreamResponse:
        """See a request through, whatever becomes of it, and tell of it once."""
        outcome = RequestOutcome.LEFT
        visit.task = asyncio.current_task()
        self._visits.add(visit)
        try:
            response = await self._answer(visit)
        except TroubleError as error:
            outcome = visit.failure
            if error.trouble.status == HTTPStatus.UNAUTHORIZED:
                self._note_wrong_key(visit)
            return visit.fail(error.trouble)
        except ConnectionError:  # the client's
            raise
        except asyncio.CancelledError:
            # There are two cases: the client has left, or we end the request and its client is to be told.
            if visit.ending is None or visit.task is None or visit.task.uncancel():
                raise
            outcome = visit.failure
            return visit.fail(visit.ending)
        except Exception:  # noqa: BLE001 (a request's boundary)
            _log.exception("%s %s failed", visit.request.method, visit.route.name)
            outcome = RequestOutcome.FAILED
            return visit.fail(Trouble(500, "a bug in llamavisor; see its log"))
        else:
            outcome = RequestOutcome.OK
            return response
        finally:
            self._visits.discard(visit)
            visit.task = None
            if visit.conversation is not None:
                self._conversations.ended(visit.conversation)
            self._bus.publish(visit.ended(outcome, is_logged=self._settings.log_requests))

    async def _answer(self, visit: Visit) -> web.StreamResponse:
        request, route, guard = visit.request, visit.route, self._guard
        if len(request.raw_headers) > FEW_HEADERS and sum(map(_length, request.raw_headers)) > HEAD_BYTES:
            raise TroubleError(_HEAD_TOO_LARGE)
        visit.cors = visit.answer.extra_headers = list(guard.cors_headers(request.headers))
        visit.caller = caller = guard.admit(request.method, request.raw_path, request.headers, version=request.version)
        if route.needs_admin:
            caller.check_admin()
        if route is PREFLIGHT:
            return visit.reply(Reply(200, content_type="text/html", headers=dict(guard.preflight(request.headers))))
        if route.name == HEALTH:
            trouble = self._closed or (None if any(router.is_serving for router in self._fleet) else LOADING)
            return visit.reply(_OK if trouble is None else trouble.reply(route.api))
        if route.name == NEWS:
            return await self._tell_news(visit, caller)
        if (trouble := self._closed) is not None:
            raise TroubleError(trouble)
        with self._traffic.enter() as visit.passage:
            if route.kind is Kind.BODY:
                return await self._ask_by_body(visit, caller)
            if route.kind is Kind.QUERY or (route.name == PROPS and visit.query_model):
                return await self._ask_by_query(visit, caller)
            if route.kind is Kind.STREAM:
                return await self._resume(visit, caller)
            if route.kind is Kind.OWN:
                return await self._manage(visit, caller)
            with await self._take_in(visit, JsonPeek()) as body:
                await self._forwarder.to_router(visit, body.parts)
            return visit.answer

    def _note_wrong_key(self, visit: Visit) -> None:
        """Somebody has no key, or a wrong one: told at once, and then once a minute how often."""
        self._wrong_keys += 1
        now = time.monotonic()
        if now - self._wrong_key_told_at >= WRONG_KEY_S:
            times = "a request" if self._wrong_keys == 1 else f"{self._wrong_keys} requests"
            text = f"{times} without a key, or with a wrong one, the last from {visit.request.remote}"
            self._bus.publish(Warned(subject="gateway", text=text))
            self._wrong_keys, self._wrong_key_told_at = 0, now

    @property
    def _closed(self) -> Trouble | None:
        """Why no request is taken, None if they are."""
        drain = self._traffic.drain
        if not drain.is_draining:
            return None
        return _ENDING if drain.is_final else _DRAINING

    # --- for a model ----------------------------------------------------------------------------------------------

    async def _ask_by_body(self, visit: Visit, caller: Caller) -> web.StreamResponse:
        peek = peek_for(visit.request.headers.get("Content-Type"))
        with await self._take_in(visit, peek) as body:
            peeked = peek.finish()
            visit.is_stream = peeked.stream
            # What is wrong with a body, llama-server says in words of its own parser.
            if not peeked.is_object or not (peeked.model or self._settings.default_model):
                if caller.models is not None:  # nobody who may not use all models speaks to a router itself
                    raise TroubleError(_NOT_UNDERSTOOD)
                await self._forwarder.to_router(visit, body.parts)
                return visit.answer
            model = self._model_of(visit, peeked.model, caller)
            name = visit.request.headers.get(CONVERSATION)
            if name and visit.answer.outlives_client:
                try:
                    visit.conversation = self._conversations.begin(name, caller, partial(visit.end, _STOPPED))
                except TakenError as error:
                    raise TroubleError(Trouble(403, str(error))) from error
            await self._forwarder.to_model(visit, model, body.parts, heartbeat_s=_heartbeat_s(visit))
            return visit.answer

    async def _ask_by_query(self, visit: Visit, caller: Caller) -> web.StreamResponse:
        model = self._model_of(visit, visit.query_model, caller)
        await self._forwarder.to_model(visit, model, ())
        return visit.answer

    def _model_of(self, visit: Visit, word: str | None, caller: Caller) -> str:
        """The name of the model that is asked for, and may be.

        Raises:
            TroubleError: none is named, or it may not be used, or it is not loaded and is not to be.
        """
        word = word or self._settings.default_model
        if not word:
            raise TroubleError(MISSING)
        where = self._fleet.memory.scheduler.where
        visit.model = name = where.name_of(word)
        caller.check_model(name)
        if visit.autoload is False and not where.is_loaded(name):
            states = [model.state for router in self._fleet if (model := router.table.get(name)) is not None]
            if not states:
                raise TroubleError(not_found(word))
            raise TroubleError(LOADING if ModelState.LOADING in states else NOT_LOADED)
        return name

    async def _resume(self, visit: Visit, caller: Caller) -> web.StreamResponse:
        """GET and DELETE /v1/stream."""
        asked = parse_qs(visit.query)
        name = asked.get("conv_id", [""])[-1]
        visit.query = urlencode([(key, asked[key][-1]) for key in ("conv_id", "from") if key in asked])
        if not name:
            raise TroubleError(Trouble(400, "Missing conversation id in path", is_native=True))
        if visit.request.method == "DELETE":
            ended = self._conversations.end(name, caller)
            endpoint = ended.endpoint if ended is not None else None
            if endpoint is not None and await self._forwarder.to_same(visit, endpoint):
                return visit.answer
            return visit.reply(Reply(204))
        known = self._conversations.find(name, caller)
        if known is not None and known.endpoint is None:
            raise TroubleError(Trouble(503, "Stream owner model is loading, retry later", is_native=True))
        if known is None or known.endpoint is None or not await self._forwarder.to_same(visit, known.endpoint):
            return visit.reply(GONE)
        return visit.answer

    # --- answered here --------------------------------------------------------------------------------------------

    async def _manage(self, visit: Visit, caller: Caller) -> web.StreamResponse:
        management, route = self._management, visit.route.name
        if route == LIST:
            is_reload = bool(parse_qs(visit.query).get("reload", [""])[0])
            if is_reload:
                caller.check_admin()
            return visit.reply(await management.models(caller.may_use, reload=is_reload))
        if route == PROPS:
            return visit.reply(management.props())
        if route == REMOVE:
            return visit.reply(await management.remove(visit.query_model or "", caller.may_use))
        with await self._take_in(visit, JsonPeek(), limit_bytes=SMALL_BYTES) as body:
            content = b"".join(body.parts)
            if route == LOOKUP:
                return visit.reply(await self._look_up(content, caller))
            word = named_in(content)
            if word is None:
                await self._forwarder.to_router(visit, body.parts)
                return visit.answer
            if route == DOWNLOAD:
                caller.check_model(word)
                return visit.reply(management.download(word))
            act = {LOAD: management.load, UNLOAD: management.unload}[route]
            return visit.reply(act(word, caller.may_use))

    async def _look_up(self, content: bytes, caller: Caller) -> Reply:
        try:
            asked = json.loads(content)
        except (ValueError, RecursionError):
            asked = None
        names = asked.get("conversation_ids") if isinstance(asked, dict) else None
        found = await self._conversations.look_up(names, caller) if isinstance(names, list) else []
        return ok(found)

    async def _tell_news(self, visit: Visit, caller: Caller) -> web.StreamResponse:
        """GET /models/sse: it ends with the client or the daemon, so nobody waits for it."""
        if visit.request.method == "HEAD":
            return visit.reply(Reply(200, content_type="text/event-stream"))
        visit.task = None  # it is ended by the end of the events
        with self._management.events(caller.may_use) as parts:
            response = web.StreamResponse(headers=_NEWS_HEADERS)
            response.headers.update(visit.cors)
            await response.prepare(visit.request)
            async for part in parts:
                await response.write(part)
        return response

    async def _take_in(self, visit: Visit, peek: Peek, *, limit_bytes: int | None = None) -> Body:
        """The body of a request, which is read while it comes.

        Raises:
            TroubleError: it is too large, or does not come, or there is no room for it.
        """
        limit_bytes = limit_bytes or self._settings.max_body_bytes
        try:
            body = await take_in(visit.request, peek, self._stock, limit_bytes=limit_bytes, stall_s=STALL_S)
        except IntakeError as error:
            retry_after_s = RETRY_S if error.status == HTTPStatus.SERVICE_UNAVAILABLE else None
            raise TroubleError(Trouble(error.status, str(error), retry_after_s=retry_after_s, closes=True)) from error
        visit.bytes_in = body.size
        if self._settings.log_bodies:
            visit.body = b"".join(body.parts)[:BODY_SHOWN]
        return body


def _length(field: tuple[bytes, bytes]) -> int:
    return len(field[0]) + len(field[1])


def _heartbeat_s(visit: Visit) -> float | None:
    """How often a client that streams wants a sign of life while it waits; None for never."""
    text = visit.request.headers.get(HEARTBEAT, "")
    if not text or not visit.is_stream:
        return None
    try:
        asked_s = float(text)
    except ValueError:
        return None
    return min(max(asked_s, HEARTBEAT_MIN_S), HEARTBEAT_MAX_S) if math.isfinite(asked_s) else None
