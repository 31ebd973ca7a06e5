"""`make soak`: a daemon under random faults and random clients, and whether what it promises holds all the time.

Exit code 0, or 1 with what is broken.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import anyio
import table
from fault import Fault
from invariants import Held, Invariants
from plan import EVERY_S, KINDS, Plan, planned
from stage import CHAT_MODELS, Stage
from traffic import Tally, Traffic

from conftest import find_llama_server
from leaks import adopt_orphans

INSIDE = "LLAMAVISOR_SOAK_INSIDE"
"""Set in the mount namespace in which the small disk of the state folder is."""
DISK = "32m"
WARM_S = 3.0
SHOWN = 60
"""So many events are shown for each of the first findings."""


def main() -> int:
    """Read the command line, and do it."""
    parser = argparse.ArgumentParser(prog="python tests/soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long faults come (10)")
    parser.add_argument("--seed", type=int, help="from which the faults follow (a random one)")
    parser.add_argument("--every", type=float, default=EVERY_S, help="seconds between two faults on the average (4)")
    parser.add_argument(
        "--only", action="append", default=[], help="only faults whose label holds this; may be repeated"
    )
    parser.add_argument("--without", action="append", default=[], help="none whose label holds this; may be repeated")
    parser.add_argument("--keep", type=Path, help="folder for the events and the daemon's log")
    arguments = parser.parse_args()
    llama_server = find_llama_server()
    if llama_server is None:
        sys.exit("no llama-server: run `make soak`, which builds one")
    if INSIDE not in os.environ:
        command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, *sys.argv]
        os.execvpe(command[0], command, {**os.environ, INSIDE: "1"})
    kinds = [kind for kind in KINDS if _is_chosen(kind.label, arguments.only, arguments.without)]
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="llamavisor-soak-") as folder:
        stage = Stage(Path(folder), llama_server)
        disk = stage.daemon.state_dir
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", disk], check=True)
        try:
            soak = Soak(stage, kinds, seed, arguments.minutes * 60.0, arguments.every)
            anyio.run(soak.run)
            soak.tell()
        finally:
            if arguments.keep is not None:
                soak.keep(arguments.keep)
            subprocess.run(["umount", "--lazy", disk], check=True)
    return 1 if stage.findings.all else 0


def _is_chosen(label: str, only: Sequence[str], without: Sequence[str]) -> bool:
    is_wanted = not only or any(part in label for part in only)
    return is_wanted and not any(part in label for part in without)


class Soak:
    """One run.

    Args:
        stage: where.
        kinds: of faults.
        seed: from which all choices follow.
        for_s: how long faults come.
        every_s: between two faults on the average.
    """

    def __init__(self, stage: Stage, kinds: Sequence[type[Fault]], seed: int, for_s: float, every_s: float) -> None:
        self._stage = stage
        self._kinds = kinds
        self._seed = seed
        self._for_s = for_s
        self._plan = Plan(stage, planned(seed, kinds, every_s))
        self._traffic = Traffic(stage, self._plan.records, seed)
        self._invariants = Invariants(stage)

    def __repr__(self) -> str:
        return f"<Soak {self._seed}>"

    async def run(self) -> None:
        """Start the daemon, let everything happen, wait for calm, and end it."""
        stage = self._stage
        print(f"seed {self._seed}: {len(self._kinds)} kinds of faults for {self._for_s:.0f} s", flush=True)
        stage.daemon.start()
        try:
            await stage.wait_live()
            await self._happen()
        finally:
            with anyio.CancelScope(shield=True):
                try:
                    await anyio.to_thread.run_sync(stage.daemon.end)
                except AssertionError as error:
                    stage.findings.broken("nothing is left", str(error))
        self._invariants.end()

    async def _happen(self) -> None:
        stage = self._stage
        async with anyio.create_task_group() as background:
            background.start_soon(stage.journal.follow)
            await self._warm_up()
            before = Held.by(stage.daemon.pid)
            background.start_soon(self._invariants.watch)
            async with anyio.create_task_group() as clients:
                clients.start_soon(self._traffic.run)
                await self._plan.run(time.monotonic() + self._for_s)
                self._traffic.stop()
            await self._invariants.are_calm()
            self._invariants.has_not_grown(before)
            background.cancel_scope.cancel()

    async def _warm_up(self) -> None:
        """Have every router ready and every model answer once, so that later growth is growth."""
        stage = self._stage

        async def is_ready() -> bool:
            return all(router["state"] == "ready" for router in (await stage.routers()).values())

        if await stage.until(is_ready, 30.0) is None:
            stage.findings.broken("ready at first", "not within 30 s")
        for model in CHAT_MODELS:
            if await stage.has_loaded(model) is None:
                stage.findings.broken("every model loads at first", model)
        await stage.pin()
        stage.pinned_at = time.time()
        await anyio.sleep(WARM_S)

    def tell(self) -> None:
        """Print the table, and what is broken with what happened around it."""
        stage, tally = self._stage, self._traffic.tally
        print()
        print("\n".join(table.lines(self._kinds, self._plan.records, tally)))
        held = "broken, see below" if stage.findings.all else "held"
        print(f"\nseed {self._seed}; {_requests(tally)}")
        print(f"all invariants, looked at {self._invariants.looks} times: {held}")
        for record in self._plan.records:
            for lost in record.lost:
                print(f"lost to {record.label} at {stage.findings.at(record.began)}: {lost}")
        for finding in stage.findings.all:
            at = stage.findings.at(finding.time)
            print(f"\nBROKEN at {at} (seed {self._seed}): {finding.invariant}: {finding.text}")
            print("\n".join(stage.journal.about(finding.time)[-SHOWN:]))

    def keep(self, folder: Path) -> None:
        """Leave the events and the log for people."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = (f"{self._stage.findings.at(event['time'])} {event}\n" for event in self._stage.journal.events)
        (folder / "events").write_text("".join(lines), encoding="utf-8")
        (folder / "daemon.log").write_bytes(self._stage.daemon.log.read_bytes())


def _requests(tally: Tally) -> str:
    ended = ", ".join(f"{count} {how}" for how, count in sorted(tally.ended.items()))
    return f"{tally.ended.total()} requests: {ended}; the slowest took {tally.slowest_s:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
