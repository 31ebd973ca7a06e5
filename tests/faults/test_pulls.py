"""M1 to M10: what happens to models on their way from the Hub, and F14: the folder that they go to hangs."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import httpx
import pytest

import llamavisor.hub.staging as staging_module
from fakes.hub_server import Fault, HubFile, HubServer, Repository
from hub_folder import MANY, MIB, PATIENCE, Here, hub_of_models, noise, until
from llamavisor.catalog.disk import Disk
from llamavisor.events import PullCancelled, PullFailed, PullStarted
from llamavisor.hub import Hub, HubError, Listing, Patience, PullState, RemoteFile, Why, parse
from llamavisor.hub.placing import place
from llamavisor.hub.pulls import THREADS
from llamavisor.hub.record import plan
from llamavisor.hub.staging import NAME, SPARE_BYTES, Staging

pytestmark = pytest.mark.anyio


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with some models."""
    with hub_of_models(tmp_path) as hub:
        yield hub


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


async def test_m8_two_daemons_on_one_folder(here: Here, server: HubServer) -> None:
    """Two daemons that pull the same into one folder bring it once, and both have it."""
    other = Here(server, here.models_dir)
    server.faults = [Fault(stall_after=MIB)]
    async with other.pulls.opened():
        pulls = [await each.pulls.start(parse("user/big")) for each in (here, other)]
        await until(lambda: any(pull.done_bytes for pull in pulls))
        server.released.set()
        for pull in pulls:
            await pull.wait()
    assert [pull.state for each in (here, other) for pull in each.pulls.all] == [PullState.DONE] * 2
    assert sum(asked.sent[0] for asked in server.downloads()) == MANY
    assert here.hidden() == []


async def test_m7_two_models_of_one_name(here: Here, server: HubServer) -> None:
    """While a model comes, another of its name is refused at once, not when it has come; so is it by another name."""
    server.faults = [Fault(stall_after=MIB)]
    pull = await here.pulls.start(parse("user/big"))
    with pytest.raises(HubError, match="already") as raised:
        await here.pulls.start(parse("other/big"))
    assert raised.value.why is Why.EXISTS
    with pytest.raises(HubError, match="as Big-Q4_K_M"):
        await here.pulls.start(parse("user/big"), name="other")
    server.released.set()
    assert await pull.wait()


async def test_m7_a_file_that_appears_meanwhile(here: Here, server: HubServer) -> None:
    """What somebody else puts in the model's place while it comes stays; the pull fails, and keeps what came."""
    server.faults = [Fault(stall_after=MIB)]
    pull = await here.pulls.start(parse("user/big"))
    await until(lambda: pull.done_bytes)
    (here.models_dir / "Big-Q4_K_M.gguf").write_bytes(b"mine")
    server.released.set()
    with pytest.raises(HubError) as raised:
        await pull.wait()
    assert raised.value.why is Why.EXISTS
    assert (here.models_dir / "Big-Q4_K_M.gguf").read_bytes() == b"mine"
    (here.models_dir / "Big-Q4_K_M.gguf").unlink()
    before = len(server.downloads())
    await here.pull("user/big")
    assert len(server.downloads()) == before


@pytest.mark.parametrize("drop", [False, True])
async def test_m9_cancelled(here: Here, server: HubServer, drop: bool) -> None:
    """Who cancels sees nothing half done; what came is gone on with, or has gone."""
    server.faults = [Fault(stall_after=2_000_000)]
    pull = await here.pulls.start(parse("user/big"))
    await until(lambda: pull.done_bytes > MIB)
    await here.pulls.cancel(pull.id, drop=drop)
    assert (pull.state, await pull.wait()) == (PullState.CANCELLED, None)
    assert here.visible() == []
    assert bool(here.hidden()) is not drop
    assert [record.name for record in await here.pulls.paused()] == ([] if drop else ["Big-Q4_K_M"])
    assert here.told(PullCancelled)
    server.faults = []
    server.asked.clear()
    await here.pull("user/big")
    sent = sum(asked.sent[0] for asked in server.downloads())
    assert sent == MANY if drop else sent < MANY - MIB
    assert here.hidden() == []


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99, 1.0])
async def test_m9_cancelled_at_any_moment(server: HubServer, models_dir: Path, share: float) -> None:
    """However early or late it is cancelled, the model is there whole or not at all, and the next pull brings it."""
    states = []
    for turns in (0, 1, 2, 4, 8, 16, 32, 64):
        here = Here(server, models_dir)
        if not turns:  # of each file comes that share and one byte: a fast one does not always get to its end first
            server.faults = [Fault(stall_after=int(share * MANY) + 1, times=3)]
        async with here.pulls.opened():
            pull = await here.pulls.start(parse("user/vision:Q8_0"))
            await until(lambda pull=pull: pull.done_bytes >= share * pull.total_bytes)
            for _ in range(turns):
                await anyio.lowlevel.checkpoint()
            await here.pulls.cancel(pull.id)
            states.append(pull.state)
            server.faults = []
            assert len(here.visible()) == (3 if pull.state is PullState.DONE else 0)
            await here.pull("user/vision:Q8_0")
        assert here.hidden() == []
        for path in here.visible():
            (models_dir / path).unlink()
        (models_dir / "V-Q8_0").rmdir()
    assert PullState.CANCELLED in states or share == 1.0


async def test_m10_what_was_under_way_is_taken_up_again(server: HubServer, models_dir: Path) -> None:
    """The next daemon goes on with what was under way when the last one ended, but not with what was cancelled."""
    server.faults = [Fault(stall_after=2_000_000, times=2)]
    async with (first := Here(server, models_dir)).pulls.opened():
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


async def test_m1_a_failure_is_told_and_gone_on_from(here: Here, server: HubServer) -> None:
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


async def test_m4_a_gated_repository(here: Here) -> None:
    """A token that has no access to a gated repository is told what to do."""
    with pytest.raises(HubError, match="restricted") as raised:
        await here.pull("user/gated")
    assert raised.value.why is Why.FORBIDDEN
    assert "Ask for access" in raised.value.hint


async def test_m5_no_room(here: Here, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk has no room for is refused before a byte comes, with the numbers."""
    monkeypatch.setattr("llamavisor.hub.staging.disk_of", lambda _: Disk(10**12, 66 * 1024 * 1024))
    with pytest.raises(HubError, match=r"needs 2\.9 MiB more, and .* has 2\.0 MiB to spare") as raised:
        await here.pull("user/big")
    assert raised.value.why is Why.NO_SPACE
    assert not server.downloads()


async def test_m5_a_folder_that_is_not_there(server: HubServer, tmp_path: Path) -> None:
    """A models folder that is not there is told of."""
    async with (here := Here(server, tmp_path / "none")).pulls.opened():
        with pytest.raises(HubError, match="none") as raised:
            await here.pull("user/big")
    assert raised.value.why is Why.DISK


@pytest.mark.parametrize("name", ["../x", "a/b", ".x", "..", "x\n"])
async def test_m6_names_that_climb_out(here: Here, name: str) -> None:
    """A model gets no name that leads out of the folder, or hides in it."""
    with pytest.raises(HubError, match="no name"):
        await here.pull("user/tiny", name=name)


async def test_m6_litter_is_swept_and_nothing_else(here: Here, server: HubServer) -> None:
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


@pytest.mark.parametrize("moment", ["queued", "while another works on it", "checked", "on its way"])
@pytest.mark.parametrize("drop", [False, True])
async def test_m9_cancelled_while_it_waits(server: HubServer, models_dir: Path, moment: str, drop: bool) -> None:
    """A pull that waits for its turn, for another daemon, or for a look at its content can be cancelled and dropped."""
    other, here = (Here(server, models_dir) for _ in range(2))
    server.faults = [Fault(stall_after=MIB, times=9)]
    async with other.pulls.opened(), here.pulls.opened():
        if moment == "queued":
            for text in ("user/big:q8_0", "user/vision"):
                await here.pulls.start(parse(text))
        if moment == "while another works on it":
            first = await other.pulls.start(parse("user/big"))
            await until(lambda: first.done_bytes)
        if moment == "checked":
            (models_dir / "Big-Q4_K_M.gguf").write_bytes(noise("big").content)
        pull = await here.pulls.start(parse("user/big"))
        if moment == "on its way":
            await until(lambda: pull.done_bytes)
        await here.pulls.cancel(pull.id, drop=drop)
        assert pull.state is PullState.CANCELLED
        server.released.set()
        for each in (*other.pulls.all, *here.pulls.all):
            await each.wait()
        assert ("Big-Q4_K_M.gguf" in here.visible()) is moment.startswith(("while another", "checked"))
    names = [record.name for record in Staging(models_dir).records()]
    assert names == ([] if drop or moment == "while another works on it" else ["Big-Q4_K_M"])


@pytest.mark.parametrize("drop", [False, True])
async def test_m8_a_pull_that_one_of_two_daemons_gives_up(server: HubServer, models_dir: Path, drop: bool) -> None:
    """What one daemon cancels the other still brings, and its own next one goes on with it."""
    mine, theirs = (Here(server, models_dir) for _ in range(2))
    server.faults = [Fault(stall_after=MIB, times=2)]
    async with mine.pulls.opened():
        pull = await mine.pulls.start(parse("user/big"))
        await until(lambda: pull.done_bytes)
        async with theirs.pulls.opened():
            waiting = await theirs.pulls.start(parse("user/big"))
            await mine.pulls.cancel(pull.id, drop=drop)
            await until(lambda: theirs.told(PullStarted))
            assert waiting.state is PullState.UNDER_WAY
    server.released.set()
    async with (later := Here(server, models_dir)).pulls.opened():
        assert await later.pulls.all[0].wait() == models_dir / "Big-Q4_K_M.gguf"


@pytest.mark.parametrize("drop", [False, True])
async def test_m5_a_disk_that_lets_nothing_go(here: Here, server: HubServer, drop: bool) -> None:
    """A disk that became read-only under a pull: who cancels it is told, and the daemon goes on."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    server.faults = [Fault(stall_after=MIB)]
    pull = await here.pulls.start(parse("user/big"))
    await until(lambda: pull.done_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llamavisor.hub.staging.replace_file", refuse)
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(HubError, match="Read-only") as raised:
            await here.pulls.cancel(pull.id, drop=drop)
    assert raised.value.why is Why.DISK
    assert pull.state is PullState.FAILED
    assert await here.pull("user/tiny")


async def test_m6_a_staging_folder_that_is_a_link(here: Here, tmp_path: Path) -> None:
    """A link in the place of the staging folder, or of the one in it, is not followed: nothing behind it is touched."""
    precious = tmp_path / "precious"
    (precious / "files").mkdir(parents=True)
    names = ["x-0123456789abcdef.lock", "x-0123456789abcdef/model", f"files/{'0' * 32}-9.part"]
    for name in names:
        (precious / name).parent.mkdir(exist_ok=True)
        (precious / name).write_text("precious")
    staging = here.models_dir / NAME
    for link, target in ((staging, precious), (staging / "files", precious / "files")):
        for each in (staging / "files", staging):
            if each.is_dir() and not each.is_symlink():
                each.rmdir()
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(target)
        async with Here(here.server, here.models_dir).pulls.opened():
            pass
        assert Staging(here.models_dir).clean(float("inf"), is_dry=False) == []
        with pytest.raises(HubError, match="link") as raised:
            await here.pull("user/big")
        assert raised.value.why is Why.DISK
        link.unlink()
    assert [(precious / name).read_text() for name in names] == ["precious"] * 3


async def test_m6_records_that_somebody_planted(server: HubServer, models_dir: Path) -> None:
    """What is no record of ours is neither begun nor waited for: another shape, another name, a FIFO, a huge file."""
    true = plan(await Hub({"HF_ENDPOINT": server.url}).look(parse("user/big")), parse("user/big"))
    staging = Staging(models_dir)
    staging.write(true)
    bad = [{"repository": "../user"}, {"commit": "a/../b"}, {"commit": "?"}, {"name": "a/b"}, {"files": []}]
    for number, change in enumerate(bad):
        document = {**json.loads(true.model_dump_json()), **change}
        (staging.path / f"x-{number:016x}.json").write_text(json.dumps(document))
    (staging.path / f"y-{'1' * 16}.json").write_text(true.model_dump_json())
    os.mkfifo(staging.path / f"z-{'2' * 16}.json")
    (staging.path / f"w-{'3' * 16}.json").write_bytes(b" " * 3_000_000)
    (staging.path / f"v-{'4' * 16}.json").symlink_to(staging.path / f"{true.key}.json")
    with anyio.fail_after(10):
        assert await anyio.to_thread.run_sync(staging.records, abandon_on_cancel=True) == [true]


async def test_m3_a_file_that_git_holds(here: Here, server: HubServer) -> None:
    """A small file that does not lie in the store is verified, too, by what git calls it."""
    server.repositories["user/git"] = Repository({"G-Q4_0.gguf": HubFile(b"GGUF" * 1000, is_lfs=False)})
    assert await here.pull("user/git")
    (here.models_dir / "G-Q4_0.gguf").unlink()
    server.faults = [Fault(at="hub", path="/resolve/", flip=77, times=9)]
    with pytest.raises(HubError, match="hash") as raised:
        await here.pull("user/git")
    assert raised.value.why is Why.WRONG_CONTENT
    assert here.visible() == []


async def test_m4_a_server_that_sends_us_to_a_place_without_tls() -> None:
    """What is asked of a Hub by TLS is not fetched without it, whatever the Hub says."""
    async with Hub({"HF_ENDPOINT": "https://hub.invalid"}, PATIENCE).connect() as connection:
        client = connection._client
        redirect = httpx.MockTransport(lambda _: httpx.Response(302, headers={"Location": "http://store.invalid/x"}))
        client._transport, client._mounts = redirect, {}
        listing = Listing(repository="user/repo", revision="main", commit="a" * 40, choices=())
        with pytest.raises(HubError, match="without TLS"):
            async with connection.open(listing, RemoteFile("x.gguf", 9)):
                pass


async def test_m4_a_hub_that_wants_to_be_left_alone(server: HubServer) -> None:
    """To who waits for an answer it is told at once that the Hub wants to be asked again much later."""
    server.faults = [Fault(at="hub", status=429, headers={"Retry-After": "120"}, times=9)]
    with anyio.fail_after(10), pytest.raises(HubError, match=r"asked again in 120 s") as raised:
        await Hub({"HF_ENDPOINT": server.url}).look(parse("user/big"))
    assert (raised.value.why, raised.value.retry_after_s) == (Why.BUSY, 120.0)


async def test_m4_a_token_that_cannot_be_read(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a token that is no file is told of, and ends nothing."""
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/")
    with pytest.raises(HubError, match="cannot be read: Is a directory") as raised:
        await Hub({"HF_ENDPOINT": server.url}).look(parse("user/big"))
    assert raised.value.why is Why.UNAUTHORIZED


async def test_m7_too_many_pulls(here: Here, monkeypatch: pytest.MonkeyPatch, server: HubServer) -> None:
    """Nobody can have pulls without end begun; who has asked too much is told."""
    monkeypatch.setattr("llamavisor.hub.pulls.MOST", 2)
    server.faults = [Fault(stall_after=MIB, times=2)]
    pulls = [await here.pulls.start(parse(text)) for text in ("user/big", "user/big:q8_0")]
    with pytest.raises(HubError, match="2 pulls are under way") as raised:
        await here.pulls.start(parse("user/tiny"))
    assert raised.value.why is Why.TOO_MANY
    server.released.set()
    for pull in pulls:
        await pull.wait()
    assert await here.pull("user/tiny")


async def test_m7_what_is_there_is_read_before_it_is_believed(here: Here) -> None:
    """A file of the same name and size whose content is another is told of, and stays."""
    target = here.models_dir / "Big-Q4_K_M.gguf"
    target.write_bytes(bytes(MANY))
    with pytest.raises(HubError, match="something else"):
        await here.pull("user/big")
    assert target.read_bytes() == bytes(MANY)


async def test_m5_what_is_here_needs_no_room(server: HubServer, models_dir: Path) -> None:
    """What came before, and what two pulls have in common, counts once when it is asked whether there is room."""
    here = Here(server, models_dir)
    server.faults = [Fault(stall_after=2_000_000, times=9)]
    async with here.pulls.opened():
        first = await here.pulls.start(parse("user/vision:Q4_0"))
        await until(lambda: first.done_bytes == 4_000_000)
        needed = here.pulls.staging.missing_bytes([first.record])
        assert needed == 2_000_000
        with pytest.MonkeyPatch.context() as patch:
            room = SPARE_BYTES + needed + 2 * MANY  # for the two parts of the other one, not for its projector
            patch.setattr("llamavisor.hub.staging.disk_of", lambda _: Disk(10**12, room))
            await here.pulls.start(parse("user/vision:Q8_0"))
            with pytest.raises(HubError, match="0 B to spare"):
                await here.pulls.start(parse("user/tiny"))


async def test_f14_a_pull_into_a_folder_that_hangs(here: Here, server: HubServer, tmp_path: Path) -> None:
    """A models folder that hangs takes a few threads, and nobody else's time; who asks for it is told."""
    released, hanging = threading.Event(), list[Path]()
    true_lstat = Path.lstat

    def lstat(path: Path) -> os.stat_result:
        if "hung" in path.parts:
            hanging.append(path)
            released.wait()
        return true_lstat(path)

    (tmp_path / "hung").mkdir()
    async with (hung := Here(server, tmp_path / "hung")).pulls.opened():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "lstat", lstat)
            with pytest.MonkeyPatch.context() as hurry:
                hurry.setattr("llamavisor.hub.pulls.DISK_S", 0.1)
                for _ in range(3 * THREADS):
                    with anyio.fail_after(15), pytest.raises(HubError, match="does not answer"):
                        await hung.pulls.paused()
                with anyio.fail_after(15), pytest.raises(HubError, match="does not answer"):
                    await hung.pulls.start(parse("user/big"))
            assert 0 < len(hanging) <= THREADS
            assert await here.pull("user/big")
            hanging.clear()
            with anyio.fail_after(15):
                async with anyio.create_task_group() as daemon:

                    async def live() -> None:
                        async with Here(server, tmp_path / "hung").pulls.opened():
                            pass

                    daemon.start_soon(live)
                    await until(lambda: hanging)
                    daemon.cancel_scope.cancel()
            released.set()
        assert await hung.pull("user/big")


async def test_m6_pulls_that_nobody_goes_on_with_are_given_up(server: HubServer, models_dir: Path) -> None:
    """Cleaning gives up what was left long ago and removes what nobody wants; what is under way or young stays."""
    here = Here(server, models_dir)
    server.faults = [Fault(stall_after=MIB, times=9)]
    async with here.pulls.opened():
        left, goes = [await here.pulls.start(parse(text)) for text in ("user/big", "user/big:q8_0")]
        await until(lambda: left.done_bytes and goes.done_bytes)
        await here.pulls.cancel(left.id)
        staging, litter = Staging(models_dir), f"{NAME}/files/{'0' * 32}-9"
        (models_dir / f"{litter}.part").write_bytes(b"12345")
        told = {each.rel: (each.model, each.size_bytes, each.is_under_way) for each in staging.holdings()}
        record_bytes = (staging.path / f"{left.id}.json").stat().st_size
        assert told[f"{NAME}/{left.id}"][:1] == ("Big-Q4_K_M",)
        assert MIB < told[f"{NAME}/{left.id}"][1] < MIB + 2 * record_bytes
        assert (told[f"{NAME}/{left.id}"][2], told[f"{NAME}/{goes.id}"][2], told[litter]) == (
            False,
            True,
            ("", 5, False),
        )
        young = time.time() - 3600
        assert [each.rel for each in staging.clean(young, is_dry=True)] == [litter]
        assert (models_dir / f"{litter}.part").exists()
        assert [each.rel for each in staging.clean(young, is_dry=False)] == [litter]
        assert [each.rel for each in staging.clean(time.time() + 9, is_dry=False)] == [f"{NAME}/{left.id}"]
        assert [each.key for each in staging.holdings()] == [goes.id]
        server.released.set()
        assert await goes.wait()


@pytest.mark.parametrize("damage", ["another version", "no descriptor", "somebody else's"])
async def test_m6_a_record_that_cannot_be_read(here: Here, server: HubServer, damage: str) -> None:
    """What came of a pull is not litter because its record cannot be read just now."""
    server.faults = [Fault(cut_after=1_000_000), Fault(cut_after=0, times=99)]
    with pytest.raises(HubError):
        await here.pull("user/big")
    kept, (key,) = here.hidden(), [record.key for record in Staging(here.models_dir).records()]
    staging, path = Staging(here.models_dir), here.models_dir / NAME / f"{key}.json"
    true_open, true_text = os.open, path.read_text()

    def refuse(file: object, *args: object, **more: object) -> int:
        if str(file).endswith(".json"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return true_open(file, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        if damage == "another version":
            path.write_text("{}")
        elif damage == "no descriptor":
            patch.setattr(os, "open", refuse)
        else:
            os.chown(path, 12345, -1)
        async with Here(server, here.models_dir).pulls.opened():
            pass
        assert here.hidden() == kept
        assert [(each.rel, each.model) for each in staging.holdings()] == [(f"{NAME}/{key}", "")]
    path.write_text(true_text)
    os.chown(path, os.geteuid(), -1)
    server.faults = []
    server.asked.clear()
    assert await here.pull("user/big")
    assert sum(asked.sent[0] for asked in server.downloads()) == MANY - 1_000_000


async def test_m6_what_others_make_of_the_staging_folder(here: Here, tmp_path: Path) -> None:
    """Folders in folders, a folder of a pull that is a link, or somebody else's folder end nothing and move nothing."""
    staging = Staging(here.models_dir)
    staging.prepare()
    deep = staging.path / f"x-{'0' * 16}" / Path(*["d"] * 400)
    deep.mkdir(parents=True)
    staging.sweep()
    assert deep.exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "Big-Q4_K_M.gguf").write_text("precious")
    record = plan(await here.pulls.hub.look(parse("user/big")), parse("user/big"))
    staging.folder_of(record).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HubError, match="link"):
        await here.pull("user/big")
    assert (tmp_path / "elsewhere" / "Big-Q4_K_M.gguf").read_text() == "precious"
    os.chown(staging.path, 12345, -1)
    with pytest.raises(HubError, match="somebody else's"):
        await here.pull("user/tiny")


async def test_m3_a_large_file_that_comes_whole(here: Here, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that heeds no ranges sends more at once than we ask for at once: all of it is taken."""
    monkeypatch.setattr("llamavisor.hub.transfer.SPAN_BYTES", 1_000_000)
    server.faults = [Fault(ignores_range=True, times=9)]
    assert await here.pull("user/big")
    assert [asked.sent for asked in server.downloads()] == [[MANY]]


async def test_m3_a_hub_that_tells_what_cannot_be(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer whose hashes are none is the Hub's fault, and told so."""
    monkeypatch.setattr(HubFile, "oid", "no hash")
    with pytest.raises(HubError, match="cannot be") as raised:
        plan(await Hub({"HF_ENDPOINT": server.url}).look(parse("user/big")), parse("user/big"))
    assert raised.value.why is Why.SERVER


async def test_m9_who_leaves_ends_only_what_nobody_else_wants(here: Here, server: HubServer) -> None:
    """A pull goes on as long as somebody wants it: who began it, who joined it later, or a person."""
    server.faults = [Fault(stall_after=MIB, times=2)]
    pull = await here.pulls.start(parse("user/big"), who="a")
    await here.pulls.start(parse("user/big:q4_k_m"), who="b")
    await here.pulls.leave("a")
    assert pull.state is PullState.UNDER_WAY
    await here.pulls.leave("b")
    assert pull.state is PullState.CANCELLED
    again = await here.pulls.start(parse("user/big"))
    await here.pulls.start(parse("user/big"), who="a")
    await here.pulls.leave("a")
    server.released.set()
    assert await again.wait()


async def test_m9_cleaning_while_a_pull_is_taken_up_again(here: Here, server: HubServer) -> None:
    """What was left and is wanted again since stays, however long cleaning had it on its list."""
    server.faults = [Fault(cut_after=1_000_000), Fault(cut_after=0, times=99)]
    with pytest.raises(HubError):
        await here.pull("user/big")
    staging = Staging(here.models_dir)
    (record,) = staging.records()
    kept = here.hidden()
    staging.write(record)
    assert staging.drop(record.key) is True
    with pytest.raises(HubError):
        await here.pull("user/big")
    staging.write(record.model_copy(update={"is_under_way": True}))
    assert staging.drop(record.key) is False
    assert here.hidden() == kept


async def test_f14_a_folder_that_hangs_amid_a_pull(
    here: Here, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that hangs keeps its own pull; it cannot be cancelled, which is told, and is once the disk is back."""
    released, hangs = threading.Event(), threading.Event()
    true_pwrite = os.pwrite

    def pwrite(fd: int, *args: object) -> int:
        if "/hung/" in os.readlink(f"/proc/self/fd/{fd}"):
            hangs.set()
            released.wait()
        return true_pwrite(fd, *args)

    (tmp_path / "hung").mkdir()
    monkeypatch.setattr(os, "pwrite", pwrite)
    async with (hung := Here(server, tmp_path / "hung")).pulls.opened():
        pull = await hung.pulls.start(parse("user/big"))
        await until(hangs.is_set)
        with pytest.MonkeyPatch.context() as hurry:
            hurry.setattr("llamavisor.hub.pulls.DISK_S", 0.2)
            with anyio.fail_after(15), pytest.raises(HubError, match="does not answer"):
                await hung.pulls.cancel(pull.id)
        assert await here.pull("user/big")
        assert [each.id for each in hung.pulls.under_way] == [pull.id]
        released.set()
        assert await pull.wait() is None
        assert pull.state is PullState.CANCELLED
        assert await hung.pull("user/big")


async def test_f14_what_was_refused_is_not_begun_later(
    server: HubServer, tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pull that could not be written down in time, as was told, is not gone on with when the disk is back."""
    monkeypatch.setattr("llamavisor.hub.pulls.DISK_S", 2.0)  # far more than what is done before takes
    released = threading.Event()
    true_replace = staging_module.replace_file

    def replace_file(path: Path, data: bytes) -> None:
        released.wait()
        true_replace(path, data)

    async with (here := Here(server, models_dir)).pulls.opened():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(staging_module, "replace_file", replace_file)
            with pytest.raises(HubError, match="does not answer"):
                await here.pulls.start(parse("user/big"))
            released.set()
            await until(lambda: not here.pulls.under_way)
    assert [record.is_under_way for record in Staging(models_dir).records()] == [False]


async def test_m5_a_full_disk_amid_a_pull(server: HubServer, models_dir: Path) -> None:
    """Why a pull was left is remembered although the disk is full, and told by the next daemon."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def pwrite(fd: int, *args: object) -> int:
        """Only what has its place already can be written."""
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".part"):
            refuse()
        return true_pwrite(fd, *args)

    true_pwrite = os.pwrite
    async with (here := Here(server, models_dir)).pulls.opened():
        with pytest.MonkeyPatch.context() as patch:
            server.faults = [Fault(stall_after=MIB)]
            pull = await here.pulls.start(parse("user/big"))
            await until(lambda: pull.done_bytes)
            patch.setattr("llamavisor.hub.staging.replace_file", refuse)
            patch.setattr(os, "pwrite", pwrite)
            server.released.set()
            with pytest.raises(HubError):
                await pull.wait()
    async with (later := Here(server, models_dir)).pulls.opened():
        (left,) = await later.pulls.paused()
        assert (left.why, left.is_under_way) == ("no_space", False)
        assert "the disk is full" in left.reason
        assert await later.pull("user/big")


async def test_m9_what_was_dropped_is_gone(here: Here, server: HubServer) -> None:
    """Whether it was under way, left or failed: after it has been dropped there is no such pull."""
    server.faults = [Fault(stall_after=MIB), Fault(cut_after=0, times=99)]
    for state in ("under way", "failed"):
        pull = await here.pulls.start(parse("user/big"))
        if state == "under way":
            await until(lambda pull=pull: pull.done_bytes)
        else:
            with pytest.raises(HubError):
                await pull.wait()
        assert await here.pulls.cancel(pull.id, drop=True)
        assert here.hidden() == []
        with pytest.raises(HubError) as raised:
            await here.pulls.cancel(pull.id, drop=True)
        assert raised.value.why is Why.NO_PULL


async def test_m9_dropped_when_it_is_done(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pull that was in its last step when it was to be dropped is done, and nobody is told that it has gone."""
    placing, released = threading.Event(), threading.Event()

    def place_slowly(*args: object) -> Path:
        placing.set()
        assert released.wait(60)
        return place(*args)

    monkeypatch.setattr("llamavisor.hub.pulls.place", place_slowly)
    monkeypatch.setattr("llamavisor.hub.pulls.DISK_S", 60.0)
    answers: list[bool] = []

    async def drop() -> None:
        answers.append(await here.pulls.cancel(pull.id, drop=True))

    pull = await here.pulls.start(parse("user/tiny"))
    await until(placing.is_set)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(drop)
        await until(lambda: pull.scope.cancel_called)
        released.set()
    assert (answers, pull.state) == ([False], PullState.DONE)
    assert here.visible() == ["Tiny-Q4_K_M.gguf"]


async def test_m5_room_that_another_daemon_takes(
    here: Here, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another daemon that shares the folder brings takes its room, until it is there or given up."""
    monkeypatch.setattr("llamavisor.hub.staging.disk_of", lambda _: Disk(10**12, SPARE_BYTES + MANY + MIB))
    server.faults = [Fault(stall_after=0)]
    other = Here(server, here.models_dir, Patience(stall_s=600.0))
    async with other.pulls.opened():
        theirs = await other.pulls.start(parse("user/big"))
        with pytest.raises(HubError, match=r"needs 2\.9 MiB more, and .* has 1\.0 MiB to spare") as raised:
            await here.pulls.start(parse("user/big:q8_0"))
        assert raised.value.why is Why.NO_SPACE
        await other.pulls.cancel(theirs.id)
        server.faults = []  # theirs may have been given up before it was met
        assert await here.pull("user/big:q8_0")


async def test_m10_what_a_client_wanted_is_a_persons_afterwards(server: HubServer, models_dir: Path) -> None:
    """The next daemon goes on with what a client wanted, and no client that joins it and leaves ends it."""
    server.faults = [Fault(stall_after=MIB, times=2)]
    async with (first := Here(server, models_dir, Patience(stall_s=600.0))).pulls.opened():
        pull = await first.pulls.start(parse("user/big"), who="a client")
        await until(lambda: pull.done_bytes)
    async with (second := Here(server, models_dir, Patience(stall_s=600.0))).pulls.opened():
        (pull,) = second.pulls.all
        assert await second.pulls.start(parse("user/big"), who="a client") is pull
        await second.pulls.leave("a client")
        assert pull.state is PullState.UNDER_WAY
        server.released.set()
        assert await pull.wait()
