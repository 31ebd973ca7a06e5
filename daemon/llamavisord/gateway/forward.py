"""Requests on their way to a process of llama-server: to the model that they name, or to a router.

A model is had by a lease; its process is asked directly. One that ends before the client was sent any data is no error:
the request waits for the model's next life, and is sent again.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio

from llamavisor.demands import Lease
from llamavisor.endpoint import Endpoint
from llamavisor.errors import LlamavisorError
from llamavisor.fleet import Fleet
from llamavisor.states import RouterState
from llamavisord.config import GatewaySettings
from llamavisord.gateway.relay import NotAStreamError, Relay, UpstreamError, UpstreamFailure
from llamavisord.gateway.replies import RETRY_S, Trouble, TroubleError, trouble_of
from llamavisord.gateway.routes import Kind
from llamavisord.gateway.visit import Visit

ROUTER_S = 30.0
"""How long a request that only a router can answer waits for one that does."""
ROUTER_POLL_S = 0.05

_FAILED = frozenset({500, 502, 503, 504})
"""With these a process says that the fault is its own; 501 is what it was not made for."""
_DOWN = frozenset({RouterState.STOPPED, RouterState.FAILED})


class Forwarder:
    """Sends requests on.

    Args:
        fleet: whose processes they go to.
        settings: how long, and how often.
        relay: moves the bytes.
    """

    def __init__(self, fleet: Fleet, settings: GatewaySettings, relay: Relay) -> None:
        self.settings = settings
        self._fleet = fleet
        self._relay = relay
        self._waiting = 0  # for any router

    def __repr__(self) -> str:
        return f"<Forwarder {self._relay!r}>"

    async def to_model(
        self, visit: Visit, model: str, body: Sequence[bytes], *, heartbeat_s: float | None = None
    ) -> None:
        """Have a model answer; it is loaded if need be.

        Args:
            visit: the request.
            model: the model's name, or an alias.
            body: the parts of the request's body.
            heartbeat_s: seconds between signs of life in a stream whose model is waited for; None for none.

        Raises:
            TroubleError: it did not, or not in full.
        """
        leases, is_fresh = self._fleet.leases, False
        while True:
            has_answered = has_failed = False
            endpoint = leases.acquire_loaded(model) or await self._await_model(visit, model, heartbeat_s)
            visit.sends_to(endpoint)
            try:
                await self._relay.exchange(
                    endpoint, visit.head_for(endpoint, sum(map(len, body))), body, visit.answer, fresh=is_fresh
                )
            except UpstreamError as error:
                visit.loses_model()
                if error.was_reused and not is_fresh:  # it had been idle for too long: nothing has happened
                    is_fresh = True
                else:
                    await self._look_after(visit, endpoint, error)
                    is_fresh = False
            else:
                has_failed = visit.answer.status in _FAILED
                has_answered = not has_failed and visit.route.kind is Kind.BODY  # a look at its metrics takes no model
                return
            finally:
                visit.waits_again()
                leases.release(endpoint, has_answered=has_answered, has_failed=has_failed)

    async def _look_after(self, visit: Visit, endpoint: Endpoint, error: UpstreamError) -> None:
        """A process did not answer, or not in full: returns if the request is to be sent again.

        Raises:
            TroubleError: it is not.
        """
        # There are four cases:
        # 1. It has answered, and what it said cannot be passed on: that is told.
        # 2. The client has data of an answer that breaks off: nobody can take that back.
        # 3. The process has ended: its next one is asked, a bounded number of times, for the request may be the reason.
        # 4. It lives. One that takes no connections is deaf for ever, and ended; in any case it is asked again as in 3.
        if isinstance(error, NotAStreamError):
            raise TroubleError(_told(endpoint.model, error)) from error
        if error.kind is UpstreamFailure.GARBAGE:
            raise TroubleError(Trouble(502, f"model {endpoint.model}: its answer cannot be understood")) from error
        has_ended = await self._fleet.leases.has_ended(endpoint)
        what = "its process has ended" if has_ended else f"the connection to its process failed ({error})"
        if error.has_data:
            text = f"model {endpoint.model}: {what} while it answered; what was sent of the answer is not whole"
            raise TroubleError(Trouble(500, text)) from error
        if not has_ended and error.kind is UpstreamFailure.REFUSED:
            self._fleet.memory.scheduler.end_unresponsive(endpoint)
            await self._fleet.leases.has_ended(endpoint)  # it is promised to nobody from then on
        if visit.retries >= self.settings.retries:
            text = f"model {endpoint.model}: {what}, and {visit.retries} tries before this one failed too"
            raise TroubleError(Trouble(502, text, retry_after_s=RETRY_S)) from error
        visit.retries += 1

    async def _await_model(self, visit: Visit, model: str, heartbeat_s: float | None) -> Endpoint:
        began, within_s = time.monotonic(), self.settings.wait_s - visit.age_s
        had: Endpoint | None = None
        try:
            async with _beating(visit, heartbeat_s):
                had = await self._fleet.leases.acquire(model, within_s=max(0.0, within_s))
        except LlamavisorError as error:
            raise TroubleError(trouble_of(error, visit.model or model, self._fleet.holders.why_missing)) from error
        except BaseException:
            if had is not None:  # ended between the grant and the next step
                self._fleet.leases.release(had)
            raise
        finally:
            visit.has_waited(time.monotonic() - began)
        return had

    async def to_same(self, visit: Visit, endpoint: Endpoint) -> bool:
        """Have the very process of an earlier lease answer; False if it is not there any more.

        Raises:
            TroubleError: it did not answer in full.
        """
        leases = self._fleet.leases
        held = leases.acquire_loaded(endpoint.model, router=endpoint.router)
        # One that is to leave takes no more leases; while the one of the conversation's own request lasts, it is there.
        if not (leases.is_kept(endpoint) if held is None else held.port == endpoint.port):
            if held is not None:
                leases.release(held)
            return False
        try:
            visit.model = endpoint.model
            visit.sends_to(endpoint)
            await self._relay.exchange(endpoint, visit.head_for(endpoint, 0), (), visit.answer, fresh=True)
        except UpstreamError as error:
            if error.has_data:
                raise TroubleError(Trouble(500, f"model {endpoint.model}: the stream broke off ({error})")) from error
            return False
        finally:
            visit.waits_again()
            if held is not None:
                leases.release(held)
        return True

    async def to_router(self, visit: Visit, body: Sequence[bytes]) -> None:
        """Have a router answer, the first that serves. What may have had an effect there is not sent again.

        Raises:
            TroubleError: there is none, or it did not answer.
        """
        is_fresh, can_repeat = False, visit.request.method in {"GET", "HEAD"}
        while True:
            endpoint = await self._await_router()
            visit.sends_to(endpoint)
            try:
                head = visit.head_for(endpoint, sum(map(len, body)))
                await self._relay.exchange(endpoint, head, body, visit.answer, fresh=is_fresh)
            except UpstreamError as error:
                is_stale = error.was_reused and not is_fresh
                is_again = can_repeat or error.kind is UpstreamFailure.REFUSED
                if not is_stale and (error.has_data or not is_again or visit.retries >= self.settings.retries):
                    text = f"router {endpoint.router}: {error}"
                    raise TroubleError(Trouble(502, text, retry_after_s=RETRY_S)) from error
                visit.retries += not is_stale
                is_fresh = True
            else:
                return

    async def _await_router(self) -> Endpoint:
        """Where a router's own process answers; one that starts is waited for, by so many as may wait for models.

        Raises:
            TroubleError: there is none, and none comes.
        """
        if (endpoint := self._find_router()) is not None:
            return endpoint
        if self._waiting >= self.settings.max_waiting:
            raise TroubleError(Trouble(503, f"{self._waiting} others wait for a router", retry_after_s=RETRY_S))
        self._waiting += 1
        try:
            with anyio.move_on_after(ROUTER_S):
                while any(router.state not in _DOWN for router in self._fleet):
                    if (endpoint := self._find_router()) is not None:
                        return endpoint
                    await anyio.sleep(ROUTER_POLL_S)
        finally:
            self._waiting -= 1
        raise TroubleError(Trouble(503, "no router is up", retry_after_s=RETRY_S))

    def _find_router(self) -> Endpoint | None:
        """The first router's own process that answers, None while there is none."""
        for router in self._fleet:
            if router.is_serving and router.launch is not None:
                settings, port = router.settings, router.launch.port
                return Endpoint(Lease(0, router.name, ""), settings.host, port, settings.api_key)
        return None


@asynccontextmanager
async def _beating(visit: Visit, heartbeat_s: float | None) -> AsyncIterator[None]:
    """Give signs of life while something is waited for; an error of the block passes as it is."""
    if heartbeat_s is None:
        yield
        return

    async def beat() -> None:
        while True:
            await anyio.sleep(heartbeat_s)
            visit.answer.begin_stream()
            visit.answer.comment("waiting")

    failure: Exception | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(beat)
        try:
            yield
        except Exception as error:  # noqa: BLE001 (a group would wrap it)
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure


def _told(model: str, error: NotAStreamError) -> Trouble:
    """What a process has said instead of the stream that its client was promised: its own error, as a rule."""
    try:
        said = json.loads(error.content)["error"]
        return Trouble(error.status, str(said["message"]), str(said["type"]))
    except (ValueError, LookupError, TypeError, RecursionError):
        excerpt = " ".join(error.content[:400].decode("utf-8", "replace").split())
        return Trouble(502, f"model {model} answered with status {error.status}: {excerpt}")
