"""Models from a Hub of our own into a models folder: once, whole or not at all, whoever asks and whatever happens."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import anyio
import huggingface_hub
import pytest

from fakes.hub_server import Fault, HubFile, HubServer, Repository
from llamavisor.catalog import EntryState, Scanner
from llamavisor.catalog.disk import Disk
from llamavisor.events import Bus, Event, PullCancelled, PullEnded, PullFailed, PullProgress, PullStarted
from llamavisor.hub import Hub, HubError, Patience, Pulls, PullState, Stage, Why, parse
from llamavisor.hub.staging import NAME, Staging
from llamavisord.tiny_model import write_tiny_model

pytestmark = pytest.mark.anyio

PATIENCE = Patience(connect_s=5.0, stall_s=0.5, delays_s=(0.01, 0.01, 0.01))
SECRET = "hf_verysecret"
MANY = 3_000_000
MIB = 1_048_576


def noise(name: str, size: int = MANY) -> HubFile:
    """A file of some content that no other has."""
    return HubFile(hashlib.shake_128(name.encode()).digest(size))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with a true model, a large one, one in parts with a projector, and a gated one."""
    write_tiny_model(tmp_path / "tiny", ["I", "am", "pulled"])
    tiny = HubFile((tmp_path / "tiny").read_bytes())
    parts = {f"Q8/V-Q8_0-0000{n}-of-00002.gguf": noise(f"part {n}") for n in (1, 2)}
    repositories = {
        "user/tiny": Repository({"Tiny-Q4_K_M.gguf": tiny, "README.md": HubFile(b"# T", is_lfs=False)}),
        "user/big": Repository({"Big-Q4_K_M.gguf": noise("big"), "Big-Q8_0.gguf": noise("bigger")}),
        "user/vision": Repository({**parts, "V-Q4_0.gguf": noise("V"), "mmproj-V-F16.gguf": noise("projector")}),
        "other/big": Repository({"Big-Q4_K_M.gguf": noise("another big")}),
        "user/gated": Repository({"G-Q4_0.gguf": noise("G")}, gated_to=()),
    }
    with HubServer(repositories, tokens=[SECRET]) as hub:
        yield hub
        huggingface_hub.close_session()


class Here:
    """A models folder, and who brings models into it.

    Attributes:
        pulls: they.
        events: what they told.
    """

    def __init__(self, server: HubServer, models_dir: Path, patience: Patience = PATIENCE) -> None:
        self.events: list[Event] = []
        bus = Bus()
        bus.listen(lambda published: self.events.append(published.event))
        self.pulls = Pulls(Hub({"HF_ENDPOINT": server.url, "HF_TOKEN": SECRET}, patience), models_dir, bus)
        self.models_dir = models_dir

    async def pull(self, text: str, **more: str) -> Path | None:
        """Brings a model."""
        with anyio.fail_after(30):
            return await (await self.pulls.start(parse(text), **more)).wait()

    def told(self, *kinds: type[Event]) -> list[Event]:
        """The events of these kinds."""
        return [event for event in self.events if isinstance(event, kinds)]

    def visible(self) -> list[str]:
        """What everybody sees in the folder."""
        return sorted(
            str(path.relative_to(self.models_dir))
            for path in self.models_dir.rglob("*")
            if path.is_file() and NAME not in path.parts
        )

    def hidden(self) -> list[str]:
        """What lies in the staging folder, but the folder for files itself."""
        found = (self.models_dir / NAME).rglob("*")
        return sorted(str(path.relative_to(self.models_dir / NAME)) for path in found if path.name != "files")


@pytest.fixture
def models_dir(tmp_path: Path) -> Path:
    """An empty models folder."""
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
async def here(server: HubServer, models_dir: Path) -> AsyncIterator[Here]:
    """It, open."""
    made = Here(server, models_dir)
    async with made.pulls.opened():
        yield made


async def until(look: Callable[[], object]) -> None:
    """Waits for something that another task does."""
    with anyio.fail_after(15):
        while not look():
            await anyio.sleep(0.005)


async def test_a_model_comes(here: Here) -> None:
    """A model comes into the folder under its own name, and nothing else stays on the disk."""
    path = await here.pull("user/tiny")
    assert path == here.models_dir / "Tiny-Q4_K_M.gguf"
    assert here.visible() == ["Tiny-Q4_K_M.gguf"]
    assert here.hidden() == []
    assert [type(event) for event in here.told(PullStarted, PullEnded, PullFailed)] == [PullStarted, PullEnded]
    assert [event.here_bytes for event in here.told(PullStarted)] == [0]
    (pull,) = here.pulls.all
    assert (pull.state, pull.done_bytes, pull.files[0].stage) == (PullState.DONE, pull.total_bytes, Stage.DONE)


async def test_the_catalog_takes_it_at_first_sight(here: Here) -> None:
    """The catalog has the model READY at its next look, and sees nothing of the staging folder while it comes."""
    scanner = Scanner(str(here.models_dir))
    (here.models_dir / NAME / "files").mkdir(parents=True)
    (here.models_dir / NAME / "files" / "half.gguf").write_bytes(b"GGUF")
    assert scanner.scan().changed == ()
    await here.pull("user/tiny")
    (entry,) = scanner.scan().changed
    assert (entry.name, entry.state, entry.reason) == ("Tiny-Q4_K_M", EntryState.READY, "")


async def test_parts_and_projector_come_as_one_folder(here: Here, server: HubServer) -> None:
    """A model of several files appears as one folder, in one step, when the last of them is whole."""
    server.faults = [Fault(path=noise("part 2").oid, stall_after=1000, times=1)]
    seen: list[list[str]] = []
    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            while True:
                seen.append(here.visible())
                await anyio.sleep(0.001)

        tasks.start_soon(watch)
        path = await here.pull("user/vision:Q8_0")
        tasks.cancel_scope.cancel()
    whole = [
        "V-Q8_0/V-Q8_0-00001-of-00002.gguf",
        "V-Q8_0/V-Q8_0-00002-of-00002.gguf",
        "V-Q8_0/mmproj-V-F16.gguf",
    ]
    assert path == here.models_dir / "V-Q8_0"
    assert here.visible() == whole
    assert all(names in ([], whole) for names in seen)
    assert here.hidden() == []


async def test_the_same_twice_is_one_pull(here: Here, server: HubServer) -> None:
    """Who asks for what is under way, by whatever name, shares it."""
    server.faults = [Fault(stall_after=MIB)]
    first = await here.pulls.start(parse("user/big"))
    second = await here.pulls.start(parse("user/big:q4_k_m"))
    assert first is second
    await first.wait()
    assert sum(asked.sent[0] for asked in server.downloads()) == MANY


async def test_what_two_pulls_share_comes_once(here: Here, server: HubServer) -> None:
    """Two quantizations of one model get its projector, and it is fetched once."""
    server.faults = [Fault(path=noise("projector").oid, stall_after=MIB)]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(here.pull, "user/vision:Q8_0")
        tasks.start_soon(here.pull, "user/vision:Q4_0")
    assert {"V-Q8_0/mmproj-V-F16.gguf", "V-Q4_0/mmproj-V-F16.gguf"} < set(here.visible())
    sent = sum(asked.sent[0] for asked in server.downloads() if noise("projector").oid in asked.path)
    assert sent == MANY
    assert here.hidden() == []


async def test_two_daemons_on_one_folder(here: Here, server: HubServer) -> None:
    """Two daemons that pull the same into one folder bring it once, and both have it."""
    other = Here(server, here.models_dir)
    server.faults = [Fault(stall_after=MIB)]
    async with other.pulls.opened(), anyio.create_task_group() as tasks:
        tasks.start_soon(here.pull, "user/big")
        tasks.start_soon(other.pull, "user/big")
    assert [pull.state for each in (here, other) for pull in each.pulls.all] == [PullState.DONE] * 2
    assert sum(asked.sent[0] for asked in server.downloads()) == MANY
    assert here.hidden() == []


async def test_what_is_there_already(here: Here, server: HubServer) -> None:
    """A model that is there with the same content is a success without a byte; with another it is refused."""
    await here.pull("user/big")
    server.asked.clear()
    assert await here.pull("user/big") == here.models_dir / "Big-Q4_K_M.gguf"
    assert not server.downloads()
    with pytest.raises(HubError, match="something else") as raised:
        await here.pull("other/big")
    assert raised.value.why is Why.EXISTS
    assert (here.models_dir / "Big-Q4_K_M.gguf").read_bytes() == noise("big").content
    assert await here.pull("other/big", name="Another") == here.models_dir / "Another.gguf"


async def test_two_models_of_one_name(here: Here, server: HubServer) -> None:
    """While a model comes, another of its name is refused at once, not when it has come."""
    server.faults = [Fault(stall_after=MIB)]
    pull = await here.pulls.start(parse("user/big"))
    with pytest.raises(HubError, match="already") as raised:
        await here.pulls.start(parse("other/big"))
    assert raised.value.why is Why.EXISTS
    await pull.wait()


async def test_a_file_that_appears_meanwhile_is_not_replaced(here: Here, server: HubServer) -> None:
    """What somebody else puts in the model's place while it comes stays; the pull fails, and keeps what came."""
    server.faults = [Fault(stall_after=MIB)]
    pull = await here.pulls.start(parse("user/big"))
    await until(lambda: pull.done_bytes)
    (here.models_dir / "Big-Q4_K_M.gguf").write_bytes(b"mine")
    with pytest.raises(HubError) as raised:
        await pull.wait()
    assert raised.value.why is Why.EXISTS
    assert (here.models_dir / "Big-Q4_K_M.gguf").read_bytes() == b"mine"
    (here.models_dir / "Big-Q4_K_M.gguf").unlink()
    before = len(server.downloads())
    await here.pull("user/big")
    assert len(server.downloads()) == before


@pytest.mark.parametrize("drop", [False, True])
async def test_cancelled(here: Here, server: HubServer, drop: bool) -> None:
    """Who cancels sees nothing half done; what came is gone on with, or has gone."""
    server.faults = [Fault(stall_after=2_000_000, times=9)]
    patient = Here(server, here.models_dir, Patience(stall_s=30.0))
    async with patient.pulls.opened():
        pull = await patient.pulls.start(parse("user/big"))
        await until(lambda: pull.done_bytes > MIB)
        await patient.pulls.cancel(pull.id, drop=drop)
        assert (pull.state, await pull.wait()) == (PullState.CANCELLED, None)
        assert patient.visible() == []
        assert bool(patient.hidden()) is not drop
        assert [record.name for record in await patient.pulls.paused()] == ([] if drop else ["Big-Q4_K_M"])
        assert patient.told(PullCancelled)
    server.faults = []
    server.asked.clear()
    await here.pull("user/big")
    sent = sum(asked.sent[0] for asked in server.downloads())
    assert sent == MANY if drop else sent < MANY - MIB
    assert here.hidden() == []


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99, 1.0])
async def test_cancelled_at_any_moment(server: HubServer, models_dir: Path, share: float) -> None:
    """However early or late it is cancelled, the model is there whole or not at all, and the next pull brings it."""
    states = []
    for turns in (0, 1, 2, 4, 8, 16, 32, 64):
        here = Here(server, models_dir)
        async with here.pulls.opened():
            pull = await here.pulls.start(parse("user/vision:Q8_0"))
            await until(lambda pull=pull: pull.done_bytes >= share * pull.total_bytes)
            for _ in range(turns):
                await anyio.lowlevel.checkpoint()
            await here.pulls.cancel(pull.id)
            states.append(pull.state)
            assert len(here.visible()) == (3 if pull.state is PullState.DONE else 0)
            await here.pull("user/vision:Q8_0")
        assert here.hidden() == []
        for path in here.visible():
            (models_dir / path).unlink()
        (models_dir / "V-Q8_0").rmdir()
    assert PullState.CANCELLED in states or share == 1.0


async def test_a_pull_that_is_not_there(here: Here) -> None:
    """To cancel what is not there is told."""
    with pytest.raises(HubError) as raised:
        await here.pulls.cancel("nothing")
    assert raised.value.why is Why.NO_PULL


async def test_what_was_under_way_is_taken_up_again(server: HubServer, models_dir: Path) -> None:
    """The next daemon goes on with what was under way when the last one ended, but not with what was cancelled."""
    server.faults = [Fault(stall_after=2_000_000, times=2)]
    async with (first := Here(server, models_dir, Patience(stall_s=30.0))).pulls.opened():
        pulls = [await first.pulls.start(parse(text)) for text in ("user/big", "user/big:q8_0")]
        await until(lambda: all(pull.done_bytes > MIB for pull in pulls))
        await first.pulls.cancel(pulls[1].id)
    assert first.visible() == []
    server.asked.clear()
    async with (second := Here(server, models_dir)).pulls.opened():
        (pull,) = second.pulls.all
        await pull.wait()
        assert second.visible() == ["Big-Q4_K_M.gguf"]
        assert sum(asked.sent[0] for asked in server.downloads()) < MANY - MIB
        assert [asked for asked in server.asked if "/api/" in asked.path] == []
        assert [record.name for record in await second.pulls.paused()] == ["Big-Q8_0"]


async def test_a_failure_is_told_and_gone_on_from(here: Here, server: HubServer) -> None:
    """A pull that fails says why, keeps what came, and goes on with it when it is asked for again."""
    server.faults = [Fault(cut_after=2_000_000), Fault(cut_after=0, times=99)]
    with pytest.raises(HubError, match="cut"):
        await here.pull("user/big")
    (told,) = here.told(PullFailed)
    assert (told.model, told.why) == ("Big-Q4_K_M", "unreachable")
    assert here.visible() == []
    server.faults = []
    server.asked.clear()
    await here.pull("user/big")
    assert [asked.sent for asked in server.downloads()] == [[MANY - 2_000_000]]


async def test_a_gated_repository(here: Here) -> None:
    """A token that has no access to a gated repository is told what to do."""
    with pytest.raises(HubError, match="restricted") as raised:
        await here.pull("user/gated")
    assert raised.value.why is Why.FORBIDDEN
    assert "Ask for access" in raised.value.hint


async def test_no_room(here: Here, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk has no room for is refused before a byte comes, with the numbers."""
    monkeypatch.setattr("llamavisor.hub.staging.disk_of", lambda _: Disk(10**12, 66 * 1024 * 1024))
    with pytest.raises(HubError, match=r"needs 0\.0 GiB more") as raised:
        await here.pull("user/big")
    assert raised.value.why is Why.NO_SPACE
    assert not server.downloads()


async def test_a_folder_that_cannot_be_written(server: HubServer, tmp_path: Path) -> None:
    """A models folder that is not there is told of."""
    async with (here := Here(server, tmp_path / "none")).pulls.opened():
        with pytest.raises(HubError, match="none") as raised:
            await here.pull("user/big")
    assert raised.value.why is Why.DISK


@pytest.mark.parametrize("name", ["../x", "a/b", ".x", "..", "x\n"])
async def test_names_that_climb_out(here: Here, name: str) -> None:
    """A model gets no name that leads out of the folder, or hides in it."""
    with pytest.raises(HubError, match="no name"):
        await here.pull("user/tiny", name=name)


async def test_no_more_than_two_at_once(here: Here, server: HubServer) -> None:
    """A third pull waits for its turn."""
    server.faults = [Fault(stall_after=MIB, times=2)]
    pulls = [await here.pulls.start(parse(text)) for text in ("user/big", "user/big:q8_0", "user/tiny")]
    await until(lambda: len(server.downloads()) == 2)
    assert len(here.told(PullStarted)) == 2
    for pull in pulls:
        await pull.wait()


async def test_progress_is_told(here: Here, server: HubServer) -> None:
    """While a model comes it is told how far it is, how fast it comes, and how long it still takes."""
    patient = Here(server, here.models_dir, Patience(stall_s=30.0))
    server.faults = [Fault(stall_after=2_000_000)]
    async with patient.pulls.opened():
        await patient.pulls.start(parse("user/big"))
        await until(lambda: patient.told(PullProgress))
    (told, *_) = patient.told(PullProgress)
    assert told.is_frequent
    assert (told.done_bytes, told.total_bytes) == (2_000_000, MANY)
    assert told.speed_bytes_per_s > 0
    assert told.left_s > 0


async def test_the_token_is_nowhere(here: Here, server: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    """The token goes to the Hub alone: not into a log, an error, an event, a file, or what an object shows."""
    caplog.set_level(logging.DEBUG)
    server.faults = [Fault(cut_after=0, times=99)]
    with pytest.raises(HubError) as raised:
        await here.pull("user/big")
    assert any(asked.headers.get("authorization") == f"Bearer {SECRET}" for asked in server.asked)
    shown = [caplog.text, repr(raised.value), repr(here.pulls), repr(here.pulls.hub), repr(here.events)]
    shown += [path.read_text(errors="replace") for path in (here.models_dir / NAME).rglob("*") if path.is_file()]
    assert not [text for text in shown if SECRET in text]


async def test_litter_is_swept_and_nothing_else(here: Here, server: HubServer) -> None:
    """What no pull wants any more goes; what is kept to be gone on with stays."""
    server.faults = [Fault(cut_after=1_000_000), Fault(cut_after=0, times=99)]
    with pytest.raises(HubError):
        await here.pull("user/big")
    kept = here.hidden()
    staging = Staging(here.models_dir)
    content, key = "0" * 32 + "-9", "old-" + "1" * 16
    (staging.path / "files" / f"{content}.part").write_bytes(b"12345")
    (staging.path / "files" / f"{content}.etag").write_text("x")
    (staging.path / key).mkdir()
    (staging.path / key / "a.gguf").write_bytes(b"123")
    (staging.path / f"left-{'2' * 16}.lock").touch()
    foreign = [".part", ".lock", "mine.txt", ".x-0123456789abcdef.json.tmp", "files/.etag", "files/mine"]
    for name in foreign:
        (staging.path / name).write_text("x")
    staging.sweep()
    assert here.hidden() == sorted([*kept, *foreign])
