"""The fake folder watch and the true one do the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from fakes.waiting import PATIENCE_S
from fakes.watch import FakeWatch
from ggufs import small_model
from llamavisor.catalog.entry import Entry, EntryState, FileId, ModelFile
from llamavisor.watch import Afresh, FolderWatch, Found, Looked, ModeChanged, News

pytestmark = pytest.mark.anyio

NEVER_S = 3600.0


class Rig:
    """A watch, and hands that put files into its folder without telling it."""

    def __init__(self, watch: FolderWatch | FakeWatch) -> None:
        self.watch = watch
        self.news: list[News] = []

    def tell(self, news: News) -> None:
        """Keep the news that both know."""
        if not isinstance(news, ModeChanged):
            self.news.append(news)

    def place(self, name: str) -> None:
        """A whole file is there from now on."""
        path = self.watch.root / f"{name}.gguf"
        if isinstance(self.watch, FakeWatch):
            files = (ModelFile(str(path), FileId(1, len(self.watch.entries), 3, 4)),)
            self.watch.entries[name] = Entry(name=name, state=EntryState.READY, files=files)
        else:
            path.write_bytes(small_model().encode())

    def take(self, name: str) -> None:
        """A file is not there any more."""
        if isinstance(self.watch, FakeWatch):
            del self.watch.entries[name]
        else:
            (self.watch.root / f"{name}.gguf").unlink()

    async def until_looked(self) -> None:
        """Wait for the end of the first look."""
        with anyio.fail_after(PATIENCE_S):
            while not any(isinstance(news, Looked) for news in self.news):
                await anyio.sleep(0.005)

    def found(self) -> list[str]:
        """Names that were told, with a minus those that went, each once."""
        told: list[str] = []
        for news in self.news:
            if isinstance(news, Found):
                told += [*(entry.name for entry in news.changed), *(f"-{name}" for name in news.removed)]
        return list(dict.fromkeys(told))


@pytest.fixture(params=["fake", "real"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Rig]:
    """Makes a watch of a folder, first the fake one and then the true one."""
    kind = FakeWatch if request.param == "fake" else FolderWatch
    return lambda: Rig(kind(tmp_path, interval_s=NEVER_S))


async def test_it_begins_afresh(make: Callable[[], Rig]) -> None:
    """The first news are all that there is, framed."""
    rig = make()
    rig.place("a")
    async with anyio.create_task_group() as group:
        group.start_soon(rig.watch.run, rig.tell)
        await rig.until_looked()
        group.cancel_scope.cancel()
    assert rig.news[0] == Afresh()
    assert isinstance(rig.news[-1], Looked)
    assert rig.news[-1].file_count == 1
    assert rig.found() == ["a"]


async def test_a_rescan_tells_before_it_answers(make: Callable[[], Rig]) -> None:
    """What was there when it was asked for has been told when it is over."""
    rig = make()
    rig.place("a")
    async with anyio.create_task_group() as group:
        group.start_soon(rig.watch.run, rig.tell)
        await rig.until_looked()
        rig.place("b")
        assert await rig.watch.rescan()
        assert rig.found() == ["a", "b"]
        rig.take("b")
        assert await rig.watch.rescan()
        assert rig.found() == ["a", "b", "-b"]
        assert isinstance(rig.news[-1], Looked)
        group.cancel_scope.cancel()


async def test_a_rescan_without_a_watch(make: Callable[[], Rig]) -> None:
    """Nobody looks, so it does not come in time."""
    rig = make()
    begin = time.monotonic()
    assert not await rig.watch.rescan(within_s=0.05)
    assert time.monotonic() - begin >= 0.05
    assert rig.news == []


async def test_a_rescan_before_the_first_look(make: Callable[[], Rig]) -> None:
    """It waits for the watch to begin."""
    rig = make()
    rig.place("a")
    async with anyio.create_task_group() as group:
        group.start_soon(rig.watch.run, rig.tell)
        assert await rig.watch.rescan()
        assert rig.found() == ["a"]
        group.cancel_scope.cancel()


async def test_a_second_run(make: Callable[[], Rig]) -> None:
    """After it was cancelled it can run again, and begins afresh."""
    rig = make()
    rig.place("a")
    for _ in range(2):
        rig.news.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(rig.watch.run, rig.tell)
            await rig.until_looked()
            group.cancel_scope.cancel()
        assert rig.news[0] == Afresh()
        assert rig.found() == ["a"]


async def test_nothing_new(make: Callable[[], Rig]) -> None:
    """A look that finds nothing new tells that it looked, and no more."""
    rig = make()
    async with anyio.create_task_group() as group:
        group.start_soon(rig.watch.run, rig.tell)
        await rig.until_looked()
        rig.news.clear()
        assert await rig.watch.rescan()
        assert [type(news) for news in rig.news] == [Looked]
        group.cancel_scope.cancel()


@pytest.mark.usefixtures("virtual_time")
async def test_the_fake_on_virtual_time() -> None:
    """The interval passes, a hanging look does not end, and what is put in is told at once."""
    watch, news = FakeWatch(interval_s=30.0), list[News]()
    entry = Entry(name="a", state=EntryState.READY, files=(ModelFile("/models/a.gguf", FileId(1, 2, 3, 4)),))
    async with anyio.create_task_group() as group:
        group.start_soon(watch.run, news.append)
        await anyio.sleep(65)
        assert watch.looks == 3
        watch.is_hanging = True
        assert not await watch.rescan(within_s=100)
        watch.is_hanging = False
        watch.put(entry)
        assert news[-2] == Found(changed=(entry,))
        watch.remove("a")
        assert news[-2] == Found(removed=("a",))
        group.cancel_scope.cancel()
