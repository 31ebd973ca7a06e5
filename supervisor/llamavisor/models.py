"""What is known of every model on one router: one table, one writer, no waiting.

The router's word arrives as events and as whole lists, the kernel's as the end of a child process, and our own intents
are kept beside them, because the router's `failed` and `exit_code` do not tell a deliberate unload from a crash. Every
method returns the events that follow from what it was told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llamavisor.api import ListedModel, StatusEvent
from llamavisor.cause import Cause, classify_refusal
from llamavisor.events import (
    Event,
    ModelChildExited,
    ModelLoaded,
    ModelLoadFailed,
    ModelLoading,
    ModelProgress,
    ModelSleeping,
    ModelUnloaded,
    UnloadReason,
)
from llamavisor.health import Pulse
from llamavisor.process import ExitStatus
from llamavisor.states import HAS_CHILD, RESIDENT, ModelState
from llamavisor.usage import Usage
from llamavisor.vitals import Vitals

QUIET_S = 2.0
"""A model that did nothing for so long is taken to be idle, and may be unloaded for a change of its file or options."""
DEAD_S = 2.0
"""A router that calls a model loaded for so long after its process has ended has lost sight of it."""


@dataclass(slots=True, kw_only=True)
class Model:
    """One model on one router. Written by `ModelTable` alone.

    Attributes:
        name: the router's name of it.
        state: its state as far as we know.
        since: monotonic time in seconds at which it came into this state.
        path: file that it is loaded from.
        pid: its child process, None without one or before it was found.
        port: port of its child on 127.0.0.1.
        n_ctx: context length in tokens that it really got.
        info: what its process says of it, as `api.ListedModel` has it.
        stage: what is being loaded.
        progress: fraction of the stage, 0 to 1.
        progressed_at: monotonic time of the last sign of a load's progress.
        error: why its last load failed or its child ended.
        log_tail: the end of what its process had printed then.
        loaded_at: monotonic time at which it was last loaded.
        recency: grows with every load, but not when we load again what was resident; orders what we load again.
        in_flight: requests that it is answering or that wait for it, None when that is not known.
        metrics: what its process last said on its /metrics, empty before it has; another process has not said it.
        used_at: monotonic time at which it was last seen to do something.
        quiet_since: monotonic time since when it has been seen to do nothing, None while that is not known.
        dead_since: monotonic time at which its process ended while its router goes on calling it loaded.
        log_mark: size of the router's log in bytes when it began to load: what explains a failure stands behind it.
        pulse: the health of its process, None before it was asked for the first time.
        hung_at: monotonic time at which its process was found to be hung, None while it is not.
        ended: how its last process has ended, None if nobody can say.
        ended_pid: which one that was.
    """

    name: str
    state: ModelState = ModelState.UNLOADED
    since: float
    path: Path | None = None
    pid: int | None = None
    port: int | None = None
    n_ctx: int | None = None
    info: Mapping[str, object] | None = None
    stage: str | None = None
    progress: float | None = None
    progressed_at: float = 0.0
    error: str | None = None
    log_tail: tuple[str, ...] = ()
    loaded_at: float | None = None
    recency: int = 0
    in_flight: int | None = None
    work: float = 0.0  # grows whenever it does something
    metrics: bytes = b""
    used_at: float | None = None
    quiet_since: float | None = None
    dead_since: float | None = None
    log_mark: int = 0
    pulse: Pulse | None = None
    hung_at: float | None = None
    ended: ExitStatus | None = None
    ended_pid: int | None = None
    was_tried: bool = False  # we had it do something, and it has not been looked at since
    is_wanted: bool = False  # we asked for the load that is under way
    is_asking: bool = False  # our call to load it has not returned: no list can know of it yet
    is_heard: bool = True  # the router has spoken of the load that we asked for: an end before that is of a former life
    is_overdue: bool = False  # its load has made no progress for too long
    is_again: bool = False  # it was resident before its router ended, and is being loaded again
    leaves_for: UnloadReason = UnloadReason.REQUESTED  # why it is UNLOADING
    router_says: ModelState = ModelState.UNKNOWN  # what the router calls it while it is UNLOADING to us
    revision: int = 0  # Invariant: grows with every change; a list that was asked for before it is older news


class ModelTable:
    """All models of one router.

    Args:
        router: name of the router, for the events.
    """

    def __init__(self, router: str) -> None:
        self._router = router
        self._models: dict[str, Model] = {}
        # Invariant: those of them that have a child. They are looked at all the time, and the others may be thousands.
        self._running: dict[str, Model] = {}
        self.revision = 0
        self._members_at = 0  # revision at which a model was last added or removed: an older list knows nothing of it
        self._loads = 0
        self._processes: dict[str, int] = {}  # which process serves a model, for as long as it lives

    def __repr__(self) -> str:
        states = ", ".join(f"{model.name}={model.state.value}" for model in self)
        return f"<ModelTable {self._router}: {states}>"

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    def get(self, name: str) -> Model | None:
        """The model of that name, None when the router does not list it."""
        return self._models.get(name)

    def is_idle(self, name: str, *, now: float) -> bool:
        """Whether a model in memory has done nothing for a while. What is not known is not idle."""
        model = self._models.get(name)
        return model is not None and model.quiet_since is not None and now - model.quiet_since >= QUIET_S

    def is_all_idle(self, *, now: float) -> bool:
        """Whether no model is loading or leaving, and none is answering anybody, as far as is known."""
        return all(
            model.dead_since is not None
            or model.hung_at is not None
            or model.is_overdue
            or self.is_idle(model.name, now=now)
            for model in self.running()
        )

    def was_away(self, gap_s: float) -> None:
        """We did not run for so long: what happened meanwhile is heard only now, and is not late by that."""
        for model in self:
            model.progressed_at += gap_s
            model.dead_since = None if model.dead_since is None else model.dead_since + gap_s
            model.pulse = None if model.pulse is None else model.pulse.later(gap_s)

    def corpse(self, *, now: float) -> str | None:
        """A model whose process has ended while the router goes on calling it loaded; None without one."""
        for model in self.running():
            if model.dead_since is not None and now - model.dead_since >= DEAD_S:
                return model.name
        return None

    def running(self) -> list[Model]:
        """The models that have a process, as far as is known."""
        return list(self._running.values())

    def residents(self) -> list[str]:
        """The names of the models in memory, the most recently loaded first. One that is loading is not among them."""
        resident = [model for model in self.running() if model.state in RESIDENT]
        return [model.name for model in sorted(resident, key=lambda model: -model.recency)]

    def apply_list(
        self,
        listed: Iterable[ListedModel],
        *,
        asked_at: int,
        now: float,
        is_first: bool = False,
    ) -> list[Event]:
        """Take over a whole list of the router.

        Args:
            listed: what GET /models said.
            asked_at: `revision` when the list was asked for; what changed since then is newer than the list.
            now: monotonic seconds.
            is_first: whether it is the first after the event stream was opened.
        """
        happened: list[Event] = []
        knows_members = asked_at >= self._members_at
        entries = {entry.name: entry for entry in listed}
        for name, entry in entries.items():
            model = self._models.get(name)
            is_news = model is None or (model.revision <= asked_at and not model.is_asking)
            if model is None:
                if not knows_members:  # it was removed since
                    continue
                model = self._add(name, now)
            model.path = entry.path or model.path
            model.n_ctx = entry.n_ctx or model.n_ctx
            model.info = entry.info or model.info
            if is_news:
                model.is_heard |= is_first  # a later one may have overtaken events
                happened += self._observe(model, entry.state, now, exit_code=1 if entry.failed else 0)
        for model in [model for model in self if model.name not in entries]:
            if knows_members and model.revision <= asked_at:
                happened += self._observe(model, ModelState.UNLOADED, now, exit_code=0)
                self.revision += 1
                self._members_at = self.revision
                del self._models[model.name]
        return happened

    def _add(self, name: str, now: float) -> Model:
        self.revision += 1
        self._members_at = self.revision
        self._models[name] = Model(name=name, since=now, revision=self.revision)
        return self._models[name]

    def apply_event(self, event: StatusEvent, *, now: float) -> list[Event]:
        """Take over one status event of the router."""
        model = self._models.get(event.model) or self._add(event.model, now)
        happened: list[Event] = []
        if event.n_ctx is not None:
            model.n_ctx = event.n_ctx
        model.info = event.info or model.info
        if not model.is_heard and event.state is ModelState.UNLOADED:  # a list has told us so before
            return []
        model.is_heard = True
        happened += self._observe(model, event.state, now, exit_code=event.exit_code)
        if model.state is event.state is ModelState.LOADING and event.progress is not None:
            model.stage, model.progress, model.progressed_at = event.stage, event.progress, now
            model.is_overdue, model.hung_at = False, None
            happened.append(
                ModelProgress(router=self._router, model=model.name, stage=event.stage or "", progress=event.progress)
            )
        return happened

    def child_found(self, name: str, pid: int, port: int | None) -> None:
        """Note which process serves the model."""
        if (model := self._models.get(name)) is not None:
            model.pid, model.port, model.dead_since = pid, port, None
            model.pulse, model.hung_at, model.metrics = None, None, b""
            self._processes[name] = pid

    def has_process(self, name: str) -> bool:
        """Whether a process that served the model has not ended yet, whatever its router says."""
        return name in self._processes

    def note_overdue(self, name: str) -> bool:
        """Take note that a load has made no progress for too long; whether that is news."""
        model = self._models[name]
        was_overdue, model.is_overdue = model.is_overdue, True
        return not was_overdue

    def used(
        self,
        name: str,
        usage: Usage | None,
        *,
        vitals: Vitals | None = None,
        has_refused: bool = False,
        now: float,
    ) -> None:
        """Note how busy a model is, and how well.

        Args:
            name: the model.
            usage: what it says; None when it did not say: it is not known to be idle then.
            vitals: what its process has done so far, if that was looked at.
            has_refused: whether it has answered all the same.
            now: monotonic seconds.
        """
        model = self._models.get(name)
        if model is None or model.state not in RESIDENT:
            return
        if usage is not None and model.pid is not None:
            model.metrics = usage.text
        pulse = model.pulse or Pulse.begin(now)
        if model.state is ModelState.SLEEPING:  # it repeats what it said before it fell asleep
            model.pulse = pulse.failed(vitals, now) if usage is None and not has_refused else pulse.answered(now)
            return
        if usage is None:
            model.in_flight = model.quiet_since = None
            model.pulse = pulse.answered(now) if has_refused else pulse.failed(vitals, now)
            return
        is_stuck = usage.in_flight > 0 and usage.work == model.work and model.pulse is not None
        model.pulse = pulse.idle(vitals, now) if is_stuck else pulse.answered(now)
        is_busy = usage.in_flight > 0 or usage.work != model.work
        if is_busy:
            # The first look at a model finds what its warm-up has counted, one after a trial what we had it do.
            is_first = model.in_flight is None or model.was_tried
            model.used_at = model.used_at if is_first and not usage.in_flight else now
            model.was_tried = False
            model.quiet_since = None if usage.in_flight else now
        elif model.quiet_since is None:
            model.quiet_since = now
        model.in_flight, model.work = usage.in_flight, usage.work

    def note_hung(self, name: str, *, now: float) -> None:
        """The process of a model is beyond hope."""
        self._models[name].hung_at = now

    def note_works(self, name: str, *, now: float) -> None:
        """The process of a model was tried, and works. What it did for that is no use of it."""
        model = self._models[name]
        model.pulse, model.was_tried = Pulse.begin(now), True

    def child_ended(self, name: str, pid: int, *, status: ExitStatus | None = None, now: float) -> list[Event]:
        """The kernel says that a model's process has ended, and how as far as it tells.

        The router's word follows within milliseconds.
        """
        if self._processes.get(name) == pid:
            del self._processes[name]
        model = self._models.get(name)
        if model is not None and model.pid == pid:
            model.pid = model.port = model.pulse = model.hung_at = None
            model.metrics = b""
            model.dead_since = now if model.state in HAS_CHILD else None
            model.ended, model.ended_pid = status, pid
        return [ModelChildExited(router=self._router, model=name, pid=pid, status=str(status or ""))]

    def begin_load(self, name: str, *, now: float, is_again: bool = False) -> list[Event]:
        """We are asking the router to load the model; the call is under way.

        Args:
            name: the model.
            now: monotonic seconds.
            is_again: whether it was resident before its router ended; it keeps its place among the others then.
        """
        model = self._models[name]
        model.is_asking = model.is_wanted = True
        model.is_heard = False
        model.is_again = is_again
        return self._observe(model, ModelState.LOADING, now, exit_code=None)

    def end_load_call(self, name: str, *, refusal: str | None, now: float) -> list[Event]:
        """The call to load the model has returned; a refusal means that it is not loading."""
        model = self._models.get(name)
        if model is None:
            return []
        self.revision += 1
        model.revision, model.is_asking = self.revision, False
        if refusal is None or model.state is not ModelState.LOADING:
            return []
        model.error, model.is_wanted = refusal, False
        self._enter(model, ModelState.FAILED, now)
        cause = classify_refusal(refusal)
        return [ModelLoadFailed(router=self._router, model=name, reason=refusal, cause=cause)]

    def unloading(self, name: str, *, now: float, reason: UnloadReason = UnloadReason.REQUESTED) -> None:
        """We are asking the router to unload the model; until it has gone the router goes on calling it loaded."""
        model = self._models.get(name)
        if model is not None and model.state in HAS_CHILD:
            model.router_says, model.leaves_for = model.state, reason
            self._enter(model, ModelState.UNLOADING, now)

    def still_there(self, name: str, *, now: float) -> None:
        """The router would not unload the model: back to what the router calls it."""
        model = self._models.get(name)
        if model is not None and model.state is ModelState.UNLOADING:
            self._enter(model, model.router_says, now)
            model.progressed_at = now
            if model.router_says is ModelState.LOADED and model.loaded_at is None:  # it became so meanwhile
                model.loaded_at = now

    def mark_log(self, name: str, size: int) -> None:
        """Note how long the router's log was when the model began to load."""
        if (model := self._models.get(name)) is not None:
            model.log_mark = size

    def forgive(self, name: str) -> None:
        """The router ended the model's process itself: what looked like a crash was none."""
        model = self._models.get(name)
        if model is not None and model.state is ModelState.FAILED:
            model.state, model.error = ModelState.UNLOADED, None

    def explain(self, name: str, reason: str, log_tail: tuple[str, ...] = ()) -> None:
        """Put a better reason in the place of a failed model's error, and the end of what its process printed."""
        if (model := self._models.get(name)) is not None:
            model.error, model.log_tail = reason, log_tail

    def router_ended(self, *, now: float) -> list[Event]:
        """The router's process has ended, and with it every child."""
        happened: list[Event] = []
        self._processes.clear()
        for model in self:
            model.is_asking = model.is_wanted = False  # the call died with the router
            model.is_heard = True
            if model.state is ModelState.LOADING:
                model.error = "its router ended while it was loading"
                self._enter(model, ModelState.FAILED, now)
                happened.append(
                    ModelLoadFailed(router=self._router, model=model.name, reason=model.error, cause=Cause.UNSOUND)
                )
            elif model.state in HAS_CHILD:
                reason = model.leaves_for if model.state is ModelState.UNLOADING else UnloadReason.ROUTER
                self._enter(model, ModelState.UNLOADED, now)
                happened.append(ModelUnloaded(router=self._router, model=model.name, reason=reason))
        return happened

    def _observe(self, model: Model, state: ModelState, now: float, *, exit_code: int | None) -> list[Event]:
        """Take note that the router says that `model` is in `state`.

        There are five cases:

        1. It says what we know: nothing happened.
        2. It still calls a model loaded or loading that we asked it to unload: it has no word for that; ours stands.
        3. A model is (being) loaded.
        4. A load ended without the model.
        5. A loaded model left: asked for, by the router's own choice, or by a crash. A model that failed stays FAILED
           while the router calls it unloaded: that is the same news with less in it.
        """
        old = model.state
        if state is old:
            return []
        if old is ModelState.UNLOADING and state in HAS_CHILD:
            model.router_says = state
            return []
        if state is ModelState.UNLOADED and old is ModelState.FAILED:
            return []
        router, name = self._router, model.name
        if state is ModelState.LOADING:
            wanted = model.is_wanted
            self._enter(model, state, now)
            model.error, model.progressed_at, model.log_tail = None, now, ()
            return [ModelLoading(router=router, model=name, is_requested=wanted)]
        if state is ModelState.LOADED:
            load_s = now - model.since if old is ModelState.LOADING else None
            self._enter(model, state, now)
            model.error, model.loaded_at, model.is_wanted = None, now, False
            model.used_at = model.used_at if model.is_again else now
            if not model.is_again:
                self._loads += 1
                model.recency = self._loads
            is_again, model.is_again = model.is_again, False
            return [ModelLoaded(router=router, model=name, load_s=load_s, is_again=is_again)]
        if state is ModelState.SLEEPING:
            self._enter(model, state, now)
            return [ModelSleeping(router=router, model=name)]
        if state is ModelState.UNLOADED and old is ModelState.LOADING:
            model.error, model.is_wanted = "its process ended while it was loading", False
            self._enter(model, ModelState.FAILED, now)
            return [ModelLoadFailed(router=router, model=name, reason=model.error)]
        if state is ModelState.UNLOADED and old in HAS_CHILD:
            if old is ModelState.UNLOADING:
                reason = model.leaves_for
            else:
                reason = UnloadReason.CRASHED if exit_code else UnloadReason.EVICTED
            if reason is UnloadReason.CRASHED:
                model.error = "its process ended unasked"
                self._enter(model, ModelState.FAILED, now)
            else:
                self._enter(model, state, now)
            return [ModelUnloaded(router=router, model=name, reason=reason)]
        self._enter(model, state, now)
        return []

    def _enter(self, model: Model, state: ModelState, now: float) -> None:
        self.revision += 1
        model.revision = self.revision
        if ModelState.UNLOADING not in {model.state, state}:  # what hangs is not healed by being told to leave
            model.pulse = model.hung_at = None
        model.state, model.since, model.is_overdue = state, now, False
        if state is not ModelState.LOADING:
            model.stage = model.progress = None
        if state is ModelState.LOADING:
            model.ended = model.ended_pid = None
        if state not in {ModelState.LOADED, ModelState.UNLOADING}:  # from the latter it may come back
            model.in_flight, model.work = None, 0.0
            model.quiet_since = now if state is ModelState.SLEEPING else None
        if state is ModelState.LOADING or state not in HAS_CHILD:  # else only another process is a sign of life
            model.dead_since = None
        if state in HAS_CHILD:
            self._running[model.name] = model
        else:
            self._running.pop(model.name, None)
            model.pid = model.port = model.n_ctx = model.info = None
            model.metrics = b""
