"""What people do to it: configuration, good and bad, and commands at random."""

from __future__ import annotations

import time

import anyio
from fault import Fault
from file_faults import PINNED_FULL
from journal import Event
from stage import ALIASED, PINNED

BAD = "this is not TOML ]\n"
LEAVES_S = 1.0
"""A model that had been told to leave before it was pinned has left by then."""


class ReloadGood(Fault):
    """D2, D3. Noticed: it is in force. Well again: the router knows the model by its new alias."""

    label = "a good configuration"

    @property
    def claims(self) -> frozenset[str]:
        return frozenset({"config", f"{self.router}/{self.router}-{ALIASED}"})

    async def inject(self) -> None:
        stage, model = self.stage, f"{self.router}-{ALIASED}"
        stage.aliases[model] = f"{model}-v{self.choose.randrange(10**6)}"
        stage.daemon.config.write_text(stage.config(), encoding="utf-8")
        self.done_at = time.time()
        status, told = await stage.call("POST", "reload")
        if status != 200:
            stage.findings.broken("a good configuration is taken", f"{status} {told}")

    def is_seen(self, event: Event) -> bool:
        return event["event"] == "ConfigReloaded" and event["time"] > self.done_at

    async def healed_at(self, since: int) -> float | None:
        model = f"{self.router}-{ALIASED}"

        async def is_known() -> bool:
            return (await self.stage.all_models())[model]["aliases"] == [self.stage.aliases[model]]

        return await self.stage.until(is_known, self.recover_s)


class ReloadBad(Fault):
    """D2. Noticed: it is refused. Well again, counted from then: the good one is read again, and changes nothing."""

    label = "a bad configuration"
    weight = 1

    @property
    def claims(self) -> frozenset[str]:
        return frozenset({"config"})

    async def inject(self) -> None:
        stage = self.stage
        stage.daemon.config.write_text(stage.config() + BAD, encoding="utf-8")
        self.done_at = time.time()
        status, told = await stage.call("POST", "reload")
        if status != 422:
            stage.findings.broken("a bad configuration is refused", f"{status} {told}")

    def is_seen(self, event: Event) -> bool:
        return event["event"] == "ConfigRejected" and event["time"] > self.done_at

    async def cure(self) -> None:
        self.stage.daemon.config.write_text(self.stage.config(), encoding="utf-8")
        self.cured_at = time.time()
        await self.stage.call("POST", "reload")

    def is_healed(self, event: Event) -> bool:
        return event["event"] == "ConfigReloaded" and event["time"] > self.cured_at

    async def tidy(self) -> None:
        self.stage.daemon.config.write_text(self.stage.config(), encoding="utf-8")


class _Command(Fault):
    """A command: there is nothing to notice."""

    detect_s = None

    async def post(self, path: str, *fine: int) -> None:
        """Give it; refusals that depend on what else goes on are fine."""
        status, told = await self.stage.call("POST", path)
        if status not in {200, 202, 503, 504, *fine}:
            self.stage.findings.broken("a command is taken", f"POST {path}: {status} {told}")


class Restart(_Command):
    """Well again: it is ready, and what was loaded is loaded."""

    label = "command restart"
    weight = 1

    @property
    def claims(self) -> frozenset[str]:
        return frozenset({self.router})

    async def inject(self) -> None:
        self.done_at = time.time()
        await self.post(f"routers/{self.router}/restart?wait=14")

    def is_healed(self, event: Event) -> bool:
        is_it = event["event"] == "RouterRecovered" and event["router"] == self.router
        return is_it and event["time"] > self.done_at


class StopAndStart(_Command):
    """Stopped it stays down. Well again, counted from the start: it is ready, and what is loaded on start is loaded."""

    label = "command stop, then start"
    weight = 1

    @property
    def claims(self) -> frozenset[str]:
        return frozenset({self.router})

    async def inject(self) -> None:
        self.done_at = time.time()
        await self.post(f"routers/{self.router}/stop?wait=14")

    async def cure(self) -> None:
        await anyio.sleep(self.choose.uniform(1.0, 3.0))
        state = (await self.stage.routers())[self.router]["state"]
        if state != "stopped":
            self.stage.findings.broken("a stopped router stays down", f"{self.router} is {state}")
        self.cured_at = time.time()
        await self.post(f"routers/{self.router}/start?wait=14")

    def is_healed(self, event: Event) -> bool:
        is_load = event["event"] == "ModelLoaded" and event["model"] == f"{self.router}-{PINNED}"
        return is_load and event["time"] > self.cured_at


class LoadAndPin(_Command):
    """A model is loaded and pinned for a while, which nothing may undo but the end of its process."""

    label = "command load, pin, unpin"

    async def prepare(self) -> bool:
        if self.model in self.stage.pins or self.model.endswith(f"-{PINNED_FULL}"):
            return False
        return await self.stage.has_loaded(self.model) is not None

    async def inject(self) -> None:
        self.done_at = time.time()
        await self.post(f"models/{self.model}/pin")
        await anyio.sleep(LEAVES_S)
        self._is_loaded = self.model in await self.stage.loaded()
        self._mark = self.stage.journal.mark

    async def cure(self) -> None:
        await anyio.sleep(self.choose.uniform(1.0, 4.0))
        self.cured_at = time.time()
        for event in self.stage.journal.events[self._mark :] if self._is_loaded else ():
            is_ours = event["event"] == "ModelUnloaded" and event["model"] == self.model
            if is_ours and event["reason"] in {"evicted", "expired"}:
                self.stage.findings.broken("a pinned model stays", event["message"])
        await self.post(f"models/{self.model}/unpin")

    async def healed_at(self, since: int) -> float | None:
        return self.cured_at


class Unload(_Command):
    """Well again: somebody has asked for it, and it is loaded."""

    label = "command unload"
    weight = 1

    async def prepare(self) -> bool:
        return self.model not in self.stage.pins and await self.stage.has_loaded(self.model) is not None

    async def inject(self) -> None:
        self.done_at = time.time()
        await self.post(f"models/{self.model}/unload?wait=14", 409)

    def is_healed(self, event: Event) -> bool:
        is_load = event["event"] == "ModelLoaded" and event["model"] == self.model
        return is_load and event["time"] > self.done_at
