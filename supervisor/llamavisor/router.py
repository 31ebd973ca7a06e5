"""One supervised router: the owner of its state, who alone decides and alone writes.

Everything that happens reaches the owner as a message in its inbox: news from the running generation, wishes of people,
the tick of the clock. It looks the answer up in the table of `states`, asks the policy of `restart`, and starts
workers; it never waits for the outside itself.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any

import anyio
import anyio.abc

from llamavisor import events as ev
from llamavisor import generation as gen
from llamavisor import messages as msg
from llamavisor import news
from llamavisor.api import Props
from llamavisor.appraisal import Appraisal
from llamavisor.arbiter import Arbiter
from llamavisor.cause import Cause, Verdict
from llamavisor.comeback import Comeback
from llamavisor.errors import RouterNotReadyError
from llamavisor.footprint import Device
from llamavisor.gaps import Gaps
from llamavisor.host import Host, RouterProcess
from llamavisor.inbox import Inbox
from llamavisor.launch import Launch
from llamavisor.models import ModelTable
from llamavisor.operations import Kind, Operation, Ticket
from llamavisor.output import OutputFile
from llamavisor.pause import Pause
from llamavisor.process import TERM_GRACE_S
from llamavisor.renewal import SICK_GRACE_S, Renewal
from llamavisor.residency import Line, Residency
from llamavisor.sections import ModelSpec
from llamavisor.settings import OnOverwrite, RouterSettings, base_url
from llamavisor.shelf import Offered, Shelf
from llamavisor.states import SERVING, Change, Life, RouterAction, RouterInput, RouterState, step
from llamavisor.troubles import Troubles

TICK_S = 1.0


class Router:
    """One router under supervision.

    Args:
        host: where it runs.
        bus: where its events go.
        random: a source of numbers in [0, 1), for the jitter of the backoff.
        arbiter: who sees all routers; without one it decides over its loads by itself.

    Everything public may be read at any time on the event loop; only the owner (`run`) writes.
    """

    def __init__(self, host: Host, *, bus: ev.Bus, random: Callable[[], float], arbiter: Arbiter | None = None) -> None:
        self.life = Life()
        self.since = 0.0
        self.starts = 0  # generations that were begun
        self.restarts = 0  # of these, the ones that replaced another
        self.process: RouterProcess | None = None
        self.spawned_at: float | None = None  # monotonic time of the start of its process
        self.launch: Launch | None = None
        self.props: Props | None = None  # what its process said of itself when it came up; the last one's while none is
        self._host = host
        self._publish = bus.publish
        self._inbox = Inbox[msg.Message]()
        self._post = self._inbox.post
        self.is_over = False  # it was shut down
        self._arbiter = arbiter
        self._troubles = Troubles(self.name, publish=self._publish, signal=self._signal)
        self._residency = Residency(
            host.settings,
            host.output,
            refusal=lambda: self._troubles.refusal,
            publish=bus.publish,
            post=self._post_from,
            arbiter=arbiter,
        )
        self._generation: gen.Generation | None = None
        self._ready_since: float | None = None
        self._waiting: str | None = None  # what a start waits for
        self._gaps = Gaps(TICK_S)
        self._changed = anyio.Event()
        self._tasks: anyio.abc.TaskGroup | None = None
        self._grace_s = TERM_GRACE_S
        self._renewal = Renewal(
            self.name,
            self._residency,
            self._troubles,
            arbiter,
            publish=self._publish,
            restart=self._restart_for,
            end=self._end_unfit,
            begin=lambda work: self._generation is not None and self._generation.start_soon(work),
        )
        pause = Pause(start_soon=self._start_soon, post=self._post)
        self.comeback = Comeback(self.name, publish=self._publish, random=random, pause=pause)

    def __repr__(self) -> str:
        return f"<Router {self.name} {self.state.value} pid={self.process.pid if self.process else None}>"

    @property
    def settings(self) -> RouterSettings:
        """What it is told to be."""
        return self._host.settings

    @property
    def host(self) -> Host:
        """Where it runs."""
        return self._host

    @property
    def name(self) -> str:
        """Its name in the fleet."""
        return self._host.settings.name

    @property
    def state(self) -> RouterState:
        """Where it is in its life."""
        return self.life.state

    @property
    def table(self) -> ModelTable:
        """What is known of its models."""
        return self._residency.table

    @property
    def shelf(self) -> Shelf:
        """What it is to serve, and what it has been told of that."""
        return self._residency.shelf

    @property
    def url(self) -> str | None:
        """Where this machine's own clients reach it; None while a port is still to be found for it."""
        port = self.launch.port if self.launch is not None else self.settings.port
        return base_url(self.settings.host, port) if port else None

    @property
    def is_serving(self) -> bool:
        """Whether clients are answered."""
        return self.state in SERVING

    @property
    def is_closed(self) -> bool:
        """Whether it serves what is loaded and may load nothing more: a device is missing, or a restart is due."""
        return self._residency.closed is not None

    @property
    def reason(self) -> str | None:
        """Why it is not simply READY, as a person reads it."""
        if self.state is RouterState.DEGRADED:
            return self._troubles.text
        if self.state is RouterState.STARTING and self._waiting:
            return self._waiting
        is_well = self.state in {RouterState.READY, RouterState.STOPPED}
        return None if is_well or self.comeback.verdict is None else self.comeback.verdict.reason

    @property
    def hint(self) -> str | None:
        """What a person can do about the reason."""
        if self.state in {RouterState.FAILED, RouterState.BACKOFF} and self.comeback.verdict is not None:
            return self.comeback.verdict.hint or None
        if self.state is RouterState.DEGRADED:
            closed = self._residency.closed
            return closed.hint if closed is not None else f"llamavisor restart {self.name}"
        return None

    @property
    def output(self) -> OutputFile:
        """What its processes print."""
        return self._host.output

    # --- what others ask of it ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Want it up. Clears FAILED; no effect on a router that is up."""
        self._post(msg.Wish(RouterInput.START))

    def stop(self) -> None:
        """Want it down, and what was resident forgotten."""
        self._post(msg.Wish(RouterInput.STOP))

    def restart(self) -> None:
        """Want a fresh process, with what is resident loaded again. Neither uses nor needs the restart budget."""
        self._post(msg.Wish(RouterInput.RESTART))

    def reconfigure(self, host: Host, *, restart: bool = True) -> None:
        """Go on with other settings, in a fresh process if `restart`; a router in trouble gets one in any case."""
        self._post(msg.Reconfigured(host, restart))

    def want(
        self,
        specs: Mapping[str, ModelSpec],
        leaving: Mapping[str, Change] | None = None,
        *,
        on_overwrite: OnOverwrite = "reload",
    ) -> None:
        """Serve these models from now on. What runs is touched only when it is idle, and only if it has changed."""
        self._post(msg.Wanted(specs, leaving or {}, on_overwrite))

    async def load(self, model: str) -> bool:
        """Have `model` loaded, and wait until the router says so. A router that is starting is waited for.

        Returns:
            False if it was loaded already.

        Raises:
            ModelNotFoundError: the router does not list it.
            ModelLoadError: it did not become loaded.
            ModelsMaxError: no other model can leave now.
            DeviceMissingError: the device that it is meant for is not there.
            RouterNotReadyError: the router is stopped or failed.
        """
        return await self._ask(Operation(Kind.LOAD, self.shelf.name_of(model)))

    async def unload(
        self, model: str, *, reason: ev.UnloadReason = ev.UnloadReason.REQUESTED, if_idle: bool = False
    ) -> bool:
        """Have `model` unloaded, and wait until it is gone; a load that is under way is cancelled.

        Args:
            model: its name, or an alias.
            reason: what it is for.
            if_idle: whether it is to be done only if the model turns out to answer nobody.

        Returns:
            False if it was not loaded.

        Raises:
            ModelNotFoundError: the router does not list it.
            RouterNotReadyError: the router is stopped or failed.
            ApiError: the router refused.
        """
        return await self._ask(Operation(Kind.UNLOAD, self.shelf.name_of(model), if_idle=if_idle, reason=reason))

    def tell(self, what: msg.Recalled | msg.DevicesLost | msg.Suspected) -> None:
        """Let the owner know what others have seen."""
        self._post(what)

    async def rescan(self) -> None:
        """Have the router read what it may serve again, changed or not. Nothing that runs is stopped.

        Raises:
            ApiError: the router refused.
            RouterNotReadyError: the router is stopped or failed.
        """
        await self._ask(Operation(Kind.RELOAD))

    async def appraise(self, offered: Offered, devices: tuple[Device, ...]) -> Appraisal | None:
        """What a model is expected to take here, None when nobody can say."""
        return None if self.launch is None else await self._host.appraise(self.launch, offered, devices)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds, looked at after every message that the owner has handled."""
        while not condition():
            await self._changed.wait()

    async def shut_down(self, *, grace_s: float = TERM_GRACE_S) -> None:
        """Stop for good; returns when nothing of it is left. A second call with a shorter grace hurries the first."""
        if self.is_over:
            return
        self._grace_s = grace_s
        self.stop()
        if self._generation is not None and self.state is RouterState.STOPPING:
            await self._generation.stop(grace_s=grace_s)
        await self.wait_until(lambda: self.state is RouterState.STOPPED and not self._inbox)
        if self._generation is not None:
            await self._generation.gone.wait()
        self.is_over = True
        self._post(msg.Tick())

    async def _ask(self, operation: Operation) -> bool:
        if self.is_over:
            raise self._not_ready()
        ticket = Ticket(operation)
        self._post(ticket)
        try:
            return await ticket.wait()
        finally:
            ticket.finish()  # nobody waits for it any longer; what it asked for goes on

    # --- the owner ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Supervise until shut down or cancelled; if cancelled, end the process first.

        Begins in STOPPED: call `start`.
        """
        async with anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self._tell_the_time)
            self._tasks.start_soon(self.output.keep_bounded, self._tell_of_log)
            while not self.is_over:
                self._handle(await self._inbox.take())
                self._residency.advance()
                self._changed.set()
                self._changed = anyio.Event()
            self._tasks.cancel_scope.cancel()

    def _handle(self, message: msg.Message) -> None:
        if gap_s := self._gaps.pass_s(anyio.current_time()):
            self._troubles.was_away(gap_s)
            self.table.was_away(gap_s)
        match message:
            case msg.Heard(generation, heard):
                if isinstance(heard, news.Gone):  # the next may have begun already
                    if left := heard.leftovers:
                        self._publish(ev.StraysKilled(router=self.name, pids=left.killed, survivors=left.survivors))
                    self._publish(ev.RouterGone(router=self.name))
                if generation is self._generation:
                    self._hear(heard)
            case msg.CallEnded(generation, operation, error):
                if generation is self._generation:
                    self._residency.call_ended(operation, error)
            case msg.RetryDue(generation) if generation is self._generation:
                self._signal(RouterInput.RETRY_DUE)
            case msg.Wish(wish):
                self.comeback.why = Cause.REQUESTED if wish is RouterInput.RESTART else None
                self._signal(wish)
            case msg.Reconfigured(host, restart):
                self._host = host
                self._residency.settle_on(host)
                if self._is_wanted and (restart or self.state is not RouterState.READY):
                    self._renewal.reconfigured(can_wait=self.state is RouterState.READY)
            case Ticket():
                if self._is_wanted and self.state is not RouterState.FAILED:
                    self._residency.accept(message)
                else:
                    message.finish(self._not_ready())
            case msg.DevicesLost(devices, is_news) if self.is_serving:
                self._renewal.devices_lost(devices, is_news=is_news)
            case msg.Wanted() | msg.Recalled() | msg.Suspected():
                self._residency.take(message)
            case msg.Tick():
                self._tick()

    def _signal(self, signal: RouterInput) -> None:
        old = self.state
        self.life, action = step(self.life, signal)
        if self.state is not old:
            self.since = anyio.current_time()
            self.comeback.end_wait()
            self._publish(ev.RouterStateChanged(router=self.name, old=old, new=self.state))
            if self.state is RouterState.STOPPING:
                self._residency.pause()
            if self.state in {RouterState.STOPPED, RouterState.FAILED}:
                self._residency.given_up(self._not_ready(), forget=self.state is RouterState.STOPPED)
        match action:
            case RouterAction.SPAWN:
                self._spawn()
            case RouterAction.STOP:
                assert self._generation is not None  # noqa: S101 (only a state with a generation leads here)
                grace_s = min(self._grace_s, SICK_GRACE_S) if self._renewal.is_sick else self._grace_s
                self._start_soon(partial(self._generation.stop, grace_s=grace_s))
            case RouterAction.BACK_OFF:
                answered_at = self._troubles.pulse.answered_at
                self.comeback.back_off(self._generation, ready_since=self._ready_since, answered_at=answered_at)
            case RouterAction.LATCH:
                self.comeback.latch(self._generation, self._host, self.launch)
            case RouterAction.NONE:
                pass

    def _spawn(self) -> None:
        before = self._generation
        self.starts += 1
        self._ready_since = self._waiting = self.launch = None
        self._troubles.forget()
        generation = gen.Generation(
            self._host,
            post=lambda heard: self._post(msg.Heard(generation, heard)),
            revision=lambda: self.table.revision,
        )
        self._generation = generation
        self._start_soon(generation.run, before.gone if before else None)

    def _hear(self, heard: news.News) -> None:
        if isinstance(heard, news.ModelNews):
            self._residency.hear(heard)
            return
        now = anyio.current_time()
        match heard:
            case news.Unsound(reason):
                self._renewal.unsound(reason)
            case news.AllIdle() if self.is_serving and not (self._arbiter and self._arbiter.is_used(self.name)):
                self._renewal.confirmed()
            case news.Probed(duration_s, error, vitals) if self.is_serving:
                self._publish(ev.RouterProbed(router=self.name, duration_s=duration_s, error=error))
                disturbed = self._gaps.has_disturbed(now - duration_s, within_s=gen.PROBE_INTERVAL_S)
                self._troubles.probed(error, vitals, counts=not disturbed, now=now)
            case news.DevicesMissing(devices) if self.is_serving:  # one that is being stopped is not renewed
                self._renewal.devices_missing(devices)
            case news.Polling(reason):
                self._warn(f"{reason}; its list is read every second instead")
            case news.Replaced() if self.is_serving:
                self._renewal.replaced()
                self._renewal.advance(now=now)
            case news.Waiting(reason, is_news):
                self._waiting = reason
                if is_news and reason is not None:
                    self._warn(reason)
            case news.Spawned(process, launch, offer):
                self.process, self.launch, self.spawned_at = process, launch, now
                self._residency.told(offer)
                self._publish(ev.RouterSpawned(router=self.name, pid=process.pid, cause=self.comeback.why))
                self.restarts += self.comeback.why is not None
                for warning in launch.warnings:
                    self._warn(warning)
            case news.CameUp() if self.state is RouterState.STARTING:  # not while it is being stopped
                self._come_up(heard)
            case news.Overdue(reason):
                self.comeback.verdict = Verdict(Cause.START_TIMEOUT, reason, "see `llamavisor logs`")
                self._signal(RouterInput.OVERDUE)
            case news.Ended():
                self._end(heard)
            case news.Gone():
                self._signal(RouterInput.GONE)

    def _come_up(self, up: news.CameUp) -> None:
        assert self.process is not None and self._generation is not None and self.launch is not None  # noqa: S101, PT018
        self._ready_since = anyio.current_time()
        self._troubles.came_up(self._ready_since)
        self.comeback.verdict, self.props = None, up.props
        self._residency.came_up(Line(up.api, self._generation, self._host, self.launch), up.models)
        self._signal(RouterInput.READY)
        self._publish(ev.RouterReady(router=self.name, pid=self.process.pid, url=self.url or "", start_s=up.start_s))
        if not up.models:
            self._warn(f"no models yet: put GGUF files into {self.settings.models_dir}, or `llamavisor pull USER/REPO`")
        self._renewal.devices_missing(up.missing_devices)

    def _end(self, ended: news.Ended) -> None:
        is_requested = self.state is RouterState.STOPPING
        self.process = self.spawned_at = None
        if ended.pid is not None:
            self._publish(
                ev.RouterExited(
                    router=self.name,
                    pid=ended.pid,
                    status=ended.status,
                    cause=ended.verdict.cause,
                    is_requested=is_requested,
                    detail=ended.verdict.reason,
                )
            )
        is_orderly = is_requested and self.life.then is not RouterState.BACKOFF
        self._residency.went_down(keeps=self.life.then is not RouterState.STOPPED, is_requested=is_orderly)
        if not is_requested:
            self.comeback.verdict = ended.verdict
            self._signal(RouterInput.REFUSED if ended.verdict.is_permanent else RouterInput.CRASHED)

    def _warn(self, text: str) -> None:
        self._publish(ev.Warned(subject=f"router {self.name}", text=text))

    def _restart_for(self, cause: Cause) -> None:
        self.comeback.why = cause
        self._signal(RouterInput.RESTART)

    def _end_unfit(self, verdict: Verdict) -> None:
        self.comeback.verdict = verdict
        self._signal(RouterInput.UNFIT)

    @property
    def _is_wanted(self) -> bool:
        return RouterState.STOPPED not in {self.state, self.life.then}

    def _not_ready(self) -> RouterNotReadyError:
        verdict = self.comeback.verdict if self.state is RouterState.FAILED else None
        reason = f": {verdict.reason}" if verdict is not None else ""
        return RouterNotReadyError(
            f"router {self.name} is {self.state.value}{reason}", hint=self.hint or f"llamavisor start {self.name}"
        )

    async def _tell_the_time(self) -> None:
        while True:
            await anyio.sleep(TICK_S)
            self._post(msg.Tick())

    def _tell_of_log(self, size_bytes: int, error: OSError | None) -> None:
        rotated = ev.LogRotated(router=self.name, size_bytes=size_bytes)
        self._publish(rotated if error is None else ev.Warned(subject=f"log of router {self.name}", text=str(error)))

    def _tick(self) -> None:
        now = anyio.current_time()
        if self.is_serving and self._ready_since is not None:
            self.comeback.note_ready(ready_for_s=now - self._ready_since)
        self._residency.check_deadlines()
        if self.is_serving:
            self._renewal.advance(now=now)

    def _start_soon(self, work: Callable[..., Coroutine[Any, Any, None]], *args: object) -> None:
        assert self._tasks is not None  # noqa: S101 (the owner runs)
        self._tasks.start_soon(work, *args)

    def _post_from(self, generation: gen.Generation, heard: news.News | msg.CallEnded) -> None:
        self._post(heard if isinstance(heard, msg.CallEnded) else msg.Heard(generation, heard))
