"""One file from a Hub of our own to the disk, through every fault that a network has."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import pytest

from fakes.hub_server import Fault, HubFile, HubServer, Repository
from llamavisor.hub import Hub, HubError, Patience, Progress, RemoteFile, Stage, Why
from llamavisor.hub.listing import Listing
from llamavisor.hub.remote import Connection
from llamavisor.hub.staging import Part
from llamavisor.hub.transfer import Errand, fetch
from llamavisor.threads import Threads

pytestmark = pytest.mark.anyio

CONTENT = hashlib.shake_128(b"a model").digest(3_000_000)
FILE = HubFile(CONTENT)
NAME = "model-Q4_K_M.gguf"
LISTING = Listing(repository="user/repo", revision="main", commit="a" * 40, choices=())
WANTED = RemoteFile(NAME, len(CONTENT), FILE.oid)
PATIENCE = Patience(connect_s=5.0, stall_s=0.4, delays_s=(0.01, 0.01, 0.01))


@pytest.fixture
def server() -> Iterator[HubServer]:
    """A Hub with one repository of one file."""
    with HubServer({"user/repo": Repository({NAME: FILE})}, tokens=["hf_good"]) as hub:
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


async def bring(
    connection: Connection, part: Part, file: RemoteFile = WANTED, patience: Patience = PATIENCE
) -> Progress:
    """Has the file fetched."""
    progress = Progress(file.name, file.size)
    with anyio.fail_after(30):
        await fetch(connection, Errand(LISTING, file, part, progress, Threads(4)), patience)
    return progress


def begin(part: Part, count: int, etag: str = f'"{FILE.oid[:32]}-7"') -> None:
    """Leaves the beginning of the file, as a process that was killed does."""
    part.partial.write_bytes(CONTENT[:count])
    if etag:
        part.etag.write_text(etag)


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


@pytest.mark.parametrize("left", [b"x" * 2_000_000, CONTENT + b"more", b"x" * 3_000_000])
async def test_a_wrong_beginning_is_found_by_the_hash(connection: Connection, part: Part, left: bytes) -> None:
    """A part that is damaged, too long or complete and wrong costs a second download, and nothing else."""
    part.partial.write_bytes(left)
    await bring(connection, part)
    assert part.whole.read_bytes() == CONTENT


async def test_a_file_without_a_hash_is_not_gone_on_with_blindly(
    connection: Connection, part: Part, server: HubServer
) -> None:
    """Where the Hub tells no hash and nobody knows the ETag of what is here, it is fetched from its beginning."""
    begin(part, 1_000_000, etag="")
    await bring(connection, part, RemoteFile(NAME, len(CONTENT)))
    assert [asked.sent for asked in server.downloads()] == [[3_000_000]]


@pytest.mark.parametrize("after", [0, 1, 65_536, 1_500_000, 2_999_999])
async def test_a_cut_is_gone_on_from(connection: Connection, part: Part, server: HubServer, after: int) -> None:
    """A connection that is cut anywhere is opened again, and not a byte comes twice."""
    server.faults = [Fault(cut_after=after)]
    await bring(connection, part)
    assert part.whole.read_bytes() == CONTENT
    assert sum(asked.sent[0] for asked in server.downloads()) == len(CONTENT)


async def test_a_stall_is_a_cut(connection: Connection, part: Part, server: HubServer) -> None:
    """A server that sends nothing any more is left after the stall timeout, and what it sent is kept."""
    server.faults = [Fault(stall_after=1_500_000)]
    await bring(connection, part)
    assert part.whole.read_bytes() == CONTENT
    assert [asked.range for asked in server.downloads()] == ["bytes=0-2999999", "bytes=1500000-2999999"]


async def test_many_cuts_are_no_failure_while_bytes_come(connection: Connection, part: Part, server: HubServer) -> None:
    """Only failures in a row without a byte between them count: patience is for who gains nothing."""
    server.faults = [Fault(cut_after=200_000) for _ in range(12)]
    await bring(connection, part)
    assert part.whole.read_bytes() == CONTENT


async def test_patience_ends(connection: Connection, part: Part, server: HubServer) -> None:
    """A server that gives nothing is left alone at last, with what came kept for the next time."""
    server.faults = [Fault(cut_after=1_000_000), Fault(cut_after=0, times=99)]
    with pytest.raises(HubError) as raised:
        await bring(connection, part)
    assert raised.value.why is Why.UNREACHABLE
    assert part.partial.stat().st_size == 1_000_000
    assert len(server.downloads()) == 1 + len(PATIENCE.delays_s)


async def test_one_wrong_byte_is_fetched_again(connection: Connection, part: Part, server: HubServer) -> None:
    """A byte that is wrong is found by the hash; the second download is right."""
    server.faults = [Fault(flip=1_234_567)]
    await bring(connection, part)
    assert part.whole.read_bytes() == CONTENT


async def test_wrong_bytes_are_never_taken(connection: Connection, part: Part, server: HubServer) -> None:
    """A server that sends wrong bytes twice is told of, and nothing of them stays."""
    server.faults = [Fault(flip=1_234_567, times=2)]
    with pytest.raises(HubError, match="another hash") as raised:
        await bring(connection, part)
    assert raised.value.why is Why.WRONG_CONTENT
    assert not part.whole.exists()
    assert part.partial.stat().st_size == 0


async def test_a_server_that_heeds_no_ranges(connection: Connection, part: Part, server: HubServer) -> None:
    """A server that sends the whole file for a part of it is taken at its word: all of it is written anew."""
    begin(part, 2_000_000)
    server.faults = [Fault(ignores_range=True)]
    await bring(connection, part)
    assert part.whole.read_bytes() == CONTENT


@pytest.mark.parametrize("size", [len(CONTENT) - 1, len(CONTENT) + 1])
async def test_another_size_than_listed(connection: Connection, part: Part, size: int) -> None:
    """A file of another size than the list says is refused before it is fetched."""
    with pytest.raises(HubError) as raised:
        await bring(connection, part, RemoteFile(NAME, size, FILE.oid))
    assert raised.value.why is Why.WRONG_CONTENT


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
@pytest.mark.parametrize("at", ["hub", "store"])
async def test_a_passing_refusal(connection: Connection, part: Part, server: HubServer, status: int, at: str) -> None:
    """What passes is tried again."""
    server.faults = [Fault(at=at, status=status)]
    await bring(connection, part)
    assert part.whole.read_bytes() == CONTENT


async def test_a_server_that_wants_to_be_left_alone_for_a_while(
    connection: Connection, part: Part, server: HubServer
) -> None:
    """The next attempt comes when Retry-After says, not before."""
    server.faults = [Fault(status=429, headers={"Retry-After": "1"})]
    began = anyio.current_time()
    await bring(connection, part)
    assert anyio.current_time() - began >= 1.0


async def test_a_server_that_wants_to_be_left_alone_for_long(
    connection: Connection, part: Part, server: HubServer
) -> None:
    """Nobody waits for an hour: it is told instead."""
    server.faults = [Fault(status=429, headers={"Retry-After": "3600"})]
    with pytest.raises(HubError, match="3600") as raised:
        await bring(connection, part)
    assert (raised.value.why, raised.value.retry_after_s) == (Why.BUSY, 3600.0)


async def test_cancelled_in_the_middle(connection: Connection, part: Part, server: HubServer) -> None:
    """Who is cancelled leaves what came, and the next one goes on from there."""
    server.faults = [Fault(stall_after=2_000_000)]
    progress = Progress(NAME, len(CONTENT))
    patience = Patience(stall_s=30.0)
    async with Hub({"HF_ENDPOINT": server.url}, patience).connect() as patient, anyio.create_task_group() as tasks:
        tasks.start_soon(fetch, patient, Errand(LISTING, WANTED, part, progress, Threads(4)), patience)
        with anyio.fail_after(10):
            while progress.done < 1_000_000:
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    kept = part.partial.stat().st_size
    assert kept >= 1_000_000
    await bring(connection, part)
    assert server.downloads()[-1].range == f"bytes={kept}-2999999"


async def test_a_full_disk(connection: Connection, part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full ends it with these very words."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llamavisor.hub.transfer.os.pwrite", full)
    with pytest.raises(HubError, match="disk is full") as raised:
        await bring(connection, part)
    assert raised.value.why is Why.NO_SPACE


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
