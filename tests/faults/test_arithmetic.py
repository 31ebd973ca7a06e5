"""T3: the arithmetic of restarts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamavisor import restart
from llamavisor.restart import RestartHistory, after_end, delay_s, while_ready

counts = st.integers(min_value=1, max_value=10**6)
jitters = st.floats(min_value=0.0, max_value=1.0, exclude_max=True)


def test_t3_delays_double_up_to_a_minute() -> None:
    """T3: without jitter the delays are 1, 2, 4, 8, 16, 32 and then 60 seconds for ever."""
    assert [delay_s(n, 0.0) for n in range(1, 10)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]


@given(counts, counts, jitters)
def test_t3_delays_are_monotone(one: int, other: int, jitter: float) -> None:
    """T3: with the same jitter more failures never mean a shorter delay."""
    fewer, more = sorted((one, other))
    assert 0.0 < delay_s(fewer, jitter) <= delay_s(more, jitter) <= restart.MAX_DELAY_S * (1 + restart.JITTER)


@given(counts, jitters)
def test_t3_delay_is_bounded(failures: int, jitter: float) -> None:
    """T3: a delay is never below a second, never above 75, and never below that of fewer failures without jitter."""
    delay = delay_s(failures, jitter)
    assert 1.0 <= delay <= 75.0
    assert delay_s(failures, 0.0) <= delay <= 1.25 * delay_s(failures, 0.0)
    assert delay_s(failures, 0.0) <= delay_s(failures + 1, 0.0)


@given(counts, jitters, st.one_of(st.none(), st.floats(min_value=0.0, max_value=restart.STABLE_AFTER_S - 0.01)))
def test_t3_end_before_ten_seconds_is_a_failure(failures: int, jitter: float, ready_for_s: float | None) -> None:
    """T3: a router that was never ready, or not for ten seconds, has failed once more and waits for its delay."""
    history, delay = after_end(RestartHistory(failures), now=0.0, ready_for_s=ready_for_s, jitter=jitter)
    assert history.failures == failures + 1
    assert delay == delay_s(failures + 1, jitter)


def test_t3_stable_router_is_restarted_at_once_six_times_a_minute() -> None:
    """T3: a router that had been ready for ten seconds comes back at once; the seventh time in a minute it waits."""
    history = RestartHistory()
    delays = []
    for second in range(7):
        history, delay = after_end(history, now=float(second), ready_for_s=10.0, jitter=0.0)
        delays.append(delay)
    assert delays == [0, 0, 0, 0, 0, 0, 1]
    assert history.failures == 1
    assert len(history.instant_at) <= restart.INSTANT_RESTARTS


def test_t3_instant_restarts_are_forgotten_after_a_minute() -> None:
    """T3: a minute after the first of six instant restarts there is room for another one."""
    history = RestartHistory(instant_at=tuple(float(second) for second in range(6)))
    assert after_end(history, now=59.9, ready_for_s=10.0, jitter=0.0)[1] == 1.0
    assert after_end(history, now=60.0, ready_for_s=10.0, jitter=0.0)[1] == 0.0


@pytest.mark.parametrize(("ready_for_s", "failures"), [(10.0, 5), (299.9, 5), (300.0, 0)])
def test_t3_failures_are_forgiven_after_five_minutes(ready_for_s: float, failures: int) -> None:
    """T3: ten seconds of service do not wipe out the failures before them, five minutes do."""
    assert while_ready(RestartHistory(5), ready_for_s=ready_for_s).failures == failures
    assert after_end(RestartHistory(5), now=0.0, ready_for_s=ready_for_s, jitter=0.0)[0].failures == failures


def test_t3_crash_loop_is_raised_at_ten() -> None:
    """T3: ten failures in a row are a crash loop, nine are not."""
    assert not RestartHistory(9).is_crash_loop
    assert RestartHistory(10).is_crash_loop


@given(st.lists(st.tuples(st.floats(0.0, 1000.0), st.one_of(st.none(), st.floats(0.0, 1000.0)))))
def test_t3_never_more_than_a_start_a_second_for_long(ends: list[tuple[float, float | None]]) -> None:
    """T3: whatever happens, starts without a delay stay within six a minute, and the history stays small."""
    history, now, instant = RestartHistory(), 0.0, []
    for pause, ready_for_s in ends:
        now += pause
        history, delay = after_end(history, now=now, ready_for_s=ready_for_s, jitter=0.0)
        assert delay == 0.0 or delay >= 1.0
        instant += [now] if delay == 0.0 else []
        assert len([at for at in instant if now - at < 60.0]) <= 6
        assert len(history.instant_at) <= 6
