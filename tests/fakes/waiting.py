"""Waiting for something that another process does, which no event of ours announces."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")

PATIENCE_S = 30.0
"""Far beyond what anything takes on a busy machine, far below the time limit of a test."""
_POLL_S = 0.005


def eventually(look: Callable[[], _T], *, what: str = "", within_s: float = PATIENCE_S) -> _T:
    """Look again and again until the answer is true, and return it.

    Args:
        look: asked every few milliseconds; AssertionError counts as no.
        what: what is waited for, for the message.
        within_s: how long at most.

    Raises:
        AssertionError: it did not come; carries the last answer.
    """
    deadline = time.monotonic() + within_s
    while True:
        try:
            answer = look()
        except AssertionError:
            if time.monotonic() > deadline:
                raise
        else:
            if answer:
                return answer
            if time.monotonic() > deadline:
                raise AssertionError(f"no {what or look} within {within_s} s; last seen: {answer!r}")
        time.sleep(_POLL_S)
