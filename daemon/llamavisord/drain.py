"""The gate of the gateway: whether new requests come in, and when the last one is out."""

from __future__ import annotations

import anyio

from llamavisor.errors import LlamavisorError
from llamavisor.events import Bus, GatewayDraining, GatewayResumed


class NoGatewayError(LlamavisorError):
    """Raised when somebody commands the gateway of a daemon that has none."""

    code = "no_gateway"

    def __init__(self) -> None:
        super().__init__(
            'this daemon has no gateway: its configuration says serve = "router"',
            hint="`llamavisor stop` ends a router",
        )


class EndingError(LlamavisorError):
    """Raised when somebody wants requests to be taken again while the daemon ends."""

    code = "ending"

    def __init__(self) -> None:
        super().__init__("the daemon is ending: it takes no requests any more", hint="start it again when it has ended")


class Drain:
    """Counts the requests in the gateway, and turns new ones away when it is told to.

    The gateway asks `is_draining` before it takes a request, and tells of each that it takes; models stay loaded.

    Args:
        bus: hears when it begins and when it ends.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._inside = 0
        self._is_draining = False
        self._is_final = False
        self._changed: anyio.Event | None = None  # only while somebody waits

    def __repr__(self) -> str:
        return f"<Drain {'draining' if self._is_draining else 'open'} inside={self._inside}>"

    @property
    def is_draining(self) -> bool:
        """Whether new requests are turned away."""
        return self._is_draining

    @property
    def is_final(self) -> bool:
        """Whether this is for good: the daemon ends."""
        return self._is_final

    @property
    def inside(self) -> int:
        """Requests that were taken and have not ended."""
        return self._inside

    def enter(self) -> None:
        """A request was taken."""
        self._inside += 1

    def leave(self) -> None:
        """It has ended, however."""
        self._inside -= 1
        if not self._inside:
            self._wake()

    def begin(self, reason: str, *, deadline_s: float | None = None) -> bool:
        """Turn new requests away from now on.

        Args:
            reason: why, for a person.
            deadline_s: after how many seconds the gateway will end those that are in it, because the daemon ends: this
                is for good. None: they have as long as they need, and `end` takes it back.

        Returns:
            Whether that was any news.
        """
        if self._is_draining and (deadline_s is None or self._is_final):
            return False
        self._is_draining, self._is_final = True, deadline_s is not None
        self._bus.publish(GatewayDraining(reason=reason, requests=self._inside, deadline_s=deadline_s))
        return True

    def end(self) -> bool:
        """Take requests again.

        Returns:
            Whether that was any news.

        Raises:
            EndingError: the daemon ends.
        """
        if self._is_final:
            raise EndingError
        if not self._is_draining:
            return False
        self._is_draining = False
        self._bus.publish(GatewayResumed())
        self._wake()
        return True

    async def wait_empty(self) -> None:
        """Wait until no request is inside, or requests are taken again: then that would never come."""
        while self._is_draining and self._inside:
            if self._changed is None:
                self._changed = anyio.Event()
            await self._changed.wait()

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None
