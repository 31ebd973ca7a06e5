"""Requests on their way to a process of llama-server: to the model that they name, or to a router.

A model is had by a lease; its process is asked directly. One that ends before the client was sent any data is no error:
the request waits for the model's next life, and is sent again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio

from llamavisor.demands import Lease
from llamavisor.endpoint import Endpoint
from llamavisor.errors import LlamavisorError
from llamavisor.fleet import Fleet
from llamavisord.config import GatewaySettings
from llamavisord.gateway.relay import NotAStreamError, Relay, UpstreamError, UpstreamFailure
from llamavisord.gateway.replies import RETRY_S, Trouble, trouble_of
from llamavisord.gateway.routes import Kind
from llamavisord.gateway.visit import TroubleError, Visit

ROUTER_S = 30.0
"""How long a request that only a router can answer waits for one that does."""
ROUTER_POLL_S = 0.05


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
        leases, is_fresh, has_answered = self._fleet.leases, False, False
        while True:
            endpoint = leases.acquire_loaded(model) or await self._await_model(visit, model, heartbeat_s)
            visit.sends_to(endpoint)
            try:
                await self._relay.exchange(
                    endpoint, visit.head_for(endpoint, sum(map(len, body))), body, visit.answer, fresh=is_fresh
                )
            except UpstreamError as error:
                visit.check()
                if error.was_reused and not is_fresh:  # it had been idle for too long: nothing has happened
                    is_fresh = True
                else:
                    await self._look_after(visit, endpoint, error)
                    is_fresh = False
            else:
                has_answered = visit.route.kind is Kind.BODY  # a look at its metrics takes no model
                return
            finally:
                visit.waits_again()
                leases.release(endpoint, has_answered=has_answered)

    async def _look_after(self, visit: Visit, endpoint: Endpoint, error: UpstreamError) -> None:
        """A process did not answer, or not in full: returns if the request is to be sent again.

        Raises:
            TroubleError: it is not.
        """
        # There are four cases:
        # 1. It has answered, and what it said cannot be passed on: that is told.
        # 2. The client has data of an answer that breaks off: nobody can take that back.
        # 3. The process has ended: its next one is asked, a bounded number of times, for the request may be the reason.
        # 4. It lives. One that takes no connections is deaf for ever; any other is asked once more.
        if isinstance(error, NotAStreamError):
            text = f"model {endpoint.model} answered with status {error.status}: {_excerpt(error.content)}"
            raise TroubleError(Trouble(502, text)) from error
        has_ended = await self._fleet.leases.has_ended(endpoint)
        what = "its process has ended" if has_ended else f"the connection to its process failed ({error})"
        if error.has_data:
            text = f"model {endpoint.model}: {what} while it answered; what was sent of the answer is not whole"
            raise TroubleError(Trouble(500, text)) from error
        if not has_ended and error.kind is UpstreamFailure.REFUSED:
            self._fleet.memory.scheduler.end_unresponsive(endpoint)
        if visit.retries >= self.settings.retries:
            text = f"model {endpoint.model}: {what}, and {visit.retries} tries before this one failed too"
            raise TroubleError(Trouble(502, text, retry_after_s=RETRY_S)) from error
        visit.retries += 1

    async def _await_model(self, visit: Visit, model: str, heartbeat_s: float | None) -> Endpoint:
        wait_s = self.settings.wait_s
        try:
            with visit.waiting(wait_s):
                async with _beating(visit, heartbeat_s):
                    return await self._fleet.leases.acquire(model)
        except LlamavisorError as error:
            raise TroubleError(trouble_of(error, visit.model or model)) from error
        text = f"model {model}: could not be had within {wait_s:g} s"
        raise TroubleError(Trouble(503, text, retry_after_s=RETRY_S))

    async def to_same(self, visit: Visit, endpoint: Endpoint) -> bool:
        """Have the very process of an earlier lease answer; False if it is not there any more.

        Raises:
            TroubleError: it did not answer in full.
        """
        leases = self._fleet.leases
        now = leases.acquire_loaded(endpoint.model, router=endpoint.router)
        if now is None:
            return False
        try:
            if now.port != endpoint.port:
                return False
            visit.model = now.model
            visit.sends_to(now)
            await self._relay.exchange(now, visit.head_for(now, 0), (), visit.answer, fresh=True)
        except UpstreamError as error:
            if error.has_data:
                raise TroubleError(Trouble(500, f"model {now.model}: the stream broke off ({error})")) from error
            return False
        finally:
            visit.waits_again()
            leases.release(now)
        return True

    async def to_router(self, visit: Visit, body: Sequence[bytes]) -> None:
        """Have a router answer, the first that serves.

        Raises:
            TroubleError: there is none, or it did not answer.
        """
        is_fresh = False
        while True:
            endpoint = await self._await_router(visit)
            visit.sends_to(endpoint)
            try:
                head = visit.head_for(endpoint, sum(map(len, body)))
                await self._relay.exchange(endpoint, head, body, visit.answer, fresh=is_fresh)
            except UpstreamError as error:
                visit.check()
                text = f"router {endpoint.router}: {error}"
                if error.has_data or (is_fresh and visit.retries >= self.settings.retries):
                    raise TroubleError(Trouble(502, text, retry_after_s=RETRY_S)) from error
                visit.retries += not error.was_reused
                is_fresh = True
            else:
                return

    async def _await_router(self, visit: Visit) -> Endpoint:
        if (endpoint := self._find_router()) is not None:
            return endpoint
        with visit.waiting(ROUTER_S):
            while True:
                if (endpoint := self._find_router()) is not None:
                    return endpoint
                await anyio.sleep(ROUTER_POLL_S)
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

    failure: BaseException | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(beat)
        try:
            yield
        except Exception as error:  # noqa: BLE001 (a group would wrap it)
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure


def _excerpt(content: bytes) -> str:
    return " ".join(content[:400].decode("utf-8", "replace").split())
