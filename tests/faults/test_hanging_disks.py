"""F14: what a models folder that hangs costs those who tidy another one, and the end of the daemon."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fakes import FakeLlamaServer
from fakes.hub_server import Fault
from fakes.waiting import eventually
from hub_folder import MANY, SECRET, hub_of_models
from llamavisor.hub.staging import NAME as STAGING
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon, config_of, start_with

HANG = """
import threading
import llamavisor.storage.{module} as module, llamavisor.storage.storage as storage, llamavisor.storage.desk as desk
def hang(work):
    def begin(root, *args, **named):
        if getattr(root, "folder", root) != {folder!r}:
            return work(root, *args, **named)
        with open({mark!r}, "a") as mark:
            mark.write("x")
        threading.Event().wait()
    return begin
storage.{work} = hang(module.{work})
storage.LOOK_S, desk.READ_S, desk.DEED_S, desk.TURN_S = 4.0, 4.0, 4.0, 0.3
"""
"""What makes a blocking function hang in one folder, and nobody wait for long, but for one that is busy."""

HANG_PULLS = """
import pathlib, threading
import llamavisor.hub.pulls as pulls
from llamavisor.hub.staging import Staging
os.environ.update(HF_ENDPOINT={hub!r}, HF_TOKEN={token!r})
def hang(work):
    def begin(staging):
        if str(staging.models_dir) == {folder!r} and pathlib.Path({mark!r}).exists():
            threading.Event().wait()
        return work(staging)
    return begin
Staging.records = hang(Staging.records)
pulls.DISK_S = 4.0
"""
"""What makes the pulls of one folder hang as soon as there is a file."""

Two = Callable[[str], RunningDaemon]


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A second models folder, with one model."""
    folder = tmp_path / "other"
    folder.mkdir()
    write_tiny_model(folder / "delta.gguf", ["I", "am", "delta"])
    return folder


@pytest.fixture
def two(
    tmp_path: Path, models_dir: Path, other: Path, fake_llama_server: Callable[..., FakeLlamaServer], free_port: int
) -> Iterator[Callable[[str], RunningDaemon]]:
    """Starts a daemon with both folders that runs some lines before it serves."""
    routers = f'[[router]]\nname = "one"\n[[router]]\nname = "two"\nmodels_dir = "{other}"\n'
    daemon = RunningDaemon(tmp_path, models_dir, fake_llama_server(), config=config_of(models_dir, free_port, routers))

    def begin(patch: str) -> RunningDaemon:
        start_with(daemon, patch)
        daemon.__enter__()
        daemon.wait_for_router("ready", "one")
        daemon.wait_for_router("ready", "two")
        return daemon

    yield begin
    daemon.end()


def problems(daemon: RunningDaemon) -> dict[str, str | None]:
    """What `du` says is wrong with each folder."""
    folders = json.loads(daemon.cli("du", "--json").stdout)["folders"]
    assert [each["models"] == [] for each in folders] == [each["problem"] is not None for each in folders]
    return {each["path"]: each["problem"] for each in folders}


@contextmanager
def ends_in_time(daemon: RunningDaemon) -> Iterator[None]:
    """What is done in the block keeps the daemon from nothing when it is to end."""
    yield
    began = time.monotonic()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert time.monotonic() - began < 10


def test_f14_a_folder_that_hangs_is_not_tidied_and_no_other_waits_for_it(
    two: Two, models_dir: Path, other: Path
) -> None:
    """F14: du tells of all folders but the one that hangs, rm and clean refuse that alone, and no thread is lost."""
    daemon = two("import llamavisor.storage.storage as storage; storage.LOOK_S = 2.0")
    worker = next(each for each in daemon.processes() if "llamavisor.watch.worker" in each.cmdline())
    assert problems(daemon) == {str(models_dir): None, str(other): None}
    threads = psutil.Process(daemon.pid).num_threads()
    with ends_in_time(daemon):
        os.kill(worker.pid, signal.SIGSTOP)
        told = problems(daemon)
        (hung,) = [path for path, problem in told.items() if problem]
        (well,) = [path for path, problem in told.items() if not problem]
        late = f"folder {hung}: does not answer"
        assert str(told[hung]).startswith(late)
        of = {str(models_dir): "alpha", str(other): "delta"}
        shown = daemon.cli("du")
        assert (shown.returncode, late in shown.stdout, f"{of[well]}.gguf" in shown.stdout) == (1, True, True)
        refused = daemon.cli("rm", "--yes", of[hung])
        assert (refused.returncode, late in refused.stderr) == (1, True)
        cleaned = daemon.cli("du", "--clean", "--yes")
        assert (cleaned.returncode, late in cleaned.stderr, "nothing to clean" in cleaned.stdout) == (1, True, True)
        assert daemon.cli("rm", "--yes", of[well]).returncode == 0
        assert psutil.Process(daemon.pid).num_threads() <= threads + 1
    assert (Path(hung) / f"{of[hung]}.gguf").exists()
    assert not (Path(well) / f"{of[well]}.gguf").exists()


def test_f14_a_disk_that_hangs_takes_three_threads_and_no_more(
    two: Two, models_dir: Path, other: Path, tmp_path: Path
) -> None:
    """F14: looks that hang are left to themselves, few of them, and the other folder is told of all the same."""
    mark = tmp_path / "mark"
    daemon = two(HANG.format(module="account", work="account", folder=str(other), mark=str(mark)))
    with ends_in_time(daemon), ThreadPoolExecutor(8) as people:
        for told in people.map(lambda _: problems(daemon), range(8)):
            assert told == {str(models_dir): None, str(other): f"folder {other} does not answer within 4 s"}
        assert mark.read_text() == "xxx"
        assert daemon.status()["ready"]
        assert daemon.cli("rm", "--yes", "alpha").returncode == 0


def test_f14_a_removal_that_hangs_is_followed_by_no_other(two: Two, other: Path, tmp_path: Path) -> None:
    """F14: who waits for a removal that does not end is told, and so is the next; the other folder is tidied."""
    mark = tmp_path / "mark"
    write_tiny_model(other / "epsilon.gguf", ["I", "am", "epsilon"])
    daemon = two(HANG.format(module="removal", work="carry_out", folder=str(other), mark=str(mark)))
    with ends_in_time(daemon):
        first = daemon.cli("rm", "--yes", "delta")
        assert first.returncode == 1
        assert f"folder {other} does not answer within 4 s; it goes on when the disk answers" in first.stderr
        eventually(mark.exists, what="a removal that has begun")
        following = daemon.cli("rm", "--yes", "epsilon")
        assert following.returncode == 1
        assert f"folder {other}: another removal there does not end" in following.stderr
        assert daemon.cli("rm", "--yes", "alpha").returncode == 0
        assert daemon.cli("du").returncode == 0
    assert {path.name for path in other.iterdir()} == {"delta.gguf", "epsilon.gguf"}


@pytest.mark.parametrize("hangs_from", ["the start", "later on"])
def test_f14_a_folder_that_hangs_hides_no_pull_into_another(
    two: Two, models_dir: Path, other: Path, tmp_path: Path, hangs_from: str
) -> None:
    """F14: pulls into the other folder, under way or left, are shown, offered by a Tab and ended in the usual time.

    That nothing can be said of this one is told, and not that it has none.
    """
    mark = tmp_path / "mark"
    if hangs_from == "the start":
        mark.touch()
    with hub_of_models(tmp_path) as hub:
        hub.faults = [Fault(stall_after=MANY // 2, times=2)]
        daemon = two(HANG_PULLS.format(hub=hub.url, token=SECRET, folder=str(other), mark=str(mark)))
        with ends_in_time(daemon):
            ids = []
            for quantization in ("Q4_K_M", "Q8_0"):
                begun = daemon.cli("pull", f"user/big:{quantization}", "--detach", "--json")
                assert begun.returncode == 0, begun.stderr
                ids.append(json.loads(begun.stdout)["pull"]["id"])
            under_way, left = ids
            assert daemon.cli("pull", "--cancel", left).returncode == 0
            mark.touch()
            shown = daemon.cli("pulls")
            assert (shown.returncode, under_way in shown.stdout, left in shown.stdout) == (0, True, True), shown.stderr
            assert f"there may be more: {other} does not answer" in shown.stdout
            status, refusal = daemon.call("GET", "/control/v1/pulls?id=nobody")
            assert (status, refusal["why"]) == (507, "disk")
            assert set(daemon.cli("__complete", "pulls").stdout.split()) == set(ids)
            for key in ids:
                ended = daemon.cli("pull", "--cancel", key, "--drop")
                assert ended.returncode == 0, ended.stderr
                assert not (models_dir / STAGING / f"{key}.json").exists()
