"""When a router that has ended is started again, and what is told of that."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from llamavisor import events as ev
from llamavisor import restart
from llamavisor.cause import Cause, Verdict
from llamavisor.generation import Generation
from llamavisor.host import Host
from llamavisor.launch import Launch
from llamavisor.pause import Pause, await_change
from llamavisor.restart import RestartHistory

_ENDED = Verdict(Cause.EXIT, "ended")


class Comeback:
    """Sees to it. Used by the router's owner alone.

    Args:
        router: name of the router, for the events.
        publish: where events go.
        random: a source of numbers in [0, 1), for the jitter of the backoff.
        pause: has it started again after a wait.

    Attributes:
        history: what the restart policy remembers.
        verdict: why it is not serving, or was not the last time.
        why: why the next process is begun, None for the first.
        retry_at: monotonic time of the next try, None while none is scheduled.
    """

    def __init__(
        self, router: str, *, publish: Callable[[ev.Event], None], random: Callable[[], float], pause: Pause
    ) -> None:
        self.history = RestartHistory()
        self.verdict: Verdict | None = None
        self.why: Cause | None = None
        self.retry_at: float | None = None
        self._router = router
        self._publish = publish
        self._random = random
        self._pause = pause

    def __repr__(self) -> str:
        return f"<Comeback of {self._router}: {self.verdict}>"

    def back_off(self, ended: Generation | None, *, served_for_s: float | None) -> None:
        """Have it started again after a delay.

        Args:
            ended: what has ended.
            served_for_s: for how long it had been READY and of use, None if it never was.
        """
        verdict, now, was_loop = self.verdict or _ENDED, anyio.current_time(), self.history.is_crash_loop
        self.history, delay_s = restart.after_end(
            self.history, now=now, ready_for_s=served_for_s, jitter=self._random()
        )
        self.why, self.retry_at = verdict.cause, now + delay_s
        count = self.history.failures
        self._publish(
            ev.RouterRestartScheduled(router=self._router, cause=verdict.cause, delay_s=delay_s, failures=count)
        )
        if self.history.is_crash_loop and not was_loop:
            self._publish(ev.RouterCrashLoop(router=self._router, failures=count))
        self._pause.begin(ended, anyio.sleep, delay_s)

    def latch(self, ended: Generation | None, host: Host, launch: Launch | None) -> None:
        """Have it started again when something about the cause has changed.

        Args:
            ended: what has ended.
            host: where it runs.
            launch: what had been started, None if nothing was.
        """
        verdict = self.verdict or _ENDED
        self.why = verdict.cause
        self._publish(
            ev.RouterFailed(router=self._router, cause=verdict.cause, reason=verdict.reason, hint=verdict.hint)
        )
        self._pause.begin(ended, await_change, host, verdict, launch)

    def end_wait(self) -> None:
        """It waits no longer."""
        self.retry_at = None
        self._pause.end()

    def note_ready(self, *, ready_for_s: float) -> None:
        """It has been READY for so long, and is."""
        self.history = restart.while_ready(self.history, ready_for_s=ready_for_s)
