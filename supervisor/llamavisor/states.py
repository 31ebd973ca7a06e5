"""The states of a router and of a model, and the one total table of a router's life.

The table is data: `step` looks a (state, input) pair up and says what comes next. It knows no clock, no process and no
socket, so every pair is walked by a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class RouterState(Enum):
    """Where a supervised router is in its life."""

    STOPPED = "stopped"
    """Nobody wants it up."""
    STARTING = "starting"
    """Its process is being started, or does not answer yet."""
    READY = "ready"
    """It serves."""
    DEGRADED = "degraded"
    """Its process is up, but it keeps less than it promised; the reason is shown."""
    STOPPING = "stopping"
    """It is being ended: SIGTERM, and SIGKILL if that does not help."""
    BACKOFF = "backoff"
    """It ended unasked; the next try is scheduled."""
    FAILED = "failed"
    """Trying again unchanged is pointless; re-armed by a change or a person."""


SERVING = frozenset({RouterState.READY, RouterState.DEGRADED})


class ModelState(Enum):
    """What is known of one model on one router."""

    UNLOADED = "unloaded"
    """It is not in memory, and can be loaded."""
    LOADING = "loading"
    """Its process is up, and does not answer yet."""
    LOADED = "loaded"
    """It answers."""
    SLEEPING = "sleeping"
    """Its process is alive, and its weights are not in memory (`sleep_idle_seconds`)."""
    UNLOADING = "unloading"
    """We asked for it; the router itself has no such state."""
    FAILED = "failed"
    """Its last load did not succeed, or its process ended unasked."""
    DOWNLOADING = "downloading"
    """The router fetches its file."""
    UNKNOWN = "unknown"
    """The router says a word that we do not know, as a future build may."""


class Change(Enum):
    """What has happened to a model since it was loaded."""

    OPTIONS = "options"
    """Its table in the configuration says something else."""
    REPLACED = "replaced"
    """Another file has its name now; the old one is still mapped, and safe."""
    OVERWRITTEN = "overwritten"
    """Its file was written over in place: it may answer nonsense, or be about to crash."""
    MOVED = "moved"
    """Its table keeps it from this router now."""
    GONE = "gone"
    """Its file is not there any more, or not fit to be served."""


RESIDENT = frozenset({ModelState.LOADED, ModelState.SLEEPING})
HAS_CHILD = frozenset({ModelState.LOADING, ModelState.LOADED, ModelState.SLEEPING, ModelState.UNLOADING})


class RouterInput(Enum):
    """What can happen to a router."""

    START = "start"  # a person, the boot, or a re-armed cause wants it up
    STOP = "stop"  # somebody wants it down
    RESTART = "restart"  # somebody wants a fresh process
    READY = "ready"  # it answers, and it is a router
    TROUBLE = "trouble"  # serving, but less than promised
    CLEARED = "cleared"  # the trouble is over
    OVERDUE = "overdue"  # not ready within its start deadline
    UNFIT = "unfit"  # it was ready, and hangs, or has lost a device
    CRASHED = "crashed"  # its process ended, or could not be started, for a cause that may pass
    REFUSED = "refused"  # its process ended, or could not be started, for a cause that stays
    RETRY_DUE = "retry_due"  # the backoff is over, or what stood in the way has changed
    GONE = "gone"  # the stop ladder has finished: nothing of the process is left


class RouterAction(Enum):
    """What the owner of a router has to do after a step."""

    NONE = "none"
    SPAWN = "spawn"  # begin a new generation of its process
    STOP = "stop"  # run the stop ladder on the current generation
    BACK_OFF = "back_off"  # ask the restart policy when, and set the timer
    LATCH = "latch"  # keep the reason, watch the cause for a change


@dataclass(frozen=True, slots=True)
class Life:
    """The part of a router's state that the table decides.

    Attributes:
        state: where the router is.
        then: which state follows STOPPING once everything is gone; None in every other state.
    """

    state: RouterState = RouterState.STOPPED
    then: RouterState | None = None  # Invariant: set if and only if state is STOPPING


@dataclass(frozen=True, slots=True)
class _Row:
    to: RouterState
    action: RouterAction = RouterAction.NONE
    then: RouterState | None = None


_S, _I, _A = RouterState, RouterInput, RouterAction

_SPAWN = _Row(_S.STARTING, _A.SPAWN)
_STOP = _Row(_S.STOPPING, _A.STOP, then=_S.STOPPED)
_RESTART = _Row(_S.STOPPING, _A.STOP, then=_S.STARTING)
_AFRESH = _Row(_S.STOPPING, _A.STOP, then=_S.BACKOFF)
_BACK_OFF = _Row(_S.BACKOFF, _A.BACK_OFF)
_LATCH = _Row(_S.FAILED, _A.LATCH)

# What is not listed changes nothing: a late message about a process that is already being replaced is no news.
_TABLE: Mapping[RouterState, Mapping[RouterInput, _Row]] = {
    _S.STOPPED: {_I.START: _SPAWN, _I.RESTART: _SPAWN},
    _S.STARTING: {
        _I.STOP: _STOP,
        _I.RESTART: _RESTART,
        _I.READY: _Row(_S.READY),
        _I.OVERDUE: _AFRESH,
        _I.CRASHED: _BACK_OFF,
        _I.REFUSED: _LATCH,
    },
    _S.READY: {
        _I.STOP: _STOP,
        _I.RESTART: _RESTART,
        _I.TROUBLE: _Row(_S.DEGRADED),
        _I.UNFIT: _AFRESH,
        _I.CRASHED: _BACK_OFF,
        _I.REFUSED: _LATCH,
    },
    _S.DEGRADED: {
        _I.STOP: _STOP,
        _I.RESTART: _RESTART,
        _I.CLEARED: _Row(_S.READY),
        _I.UNFIT: _AFRESH,
        _I.CRASHED: _BACK_OFF,
        _I.REFUSED: _LATCH,
    },
    _S.STOPPING: {
        _I.START: _Row(_S.STOPPING, then=_S.STARTING),
        _I.RESTART: _Row(_S.STOPPING, then=_S.STARTING),
        _I.STOP: _Row(_S.STOPPING, then=_S.STOPPED),
    },
    _S.BACKOFF: {
        _I.START: _SPAWN,
        _I.RESTART: _SPAWN,
        _I.RETRY_DUE: _SPAWN,
        _I.STOP: _Row(_S.STOPPED),
    },
    _S.FAILED: {
        _I.START: _SPAWN,
        _I.RESTART: _SPAWN,
        _I.RETRY_DUE: _SPAWN,
        _I.STOP: _Row(_S.STOPPED),
    },
}

# STOPPING remembers where it leads; arriving there does what that state needs.
_ON_ARRIVAL: Mapping[RouterState, RouterAction] = {
    _S.STOPPED: _A.NONE,
    _S.STARTING: _A.SPAWN,
    _S.BACKOFF: _A.BACK_OFF,
}


def step(life: Life, signal: RouterInput) -> tuple[Life, RouterAction]:
    """What follows when `signal` reaches a router in `life`.

    Called by the router's owner alone. Total: every pair of a state and an input has an answer, and an input that means
    nothing in a state returns the same life and `RouterAction.NONE`.
    """
    if life.state is RouterState.STOPPING and signal is RouterInput.GONE:
        to = life.then or RouterState.STOPPED
        return Life(to), _ON_ARRIVAL[to]
    row = _TABLE[life.state].get(signal)
    if row is None:
        return life, RouterAction.NONE
    return Life(row.to, row.then), row.action
