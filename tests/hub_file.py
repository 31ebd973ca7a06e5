"""One file of a Hub of our own, and how it is fetched."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from fakes.hub_server import HubFile, HubServer, Repository
from llamavisor.hub import Patience, Progress
from llamavisor.hub.listing import Listing, RemoteFile
from llamavisor.hub.part import Part
from llamavisor.hub.remote import Connection
from llamavisor.hub.transfer import Errand, fetch
from llamavisor.threads import Threads

CONTENT = hashlib.shake_128(b"a model").digest(3_000_000)
FILE = HubFile(CONTENT)
NAME = "model-Q4_K_M.gguf"
LISTING = Listing(repository="user/repo", revision="main", commit="a" * 40, choices=())
WANTED = RemoteFile(NAME, len(CONTENT), FILE.oid)
PATIENCE = Patience(connect_s=15.0, stall_s=30.0, delays_s=(0.01, 0.01, 0.01))


@contextmanager
def hub_of_one_file() -> Iterator[HubServer]:
    """A Hub with one repository of one file."""
    with HubServer({"user/repo": Repository({NAME: FILE})}, tokens=["hf_good"]) as hub:
        yield hub


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
