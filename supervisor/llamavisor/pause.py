"""What a FAILED router waits for: that whatever stood in its way is no longer the same."""

from __future__ import annotations

import anyio

from llamavisor.cause import Verdict
from llamavisor.host import Host
from llamavisor.launch import Launch

POLL_S = 1.0
"""How often is looked; a look costs a few system calls."""


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
