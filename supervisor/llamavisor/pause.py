"""What a router waits for before it is started again: some time in BACKOFF, in FAILED a change of the cause."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import anyio

from llamavisor.cause import Verdict
from llamavisor.generation import Generation
from llamavisor.host import Host
from llamavisor.launch import Launch
from llamavisor.messages import Message, RetryDue

POLL_S = 1.0
"""How often is looked; a look costs a few system calls."""


class Pause:
    """Has a router started again after a wait, unless it leaves its state before. Used by the router's owner alone.

    Args:
        start_soon: begins a task beside the owner.
        post: a way into the owner's inbox.
    """

    def __init__(self, *, start_soon: Callable[..., None], post: Callable[[Message], None]) -> None:
        self._start_soon = start_soon
        self._post = post
        self._scope: anyio.CancelScope | None = None

    def __repr__(self) -> str:
        return f"<Pause {'under way' if self._scope else 'none'}>"

    def begin(self, ended: Generation | None, wait: Callable[..., Coroutine[Any, Any, None]], *args: object) -> None:
        """Wait with `wait`, then say that a retry is due after the generation that has `ended`."""

        async def retry(scope: anyio.CancelScope) -> None:
            with scope:
                await wait(*args)
                self._post(RetryDue(ended))

        self._scope = anyio.CancelScope()
        self._start_soon(retry, self._scope)

    def end(self) -> None:
        """Wait no longer."""
        if self._scope is not None:
            self._scope.cancel()
            self._scope = None


async def await_change(host: Host, verdict: Verdict, launch: Launch | None) -> None:
    """Wait until another start makes sense.

    An obstacle that we see ourselves (a missing folder, a taken port) is compared with what is there now. What only
    llama-server could see (a bad option) stays until its binary changes; a new configuration comes with a restart.

    Args:
        host: where the router runs.
        verdict: why it was given up.
        launch: what had been started, None if nothing was.
    """
    if verdict.is_obstacle:
        seen: object = verdict
    else:
        seen = await _look(host) if launch is None else launch.found.fingerprint
    while True:
        await anyio.sleep(POLL_S)
        if await _look(host) != seen:
            return


async def _look(host: Host) -> object:
    """What stands in the way now; if nothing does, which llama-server would be started."""
    found = await host.prepare()
    return found.found.fingerprint if isinstance(found, Launch) else found
