"""M1 to M9 for one file: every fault that a network and a disk have."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from fakes.hub_server import Fault, HubServer
from fakes.waiting import PATIENCE_S
from hub_file import CONTENT, FILE, LISTING, NAME, PATIENCE, WANTED, bring, hub_of_one_file
from llamavisor.hub import Hub, HubError, Progress, RemoteFile, Why
from llamavisor.hub.part import Part
from llamavisor.hub.remote import Connection
from llamavisor.hub.transfer import Errand, fetch
from llamavisor.threads import Threads

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


@pytest.mark.parametrize("left", [b"x" * 2_000_000, CONTENT + b"more", b"x" * 3_000_000])
async def test_m3_a_wrong_beginning(connection: Connection, part: Part, left: bytes) -> None:
    """A part that is damaged, too long or complete and wrong costs a second download, and nothing else."""
    part.partial.write_bytes(left)
    await bring(connection, part)
    assert part.whole.read_bytes() == CONTENT


@pytest.mark.parametrize("after", [0, 1, 65_536, 1_500_000, 2_999_999])
async def test_m1_a_cut_is_gone_on_from(connection: Connection, part: Part, server: HubServer, after: int) -> None:
    """A connection that is cut anywhere is opened again, and not a byte comes twice."""
    server.faults = [Fault(cut_after=after)]
    await bring(connection, part)
    assert part.whole.read_bytes() == CONTENT
    assert sum(asked.sent[0] for asked in server.downloads()) == len(CONTENT)


async def test_m2_a_stall_is_a_cut(part: Part, server: HubServer) -> None:
    """A server that sends nothing any more is left after the stall timeout, and what it sent is kept."""
    server.faults = [Fault(stall_after=1_500_000)]
    patience = replace(PATIENCE, stall_s=2.0)
    async with Hub({"HF_ENDPOINT": server.url}, patience).connect() as connection:
        await bring(connection, part, patience=patience)
    assert part.whole.read_bytes() == CONTENT
    assert [asked.range for asked in server.downloads()] == ["bytes=0-2999999", "bytes=1500000-2999999"]


async def test_m1_many_cuts_while_bytes_come(connection: Connection, part: Part, server: HubServer) -> None:
    """Only failures in a row without a byte between them count: patience is for who gains nothing."""
    server.faults = [Fault(cut_after=200_000) for _ in range(12)]
    await bring(connection, part)
    assert part.whole.read_bytes() == CONTENT


async def test_m1_patience_ends(connection: Connection, part: Part, server: HubServer) -> None:
    """A server that gives nothing is left alone at last, with what came kept for the next time."""
    server.faults = [Fault(cut_after=1_000_000), Fault(cut_after=0, times=99)]
    with pytest.raises(HubError) as raised:
        await bring(connection, part)
    assert raised.value.why is Why.UNREACHABLE
    assert part.partial.stat().st_size == 1_000_000
    assert len(server.downloads()) == 1 + len(PATIENCE.delays_s)


async def test_m3_one_wrong_byte(connection: Connection, part: Part, server: HubServer) -> None:
    """A byte that is wrong is found by the hash; the second download is right."""
    server.faults = [Fault(flip=1_234_567)]
    await bring(connection, part)
    assert part.whole.read_bytes() == CONTENT


async def test_m3_wrong_bytes_are_never_taken(connection: Connection, part: Part, server: HubServer) -> None:
    """A server that sends wrong bytes twice is told of, and nothing of them stays."""
    server.faults = [Fault(flip=1_234_567, times=2)]
    with pytest.raises(HubError, match="another hash") as raised:
        await bring(connection, part)
    assert raised.value.why is Why.WRONG_CONTENT
    assert not part.whole.exists()
    assert part.partial.stat().st_size == 0


@pytest.mark.parametrize("size", [len(CONTENT) - 1, len(CONTENT) + 1])
async def test_m3_another_size_than_listed(connection: Connection, part: Part, size: int) -> None:
    """A file of another size than the list says is refused before it is fetched."""
    with pytest.raises(HubError) as raised:
        await bring(connection, part, RemoteFile(NAME, size, FILE.oid))
    assert raised.value.why is Why.WRONG_CONTENT


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
@pytest.mark.parametrize("at", ["hub", "store"])
async def test_m4_a_passing_refusal(
    connection: Connection, part: Part, server: HubServer, status: int, at: str
) -> None:
    """What passes is tried again."""
    server.faults = [Fault(at=at, status=status)]
    await bring(connection, part)
    assert part.whole.read_bytes() == CONTENT


async def test_m4_a_server_that_wants_to_be_left_alone_for_a_while(
    connection: Connection, part: Part, server: HubServer
) -> None:
    """The next attempt comes when Retry-After says, not before."""
    server.faults = [Fault(status=429, headers={"Retry-After": "1"})]
    began = anyio.current_time()
    await bring(connection, part)
    assert anyio.current_time() - began >= 1.0


async def test_m4_a_server_that_wants_to_be_left_alone_for_long(
    connection: Connection, part: Part, server: HubServer
) -> None:
    """Nobody waits for an hour: it is told instead."""
    server.faults = [Fault(status=429, headers={"Retry-After": "3600"})]
    with pytest.raises(HubError, match="3600") as raised:
        await bring(connection, part)
    assert (raised.value.why, raised.value.retry_after_s) == (Why.BUSY, 3600.0)


async def test_m9_a_file_cancelled_in_the_middle(connection: Connection, part: Part, server: HubServer) -> None:
    """Who is cancelled leaves what came, and the next one goes on from there."""
    server.faults = [Fault(stall_after=2_000_000)]
    progress = Progress(NAME, len(CONTENT))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fetch, connection, Errand(LISTING, WANTED, part, progress, Threads(4)), PATIENCE)
        with anyio.fail_after(PATIENCE_S):
            while progress.done < 1_000_000:
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    kept = part.partial.stat().st_size
    assert kept >= 1_000_000
    await bring(connection, part)
    assert server.downloads()[-1].range == f"bytes={kept}-2999999"


async def test_m5_a_disk_that_fills(connection: Connection, part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full ends it with these very words."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llamavisor.hub.transfer.os.pwrite", full)
    with pytest.raises(HubError, match="disk is full") as raised:
        await bring(connection, part)
    assert raised.value.why is Why.NO_SPACE
