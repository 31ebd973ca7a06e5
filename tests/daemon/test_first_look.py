"""Who asks for models before the daemon has looked at its folders waits for that, and not for longer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from running import RunningDaemon, start_with

Start = Callable[..., RunningDaemon]

LATE = """
import anyio, llamavisor.fleet as fleet
from llamavisor.watch import FolderWatch
fleet.FIRST_LOOK_S = {first_look_s}
look = FolderWatch.run
async def late(self, tell):
    while not os.path.exists({sign!r}):
        await anyio.sleep(0.02)
    await look(self, tell)
FolderWatch.run = late
"""
"""Lets nobody see what is in a folder before there is a sign."""


def late(daemon: RunningDaemon, sign: Path, *, first_look_s: float) -> RunningDaemon:
    """That daemon, whose folders do not answer before there is a sign."""
    start_with(daemon, LATE.format(sign=str(sign), first_look_s=first_look_s))
    return daemon


@pytest.mark.parametrize("serve", ["gateway", "router"])
def test_who_asks_for_models_early_is_told_what_is_true(start: Start, tmp_path: Path, serve: str) -> None:
    """The list, one model, a removal and the disk wait for the first look; status and metrics do not."""
    sign = tmp_path / "sign"
    commands = {
        "models": ("models", "--json"),
        "show": ("show", "alpha"),
        "rm": ("rm", "alpha", "--dry-run"),
        "du": ("du", "--json"),
        "pin": ("pin", "alpha"),
    }
    with late(start(serve=serve), sign, first_look_s=30.0) as daemon, ThreadPoolExecutor(len(commands)) as people:
        answers = {name: people.submit(daemon.cli, *words) for name, words in commands.items()}
        assert daemon.status()["models"] == []
        assert "llamavisor_build_info" in daemon.metrics()
        assert not any(answer.done() for answer in answers.values())
        sign.touch()
        told = {name: answer.result() for name, answer in answers.items()}
        assert {name: done.returncode for name, done in told.items()} == dict.fromkeys(commands, 0), told
        assert {each["name"] for each in json.loads(told["models"].stdout)["models"]} == {"alpha", "beta", "gamma"}
        assert len(json.loads(told["du"].stdout)["folders"][0]["models"]) == 3


def test_who_has_been_told_of_a_model_can_ask_it(start: Start, tmp_path: Path) -> None:
    """The gateway listens when the first question for a model is answered."""
    sign = tmp_path / "sign"
    with late(start(), sign, first_look_s=30.0) as daemon, ThreadPoolExecutor(1) as people:
        answer = people.submit(daemon.call, "GET", "/control/v1/models?name=alpha")
        assert daemon.status()["gateway"]["urls"] == []
        sign.touch()
        assert answer.result()[0] == 200
        assert daemon.status()["gateway"]["urls"]


def test_a_folder_that_hangs_makes_the_first_commands_slow_and_no_others(start: Start, tmp_path: Path) -> None:
    """F14: the time for the first look passes once, for the daemon and not for each who asks."""
    with late(start(), tmp_path / "never", first_look_s=4.0) as daemon:
        assert daemon.models() == {}
        began = time.monotonic()
        for _ in range(5):
            assert daemon.models() == {}
        assert time.monotonic() - began < 4.0
