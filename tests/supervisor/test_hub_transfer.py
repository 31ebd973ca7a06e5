"""One file from a Hub of our own to the disk."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from fakes.hub_server import Fault, HubServer
from hub_file import CONTENT, FILE, NAME, PATIENCE, begin, bring, hub_of_one_file
from llamavisor.hub import Hub, Progress, RemoteFile, Stage
from llamavisor.hub.part import Part
from llamavisor.hub.remote import Connection

pytestmark = pytest.mark.anyio


@pytest.fixture
def server() -> Iterator[HubServer]:
    """A Hub with one repository of one file."""
    with hub_of_one_file() as hub:
        yield hub


@pytest.fixture
async def connection(server: HubServer) -> AsyncIterator[Connection]:
    """Open to it, with a token."""
    async with Hub({"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_good"}, PATIENCE).connect() as opened:
        yield opened


@pytest.fixture
def part(tmp_path: Path) -> Part:
    """Where the file becomes whole."""
    return Part(tmp_path / "it")


async def test_a_file_comes_whole(connection: Connection, part: Part, server: HubServer) -> None:
    """A file comes from the store, which sees no token, and nothing else is left on the disk."""
    progress = await bring(connection, part)
    assert part.whole.read_bytes() == CONTENT
    assert (progress.stage, progress.done) == (Stage.DONE, len(CONTENT))
    assert [path.name for path in part.whole.parent.iterdir()] == ["it"]
    assert server.asked[0].headers["authorization"] == "Bearer hf_good"
    assert "authorization" not in server.asked[1].headers


async def test_it_looks_renamed_to_the_catalog(connection: Connection, part: Part) -> None:
    """It is older than its place in the folder, so that the catalog takes it at its first sight of it."""
    await bring(connection, part)
    status = part.whole.stat()
    assert status.st_ctime_ns > status.st_mtime_ns


async def test_a_beginning_is_gone_on_with(connection: Connection, part: Part, server: HubServer) -> None:
    """What a killed process left is not fetched again, on the condition that the content is the same."""
    begin(part, 2_000_000)
    await bring(connection, part)
    assert part.whole.read_bytes() == CONTENT
    (asked,) = server.downloads()
    assert asked.range == "bytes=2000000-2999999"
    assert asked.headers["if-range"] == f'"{FILE.oid[:32]}-7"'
    assert asked.sent == [1_000_000]


async def test_another_content_is_begun_anew(connection: Connection, part: Part, server: HubServer) -> None:
    """A server whose file has another ETag by now sends all of it, and all of it is taken."""
    begin(part, 2_000_000, etag='"another"')
    await bring(connection, part)
    assert part.whole.read_bytes() == CONTENT
    assert [asked.sent for asked in server.downloads()] == [[3_000_000]]


async def test_a_file_without_a_hash_is_not_gone_on_with_blindly(
    connection: Connection, part: Part, server: HubServer
) -> None:
    """Where the Hub tells no hash and nobody knows the ETag of what is here, it is fetched from its beginning."""
    begin(part, 1_000_000, etag="")
    await bring(connection, part, RemoteFile(NAME, len(CONTENT)))
    assert [asked.sent for asked in server.downloads()] == [[3_000_000]]


async def test_a_server_that_heeds_no_ranges(connection: Connection, part: Part, server: HubServer) -> None:
    """A server that sends the whole file for a part of it is taken at its word: all of it is written anew."""
    begin(part, 2_000_000)
    server.faults = [Fault(ignores_range=True)]
    await bring(connection, part)
    assert part.whole.read_bytes() == CONTENT


async def test_an_empty_file(part: Part, server: HubServer, connection: Connection) -> None:
    """A file of no bytes is whole at once."""
    await bring(connection, part, RemoteFile("empty.gguf", 0, hashlib.sha256().hexdigest()))
    assert part.whole.read_bytes() == b""
    assert not server.asked


def test_a_speed_is_that_of_the_last_seconds() -> None:
    """Where nothing comes any more it falls to nothing, and nobody says when it will be there."""
    now = 0.0
    progress = Progress(NAME, 1000, clock=lambda: now)
    progress.stage = Stage.RECEIVING
    progress.reach(0)
    now = 2.0
    progress.reach(100)
    assert (progress.speed, progress.left_s) == (50.0, 18.0)
    now = 30.0
    assert (progress.speed, progress.left_s) == (0.0, None)
