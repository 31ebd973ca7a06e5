"""The table of a router's life: total, and as it was meant."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamavisor.states import Life, RouterAction, RouterInput, RouterState, step

S, IN, A = RouterState, RouterInput, RouterAction

# What each input does in each state, written a second time: "next" or "next action". What is missing does nothing.
MEANT: dict[tuple[RouterState, RouterInput], tuple[RouterState, RouterAction]] = {
    (S.STOPPED, IN.START): (S.STARTING, A.SPAWN),
    (S.STOPPED, IN.RESTART): (S.STARTING, A.SPAWN),
    (S.STARTING, IN.STOP): (S.STOPPING, A.STOP),
    (S.STARTING, IN.RESTART): (S.STOPPING, A.STOP),
    (S.STARTING, IN.READY): (S.READY, A.NONE),
    (S.STARTING, IN.OVERDUE): (S.STOPPING, A.STOP),
    (S.READY, IN.UNFIT): (S.STOPPING, A.STOP),
    (S.DEGRADED, IN.UNFIT): (S.STOPPING, A.STOP),
    (S.STARTING, IN.CRASHED): (S.BACKOFF, A.BACK_OFF),
    (S.STARTING, IN.REFUSED): (S.FAILED, A.LATCH),
    (S.READY, IN.STOP): (S.STOPPING, A.STOP),
    (S.READY, IN.RESTART): (S.STOPPING, A.STOP),
    (S.READY, IN.TROUBLE): (S.DEGRADED, A.NONE),
    (S.READY, IN.CRASHED): (S.BACKOFF, A.BACK_OFF),
    (S.READY, IN.REFUSED): (S.FAILED, A.LATCH),
    (S.DEGRADED, IN.STOP): (S.STOPPING, A.STOP),
    (S.DEGRADED, IN.RESTART): (S.STOPPING, A.STOP),
    (S.DEGRADED, IN.CLEARED): (S.READY, A.NONE),
    (S.DEGRADED, IN.CRASHED): (S.BACKOFF, A.BACK_OFF),
    (S.DEGRADED, IN.REFUSED): (S.FAILED, A.LATCH),
    (S.BACKOFF, IN.START): (S.STARTING, A.SPAWN),
    (S.BACKOFF, IN.RESTART): (S.STARTING, A.SPAWN),
    (S.BACKOFF, IN.RETRY_DUE): (S.STARTING, A.SPAWN),
    (S.BACKOFF, IN.STOP): (S.STOPPED, A.NONE),
    (S.FAILED, IN.START): (S.STARTING, A.SPAWN),
    (S.FAILED, IN.RESTART): (S.STARTING, A.SPAWN),
    (S.FAILED, IN.RETRY_DUE): (S.STARTING, A.SPAWN),
    (S.FAILED, IN.STOP): (S.STOPPED, A.NONE),
}
HAS_PROCESS = {S.STARTING, S.READY, S.DEGRADED, S.STOPPING}


@pytest.mark.parametrize(
    ("state", "signal"), list(itertools.product([state for state in S if state is not S.STOPPING], IN))
)
def test_every_pair_is_as_meant(state: RouterState, signal: RouterInput) -> None:
    """Every input in every state but STOPPING does what was meant; what was not meant changes nothing."""
    life, action = step(Life(state), signal)
    assert (life.state, action) == MEANT.get((state, signal), (state, A.NONE))


# Where STOPPING leads after each input; what is missing leads where it led before. GONE leads there now.
LEADS = {IN.START: S.STARTING, IN.RESTART: S.STARTING, IN.STOP: S.STOPPED}
ARRIVAL = {S.STOPPED: A.NONE, S.STARTING: A.SPAWN, S.BACKOFF: A.BACK_OFF}


@pytest.mark.parametrize(("then", "signal"), list(itertools.product(ARRIVAL, IN)))
def test_every_pair_while_stopping_is_as_meant(then: RouterState, signal: RouterInput) -> None:
    """While a router stops nothing is done, wishes only change where that leads, and its end leads there."""
    life = Life(S.STOPPING, then=then)
    if signal is IN.GONE:
        assert step(life, signal) == (Life(then), ARRIVAL[then])
    else:
        assert step(life, signal) == (Life(S.STOPPING, then=LEADS.get(signal, then)), A.NONE)


@pytest.mark.parametrize(
    ("state", "signal", "then"),
    [
        *((state, IN.STOP, S.STOPPED) for state in (S.STARTING, S.READY, S.DEGRADED)),
        *((state, IN.RESTART, S.STARTING) for state in (S.STARTING, S.READY, S.DEGRADED)),
        (S.STARTING, IN.OVERDUE, S.BACKOFF),
        (S.READY, IN.UNFIT, S.BACKOFF),
        (S.DEGRADED, IN.UNFIT, S.BACKOFF),
    ],
)
def test_where_an_end_leads(state: RouterState, signal: RouterInput, then: RouterState) -> None:
    """What ends a process says what follows once it is gone."""
    assert step(Life(state), signal)[0] == Life(S.STOPPING, then=then)


@given(st.lists(st.sampled_from(RouterInput)), st.sampled_from([IN.START, IN.STOP, IN.RESTART]))
def test_a_wish_twice_is_a_wish_once(signals: list[RouterInput], wish: RouterInput) -> None:
    """Wishing for the same again changes nothing, and nothing more is done, but for a restart of what is starting."""
    life = Life()
    for signal in signals:
        life, _ = step(life, signal)
    once, _ = step(life, wish)
    twice, action = step(once, wish)
    if wish is not IN.RESTART or once.state is not S.STARTING:
        assert (twice, action) == (once, A.NONE)


@pytest.mark.parametrize(
    ("wishes", "then", "action"),
    [
        ([IN.STOP], S.STOPPED, A.NONE),
        ([IN.RESTART], S.STARTING, A.SPAWN),
        ([IN.STOP, IN.START], S.STARTING, A.SPAWN),
        ([IN.RESTART, IN.STOP], S.STOPPED, A.NONE),
        ([IN.STOP, IN.START, IN.STOP], S.STOPPED, A.NONE),
    ],
)
def test_last_wish_decides_where_stopping_leads(
    wishes: list[RouterInput], then: RouterState, action: RouterAction
) -> None:
    """While a router stops, the last wish decides what comes next, and it comes only when everything is gone."""
    life = Life(S.READY)
    for wish in wishes:
        life, _ = step(life, wish)
        assert life.state is S.STOPPING
    assert step(life, IN.GONE) == (Life(then), action)


def test_overdue_start_backs_off_once_gone() -> None:
    """A start that takes too long is ended first, and counted as a failure after that."""
    life, action = step(Life(S.STARTING), IN.OVERDUE)
    assert action is A.STOP
    assert step(life, IN.GONE) == (Life(S.BACKOFF), A.BACK_OFF)


@pytest.mark.parametrize("news", [IN.READY, IN.TROUBLE, IN.CLEARED, IN.OVERDUE, IN.CRASHED, IN.REFUSED, IN.RETRY_DUE])
def test_late_news_does_not_disturb_a_stop(news: RouterInput) -> None:
    """What a process says while it is being stopped is no news any more."""
    life = Life(S.STOPPING, then=S.STARTING)
    assert step(life, news) == (life, A.NONE)


@given(st.lists(st.sampled_from(RouterInput)))
def test_invariants_hold_along_any_way(signals: list[RouterInput]) -> None:
    """`then` is set exactly while stopping, a process is never started beside another, and a stop ends one."""
    life = Life()
    for signal in signals:
        before = life
        life, action = step(life, signal)
        assert (life.then is not None) == (life.state is S.STOPPING)
        if action is A.SPAWN:
            assert life.state is S.STARTING
            assert before.state not in HAS_PROCESS - {S.STOPPING}
            assert before.state is not S.STOPPING or signal is IN.GONE
        if action is A.STOP:
            assert before.state in HAS_PROCESS
            assert life.state is S.STOPPING


@given(st.lists(st.sampled_from(RouterInput)))
def test_a_stop_is_always_heeded(signals: list[RouterInput]) -> None:
    """From anywhere a stop, and the end of what runs, lead to STOPPED, and no news leads away from it."""
    life = Life()
    for signal in signals:
        life, _ = step(life, signal)
    life, _ = step(life, IN.STOP)
    life, action = step(life, IN.GONE)
    assert (life, action) == (Life(S.STOPPED), A.NONE)
    for news in set(RouterInput) - {IN.START, IN.RESTART}:
        assert step(life, news) == (life, A.NONE)
