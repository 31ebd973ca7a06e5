"""Faults of processes: killed, crashed, hung."""

from __future__ import annotations

import os
import signal
import time
from typing import ClassVar

import anyio
from fault import EVERYTHING, Fault, Victim
from journal import Event
from stage import EMBEDS, REMEMBERED_S

STABLE_S = 10.5
"""A router that has been READY for 10 s is restarted at once; before that its backoff would be measured."""
HANG_S = 90.0
"""A process that hangs is noticed after 60 to 75 s."""
GAP_S = 10.0
VERDICTS_S = 7.0
"""After a gap a wrong verdict on who was silent would come by then: probes are 5 s apart."""


class _OfProcess(Fault):
    """A signal to a process."""

    number: ClassVar[signal.Signals] = signal.SIGKILL
    victim: Victim | None = None

    async def find(self) -> int | None:
        """The process that it is to be, None if there is none."""
        raise NotImplementedError

    async def prepare(self) -> bool:
        pid = await self.find()
        if pid is None:
            return False
        try:
            self.victim = Victim(pid)
        except ProcessLookupError:
            return False
        return True

    async def inject(self) -> None:
        assert self.victim is not None
        self.done_at = time.time()
        self.victim.send(self.number)

    def is_of_victim(self, event: Event, name: str) -> bool:
        """Whether this is an event of that name about this process."""
        return event["event"] == name and self.victim is not None and event["pid"] == self.victim.pid

    def is_stable(self) -> bool:
        """Whether the router has served for so long that it is restarted at once."""
        since = self.stage.ready_since.get(self.router)
        return since is not None and time.time() - since > STABLE_S

    def has_recovered(self, event: Event) -> bool:
        """Whether the router is ready again after the fault, and what was loaded is loaded."""
        is_it = event["event"] == "RouterRecovered" and event["router"] == self.router
        return is_it and event["time"] > self.done_at

    def was_unloaded(self, event: Event) -> bool:
        """Whether the model has left memory after the fault, for a reason that has nothing to do with it."""
        is_it = event["event"] == "ModelUnloaded" and event["model"] == self.model
        return is_it and event["time"] > self.done_at and event["reason"] in {"evicted", "requested", "expired"}

    async def tidy(self) -> None:
        if self.victim is not None:
            self.victim.send(signal.SIGCONT)
            self.victim.close()


class _OfRouter(_OfProcess):
    """A signal to a router."""

    @property
    def claims(self) -> frozenset[str]:
        return frozenset({self.router})

    def is_due(self) -> bool:
        return self.is_stable()

    async def find(self) -> int | None:
        pid = (await self.stage.routers())[self.router]["pid"]
        return None if pid is None else int(pid)

    def is_seen(self, event: Event) -> bool:
        return self.is_of_victim(event, "RouterExited")

    def is_healed(self, event: Event) -> bool:
        return self.has_recovered(event)


class RouterKilled(_OfRouter):
    """P1. Well again: it is ready, and what was loaded is loaded."""

    label = "router SIGKILL"
    weight = 3


class RouterStopped(_OfRouter):
    """H1."""

    label = "router SIGSTOP"
    weight = 1
    is_slow = True
    detect_s = HANG_S
    recover_s = 60.0
    number = signal.SIGSTOP

    def is_seen(self, event: Event) -> bool:
        return event["event"] == "RouterHung" and event["router"] == self.router and event["time"] > self.done_at


class _OfChild(_OfProcess):
    """A signal to a model's process."""

    async def find(self) -> int | None:
        return await self.stage.has_loaded(self.model)

    def is_seen(self, event: Event) -> bool:
        return self.is_of_victim(event, "ModelChildExited")

    def is_healed(self, event: Event) -> bool:
        is_load = event["event"] == "ModelLoaded" and event["model"] == self.model
        return is_load and event["time"] > self.done_at


class ChildKilled(_OfChild):
    """Well again: it is loaded, because it had been for a while, or because somebody asked for it."""

    label = "model SIGKILL"
    weight = 4


class ChildCrashed(_OfChild):
    """The same with another signal."""

    label = "model SIGSEGV"
    number = signal.SIGSEGV


class ChildStopped(_OfChild):
    """H2. One that nobody asks may be evicted before."""

    label = "model SIGSTOP"
    weight = 1
    is_slow = True
    detect_s = HANG_S
    number = signal.SIGSTOP

    def is_seen(self, event: Event) -> bool:
        return self.is_of_victim(event, "ModelHung")

    def is_overtaken(self, event: Event) -> bool:
        return self.was_unloaded(event)


class ChildHeld(_OfChild):
    """F15. Somebody else holds its pipe, so that its router never hears of its end. Well again: another router is."""

    label = "model SIGKILL, pipe held"
    weight = 1
    _pipe = -1

    @property
    def claims(self) -> frozenset[str]:
        return frozenset({self.router})

    def is_due(self) -> bool:
        return self.is_stable()

    async def prepare(self) -> bool:
        if not await super().prepare():
            return False
        assert self.victim is not None
        try:
            self._pipe = os.open(f"/proc/{self.victim.pid}/fd/2", os.O_WRONLY)
        except OSError:
            return False
        return True

    def is_healed(self, event: Event) -> bool:
        return self.has_recovered(event)

    def is_overtaken(self, event: Event) -> bool:
        return self.was_unloaded(event)

    async def tidy(self) -> None:
        await super().tidy()
        if self._pipe >= 0:
            os.close(self._pipe)


class DaemonKilled(Fault):
    """D5. Well again, counted from the start of the next one: routers are ready, and the pinned models loaded."""

    label = "daemon SIGKILL, and a start"
    weight = 1
    detect_s = None

    @property
    def claims(self) -> frozenset[str]:
        return frozenset({EVERYTHING})

    async def inject(self) -> None:
        stage = self.stage
        self._wanted = await stage.loaded() & stage.pins
        stage.went_down()
        self.done_at = time.time()
        stage.daemon.signal(signal.SIGKILL)
        await anyio.to_thread.run_sync(stage.daemon.wait)

    async def cure(self) -> None:
        await anyio.sleep(self.choose.uniform(0.1, 1.5))
        stage = self.stage
        stage.journal.forget_ids()
        self.cured_at = time.time()
        stage.daemon.start()
        await stage.wait_live()
        stage.came_up()

    async def healed_at(self, since: int) -> float | None:
        async def is_well() -> bool:
            states = {router["state"] for router in (await self.stage.routers()).values()}
            return states == {"ready"} and await self.stage.loaded() >= self._wanted

        well_at = await self.stage.until(is_well, self.recover_s)
        is_lost = await self.stage.pin()
        if is_lost and self.done_at - self.stage.pinned_at > REMEMBERED_S:
            self.stage.findings.broken("no pin is lost", f"{EMBEDS} was pinned, and is not after {self.label}")
        return well_at


class DaemonStopped(Fault):
    """T2: a gap. Nobody is killed for having been silent in it. Well again: it answers."""

    label = "daemon SIGSTOP for 10 s"
    weight = 1
    detect_s = None

    @property
    def claims(self) -> frozenset[str]:
        return frozenset({EVERYTHING})

    async def inject(self) -> None:
        stage = self.stage
        self._routers = {name: router["pid"] for name, router in (await stage.routers()).items()}
        stage.is_paused = True
        self.done_at = time.time()
        stage.daemon.signal(signal.SIGSTOP)

    async def cure(self) -> None:
        await anyio.sleep(GAP_S)
        self.cured_at = time.time()
        await self.tidy()

    async def healed_at(self, since: int) -> float | None:
        async def answers() -> bool:
            await self.stage.routers()
            return True

        well_at = await self.stage.until(answers, self.recover_s)
        await anyio.sleep(VERDICTS_S)
        pids = {name: router["pid"] for name, router in (await self.stage.routers()).items()}
        if pids != self._routers:
            self.stage.findings.broken("nobody is killed for a gap", f"routers were {self._routers}, are {pids}")
        for event in self.stage.journal.events[since:]:
            if event["event"] in {"RouterHung", "ModelHung", "StraysKilled", "ModelChildExited"}:
                is_ours = event["event"] != "ModelChildExited" or self._was_killed(event, since)
                if is_ours:
                    self.stage.findings.broken("nobody is killed for a gap", event["message"])
        return well_at

    def _was_killed(self, event: Event, since: int) -> bool:
        """Whether a process that ended was not unloaded for a reason that has nothing to do with the gap."""
        reasons = {
            other["reason"]
            for other in self.stage.journal.events[since:]
            if other["event"] == "ModelUnloaded" and other["model"] == event["model"]
        }
        return bool(reasons & {"crashed", "unresponsive"})

    async def tidy(self) -> None:
        self.stage.daemon.signal(signal.SIGCONT)
        self.stage.is_paused = False
