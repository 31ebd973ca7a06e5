"""When a router that ended is started again: backoff, the limit on instant restarts, the crash loop.

Pure: every function takes the history and the time, and returns the new history.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

FIRST_DELAY_S = 1.0
MAX_DELAY_S = 60.0
JITTER = 0.25
"""The delay is stretched by up to this fraction, so that routers that fell together do not rise together."""
STABLE_AFTER_S = 10.0
"""A router that was READY for this long did come up: its end is not a failure to start."""
FORGIVEN_AFTER_S = 300.0
"""After this long READY the count of failures begins again at nought."""
INSTANT_RESTARTS = 6
INSTANT_WINDOW_S = 60.0
CRASH_LOOP_AT = 10


@dataclass(frozen=True, slots=True)
class RestartHistory:
    """What the restart policy remembers of one router.

    Attributes:
        failures: how often in a row the router failed to stay READY for `STABLE_AFTER_S`.
        instant_at: times (monotonic seconds) of the restarts without delay, oldest first, at most `INSTANT_RESTARTS`.
    """

    failures: int = 0
    instant_at: tuple[float, ...] = ()

    @property
    def is_crash_loop(self) -> bool:
        """Whether the router has failed so often in a row that a person should look."""
        return self.failures >= CRASH_LOOP_AT


def delay_s(failures: int, jitter: float) -> float:
    """Seconds to wait before the next start, after `failures` failures in a row.

    min(60 s, 1 s x 2^(failures - 1)), stretched by `jitter`, a number in [0, 1), of 25 %.

    Args:
        failures: at least 1; any size is safe.
        jitter: where in the jitter's range to land, from a random source of the caller.
    """
    exponent = min(max(failures, 1) - 1, 10)  # 2^10 s is far beyond the cap; an unbounded power would overflow
    return min(MAX_DELAY_S, FIRST_DELAY_S * 2.0**exponent) * (1.0 + JITTER * jitter)


def after_end(
    history: RestartHistory, *, now: float, ready_for_s: float | None, jitter: float
) -> tuple[RestartHistory, float]:
    """The history and the delay in seconds after a router ended although nobody asked for it.

    Args:
        history: what is remembered so far.
        now: monotonic time in seconds.
        ready_for_s: how long the router had been READY, None if it never was.
        jitter: number in [0, 1) from the caller's random source.
    """
    if ready_for_s is not None and ready_for_s >= STABLE_AFTER_S:
        failures = 0 if ready_for_s >= FORGIVEN_AFTER_S else history.failures
        recent = tuple(at for at in history.instant_at if now - at < INSTANT_WINDOW_S)
        if len(recent) < INSTANT_RESTARTS:
            return RestartHistory(failures, (*recent, now)), 0.0
        history = RestartHistory(failures, recent)
    history = replace(history, failures=history.failures + 1)
    return history, delay_s(history.failures, jitter)


def while_ready(history: RestartHistory, *, ready_for_s: float) -> RestartHistory:
    """The history of a router that has been READY for `ready_for_s` seconds and still is."""
    return replace(history, failures=0) if ready_for_s >= FORGIVEN_AFTER_S else history
