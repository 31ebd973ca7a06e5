"""What is done about models that hang, whose loads do, or that answer nothing but errors: each is ended alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamavisor import events as ev
from llamavisor.arbiter import Arbiter
from llamavisor.health import MODEL_MAX_S, Remedy, describe, remedy
from llamavisor.models import Model, ModelTable
from llamavisor.news import Tried
from llamavisor.operations import Kind, Operation, Operations, Ticket
from llamavisor.options import HANG_AFTER_S
from llamavisor.shelf import Shelf
from llamavisor.states import RESIDENT, ModelState

if TYPE_CHECKING:
    from llamavisor.residency import Line

LOAD_DEADLINE_S = 60.0
LOAD_BYTES_PER_S = 100e6
LOAD_DEADLINE_MAX_S = 1800.0
"""A load may take 60 s plus a second for every 100 MB, counted from its last progress, and never more than 30 min."""
TRIAL_EVERY_S = 60.0
"""A model that is under suspicion is not tried more often, unless it has just failed a trial."""
TRIALS = 2
"""A model that has failed so many trials in a row does not work."""


@dataclass(slots=True)
class _Trial:
    """What is known of the trials of one process."""

    pid: int
    began_at: float
    failures: int = 0
    is_under_way: bool = True


class Healing:
    """Ends what hangs. Used by the router's owner alone.

    Args:
        router: name of the router, for the events.
        table: what is known of its models.
        shelf: what they should be.
        operations: what is asked of the router.
        publish: where events go.
        renew: has the router make way for another, for this reason.
        arbiter: who sees all routers, None without one.
    """

    def __init__(
        self,
        router: str,
        table: ModelTable,
        shelf: Shelf,
        operations: Operations,
        *,
        publish: Callable[[ev.Event], None],
        renew: Callable[[str], None],
        arbiter: Arbiter | None,
    ) -> None:
        self._router = router
        self._table = table
        self._shelf = shelf
        self._publish = publish
        self._operations = operations
        self._renew = renew
        self._arbiter = arbiter
        self._trials: dict[str, _Trial] = {}

    def __repr__(self) -> str:
        return f"<Healing on {self._router}: {sorted(self._trials)}>"

    def advance(self, line: Line | None, now: float) -> None:
        """Find who hangs, and do the next thing about it; called every second."""
        running = self._table.running()
        there = {model.name: model.pid for model in running}
        self._trials = {name: trial for name, trial in self._trials.items() if there.get(name) == trial.pid}
        for model in running:
            if model.state is ModelState.LOADING:
                self._look_at_load(model, now)
        if line is None:
            return
        for model in running:
            if model.hung_at is not None:
                self._heal(model, line, now)
            elif model.state in RESIDENT and model.pulse is not None:
                if model.pulse.is_hung(now, after_s=self._hang_after_s(model), max_s=MODEL_MAX_S):
                    self._give_up(model, model.pulse.silent_s(now), describe(model.pulse, now), now)
                elif model.pulse.is_stalled(after_s=self._hang_after_s(model)):
                    self.suspect(model.name, line, now)

    def _look_at_load(self, model: Model, now: float) -> None:
        """Cancel a load that has made no progress for too long."""
        size_bytes = self._shelf.size_bytes(model.name) or 0
        deadline_s = min(LOAD_DEADLINE_MAX_S, LOAD_DEADLINE_S + size_bytes / LOAD_BYTES_PER_S)
        if now - model.progressed_at > deadline_s and self._table.note_overdue(model.name):
            text = f"no progress for {deadline_s:.0f} s: its load is cancelled"
            self._publish(ev.Warned(subject=f"model {model.name}", text=text))
            self._table.note_hung(model.name, now=now)

    def suspect(self, name: str, line: Line | None, now: float, *, deaf_port: int | None = None) -> None:
        """Something speaks against a model: have it do something, unless it has just been tried, or works for others.

        One that sleeps, is being loaded or leaves is never tried, nor is one that is busy and gets on. One that takes
        no connections need not be tried: somebody may have sent it SIGTERM, which makes it so for ever (ROUTER.md, D6).

        Args:
            name: the model.
            line: the connection to its router, None while that does not serve.
            now: monotonic seconds.
            deaf_port: where its process takes no connections; None if it answers, but nothing but errors.
        """
        model = self._table.get(name)
        if model is None or model.pid is None or model.state not in RESIDENT or model.hung_at is not None:
            return
        if deaf_port is not None:
            if model.port == deaf_port:
                self._give_up(model, 0.0, "it takes no connections", now)
            return
        if line is None or model.state is not ModelState.LOADED:
            return
        is_stalled = model.pulse is not None and model.pulse.is_stalled(after_s=self._hang_after_s(model))
        is_used = self._arbiter is not None and self._arbiter.is_used(self._router, name)
        if not is_stalled and (model.in_flight != 0 or is_used):  # also if it does not say whether it is busy
            return
        before = self._trials.get(name)
        if before is None or before.pid != model.pid:
            self._trials[name] = _Trial(model.pid, now)
        elif before.is_under_way or (before.failures == 0 and now - before.began_at < TRIAL_EVERY_S):
            return
        else:
            before.began_at, before.is_under_way = now, True
        line.generation.start_soon(line.generation.try_model, name)

    def tried(self, news: Tried, now: float) -> None:
        """A trial has ended."""
        trial, model = self._trials.get(news.model), self._table.get(news.model)
        if trial is None or trial.pid != news.pid or model is None or model.pid != news.pid:
            return
        trial.is_under_way = False
        if news.error is None:
            trial.failures = 0
            self._table.note_works(model.name, now=now)
            if self._arbiter is not None:
                self._arbiter.clear(self._router, model.name)
        elif model.pulse is None or model.pulse.failures == 0:  # one that is silent is judged by its silence alone
            trial.failures += 1
        if trial.failures >= TRIALS and model.state is ModelState.LOADED and model.hung_at is None:
            self._give_up(model, 0.0, f"it answers nothing but errors: {news.error}", now)

    def _hang_after_s(self, model: Model) -> float | None:
        spec = self._shelf.spec(model.name)
        return HANG_AFTER_S if spec is None else spec.hang_after_s

    def _give_up(self, model: Model, silent_s: float, reason: str, now: float) -> None:
        """The process of a model is beyond hope."""
        self._table.note_hung(model.name, now=now)
        pid = model.pid or 0
        self._publish(ev.ModelHung(router=self._router, model=model.name, pid=pid, silent_s=silent_s, reason=reason))
        if self._arbiter is not None:
            self._arbiter.lose(self._router, model.name)

    def _heal(self, model: Model, line: Line, now: float) -> None:
        """Its router ends it; if that does not help we do; if even that does not, its router makes way for another."""
        assert model.hung_at is not None  # noqa: S101 (it hangs)
        step = remedy(now - model.hung_at)
        if step is Remedy.UNLOAD:
            is_load = model.state is ModelState.LOADING
            reason = ev.UnloadReason.STALLED if is_load else ev.UnloadReason.UNRESPONSIVE
            unload = Operation(Kind.UNLOAD, model.name, reason=reason)
            if not self._operations.is_pending(unload):
                self._operations.ask(Ticket(unload), self._table)
            return
        line.generation.kill_child(model.name)
        if step is Remedy.RESTART:
            self._renew(f"the process of {model.name} hangs and cannot be ended")
