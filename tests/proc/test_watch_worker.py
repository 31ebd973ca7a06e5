"""The real worker on a real folder: what it notices, what it survives, and that nothing of it is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from fakes.waiting import PATIENCE_S, eventually
from ggufs import small_model
from llamavisor import procfs
from llamavisor.catalog.entry import Entry, EntryState, Scan
from llamavisor.watch import Afresh, FolderWatch, Found, Looked, ModeChanged, News, Silent, WorkerDied
from llamavisor.watch import watcher as watcher_module
from llamavisor.watch.wire import MAX_PART_ENTRIES, Configure, Decoder, ScanDone, ScanNow, encode
from llamavisor.workerprocess import WorkerProcess

pytestmark = pytest.mark.anyio

NEVER_S = 3600.0
"""An interval that does not come within a test: what is noticed was hinted at."""
SOON_S = 4.0
"""Also on a busy machine, and before any look or answer is due, of which the first comes after 5 s."""
MODEL = small_model().encode()


class Listener:
    """Keeps the news, and the catalog as they tell it."""

    def __init__(self) -> None:
        self.news: list[News] = []
        self.catalog: dict[str, Entry] = {}
        self._unnamed: set[str] = set()
        self._heard = anyio.Event()

    def tell(self, news: News) -> None:
        """Take them in."""
        self.news.append(news)
        if isinstance(news, Afresh):
            self._unnamed = set(self.catalog)
        elif isinstance(news, Found):
            self.catalog |= {entry.name: entry for entry in news.changed}
            self._unnamed -= {entry.name for entry in news.changed}
            for name in news.removed:
                del self.catalog[name]
        elif isinstance(news, Looked):
            for name in self._unnamed:
                del self.catalog[name]
            self._unnamed = set()
        self._heard.set()

    def all(self, kind: type[News]) -> list[News]:
        """All news of this kind."""
        return [news for news in self.news if isinstance(news, kind)]

    async def until(self, is_so: Callable[[], object], *, within_s: float = PATIENCE_S) -> None:
        """Wait until the news make it so."""
        with anyio.move_on_after(within_s):
            while not is_so():
                self._heard = anyio.Event()
                await self._heard.wait()
        assert is_so(), f"not so within {within_s} s: {self.news}"

    def ready(self) -> list[str]:
        """Names of what can be used."""
        return sorted(name for name, entry in self.catalog.items() if entry.state is EntryState.READY)


@asynccontextmanager
async def watching(watch: FolderWatch) -> AsyncIterator[Listener]:
    """Watch from the first look on."""
    listener = Listener()
    async with anyio.create_task_group() as group:
        group.start_soon(watch.run, listener.tell)
        await listener.until(lambda: listener.all(Looked))
        yield listener
        group.cancel_scope.cancel()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The models folder, with one model."""
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "staging").mkdir()
    drop(folder, "first")
    return folder


def drop(folder: Path, name: str) -> None:
    """Have a file renamed in that was whole a minute ago."""
    stage(folder.parent / "staging" / name).rename(folder / f"{name}.gguf")


def stage(path: Path) -> Path:
    """Write a model so that it is not taken for one that is still being written."""
    path.write_bytes(MODEL)
    os.utime(path, (time.time() - 60, time.time() - 60))
    return path


async def test_a_file_that_is_renamed_in(root: Path) -> None:
    """It is told at once, without waiting for any interval."""
    async with watching(FolderWatch(root, interval_s=NEVER_S)) as listener:
        assert listener.news[:1] == [ModeChanged("inotify", "", 0)]
        assert listener.ready() == ["first"]
        begin = time.monotonic()
        drop(root, "second")
        await listener.until(lambda: "second" in listener.ready())
        assert time.monotonic() - begin < SOON_S  # 30 ms on a quiet machine


async def test_the_disk_is_asked_by_the_worker_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look tells how much room there is; in this process the question would hang with the mount."""
    true = os.statvfs(root)
    monkeypatch.delattr(os, "statvfs")
    async with watching(FolderWatch(root, interval_s=NEVER_S)) as listener:
        (look, *_) = listener.all(Looked)
    assert isinstance(look, Looked)
    assert look.disk is not None
    assert look.disk.total_bytes == true.f_blocks * true.f_frsize
    assert 0 <= look.disk.free_bytes <= look.disk.total_bytes


async def test_a_file_that_is_written_slowly(root: Path) -> None:
    """It is told as ready once it is whole and still, by a look that the last look asked for."""
    async with watching(FolderWatch(root, interval_s=NEVER_S)) as listener:
        with (root / "slow.gguf").open("wb", buffering=0) as file:
            file.write(MODEL[:100])
            await listener.until(lambda: "slow" in listener.catalog)
            assert "slow" not in listener.ready()
            file.write(MODEL[100:])
        await listener.until(lambda: "slow" in listener.ready())


async def test_a_file_that_goes(root: Path) -> None:
    """It is told as removed."""
    drop(root, "second")
    async with watching(FolderWatch(root, interval_s=NEVER_S)) as listener:
        (root / "second.gguf").unlink()
        await listener.until(lambda: listener.ready() == ["first"])


async def test_a_file_in_a_new_folder(root: Path) -> None:
    """Folders that come later are listened to as well."""
    async with watching(FolderWatch(root, interval_s=NEVER_S)) as listener:
        (root / "sub" / "deep").mkdir(parents=True)
        drop(root, "second")
        await listener.until(lambda: "second" in listener.ready())
        stage(root.parent / "staging" / "third").rename(root / "sub" / "deep" / "third.gguf")
        await listener.until(lambda: len(listener.ready()) == 3)


async def test_a_folder_that_is_deleted_and_made_anew(root: Path) -> None:
    """What is put into the new one is told, though the kernel's watch went with the old one."""
    async with watching(FolderWatch(root, interval_s=NEVER_S)) as listener:
        for name in ("second", "third"):  # twice: file systems give the new folder the number of the old one
            shutil.rmtree(root)
            root.mkdir()
            drop(root, name)
            await listener.until(lambda name=name: name in listener.ready())
        await listener.until(lambda: listener.ready() == ["third"])


async def test_a_folder_that_is_moved_away_and_back(root: Path) -> None:
    """While it is away there is a problem and nothing is removed; then all goes on."""
    async with watching(FolderWatch(root, interval_s=NEVER_S)) as listener:
        root.rename(root.with_name("away"))
        await listener.until(lambda: any(news.problem for news in listener.all(Looked)))
        assert listener.ready() == ["first"]
        root.with_name("away").rename(root)
        await listener.until(lambda: not listener.all(Looked)[-1].problem)
        drop(root, "second")
        await listener.until(lambda: listener.ready() == ["first", "second"])


async def test_a_folder_that_comes_late(root: Path) -> None:
    """A folder that is not there yet is found when it comes."""
    root.rename(root.with_name("away"))
    async with watching(FolderWatch(root, interval_s=NEVER_S)) as listener:
        assert listener.all(Looked)[0].problem == "does not exist"
        assert [news.mode for news in listener.all(ModeChanged)] == ["polling"]
        root.with_name("away").rename(root)
        await listener.until(lambda: listener.ready() == ["first"])


async def test_a_name_that_is_not_utf8(root: Path) -> None:
    """It ends what watchfiles does, of which nobody is told, and what comes after is noticed all the same."""
    async with watching(FolderWatch(root, interval_s=NEVER_S)) as listener:
        Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe.gguf")).write_bytes(MODEL)
        await listener.until(lambda: "\\udcff\\udcfe" in listener.catalog)
        drop(root, "second")
        await listener.until(lambda: "second" in listener.ready())
        assert listener.all(ModeChanged) == [ModeChanged("inotify", "", 0)]


async def test_a_folder_behind_a_link(root: Path) -> None:
    """It is listened to, as are the folders that come in it; that it is deleted, or a file behind a link, is seen."""
    out, single = root.with_name("out"), root.with_name("single")
    out.mkdir()
    single.mkdir()
    stage(single / "lone.gguf")
    async with watching(FolderWatch(root, link_dirs=[out, single], interval_s=NEVER_S)) as listener:
        (root / "link").symlink_to(out)
        (root / "lone.gguf").symlink_to(single / "lone.gguf")
        await listener.until(lambda: listener.ready() == ["first", "lone"])
        drop(out, "second")
        await listener.until(lambda: "link" in listener.ready())
        (out / "sub").mkdir()
        stage(root.parent / "staging" / "third").rename(out / "sub" / "third.gguf")
        await listener.until(lambda: "third" in listener.ready())
        stage(root.parent / "staging" / "fourth").rename(out / "sub" / "fourth.gguf")
        await listener.until(lambda: "fourth" in listener.ready())
        shutil.rmtree(out)
        (single / "lone.gguf").unlink()
        await listener.until(lambda: listener.ready() == ["first"])


@pytest.mark.parametrize("limit", ["max_inotify_instances", "max_inotify_watches"])
async def test_a_kernel_without_inotify(root: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """Without instances or watches it polls, says so once with the reason, and finds what comes."""
    script = f'echo 0 > /proc/sys/user/{limit} && exec "$@"'
    prefix = ("/usr/bin/unshare", "-U", "-r", "sh", "-c", script, "sh")
    if subprocess.run([*prefix, "true"], check=False).returncode:
        pytest.skip("no user namespaces here")
    monkeypatch.setattr(watcher_module, "_ARGV", (*prefix, *watcher_module._ARGV))
    async with watching(FolderWatch(root, interval_s=0.1)) as listener:
        assert listener.ready() == ["first"]
        drop(root, "second")
        await listener.until(lambda: "second" in listener.ready())
        (told,) = listener.all(ModeChanged)
        assert (told.mode, told.errors) == ("polling", 1)
        assert "Too many open files" in told.reason or "watch limit" in told.reason


async def test_a_link_to_everything(root: Path) -> None:
    """It does not take the user's inotify watches."""
    (root / "everything").symlink_to("/")
    watch = FolderWatch(root, interval_s=NEVER_S)
    async with watching(watch):
        infos = Path(f"/proc/{watch.pid}/fdinfo").iterdir()
        watches = [line for info in infos for line in info.read_text().splitlines() if line.startswith("inotify")]
        assert len(watches) == 1


async def test_two_thousand_files_at_once(root: Path) -> None:
    """They cost a few looks, and every file is told."""
    async with watching(FolderWatch(root, interval_s=NEVER_S)) as listener:
        staging = root.parent / "staging"
        for number in range(2000):
            stage(staging / f"m{number}.gguf")
        begin, looks = time.monotonic(), len(listener.all(Looked))
        for file in staging.iterdir():
            file.rename(root / file.name)
        await listener.until(lambda: len(listener.ready()) == 2001, within_s=60)
        looks = len(listener.all(Looked)) - looks
        assert looks <= 2 + (time.monotonic() - begin) / 0.2
        assert max(len(news.changed) for news in listener.all(Found)) <= MAX_PART_ENTRIES


async def test_a_worker_that_hangs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped worker, as one on a dead mount, is told once, is not replaced, and goes on when it can."""
    monkeypatch.setattr(watcher_module, "ANSWER_S", 1.0)
    watch = FolderWatch(root, interval_s=NEVER_S)
    async with watching(watch) as listener:
        pid = watch.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        drop(root, "second")
        assert not await watch.rescan(within_s=0.1)
        await listener.until(lambda: listener.all(Silent))
        assert not await watch.rescan(within_s=0.5)
        assert (len(listener.all(Silent)), watch.pid, listener.ready()) == (1, pid, ["first"])
        os.kill(pid, signal.SIGCONT)
        await listener.until(lambda: listener.ready() == ["first", "second"])
        assert await watch.rescan()
        assert isinstance(listener.news[-1], Looked)
        os.kill(pid, signal.SIGSTOP)  # and once more: it is told once each time
        assert not await watch.rescan(within_s=0.1)
        await listener.until(lambda: len(listener.all(Silent)) == 2)


async def test_a_worker_that_hangs_does_not_hold_the_daemon(root: Path) -> None:
    """The end of the watch comes in time, and so does the worker's."""
    watch = FolderWatch(root, interval_s=NEVER_S)
    begin = 0.0
    async with watching(watch):
        assert watch.pid is not None
        os.kill(watch.pid, signal.SIGSTOP)
        begin = time.monotonic()
    assert time.monotonic() - begin < SOON_S


async def test_a_worker_that_hangs_from_the_start(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that never says a word is silent too."""
    monkeypatch.setattr(watcher_module, "FIRST_ANSWER_S", 0.2)
    monkeypatch.setattr(watcher_module, "_ARGV", ("/bin/sleep", "60"))
    listener = Listener()
    async with anyio.create_task_group() as group:
        group.start_soon(FolderWatch(root).run, listener.tell)
        await listener.until(lambda: listener.all(Silent))
        group.cancel_scope.cancel()
    assert listener.news[0].since_s >= 0.2


async def test_a_worker_that_is_killed(root: Path) -> None:
    """Another one follows and tells everything, what changed meanwhile included."""
    drop(root, "second")
    watch = FolderWatch(root, interval_s=NEVER_S)
    async with watching(watch) as listener:
        first = watch.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await listener.until(lambda: listener.all(WorkerDied))
        assert listener.all(WorkerDied) == [WorkerDied("SIGKILL", 1.0)]
        (root / "second.gguf").unlink()
        drop(root, "third")
        assert await watch.rescan()
        assert watch.pid not in {first, None}
        assert listener.ready() == ["first", "third"]
        assert len(listener.all(Afresh)) == 2


async def test_a_worker_that_talks_nonsense(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed, whatever else it does."""
    code = "import time; print('x' * 99, flush=True); time.sleep(60)"
    monkeypatch.setattr(watcher_module, "_ARGV", (sys.executable, "-c", code))
    assert (await first_death(root)).reason.startswith("it does not make sense")


async def test_a_worker_that_cannot_be_started(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told why, and tried again later."""
    monkeypatch.setattr(watcher_module, "_ARGV", ("/nonexistent",))
    assert (await first_death(root)).reason == "cannot start it: No such file or directory"


async def first_death(root: Path) -> WorkerDied:
    """The first news, which is that the worker has ended."""
    listener = Listener()
    async with anyio.create_task_group() as group:
        group.start_soon(FolderWatch(root).run, listener.tell)
        await listener.until(lambda: listener.news)
        group.cancel_scope.cancel()
    (died,) = listener.news
    assert isinstance(died, WorkerDied)
    return died


async def test_deaths_in_a_row(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next worker is waited for twice as long each time, up to a minute."""
    monkeypatch.setattr(watcher_module, "_ARGV", ("/nonexistent",))
    monkeypatch.setattr(watcher_module, "BACKOFF_S", 0.001)
    monkeypatch.setattr(watcher_module, "MAX_BACKOFF_S", 0.005)
    listener = Listener()
    async with anyio.create_task_group() as group:
        group.start_soon(FolderWatch(root).run, listener.tell)
        await listener.until(lambda: len(listener.news) >= 5)
        group.cancel_scope.cancel()
    assert [died.retry_in_s for died in listener.all(WorkerDied)[:5]] == [0.001, 0.002, 0.004, 0.005, 0.005]


@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.02, 0.05, 0.1, 0.2])
async def test_cancelled_at_any_time(root: Path, after_s: float) -> None:
    """Nothing is left behind, whenever it was: every test checks for that."""
    begin = time.monotonic()
    with anyio.move_on_after(after_s):
        await FolderWatch(root).run(lambda _: None)
    assert time.monotonic() - begin < after_s + SOON_S


async def test_the_environment_of_the_worker(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the daemon's marker, by which a later daemon finds it, and nobody's secrets."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    watch = FolderWatch(root, env={"LLAMAVISOR_INSTANCE": "abc"})
    async with watching(watch):
        assert watch.pid is not None
        assert procfs.has_environment(watch.pid, "LLAMAVISOR_INSTANCE=abc")
        assert not procfs.has_environment(watch.pid, "HF_TOKEN=secret")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_signals_that_are_meant_for_the_daemon(root: Path, number: signal.Signals) -> None:
    """A worker goes on when a whole group is told to end: the daemon ends it when it is time."""
    watch = FolderWatch(root, interval_s=NEVER_S)
    async with watching(watch) as listener:
        assert watch.pid is not None
        os.kill(watch.pid, number)
        assert await watch.rescan()
        assert not listener.all(WorkerDied)


async def test_a_worker_without_a_daemon(root: Path) -> None:
    """It ends with its pipes."""
    worker = WorkerProcess.start(watcher_module._ARGV, {})
    await worker.send(encode(Configure(str(root), (), NEVER_S, 0)))
    await worker.receive()
    worker.close()
    assert eventually(lambda: os.waitpid(worker.pid, os.WNOHANG)[0], what="end of the worker") == worker.pid


def test_a_stopped_worker_whose_daemon_is_killed(root: Path) -> None:
    """It ends too, though it cannot notice anything itself."""
    code = (
        "import os, signal, sys\n"
        "import anyio\n"
        "from llamavisor.watch.wire import Configure, encode\n"
        "from llamavisor.workerprocess import WorkerProcess, module_argv\n"
        "async def main():\n"
        "    worker = WorkerProcess.start(module_argv('llamavisor.watch.worker'), {})\n"
        "    await worker.send(encode(Configure(sys.argv[1], (), 9.0, 0)))\n"
        "    await worker.receive()\n"
        "    os.kill(worker.pid, signal.SIGSTOP)\n"
        "    print(worker.pid, flush=True)\n"
        "    await anyio.sleep_forever()\n"
        "anyio.run(main)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        pid = int(daemon.stdout.readline())
        daemon.kill()
    known = eventually(lambda: (known := procfs.stat(pid)) is None or (known.is_zombie and known), what="its end")
    if known is not True:
        os.waitpid(pid, 0)  # it came to us when its parent had gone


async def test_a_look_that_was_under_way(root: Path) -> None:
    """What it found may be from before one asked, so it is no answer."""
    watch, asked = FolderWatch(root), anyio.Event()
    watch._waiting.append((2, asked))
    watch._hear(ScanDone(Scan(), 1), lambda _: None)
    assert not asked.is_set()
    watch._hear(ScanDone(Scan(), 2), lambda _: None)
    assert asked.is_set()


async def test_asked_before_it_has_begun(root: Path) -> None:
    """What comes in one piece with the first message is not lost."""
    worker = WorkerProcess.start(watcher_module._ARGV, {})
    await worker.send(encode(Configure(str(root), (), NEVER_S, 0)) + encode(ScanNow(9)))
    decoder, tokens = Decoder(), [0]
    with anyio.fail_after(PATIENCE_S):
        while 9 not in tokens:
            heard = decoder.feed(await worker.receive())
            tokens += [message.token for message in heard if isinstance(message, ScanDone)]
    worker.kill()
    assert await worker.reap() == "SIGKILL"
    worker.close()


async def test_looks_that_are_asked_for_at_the_same_time(root: Path) -> None:
    """Each waits for a look that began after it asked."""
    watch = FolderWatch(root, interval_s=NEVER_S)
    answers: list[bool] = []

    async def ask() -> None:
        answers.append(await watch.rescan())

    async with watching(watch), anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(ask)
    assert answers == [True] * 20
