"""What has to hold all the time, seen from outside: in /proc, in what the daemon tells, and in its log."""

from __future__ import annotations

import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import anyio
import anyio.to_thread
import psutil
from stage import MODELS_MAX, Stage

EVERY_S = 1.0
LEFTOVERS_S = 6.0
"""By then a daemon that was started has ended what an earlier one left: 5 s are promised."""
CALM_S = 30.0
"""By then all is as it should be, once nothing happens any more."""
BUSY = frozenset({"loading", "loaded", "sleeping", "leaving", "unloading"})
MORE_DESCRIPTORS, MORE_THREADS, MORE_BYTES = 16, 8, 40_000_000
"""What a daemon may hold at the end, beyond what it held when it was warm."""
_ROUTER = re.compile(r"/routers/([^/]+)/preset\.ini$")
_SERVER = "llama-server"


@dataclass(frozen=True, slots=True)
class Process:
    """A process of ours: its parent, and of a llama-server the router or the model that it is."""

    pid: int
    parent: int
    router: str | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """What the daemon's process holds."""

    descriptors: int
    threads: int
    resident_bytes: int

    @classmethod
    def by(cls, pid: int) -> Held:
        """What it holds now."""
        process = psutil.Process(pid)
        return cls(process.num_fds(), process.num_threads(), process.memory_info().rss)

    def __str__(self) -> str:
        return f"{self.descriptors} descriptors, {self.threads} threads, {self.resident_bytes / 1e6:.0f} MB"


class Invariants:
    """Looks after them.

    Args:
        stage: what is looked at.
    """

    def __init__(self, stage: Stage) -> None:
        self.looks = 0
        self._stage = stage
        self._log_at = 0
        self._events_at = 0

    def __repr__(self) -> str:
        return f"<Invariants, looked at {self.looks} times>"

    async def watch(self) -> None:
        """Look at all of them every second until cancelled."""
        while True:
            began = time.monotonic()
            await anyio.to_thread.run_sync(self._look_at_processes)
            await anyio.to_thread.run_sync(self._look_at_log)
            self._look_at_events()
            if self._stage.is_up:
                await self._look_at_memory()
            self.looks += 1
            await anyio.sleep(max(0.1, EVERY_S - (time.monotonic() - began)))

    async def are_calm(self) -> None:
        """Within half a minute everything is as somebody wants it to be."""
        stage, wrong = self._stage, ["nothing was looked at"]
        deadline = time.monotonic() + CALM_S
        while wrong and time.monotonic() < deadline:
            try:
                wrong = await self._unmet()
            except (OSError, HTTPException, AssertionError) as error:
                wrong = [repr(error)]
            await anyio.sleep(0.25)
        for each in wrong:
            stage.findings.broken(f"as it should be after {CALM_S:.0f} s of calm", each)

    def has_not_grown(self, before: Held) -> None:
        """The daemon holds little more than it did when it was warm."""
        now = Held.by(self._stage.daemon.pid)
        if (
            now.descriptors > before.descriptors + MORE_DESCRIPTORS
            or now.threads > before.threads + MORE_THREADS
            or now.resident_bytes > before.resident_bytes + MORE_BYTES
        ):
            self._stage.findings.broken("the daemon does not grow", f"{now}; it was {before}")

    def end(self) -> None:
        """The last look, when the daemon has ended."""
        self._look_at_log()
        for process in _processes(self._marker):
            self._stage.findings.broken("nothing is left", f"{process} {_command(process.pid)}")

    @property
    def _marker(self) -> str:
        path = self._stage.daemon.state_dir / "instance"
        return f"LLAMAVISOR_INSTANCE={path.read_text(encoding='ascii').strip()}"

    async def _unmet(self) -> list[str]:
        """What is not as somebody wants it to be, one line each."""
        stage, wrong = self._stage, []
        status, models = await stage.get("status"), await stage.all_models()
        wrong += [f"{each['name']} is {each['state']}" for each in status["routers"] if each["state"] != "ready"]
        wrong += [
            f"{name} is pinned and {models[name]['state']}" for name in stage.pins if models[name]["state"] != "loaded"
        ]
        if status["config_error"]:
            wrong.append(f"configuration: {status['config_error']}")
        for model, alias in stage.aliases.items():
            if models[model]["aliases"] != [alias]:
                wrong.append(f"{model} is called {models[model]['aliases']}, not {alias}")
        ps = await stage.get("ps")
        wrong += [
            f"{each['model']}: {each['leases']} leases, {each['in_flight']} in flight"
            for each in ps["models"]
            if each["leases"] or each["in_flight"]
        ]
        wrong += [f"{queue['model']}: {queue['demands']} wait for it" for queue in ps["queues"]]
        return wrong

    # --- processes ------------------------------------------------------------------------------------------------

    def _look_at_processes(self) -> None:
        stage = self._stage
        if not (stage.daemon.state_dir / "instance").exists():
            return
        _reap(stage.daemon.pid)
        processes = _processes(self._marker)
        for invariant, text in self._wrong(processes):
            # What ends and what begins may be seen beside each other in a look that takes a while.
            again = _processes(self._marker)
            if (invariant, text) in self._wrong(again):
                stage.findings.broken(invariant, f"{text}: {[_command(each.pid) for each in again]}")

    def _wrong(self, processes: Sequence[Process]) -> list[tuple[str, str]]:
        stage, wrong = self._stage, []
        parents = {each.pid: each.parent for each in processes}
        if not stage.was_down(time.time() - LEFTOVERS_S, time.time()):
            orphans = (each for each in processes if not _descends(each.pid, stage.daemon.pid, parents))
            wrong += [("no orphans", str(each)) for each in orphans]
            routers = Counter(each.router for each in processes if each.router and each.parent == stage.daemon.pid)
            wrong += [("no router twice", f"{name} {count} times") for name, count in routers.items() if count > 1]
        children: dict[int, list[str]] = defaultdict(list)
        for each in processes:
            if each.model:
                children[each.parent].append(each.model)
        names = {each.pid: each.router for each in processes if each.router}
        for parent, models in children.items():
            wrong += [
                ("no model twice", f"{name} {count} times") for name, count in Counter(models).items() if count > 1
            ]
            if names.get(parent) == "one" and len(models) > MODELS_MAX:
                wrong.append(("no more than models_max", f"on one are {sorted(models)}"))
        return wrong

    # --- what the daemon tells ------------------------------------------------------------------------------------

    async def _look_at_memory(self) -> None:
        stage = self._stage
        try:
            ps, status = await stage.get("ps"), await stage.get("status")
        except (OSError, HTTPException) as error:
            if stage.is_up and not stage.was_down(time.time() - LEFTOVERS_S, time.time()):
                stage.findings.broken("the control socket answers", repr(error))
            return
        for router in status["routers"]:
            if router["state"] == "ready":
                stage.ready_since[router["name"]] = router["since_unix"]
            else:
                stage.ready_since.pop(router["name"], None)
        there = [each for each in ps["models"] if each["state"] in BUSY]
        count = Counter(each["router"] for each in there)
        if count["one"] > MODELS_MAX:
            stage.findings.broken("no more than models_max", f"{[(each['model'], each['state']) for each in there]}")
        for device in ps["devices"]:
            budget = device["budget_bytes"]
            taken = sum(each["expected_bytes"].get(device["id"], 0) for each in there)
            if budget is not None and taken > budget and len(there) > 1:
                told = [(each["model"], each["state"], each["expected_bytes"]) for each in there]
                stage.findings.broken("within the budget", f"{taken} of {budget} bytes: {told}")

    def _look_at_events(self) -> None:
        events = self._stage.journal.events[self._events_at :]
        self._events_at += len(events)
        for event in events:
            is_unload = event["event"] == "ModelUnloaded" and event["model"] in self._stage.pins
            if is_unload and event["reason"] in {"evicted", "expired", "pressure"}:
                self._stage.findings.broken("a pinned model stays", f"{event['id']} {event['message']}")

    def _look_at_log(self) -> None:
        with self._stage.daemon.log.open("rb") as file:
            file.seek(self._log_at)
            text = file.read()
        self._log_at += len(text)
        if b"Traceback" in text:
            at = text.index(b"Traceback")
            self._stage.findings.broken("no traceback", text[max(0, at - 300) : at + 3000].decode("utf-8", "replace"))


def _processes(marker: str) -> list[Process]:
    """All that carry the marker in their environment and live."""
    found: dict[int, tuple[int, list[str]]] = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with suppress(OSError, IndexError):
            if marker.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                fields = (
                    Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
                )
                if fields[0] not in "ZX":
                    found[pid] = int(fields[1]), _command(pid)
    return [Process(pid, parent, *_role(parent, words, found)) for pid, (parent, words) in found.items()]


def _role(
    parent: int, words: list[str], all_of_them: Mapping[int, tuple[int, list[str]]]
) -> tuple[str | None, str | None]:
    """Of a llama-server its router's name or its model's; neither for one that is just being made of its parent."""
    if not words or not words[0].endswith(_SERVER) or all_of_them.get(parent, (0, []))[1] == words:
        return None, None
    if "--alias" in words:
        return None, words[words.index("--alias") + 1].partition(",")[0]
    preset = next((_ROUTER.search(word) for word in words if _ROUTER.search(word)), None)
    return (preset[1], None) if preset else (None, None)


def _descends(pid: int, from_pid: int, parents: Mapping[int, int]) -> bool:
    while pid in parents:
        if parents[pid] == from_pid:
            return True
        pid = parents[pid]
    return False


def _command(pid: int) -> list[str]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").removesuffix("\0").split("\0")
    return []


def _reap(daemon: int) -> None:
    """Reap what a killed daemon left to us."""
    for process in psutil.Process().children():
        with suppress(psutil.NoSuchProcess, ChildProcessError):
            if process.pid != daemon and process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)
