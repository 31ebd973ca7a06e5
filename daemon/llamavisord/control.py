"""The control API: HTTP and JSON over the Unix socket, for the CLI and for `curl --unix-socket`.

Every error is a problem document (RFC 9457) with a stable `code`. A command goes on when its caller has gone.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import anyio
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from llamavisor.errors import LlamavisorError
from llamavisor.events import Bus, PeerRefused, Published
from llamavisor.hub.access import find_origin
from llamavisor.router import Router
from llamavisor.states import SERVING, RouterState
from llamavisor.threads import Threads
from llamavisord.control_socket import ControlSocket, peer_of
from llamavisord.daemon import Daemon
from llamavisord.details import describe
from llamavisord.drain import NoGatewayError
from llamavisord.inventory import folders_view, in_steps, to_json
from llamavisord.memory_view import forecast_view, memory_view, ps_view
from llamavisord.problem_documents import HttpCode, as_problems, problem
from llamavisord.pulling import PULLS, pulling_routes
from llamavisord.query import BadRequestError, WaitTimeoutError, number, wait_s
from llamavisord.search import Search
from llamavisord.tidying import tidying_routes
from llamavisord.traffic import Traffic
from llamavisord.view import router_view

BASE = "/control/v1"
BODY_BYTES = 64 * 1024
BODY_S = 10.0
"""How long the body of a request may take, although hardly any command takes one."""
GLANCE_S = 0.05
"""A command that nobody waits for is given this long, so that what can be refused at once is refused."""
FORECAST_S = 30.0
"""What a model will take is known at once, or by a tool of llama.cpp that has 10 s on each router."""
HEARTBEAT_S = 15.0
LEFT_S = 0.5
"""Between two looks whether the reader of a stream is still there."""
LOG_LINES_MAX = 10_000
TOKEN_S = 3.0
"""How long it may take to see whether the file of a token is there; a home on a server that is away does not answer."""
STATUS_MODELS_MAX = 200
"""Of more models than these `status` leaves those out that are merely not loaded; `models` has them all."""
EVENT_ID_MAX = 10**18

_TAKES_BODY = ("POST", f"{BASE}{PULLS}")
_OF_MODELS = (f"{BASE}/models", f"{BASE}/disk")
_HUNG_HOME = "see whether the home of the daemon's user is on a mount that does not answer"
_LOAD = "/load"
"""What ends so waits by itself, as long as it is told to."""

_log = logging.getLogger(__name__)

_Write = Callable[[bytes], Awaitable[None]]


class RequestTimeoutError(LlamavisorError):
    """Raised when the body of a request does not come."""

    code = "request_timeout"


def control_app(daemon: Daemon, control_socket: ControlSocket, *, body_s: float = BODY_S) -> web.Application:
    """The web application behind the control socket."""
    app = web.Application(
        middlewares=[as_problems, _guard(daemon.bus, control_socket, body_s), _after_first_look(daemon)],
        client_max_size=BODY_BYTES,
    )
    app.add_routes(control_routes(daemon))
    return app


def control_routes(daemon: Daemon) -> list[web.RouteDef]:
    """What can be asked for; the docstring of a handler says to people what it does."""
    api, base = _Api(daemon), BASE
    # A model's name may hold slashes, escaped or not, and newlines.
    return [
        web.get(f"{base}/status", api.status),
        web.get(f"{base}/ps", api.ps),
        web.get(f"{base}/models", api.models),
        # Before the model itself: a name that ends in "/forecast" has its slash escaped.
        web.get(base + r"/models/{name:[\s\S]+}/forecast", api.forecast),
        web.get(base + r"/models/{name:[\s\S]+}", api.model),
        web.get(f"{base}/routers", api.routers),
        web.post(base + r"/models/{name:[\s\S]+}/load", api.load),
        web.post(base + r"/models/{name:[\s\S]+}/unload", api.unload),
        web.post(base + r"/models/{name:[\s\S]+}/pin", api.pin),
        web.post(base + r"/models/{name:[\s\S]+}/unpin", api.unpin),
        web.post(base + r"/routers/{name:[^/]+}/restart", api.restart),
        web.post(base + r"/routers/{name:[^/]+}/stop", api.stop),
        web.post(base + r"/routers/{name:[^/]+}/start", api.start),
        web.post(f"{base}/drain", api.drain),
        web.post(f"{base}/resume", api.resume),
        web.post(f"{base}/reload", api.reload),
        web.get(f"{base}/events", api.events),
        web.get(f"{base}/logs", api.logs),
        web.get(f"{base}/hub/token", api.token),
        *tidying_routes(daemon, base),
        *pulling_routes(daemon, base),
        *health_routes(daemon),
    ]


def health_routes(daemon: Daemon) -> list[web.RouteDef]:
    """/livez: this process answers. /readyz: at least one router is serving, and the gateway lets clients in."""

    async def livez(_: web.Request) -> web.Response:
        """Whether this process answers: 200 if it does."""
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        """Whether clients are served: 200 if at least one router is ready and the gateway is open, else 503."""
        lines = [f"{router.name} {router.state.value}" for router in daemon.fleet]
        if daemon.traffic is not None:
            lines.append(f"gateway {daemon.traffic.state}")
        status = HTTPStatus.OK if daemon.is_ready else HTTPStatus.SERVICE_UNAVAILABLE
        return web.Response(text="\n".join([*lines, ""]), status=status)

    return [web.get("/livez", livez), web.get("/readyz", readyz)]


class _Api:
    """The handlers; they read the fleet and post wishes, nothing more."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._fleet = daemon.fleet
        self._bus = daemon.bus
        self._threads = Threads(1)

    async def status(self, _: web.Request) -> web.Response:
        """How the daemon is, and its routers, folders, memory and models.

        Of more than 200 models those are left out that are merely not loaded.
        """
        inventory = self._daemon.inventory()
        known = inventory.known()
        shown = known
        if len(known) > STATUS_MODELS_MAX:
            shown = [each for each in known if each.router is not None and not each.is_plain]
        return _json(
            {
                **self._daemon.view(),
                "ready": self._daemon.is_ready,
                "event_id": self._bus.last_id,
                "routers": self._routers(),
                "folders": folders_view(self._fleet),
                "memory": memory_view(self._fleet.memory.occupancy()),
                "models": await in_steps(inventory, shown),
                "models_left_out": len(known) - len(shown),
            }
        )

    async def models(self, request: web.Request) -> web.Response:
        """All models and what is known of their files. `?name=`: only those with that name or alias."""
        inventory, name = self._daemon.inventory(), request.query.get("name")
        models = await to_json(inventory, inventory.known() if name is None else inventory.called(name))
        folders = json.dumps(folders_view(self._fleet)).encode("ascii")
        body = b'{"models": ' + models + b', "folders": ' + folders + b"}"
        return web.Response(body=body, content_type="application/json")

    async def model(self, request: web.Request) -> web.Response:
        """All that is known of a model: its header, its files, its options and where they are from, its command line.

        `?router=`: only what that router makes of it.
        """
        router = request.query.get("router")
        if router is not None:
            router = self._fleet[router].name  # or there is no such router
        return _json(await describe(self._daemon.inventory(), request.match_info["name"], router=router))

    async def ps(self, _: web.Request) -> web.Response:
        """The models in memory with their bytes and use, the devices with their budgets, and who waits for what."""
        return _json(ps_view(self._fleet.memory.occupancy()))

    async def forecast(self, request: web.Request) -> web.Response:
        """Who would be unloaded to make room for a model, or why it cannot be loaded. `?router=`: on that one."""
        name, forecast, router = request.match_info["name"], None, request.query.get("router")
        if router is not None:
            router = self._fleet[router].name  # or there is no such router
        with anyio.move_on_after(FORECAST_S):
            forecast = await self._fleet.memory.forecast(name, router=router)
        if forecast is None:
            text = f"model {name}: what it would take is not known after {FORECAST_S:.0f} s"
            raise WaitTimeoutError(text, hint="ask again")
        return _json(forecast_view(forecast, self._fleet.memory.occupancy()))

    async def pin(self, request: web.Request) -> web.Response:
        """Have a model stay in memory once it is there."""
        return self._keep(request, self._fleet.memory.pin, is_pinned=True)

    async def unpin(self, request: web.Request) -> web.Response:
        """Let it leave memory again."""
        return self._keep(request, self._fleet.memory.unpin, is_pinned=False)

    def _keep(self, request: web.Request, change: Callable[[str], bool], *, is_pinned: bool) -> web.Response:
        name, event_id = request.match_info["name"], self._bus.last_id
        changed = change(name)
        return _json({"model": name, "pinned": is_pinned, "changed": changed, "event_id": event_id})

    async def routers(self, _: web.Request) -> web.Response:
        """How the routers are."""
        return _json({"routers": self._routers()})

    def _routers(self) -> list[dict[str, Any]]:
        return [router_view(router, self._fleet.memory.capacity) for router in self._fleet]

    async def load(self, request: web.Request) -> web.Response:
        """Load a model.

        `?router=` says where, `?wait=` how long the answer may take: `true`, or seconds up to 3600; 504 after that, and
        it goes on. Without it the answer comes at once: 202, or 200 for what is done.
        """
        return await self._move(request, self._fleet.load, waits_for_files=True)

    async def unload(self, request: web.Request) -> web.Response:
        """Unload a model as soon as it answers nobody. `?router=` and `?wait=` likewise."""
        return await self._move(request, self._fleet.unload)

    async def _move(
        self,
        request: web.Request,
        move: Callable[[Router, str], Awaitable[bool]],
        *,
        waits_for_files: bool = False,
    ) -> web.Response:
        name = request.match_info["name"]
        search = Search(self._fleet, self._daemon.config.rules, name, router=request.query.get("router"))
        event_id, within_s = self._bus.last_id, wait_s(request)
        router, changed = None, True
        with anyio.move_on_after(max(within_s, GLANCE_S)) as scope:
            router = await search.wait() if waits_for_files and within_s else search.now()
            changed = await move(router, search.name_on(router))
        if router is None:
            text = f"{search.awaited()}; not loaded within {within_s:g} s"
            raise WaitTimeoutError(text, hint="see `llamavisor models`, and load it again")
        status = _outcome(scope, within_s, f"model {name}")
        inventory = self._daemon.inventory()
        known = next((each for each in inventory.called(search.name_on(router)) if each.router is router), None)
        model = inventory.item(known) if known is not None else None
        body = {"model": model, "changed": changed, "event_id": event_id}
        return _json(body, status=status)

    async def restart(self, request: web.Request) -> web.Response:
        """End a router and start it again. `?wait=` likewise."""
        router = self._fleet[request.match_info["name"]]
        starts = router.starts
        router.restart()
        return await self._settle(request, router, lambda: router.starts > starts and _has_settled(router))

    async def start(self, request: web.Request) -> web.Response:
        """Start a router that was stopped or has failed. `?wait=` likewise."""
        router = self._fleet[request.match_info["name"]]
        if router.is_serving or router.state is RouterState.STARTING:
            return await self._settle(request, router, lambda: _has_settled(router), changed=False)
        starts = router.starts
        router.start()
        return await self._settle(request, router, lambda: router.starts > starts and _has_settled(router))

    async def stop(self, request: web.Request) -> web.Response:
        """End a router, until it or the daemon is started. `?wait=` likewise."""
        router = self._fleet[request.match_info["name"]]
        changed = router.state is not RouterState.STOPPED
        router.stop()
        return await self._settle(request, router, lambda: router.state is RouterState.STOPPED, changed=changed)

    async def _settle(
        self, request: web.Request, router: Router, is_done: Callable[[], bool], *, changed: bool = True
    ) -> web.Response:
        event_id, within_s = self._bus.last_id, wait_s(request)
        with anyio.move_on_after(max(within_s, GLANCE_S)) as scope:
            await router.wait_until(is_done)
        status = _outcome(scope, within_s, f"router {router.name}")
        view = router_view(router, self._fleet.memory.capacity)
        return _json({"router": view, "changed": changed, "event_id": event_id}, status=status)

    async def drain(self, request: web.Request) -> web.Response:
        """Have the gateway take no new requests (503 with `Retry-After`) and finish those that it has.

        Models stay loaded. With `?wait=` it is answered when the last request has ended. 409 with `serve = "router"`.
        """
        traffic = self._traffic()
        event_id, within_s = self._bus.last_id, wait_s(request)
        changed = traffic.drain.begin("asked for")
        with anyio.move_on_after(max(within_s, GLANCE_S)) as scope:
            await traffic.drain.wait_empty()
        status = _outcome(scope, within_s, "gateway")
        return _json({"gateway": traffic.view(), "changed": changed, "event_id": event_id}, status=status)

    async def resume(self, _: web.Request) -> web.Response:
        """Have the gateway take requests again. 409 with `serve = "router"`, and while the daemon ends."""
        traffic, event_id = self._traffic(), self._bus.last_id
        changed = traffic.drain.end()
        return _json({"gateway": traffic.view(), "changed": changed, "event_id": event_id})

    def _traffic(self) -> Traffic:
        if self._daemon.traffic is None:
            raise NoGatewayError
        return self._daemon.traffic

    async def reload(self, _: web.Request) -> web.Response:
        """Read the configuration and the models folders again; with 422 the old configuration stays in force."""
        event_id = self._bus.last_id
        gateway, applied = await self._daemon.reload()
        changes = {"changed": applied.routers, "models": applied.models, "gateway": gateway}
        body = {**changes, "problems": applied.problems}
        return _json({**body, "event_id": event_id})

    async def token(self, _: web.Request) -> web.Response:
        """Whether there is a token for the Hub, and where it is from, never the token itself.

        `origin` is `environment`, `credential` (of systemd), `login` (what `hf auth login` has left), or null.
        """
        with anyio.move_on_after(TOKEN_S):
            return _json({"origin": await self._threads.run(find_origin, os.environ, abandon_on_cancel=True)})
        raise WaitTimeoutError(f"where the token is from is not known after {TOKEN_S:.0f} s", hint=_HUNG_HOME)

    async def events(self, request: web.Request) -> web.StreamResponse:
        """What has happened and what happens, as server-sent events.

        `?since=ID` or the header `Last-Event-ID`: only what comes after that; up to 1,000 are kept. `?follow=false`
        ends after these. `?all=true` also tells events that are not kept.
        """
        since = request.headers.get("Last-Event-ID") or request.query.get("since") or "0"
        first = number("since", since, EVENT_ID_MAX)
        follows = request.query.get("follow", "true") != "false"
        # Probes and progress are for metrics and debugging: they would bury what happens.
        wants_all = request.query.get("all") == "true"

        async def tell(write: _Write) -> None:
            async with self._bus.subscribe(since=first) as (past, future):
                for published in past:
                    await write(_sse(published))
                while follows:
                    news = b": still here\n\n"
                    with anyio.move_on_after(HEARTBEAT_S):
                        try:
                            published = await future.receive()
                            while not (wants_all or published.event.is_news):
                                published = await future.receive()
                        except anyio.EndOfStream:  # it fell behind: it comes back with Last-Event-ID
                            return
                        news = _sse(published)
                    await write(news)

        return await _stream(request, "text/event-stream", tell)

    async def logs(self, request: web.Request) -> web.StreamResponse:
        """What llama-server prints.

        `?router=`: only that one; `?lines=`: how many of the past, as far as its last 64 KiB reach, 100 if it is not
        said; `?follow=true` goes on with what is printed.
        """
        name = request.query.get("router")
        routers = [self._fleet[name]] if name else list(self._fleet)
        lines = number("lines", request.query.get("lines", "100"), LOG_LINES_MAX)
        follows = request.query.get("follow") == "true"

        async def tell(write: _Write) -> None:
            async def show(router: Router, line: str) -> None:
                prefix = f"[{router.name}] " if len(routers) > 1 else ""
                await write(f"{prefix}{line}\n".encode("utf-8", "replace"))

            async def follow(router: Router) -> None:
                async for line in router.output.follow():
                    await show(router, line)

            for router in routers:
                for line in router.output.tail(lines):
                    await show(router, line)
            if follows:
                async with anyio.create_task_group() as group:
                    for router in routers:
                        group.start_soon(follow, router)

        return await _stream(request, "text/plain; charset=utf-8", tell)


async def _stream(
    request: web.Request, content_type: str, tell: Callable[[_Write], Awaitable[None]]
) -> web.StreamResponse:
    """Answer with what `tell` writes, until it has told everything or its reader has left.

    Everything that can be refused is refused before: an answer that has begun cannot become a problem document. One
    that breaks is cut off, so that its reader sees that it is not whole.
    """
    response = web.StreamResponse(headers={"Content-Type": content_type, "Cache-Control": "no-store"})
    await response.prepare(request)
    transport, writing = request.transport, anyio.Lock()  # several tasks may write

    async def write(data: bytes) -> None:
        async with writing:
            await response.write(data)

    async def watch(scope: anyio.CancelScope) -> None:
        # Nobody tells a handler that its reader has hung up, and one with nothing to write would never notice.
        while transport is not None and not transport.is_closing():
            await anyio.sleep(LEFT_S)
        scope.cancel()

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(watch, group.cancel_scope)
            await tell(write)
            group.cancel_scope.cancel()
    except* ConnectionError:
        pass  # the reader has left
    except* Exception:  # noqa: BLE001 (a request's boundary)
        _log.exception("%s %s failed", request.method, request.path)
        if transport is not None:
            transport.abort()
    return response


def _has_settled(router: Router) -> bool:
    return router.state in SERVING | {RouterState.FAILED, RouterState.BACKOFF, RouterState.STOPPED}


def _outcome(scope: anyio.CancelScope, wait_s: float, what: str) -> int:
    """200 for what is done, 202 for what goes on with nobody waiting.

    Raises:
        WaitTimeoutError: it goes on although somebody waited.
    """
    if not scope.cancelled_caught:
        return HTTPStatus.OK
    if wait_s == 0:
        return HTTPStatus.ACCEPTED
    raise WaitTimeoutError(f"{what}: not done within {wait_s:g} s; it goes on", hint="see `llamavisor events`")


def _sse(published: Published) -> bytes:
    data = json.dumps(published.as_dict(), separators=(",", ":"))
    return f"id: {published.id}\nevent: {type(published.event).__name__}\ndata: {data}\n\n".encode()


def _json(body: dict[str, Any], *, status: int = HTTPStatus.OK) -> web.Response:
    return web.json_response(body, status=status)


def _guard(bus: Bus, control_socket: ControlSocket, body_s: float) -> Middleware:
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let the right people in, and no request bodies: one command takes one."""
        transport = request.transport
        if transport is None:
            raise ConnectionResetError
        peer = peer_of(transport.get_extra_info("socket"))
        if not control_socket.admits(peer):
            bus.publish(PeerRefused(uid=peer.uid, pid=peer.pid, request=f"{request.method} {request.path}"))
            detail = f"uid {peer.uid} may not command this daemon"
            return problem(HTTPStatus.FORBIDDEN, detail, HttpCode.FORBIDDEN, f"join the group of {control_socket.path}")
        body = await _body(request, body_s) if request.can_read_body else b""
        if body not in {b"", b"{}"} and (request.method, request.path) != _TAKES_BODY:
            raise BadRequestError(f"{request.method} {request.path} takes no body; give arguments in the query")
        return await handler(request)

    return guard


def _after_first_look(daemon: Daemon) -> Middleware:
    @web.middleware
    async def after_first_look(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Have who comes early wait: to be told that there is no such model would be wrong."""
        is_load = request.method == "POST" and request.path.endswith(_LOAD)
        if request.path.startswith(_OF_MODELS) and not is_load:
            await daemon.wait_for_models()
        return await handler(request)

    return after_first_look


async def _body(request: web.Request, within_s: float) -> bytes:
    """The body of a request, without the space around it.

    Raises:
        RequestTimeoutError: it did not come in time.
    """
    try:
        with anyio.fail_after(within_s):
            return (await request.read()).strip()
    except TimeoutError:
        text = f"{request.method} {request.path}: its body did not come within {within_s:g} s"
        raise RequestTimeoutError(text) from None
