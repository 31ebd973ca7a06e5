"""The end of the process, which nothing that hangs holds up."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress

THREAD_END_S = 0.5
LAST_S = 1.0
"""How long what is done last may take."""


def leave_hung_threads(exit_code: int) -> None:
    """End the process if a thread of ours does not: one that waits for a dead mount would keep it for ever."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(THREAD_END_S)
            if thread.is_alive():
                logging.shutdown()
                os._exit(exit_code)


def leave_within(seconds: float, exit_code: int, last: Callable[[], None]) -> None:
    """End the process then, unless it has ended by itself; of several such the earliest counts.

    What waits in a thread for a dead mount is not cancelled, and keeps everything waiting that is around it. A thread
    of our own sees to this, as the event loop might be what hangs; if there is none to be had, nobody does.

    Args:
        seconds: how long it may take.
        exit_code: with what it ends then.
        last: is done before, unless that hangs as well.
    """
    timer = threading.Timer(seconds, _leave, (exit_code, last))
    timer.daemon = True
    with suppress(RuntimeError):
        timer.start()


def _leave(exit_code: int, last: Callable[[], None]) -> None:
    try:
        doing = threading.Thread(target=last, daemon=True)
        doing.start()
        doing.join(LAST_S)
    finally:
        os._exit(exit_code)
