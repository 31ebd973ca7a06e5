"""Models from a Hub of our own into a models folder: once, whole or not at all, whoever asks."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import pytest

from fakes.hub_server import Fault, HubServer
from hub_folder import MANY, MIB, SECRET, Here, hub_of_models, noise, until
from llamavisor.catalog import EntryState, Scanner
from llamavisor.events import PullEnded, PullFailed, PullProgress, PullStarted
from llamavisor.hub import HubError, PullState, Stage, Why, parse
from llamavisor.hub.staging import NAME

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
    pull = await here.pulls.start(parse("user/vision:Q8_0"))
    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            while True:
                seen.append(here.visible())
                await anyio.sleep(0.001)

        tasks.start_soon(watch)
        await until(lambda: [file.stage for file in pull.files].count(Stage.DONE) == 2)
        server.released.set()
        path = await pull.wait()
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
    server.released.set()
    await first.wait()
    assert sum(asked.sent[0] for asked in server.downloads()) == MANY


async def test_what_two_pulls_share_comes_once(here: Here, server: HubServer) -> None:
    """Two quantizations of one model get its projector, and it is fetched once."""
    server.faults = [Fault(path=noise("projector").oid, stall_after=MIB)]
    pulls = [await here.pulls.start(parse(f"user/vision:{quantization}")) for quantization in ("Q8_0", "Q4_0")]
    projectors = [file for pull in pulls for file in pull.files if file.name.startswith("mmproj")]
    await until(lambda: [file.done for file in projectors] == [MIB, MIB])  # one fetches it, the other watches
    server.released.set()
    for pull in pulls:
        await pull.wait()
    assert {"V-Q8_0/mmproj-V-F16.gguf", "V-Q4_0/mmproj-V-F16.gguf"} < set(here.visible())
    sent = sum(asked.sent[0] for asked in server.downloads() if noise("projector").oid in asked.path)
    assert sent == MANY
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


async def test_a_pull_that_is_not_there(here: Here) -> None:
    """To cancel what is not there is told."""
    with pytest.raises(HubError) as raised:
        await here.pulls.cancel("nothing")
    assert raised.value.why is Why.NO_PULL


async def test_no_more_than_two_at_once(here: Here, server: HubServer) -> None:
    """A third pull waits for its turn."""
    server.faults = [Fault(stall_after=MIB, times=2)]
    pulls = [await here.pulls.start(parse(text)) for text in ("user/big", "user/big:q8_0", "user/tiny")]
    await until(lambda: len(server.downloads()) == 2)
    assert len(here.told(PullStarted)) == 2
    server.released.set()
    for pull in pulls:
        await pull.wait()


async def test_progress_is_told(here: Here, server: HubServer) -> None:
    """While a model comes it is told how far it is, how fast it comes, and how long it still takes."""
    server.faults = [Fault(stall_after=2_000_000)]
    await here.pulls.start(parse("user/big"))
    await until(lambda: any(told.done_bytes == 2_000_000 for told in here.told(PullProgress)))
    told = next(told for told in here.told(PullProgress) if told.done_bytes == 2_000_000)
    assert told.is_frequent
    assert told.total_bytes == MANY
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
