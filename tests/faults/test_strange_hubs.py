"""M11: a repository, a Hub or a mirror that nobody should trust."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from fakes.hub_server import HubFile, HubServer, Repository
from hub_folder import hub_of_models, until
from llamavisor.hub import Hub, HubError, Listing, Patience, Why, parse
from llamavisor.hub.listing import MOST_FILES, arrange

pytestmark = pytest.mark.anyio

PATIENT = Patience(delays_s=())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with some models."""
    with hub_of_models(tmp_path) as hub:
        yield hub


@pytest.fixture
def hub(server: HubServer) -> Hub:
    """It, as we ask it: once."""
    return Hub({"HF_ENDPOINT": server.url}, PATIENT)


async def test_m11_a_repository_of_very_many_files(hub: Hub, server: HubServer) -> None:
    """Of a repository of thousands of models nothing is looked at, and who asks is told why; of one less, all is."""
    file = HubFile(b"GGUF")
    for count in (MOST_FILES, MOST_FILES + 1):
        halves = [f"m{n}-Q4_0.gguf" for n in range(count // 2)], [f"mmproj-{n}.gguf" for n in range(count - count // 2)]
        server.repositories["evil/repo"] = Repository({path: file for half in halves for path in half})
        if count <= MOST_FILES:
            assert len((await hub.look(parse("evil/repo"))).choices) == count // 2
            continue
        with pytest.raises(HubError, match=f"{count} GGUF files") as raised:
            await hub.look(parse("evil/repo"))
        assert raised.value.why is Why.NO_FILE


async def test_m11_what_takes_long_to_arrange(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes to see which files belong together, the daemon does other things meanwhile."""
    begun, released = threading.Event(), threading.Event()

    def arrange_slowly(*args: object) -> Listing:
        begun.set()
        assert released.wait(60)
        return arrange(*args)

    monkeypatch.setattr("llamavisor.hub.remote.arrange", arrange_slowly)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(hub.look, parse("user/big"))
        await until(begun.is_set)
        released.set()
