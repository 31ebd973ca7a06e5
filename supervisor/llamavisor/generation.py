"""One run of a router's process, from the look at what it needs until nothing is left of it.

A generation does and sees; it decides nothing. What it sees it posts as news to the router's owner, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import anyio.abc

from llamavisor.api import ListedModel, Props
from llamavisor.cause import Cause, Verdict, classify, was_killed
from llamavisor.errors import ApiError, OptionError, SpawnError
from llamavisor.gaps import was_missed
from llamavisor.health import PROBES
from llamavisor.host import Api, Host, ModelProcess, RouterProcess, UsageGauge
from llamavisor.launch import Launch
from llamavisor.news import (
    CameUp,
    ChildEnded,
    ChildFound,
    DevicesMissing,
    Ended,
    Gone,
    Listed,
    News,
    Overdue,
    Polling,
    Probed,
    Replaced,
    Spawned,
    Tried,
    Used,
    Waiting,
)
from llamavisor.options import HANG_AFTER_S, hang_after_s
from llamavisor.process import TERM_GRACE_S, ExitStatus, Leftovers
from llamavisor.shelf import Offer
from llamavisor.shortage import SHORTAGE_HINT, is_shortage
from llamavisor.states import HAS_CHILD, RESIDENT, ModelState
from llamavisor.usage import Usage, UsageError

START_DEADLINE_S = 60.0
START_DEADLINE_PER_MODEL_S = 0.01
"""A router opens the file of every model before it listens."""
DEVICE_DEADLINE_S = 60.0
"""How long a start waits for a device that the options name: drivers load late at boot."""
DEVICE_POLL_S = 2.0
DEVICE_POLL_LATE_S = 10.0
PROBE_INTERVAL_S = 5.0
PROBE_TIMEOUT_S = 10.0
PROBE_PAUSE_S = 0.5
"""At least so long lies between a probe that took its time and the next one."""
BINARY_POLL_S = 5.0
USAGE_INTERVAL_S = 1.0
"""All models are asked at the same moments: to wake once for 32 of them takes half the CPU of waking for each."""
USAGE_INTERVAL_LEASED_S = 2.0
"""Likewise where leases tell who is busy. llama-server notices that the client of a whole answer has left only when no
request of the model, ours included, has had a result for a second (b11434, `recv_with_timeout`)."""
SILENT_PAUSE_S = 0.2
RECONNECT_S = 0.25
POLL_S = 1.0
"""How often the list is read when the build has no event stream; `POLL_LOADING_S` while a model is loading."""
POLL_LOADING_S = 0.25
CHILD_DEADLINE_S = 5.0
"""A child exists within milliseconds after its model is called loading."""
CHILD_POLL_S = 0.02
SHORTAGE_POLL_S = 1.0
"""How often is tried to watch a model's process while there is no descriptor for that."""
AFTERMATH_S = 0.1
"""How long after a child's end its router is asked what it makes of it: it says "loaded" up to 55 ms longer."""
LOG_SETTLE_S = 0.05
"""llama-server logs from a thread of its own: the reason of a failure may reach the log after the news of it."""
_READY_POLL_S = 0.002
_READY_POLL_MAX_S = 0.1


class Generation:
    """One run of a router's process.

    Args:
        host: where it runs.
        post: takes the news; never blocks.
        revision: the current revision of the owner's model table.
    """

    def __init__(self, host: Host, *, post: Callable[[News], None], revision: Callable[[], int]) -> None:
        self.gone = anyio.Event()
        self.process: RouterProcess | None = None
        self._host = host
        self._post = post
        self._revision = revision
        self._scope = anyio.CancelScope()
        self._workers: anyio.abc.TaskGroup | None = None
        self._api: Api | None = None
        self._running: set[str] = set()  # models that the router says have a child
        self._killed: set[str] = set()  # models whose last child somebody has killed: no log can add to that
        self._watched: set[str] = set()  # models whose child is being looked for or watched
        self._loading: set[str] = set()
        self._children: dict[str, ModelProcess] = {}
        self._gauges: dict[str, tuple[UsageGauge, anyio.Lock]] = {}  # of models with a child; one read at a time
        self._resident: set[str] = set()  # models that the router calls loaded, or asleep
        self._told: dict[str, int] = {}  # how many events had come when the last one of a model did
        self._events = 0
        self._hint = anyio.Event()  # something was told that is not understood
        self._is_suspect = False  # it has left a question unanswered that is not the one after its health
        self._refusal: Verdict | None = None
        self._stopped = False  # it was asked to end
        self._has_ended = False  # its end was seen and told
        self._log_mark = 0  # size of the router's output when the process was started

    def __repr__(self) -> str:
        return f"<Generation {self._host.settings.name} pid={self.process.pid if self.process else None}>"

    async def run(self, after: anyio.Event | None) -> None:
        """Live from beginning to end. If cancelled from outside, everything that was started is ended first.

        Args:
            after: set when nothing is left of the generation before, which holds the same port.
        """
        leftovers = Leftovers()
        try:
            with self._scope:
                await self._live(after)
        finally:
            with anyio.CancelScope(shield=True):
                if after is not None:  # stopped while it waited: nothing of the one before may be left either
                    await after.wait()
                if self.process is not None:
                    if not self._has_ended:
                        await self.process.terminate(grace_s=0.0 if self._stopped else TERM_GRACE_S)
                        status = str(self.process.poll() or "the kernel holds it, even against SIGKILL")
                        self._post(Ended(Verdict(Cause.SIGNAL, status), status, self.process.pid))
                    leftovers = await self.process.clear()
                self.gone.set()
                self._post(Gone(leftovers))

    async def stop(self, *, grace_s: float) -> None:
        """End the process, politely for `grace_s` seconds; returns when it has ended, `gone` follows."""
        self._stopped = True
        if self.process is None:
            self._scope.cancel()
        else:
            await self.process.terminate(grace_s=grace_s)
            if self.process.poll() is None:  # the kernel holds it, even against SIGKILL: nobody waits for that
                self._scope.cancel()

    def start_soon(self, work: Callable[..., Coroutine[Any, Any, None]], *args: object) -> bool:
        """Have `work` done beside the router and cancelled when its process ends; False if it has none."""
        if self._workers is None:
            return False
        self._workers.start_soon(work, *args)
        return True

    def suspect(self) -> None:
        """It did not answer what it was asked: from now on it is asked more than whether it is well."""
        self._is_suspect = True

    def kill_child(self, model: str) -> None:
        """Kill the process of a model that its router does not end."""
        if (child := self._children.get(model)) is not None:
            child.kill()

    async def try_model(self, model: str) -> None:
        """Have a model do something, and post as news whether it works. A worker's task."""
        child = self._children.get(model)
        if child is not None and child.port is not None:
            self._post(Tried(model, child.pid, await self._host.try_model(child.port)))

    async def _prepare(self, after: anyio.Event | None) -> Launch | Verdict:
        """Look at what a start needs while the one before is cleared away; its port is free only after that."""
        if after is None or after.is_set() or self._host.settings.port:
            if after is not None:
                await after.wait()
            return await self._host.prepare()
        launch = await self._host.prepare()
        await after.wait()
        return launch

    async def _live(self, after: anyio.Event | None) -> None:
        launch = await self._prepare(after)
        if isinstance(launch, Verdict):
            self._post(Ended(launch, launch.reason, None))
            return
        began = anyio.current_time()
        missing = await self._await_devices(launch)
        if anyio.current_time() - began >= DEVICE_POLL_S:  # files may have come meanwhile
            again = await self._host.prepare()
            if isinstance(again, Verdict):
                self._post(Ended(again, again.reason, None))
                return
            launch = again
        self._log_mark = self._host.output.size()
        try:
            offer = await self._host.write_offer(launch, launch.specs, kept={}, before=Offer())
            process = await self._host.spawn(launch, autoload=not missing)
        except OptionError as error:
            self._post(Ended(Verdict(Cause.BAD_OPTION, str(error), error.hint), str(error), None))
            return
        except OSError as error:
            reason = f"cannot write the router's files: {error}"
            cause, hint = Cause.STATE_DIR, "make room, or let this user write to state_dir"
            if is_shortage(error):
                cause, hint = Cause.SPAWN, SHORTAGE_HINT
            self._post(Ended(Verdict(cause, reason, hint), reason, None))
            return
        except SpawnError as error:
            cause = Cause.BAD_BINARY if error.is_permanent else Cause.SPAWN
            self._post(Ended(Verdict(cause, str(error), error.hint), str(error), None))
            return
        self.process = process
        self._post(Spawned(process, launch, offer))
        ready = anyio.Event()
        async with self._host.connect(launch) as api, anyio.create_task_group() as workers:
            self._workers, self._api = workers, api
            workers.start_soon(self._serve, api, launch, missing, ready)
            status = await process.wait()
            self._workers = self._api = None
            workers.cancel_scope.cancel()
        self._has_ended = True
        lines = self._host.output.tail(50, since=self._log_mark)
        verdict = self._refusal or classify(status, was_ready=ready.is_set(), last_lines=lines)
        self._post(Ended(verdict, str(status), process.pid))

    async def _await_devices(self, launch: Launch) -> tuple[str, ...]:
        """Wait until the devices that the options name are visible; return those that still are not."""
        missing = await self._host.missing_devices(launch)
        if missing:
            text = f"waiting up to {DEVICE_DEADLINE_S:.0f} s for llama-server to see {', '.join(missing)}"
            self._post(Waiting(text, is_news=True))
        with anyio.move_on_after(DEVICE_DEADLINE_S):
            while missing:
                await anyio.sleep(DEVICE_POLL_S)
                missing = await self._host.missing_devices(launch)
        self._post(Waiting(None))
        return missing

    async def _serve(self, api: Api, launch: Launch, missing: tuple[str, ...], ready: anyio.Event) -> None:
        """What goes on beside a running process: see it come up, then follow it until it ends."""
        started = anyio.current_time()
        came_up: tuple[Props, list[ListedModel]] | None = None
        deadline_s = START_DEADLINE_S + START_DEADLINE_PER_MODEL_S * len(launch.specs)
        while came_up is None:
            with anyio.move_on_after(deadline_s) as scope:
                came_up = await self._come_up(api, launch)
            if scope.cancelled_caught and was_missed(scope.deadline, anyio.current_time()):
                continue
            if came_up is None:
                if self._refusal is None:
                    self._post(Overdue(f"not ready within {deadline_s:.0f} s"))
                return
        ready.set()
        props, models = came_up
        self._post(CameUp(api, models, anyio.current_time() - started, missing, props))
        async with anyio.create_task_group() as group:
            group.start_soon(self._follow, api)
            group.start_soon(self._heed_hints, api)
            group.start_soon(self._probe, api)
            group.start_soon(self._watch_binary, launch)
            if missing:
                group.start_soon(self._watch_devices, launch)
            self._watch_children(models)

    async def _come_up(self, api: Api, launch: Launch) -> tuple[Props, list[ListedModel]] | None:
        """Wait for the router's own word that it serves, and what; None if what came up is not a router."""
        assert self.process is not None  # noqa: S101 (a generation without a process does not come here)
        pause = _READY_POLL_S
        while True:
            try:
                props = await api.props()
                if await self._host.is_listening(self.process.pid, launch, log_mark=self._log_mark):
                    if props.is_router:
                        return props, await api.models()
                    self._refusal = Verdict(
                        Cause.BAD_BINARY,
                        "llama-server came up, but not as a router",
                        "look for a model in its environment or in /etc/llama.cpp/config.ini",
                    )
                    await self.process.terminate(grace_s=TERM_GRACE_S)
                    return None
                self._post(Waiting("somebody else answers on its port"))
            except ApiError as error:
                self._post(Waiting(f"it does not answer yet: {error}"))
            await anyio.sleep(pause)
            pause = min(pause * 1.1, _READY_POLL_MAX_S)

    async def _follow(self, api: Api) -> None:
        """Follow the router's event stream, or its list where the build has no stream.

        An event is a hint: one that is not understood, and every end of the stream, is a reason to read the list.
        """
        while True:
            try:
                async with api.events() as events:
                    await self._relist(api, is_first=True)
                    async for event in events:
                        if event is None:
                            self._hint.set()
                            continue
                        if event.exit_code and event.model not in self._killed:
                            await anyio.sleep(LOG_SETTLE_S)
                            await self._host.look_again()  # a file that was cut off explains a crash
                        self._events += 1
                        self._told[event.model] = self._events
                        self._see(event.model, event.state)
                        self._post(event)
            except ApiError as error:
                if error.status is not None:
                    self._post(Polling(f"{error} ({error.status})"))
                    await self._poll(api)
            await anyio.sleep(RECONNECT_S)
            await self._relist(api)

    async def _heed_hints(self, api: Api) -> None:
        """Read the list after events that are not understood, beside those that are: it must not overtake them."""
        while True:
            await self._hint.wait()
            await anyio.sleep(RECONNECT_S)  # downloads tell of their progress five times a second
            self._hint = anyio.Event()
            await self._relist(api)

    async def _poll(self, api: Api) -> None:
        while True:
            await anyio.sleep(POLL_LOADING_S if self._loading else POLL_S)
            await self._relist(api)

    async def _relist(self, api: Api, *, is_first: bool = False) -> None:
        asked_at, events = self._revision(), self._events
        try:
            models = await api.models()
        except ApiError:
            self.suspect()  # the probe reports a router that does not answer
            return
        self._watch_children(models, events)
        self._post(Listed(models, asked_at, is_first))

    def _watch_children(self, models: list[ListedModel], events: int = 0) -> None:
        """Take note of a list that was asked for after so many events; of what was told since it knows nothing."""
        for model in models:
            if self._told.get(model.name, 0) <= events:
                self._see(model.name, model.state)
        self._told = {name: told for name, told in self._told.items() if told > events}

    def _see(self, model: str, state: ModelState) -> None:
        """Take note of a model's state, and watch its process as soon as it has one."""
        for states, members in (({ModelState.LOADING}, self._loading), (RESIDENT, self._resident)):
            if state in states:
                members.add(model)
            else:
                members.discard(model)
        if state not in HAS_CHILD:
            self._running.discard(model)
            return
        self._running.add(model)
        if model not in self._watched and self.start_soon(self._watch_child, model):
            self._watched.add(model)

    async def _watch_child(self, model: str) -> None:
        """Watch the processes that serve a model, one after the other, for as long as the router says it has one."""
        try:
            while model in self._running:
                child = await self._find_child(model)
                if child is None:
                    return
                self._children[model] = child
                self._killed.discard(model)
                self._post(ChildFound(model, child))
                status = await self._until_ended(model, child)
                if was_killed(status):
                    self._killed.add(model)
                self._post(ChildEnded(model, child.pid, status))
                async with anyio.create_task_group() as group:
                    group.start_soon(anyio.sleep, AFTERMATH_S)
                    group.start_soon(self._host.look_again)  # a file that was cut off explains a crash
                if self._api is not None:
                    await self._relist(self._api)
        finally:
            self._watched.discard(model)
            self._children.pop(model, None)

    async def _until_ended(self, model: str, child: ModelProcess) -> ExitStatus | None:
        """Wait until a model's process has ended, and how, and read how busy it is meanwhile."""
        async with anyio.create_task_group() as group:
            if child.port is not None:
                group.start_soon(self._watch_usage, model, child.port)
            status = await _wait_for(child)
            group.cancel_scope.cancel()
        return status

    async def _watch_usage(self, model: str, port: int) -> None:
        gauge = self._host.usage_of(port)
        self._gauges[model] = gauge, anyio.Lock()
        interval_s = USAGE_INTERVAL_S if self._host.settings.autoload else USAGE_INTERVAL_LEASED_S
        is_silent = False
        try:
            while True:
                # One that did not answer has taken its time already, and is asked again soon.
                pause_s = SILENT_PAUSE_S if is_silent else interval_s - anyio.current_time() % interval_s
                await anyio.sleep(pause_s)
                is_silent = False
                if model in self._resident:  # one that loads would not answer; one that sleeps is not woken by that
                    began = anyio.current_time()
                    is_silent = await self.usage_now(model) is None and anyio.current_time() - began >= interval_s / 2
        finally:
            del self._gauges[model]
            await gauge.aclose()

    async def usage_now(self, model: str) -> Usage | None:
        """How busy a model is at this moment, None when it does not say; posted as news besides."""
        if model not in self._gauges:
            return None
        gauge, reading = self._gauges[model]
        usage, has_refused, has_asked = None, False, True
        async with reading:
            try:
                usage = await gauge.read()
            except UsageError as error:
                has_refused = error.status is not None
                has_asked = not is_shortage(error.__cause__)
        # Of one that does not answer, or has something to do, the kernel tells whether it works.
        child = self._children.get(model) if has_asked and (usage is None or usage.in_flight) else None
        self._post(Used(model, usage, child.vitals() if child is not None else None, has_refused))
        return usage

    async def _find_child(self, model: str) -> ModelProcess | None:
        gives_up_at = anyio.current_time() + CHILD_DEADLINE_S
        child: ModelProcess | None = None
        while model in self._running and self.process is not None:
            is_last = anyio.current_time() >= gives_up_at  # looked for once more: the time may have passed in a gap
            with anyio.move_on_after(CHILD_DEADLINE_S):
                child = await self._host.find_child(self.process.pid, model)
            if child is not None or is_last:
                break
            await anyio.sleep(CHILD_POLL_S)
        return child

    async def _probe(self, api: Api) -> None:
        """Ask the router every few seconds whether it is well.

        Released routers have said so for ever while they answered nothing else. One that is suspected of that is asked
        for its list, which takes the lock that they had hung on.
        """
        duration_s = 0.0
        # Who wants a hang to be found sooner has to be asked more often.
        share_s = (hang_after_s(self._host.settings.layers) or HANG_AFTER_S) / PROBES
        interval_s, timeout_s = min(PROBE_INTERVAL_S, share_s), min(PROBE_TIMEOUT_S, share_s)
        while True:
            await anyio.sleep(max(PROBE_PAUSE_S, interval_s - duration_s))
            began = anyio.current_time()
            error = vitals = None
            try:
                await api.check_health(timeout_s=timeout_s)
                if self._is_suspect:
                    await api.models()
                    self._is_suspect = False
            except ApiError as failure:
                error = str(failure)
                vitals = self.process.vitals() if self.process is not None and not is_shortage(failure.origin) else None
            duration_s = anyio.current_time() - began
            self._post(Probed(duration_s, error, vitals))

    async def _watch_binary(self, launch: Launch) -> None:
        while not await self._host.is_replaced(launch):
            await anyio.sleep(BINARY_POLL_S)
        self._post(Replaced())

    async def _watch_devices(self, launch: Launch) -> None:
        while missing := await self._host.missing_devices(launch):
            self._post(DevicesMissing(missing))
            await anyio.sleep(DEVICE_POLL_LATE_S)
        self._post(DevicesMissing(()))


async def _wait_for(child: ModelProcess) -> ExitStatus | None:
    """Wait until a model's process has ended; without a descriptor to see it with, until there is one."""
    while True:
        try:
            return await child.wait()
        except OSError:
            await anyio.sleep(SHORTAGE_POLL_S)
