"""M11: a repository, a Hub or a mirror that nobody should trust."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from fakes.hub_server import Fault, HubFile, HubServer, Repository
from hub_folder import MIB, Here, hub_of_models, noise, until
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


def told(sha: object = "a" * 40, size: object = 10, sha256: object = "b" * 64, name: object = "M.gguf") -> bytes:
    """What a Hub tells of a repository with one model."""
    sibling = {"rfilename": name, "size": size, "lfs": {"sha256": sha256, "size": size, "pointerSize": 134}}
    return json.dumps({"id": "user/big", "sha": sha, "siblings": [sibling]}).encode()


@pytest.mark.parametrize(
    "body",
    [
        told(size=-5),
        told(size=2**63),
        told(size=10**400),
        told(size=0.5),
        told(size="many"),
        told(size=77777).replace(b"77777", b"1e999"),
        told(sha=None),
        told(sha=""),
        told(sha="../../x?y#z"),
        told(sha256=None),
        told(sha256="../" * 20),
        told(name=None),
        told(name=7),
        b"[" * 100_000 + b"]" * 100_000,
        b'{"siblings": ' + b"9" * 5000 + b"}",
        b"[]",
        b"7",
        b'{"siblings": {"rfilename": 1}}',
        b"\xff",
    ],
)
async def test_m11_a_hub_that_tells_what_cannot_be(hub: Hub, server: HubServer, body: bytes) -> None:
    """Whatever a Hub tells of a repository, it is told as the Hub's fault, and nothing of it is believed."""
    server.faults = [Fault(at="hub", path="/api/", body=body)]
    with pytest.raises(HubError) as raised:
        await hub.look(parse("user/big"))
    assert raised.value.why is Why.SERVER
    assert raised.value.hint == "Look at HF_ENDPOINT."


async def test_m11_what_nobody_asks_for_may_be_anything(hub: Hub, server: HubServer) -> None:
    """What a Hub tells of files that are no GGUF files, or lead elsewhere, matters to nobody."""
    odd = [{"rfilename": name, "size": -1, "blobId": "?"} for name in ("README.md", "../M.gguf", ".M.gguf")]
    whole = json.loads(told())
    body = json.dumps({**whole, "siblings": [*odd, *whole["siblings"]]}).encode()
    server.faults = [Fault(at="hub", path="/api/", body=body)]
    (choice,) = (await hub.look(parse("user/big"))).choices
    assert (choice.name, choice.size_bytes) == ("M", 10)


ODD_ANSWERS = [
    Fault(at="hub", path="/resolve/", status=302, headers={"Location": "http://xn--a.com/"}, times=9),
    Fault(at="hub", path="/resolve/", status=302, headers={"Location": "http://127.0.0.1:99999/"}, times=9),
    Fault(at="hub", path="/resolve/", status=302, headers={"Location": f"http://{'a' * 64}.com/"}, times=9),
    Fault(status=206, headers={"Content-Range": f"bytes 0-9/{'9' * 5000}"}, times=9),
]


@pytest.mark.parametrize("fault", ODD_ANSWERS, ids=["no name", "no port", "a long name", "no number"])
async def test_m11_a_store_that_answers_oddly(
    hub: Hub, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """A store that sends to no host, or says a number without an end, is at fault; its models are listed."""
    (tmp_path / "models").mkdir()
    server.faults = [replace(fault)]
    there = await hub.look(parse("user/big"), reads_headers=True)
    assert [choice.header for choice in there.choices] == [None, None]
    monkeypatch.setattr("llamavisor.hub.transfer.SPAN_BYTES", MIB)
    async with (here := Here(server, tmp_path / "models", PATIENT)).pulls.opened():
        server.faults = [replace(fault)]
        with pytest.raises(HubError) as raised:
            await here.pull("user/big")
    assert raised.value.why in {Why.SERVER, Why.UNREACHABLE}


async def test_m11_a_name_of_a_content_that_cannot_be_written(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ETag that is no text is as good as none: the model comes."""
    monkeypatch.setattr("llamavisor.hub.transfer.SPAN_BYTES", MIB)
    (tmp_path / "models").mkdir()
    euro = '"\u20ac"'.encode().decode("latin-1")
    server.etags = dict.fromkeys((file.oid for file in server.repositories["user/big"].files.values()), euro)
    async with (here := Here(server, tmp_path / "models", PATIENT)).pulls.opened():
        assert await here.pull("user/big")


@pytest.mark.parametrize("body", [b"", b"7"])
async def test_m11_a_password_in_the_address_of_a_mirror(server: HubServer, free_port: int, body: bytes) -> None:
    """A mirror that needs a password and is away, or answers nonsense, is told of without the password."""
    server.faults = [Fault(at="hub", path="/api/", body=body)]
    address = server.url.removeprefix("http://") if body else f"127.0.0.1:{free_port}"
    mirror = Hub({"HF_ENDPOINT": f"http://bob:s3cret@{address}"}, PATIENT)
    with pytest.raises(HubError, match=f"^http://{address} ") as raised:
        await mirror.look(parse("user/big"))
    async with mirror.connect() as connection:
        assert "s3cret" not in f"{raised.value!r} {raised.value} {raised.value.hint} {connection!r}"


async def test_m11_a_store_that_lets_everybody_wait(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The headers of all models have one deadline; what was read until then is told, and no other is begun."""
    monkeypatch.setattr("llamavisor.hub.remote.HEADERS_AT_ONCE", 1)
    (tiny, *_), silent = server.repositories["user/tiny"].files.values(), noise("silent")
    server.repositories["user/slow"] = Repository({"a.gguf": tiny, **dict.fromkeys(["b.gguf", "c.gguf"], silent)})
    server.faults = [Fault(path=silent.oid, stall_after=0, times=9)]
    hub = Hub({"HF_ENDPOINT": server.url}, Patience(stall_s=600.0, answer_s=5.0))
    there = await hub.look(parse("user/slow"), reads_headers=True)
    assert [choice.header is not None for choice in there.choices] == [True, False, False]
    assert len([asked for asked in server.downloads() if silent.oid in asked.path]) == 1


@pytest.mark.parametrize("endpoint", ["http://[x", "http://xn--a.com", "http://127.0.0.1:99999"])
async def test_m11_an_address_that_is_none(hub: Hub, server: HubServer, endpoint: str) -> None:
    """An address that nobody can ask is told of as that, by who lists models and by who goes on with one."""
    there = await hub.look(parse("user/big"))
    nowhere = Hub({"HF_ENDPOINT": endpoint}, PATIENT)
    with pytest.raises(HubError) as raised:
        await nowhere.look(parse("user/big"))
    assert raised.value.why in {Why.SERVER, Why.UNREACHABLE}
    async with nowhere.connect() as connection:
        with pytest.raises(HubError) as raised:
            async with connection.open(there, there.choices[0].first):
                """It does not come to that."""
    assert raised.value.why in {Why.SERVER, Why.UNREACHABLE}
