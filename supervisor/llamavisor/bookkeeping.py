"""Has what was learned and said written down while a fleet runs."""

from __future__ import annotations

import anyio

from llamavisor.events import Bus, ModelPinned, Published, RouterSpawned, Warned
from llamavisor.ledger import Ledger
from llamavisor.threads import run_in_thread

LEDGER_INTERVAL_S = 1.0
LEDGER_END_S = 1.0
"""How long the last write of the ledger may take: its disk may not answer, and what it says can be learned again."""


async def keep(ledger: Ledger, bus: Bus) -> None:
    """Write down what was learned now and then and at the end; what a person has said or was started, at once."""
    said = anyio.Event()

    def hear(published: Published) -> None:
        if isinstance(published.event, ModelPinned | RouterSpawned):
            said.set()

    bus.listen(hear, hears_frequent=False)
    try:
        while True:
            with anyio.move_on_after(LEDGER_INTERVAL_S):
                await said.wait()
            if ledger.is_due or said.is_set():
                said = anyio.Event()
                await _flush(ledger, bus)
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(LEDGER_END_S):
            await _flush(ledger, bus)


async def _flush(ledger: Ledger, bus: Bus) -> None:
    flushed = await run_in_thread(ledger.flush, abandon_on_cancel=True)
    if flushed.message:
        bus.publish(Warned(subject="ledger", text=flushed.message))
