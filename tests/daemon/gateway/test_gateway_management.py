"""Models as clients of the gateway see and manage them: the fleet as one router, on virtual time."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from fakes.fleet import GatewayStage, models
from fakes.machine import KILLED, FakeModel, FakeStart
from llamavisor.api import Props, StatusEvent
from llamavisor.catalog import Entry, EntryState, FileId, ModelFile
from llamavisor.cause import Cause, Verdict
from llamavisor.demands import STALL_S
from llamavisor.events import ModelAdded, ModelLoaded, ModelLoading, ModelProgress, ModelSleeping
from llamavisor.settings import RouterSettings
from llamavisor.states import ModelState
from llamavisord.gateway.management import LOOK_S, Management, named_in
from llamavisord.gateway.notices import KEPT, Stream
from llamavisord.gateway.replies import Reply

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("virtual_time")]

NOT_FOUND = {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}}


def anything(_: str) -> bool:
    """A client that may use every model."""
    return True


def error(status: int, message: str, kind: str) -> tuple[int, object]:
    """An error as llama-server answers it."""
    return status, {"error": {"code": status, "message": message, "type": kind}}


def read(reply: Reply) -> tuple[int, object]:
    """What a client gets."""
    return reply.status, json.loads(reply.body)


class Desk:
    """A fleet on fakes, and what manages its models."""

    def __init__(self, folder: Path, *names: str, gib: float = 4) -> None:
        self.stage = GatewayStage(folder, models(names, gib=gib))
        self.management: Management

    def __repr__(self) -> str:
        return f"<Desk {self.stage!r}>"

    @asynccontextmanager
    async def open(self, *routers: RouterSettings, wait: bool = True, **more: object) -> AsyncIterator[Management]:
        """Have the fleet run, and somebody who answers."""
        async with self.stage.running(*routers, wait=wait, **more), anyio.create_task_group() as tasks:
            self.management = Management(
                self.stage.fleet,
                self.stage.bus,
                tasks,
            )
            yield self.management
            tasks.cancel_scope.cancel()

    async def listed(self, may_use: object = anything) -> dict[str, dict[str, object]]:
        """GET /models, by name."""
        status, document = read(await self.management.models(may_use))
        assert (status, document["object"]) == (200, "list")
        items = {item["id"]: item for item in document["data"]}
        assert len(items) == len(document["data"]), "a model is listed twice"
        return items

    async def statuses(self) -> dict[str, str]:
        """The status of every model."""
        return {name: item["status"]["value"] for name, item in (await self.listed()).items()}

    async def until_status(self, name: str, status: str) -> None:
        """Wait until a model is listed so."""
        with anyio.fail_after(3600):
            while (await self.statuses()).get(name) != status:
                await anyio.sleep(0.01)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """Two models of 4 GiB each, not yet running; a router has room for both."""
    return Desk(tmp_path, "alpha", "beta")


async def heard(stream: Stream) -> list[dict[str, object]]:
    """What a reader of events has been told since the last time, after everything under way has happened."""
    parts = b""
    with anyio.move_on_after(60):
        while True:
            parts += await anext(stream)
    return events_in(parts)


def events_in(parts: bytes) -> list[dict[str, object]]:
    """The events of a stream."""
    return [json.loads(part.removeprefix("data: ")) for part in parts.decode().split("\n\n") if part]


async def test_an_item_has_llama_servers_shape(desk: Desk) -> None:
    """Field by field, with nothing that a client must not know: no command line, no path, no port."""
    async with desk.open():
        item = (await desk.listed())["alpha"]
        assert isinstance(item.pop("created"), int)
        assert item == {
            "id": "alpha",
            "aliases": [],
            "tags": [],
            "object": "model",
            "owned_by": "llamacpp",
            "status": {"value": "unloaded", "args": [], "preset": ""},
            "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
            "source": "preset",
            "can_remove": False,
        }


async def test_every_model_is_listed_once_and_where_it_is_loaded(desk: Desk) -> None:
    """Whichever of two routers has it, and in whatever order they come."""
    async with desk.open(desk.stage.router("main"), desk.stage.router("other")):
        await desk.stage.fleet.load(desk.stage["other"], "beta")
        assert await desk.statuses() == {"alpha": "unloaded", "beta": "loaded"}
        assert (await desk.listed())["beta"]["meta"] == {"n_ctx": 4096}
        await desk.stage.fleet.load(desk.stage["main"], "alpha")
        assert await desk.statuses() == {"alpha": "loaded", "beta": "loaded"}


async def test_there_is_a_list_while_the_router_is_down(desk: Desk) -> None:
    """Before it has ever come up, and after it was killed."""
    async with desk.open(wait=False):
        await desk.stage.until(lambda: list(desk.stage.fleet))
        desk.stage.hosts["main"].obstacle = Verdict(Cause.BAD_BINARY, "no llama-server", is_obstacle=True)
        await desk.stage.until(lambda: desk.stage["main"].shelf.wanted)
        assert await desk.statuses() == {"alpha": "unloaded", "beta": "unloaded"}
        desk.stage.hosts["main"].obstacle = None
        await desk.stage.until(lambda: desk.stage["main"].is_serving)
        await desk.stage.fleet.load(desk.stage["main"], "alpha")
        desk.stage.hosts["main"].starts.append(FakeStart(ready_at=30))
        desk.stage.hosts["main"].process.end(KILLED)
        await desk.stage.until(lambda: not desk.stage["main"].is_serving)
        assert await desk.statuses() == {"alpha": "unloaded", "beta": "unloaded"}


async def test_what_cannot_be_used_is_not_listed(desk: Desk) -> None:
    """A model that its router would not take, one whose file is still written, and a broken one."""
    async with desk.open(wait=False):
        await desk.stage.until(lambda: desk.stage.hosts)
        desk.stage.hosts["main"].withholds["beta"] = "it names no model"
        await desk.stage.until(lambda: desk.stage["main"].is_serving)
        file = ModelFile("/models/new.gguf", FileId(1, 7, 1000, 1))
        states = {"settles": EntryState.SETTLING, "broken": EntryState.INVALID, "half": EntryState.INCOMPLETE}
        desk.stage.watches[0].put(*(Entry(name=name, state=state, files=(file,)) for name, state in states.items()))
        await anyio.sleep(60)
        assert list(await desk.statuses()) == ["alpha"]
        desk.stage["main"].stop()
        await desk.stage.until(lambda: not desk.stage["main"].is_serving)
        assert list(await desk.statuses()) == ["alpha"]


async def test_a_failure_is_shown_until_the_next_load(desk: Desk) -> None:
    """With `failed` and an exit code, as llama-server shows it."""
    desk.stage.models["alpha"].exit_code = 1
    async with desk.open() as management:
        management.load("alpha", anything)
        await desk.stage.until(lambda: desk.stage["main"].table.get("alpha").error)
        await desk.until_status("alpha", "unloaded")
        status = (await desk.listed())["alpha"]["status"]
        assert status == {"value": "unloaded", "args": [], "preset": "", "exit_code": 1, "failed": True}
        desk.stage.hosts["main"].models["alpha"] = FakeModel(load_s=10)
        management.load("alpha", anything)
        await desk.until_status("alpha", "loading")
        assert "failed" not in (await desk.listed())["alpha"]["status"]


async def test_a_client_sees_only_what_it_may_use(desk: Desk) -> None:
    """In the list, in the events, and when it loads and unloads."""

    def may_use(name: str) -> bool:
        return name == "alpha"

    async with desk.open() as management:
        assert list(await desk.listed(may_use)) == ["alpha"]
        assert read(management.load("beta", may_use)) == (404, NOT_FOUND)
        with management.events(may_use) as stream:
            management.load("beta", anything)
            await desk.until_status("beta", "loaded")
            management.load("alpha", anything)
            assert {event["model"] for event in await heard(stream)} == {"alpha"}
        refused = error(400, "model is not found", "invalid_request_error")
        assert read(management.unload("beta", may_use)) == refused
        assert (await desk.statuses())["beta"] == "loaded"


async def test_a_load_is_answered_at_once_and_goes_on(desk: Desk) -> None:
    """It is listed as loading from then on; a second one is refused, and so is one of what there is not."""
    desk.stage.models["alpha"].load_s = 30.0
    async with desk.open() as management:
        began = anyio.current_time()
        assert read(management.load("alpha", anything)) == (200, {"success": True})
        assert anyio.current_time() == began
        again = error(400, "model is already running", "invalid_request_error")
        assert (await desk.statuses())["alpha"] == "loading"
        assert read(management.load("alpha", anything)) == again
        await desk.until_status("alpha", "loaded")
        assert read(management.load("alpha", anything)) == again
        for word in ("nope", ""):
            assert read(management.load(word, anything)) == (404, NOT_FOUND)
        assert desk.stage.hosts["main"].process.loads == ["alpha"]


async def test_an_alias_leads_to_its_model(desk: Desk) -> None:
    """When it is loaded and unloaded; the list has it as an alias and nothing else."""
    async with desk.open() as management:
        file = ModelFile("/models/gamma.gguf", FileId(1, 9, 1000, 1))
        desk.stage.hosts["main"].models["gamma"] = FakeModel()
        entry = Entry(name="gamma", state=EntryState.READY, files=(file,), aliases=("g", "c"))
        desk.stage.watches[0].put(entry)
        await desk.until_status("gamma", "unloaded")
        item = (await desk.listed())["gamma"]
        assert item["aliases"] == ["c", "g"]
        assert management.load("g", anything).status == 200
        await desk.until_status("gamma", "loaded")
        assert management.unload("c", anything).status == 200
        await desk.until_status("gamma", "unloaded")


async def test_an_unload_waits_for_those_who_are_answered(desk: Desk) -> None:
    """It is answered at once, also a second time; the model is listed as loaded until it has gone."""
    async with desk.open() as management:
        client = desk.stage.client("alpha")
        await desk.stage.until(lambda: client.has_it)
        for _ in range(2):
            assert read(management.unload("alpha", anything)) == (200, {"success": True})
            await anyio.sleep(60)
            assert (await desk.statuses())["alpha"] == "loaded"
        client.leave()
        await desk.until_status("alpha", "unloaded")
        refused = error(400, "model is not running", "invalid_request_error")
        assert read(management.unload("alpha", anything)) == refused
        assert read(management.unload("nope", anything)) == error(400, "model is not found", "invalid_request_error")


async def test_an_unload_ends_a_load(desk: Desk) -> None:
    """One that a client had asked for, before it has begun and afterwards."""
    desk.stage.models["alpha"].load_s = math.inf
    async with desk.open() as management:
        desk.stage.hosts["main"].appraise_s = 5.0
        for wait_s in (0.0, 20.0):
            assert management.load("alpha", anything).status == 200
            await anyio.sleep(wait_s)
            assert (await desk.statuses())["alpha"] == "loading"
            assert management.unload("alpha", anything).status == 200
            await desk.until_status("alpha", "unloaded")
        await anyio.sleep(60)
        assert (await desk.statuses())["alpha"] == "unloaded"


async def test_events_have_llama_servers_words(desk: Desk) -> None:
    """From the load of a model to its end: the same names, the same fields, the same order."""
    async with desk.open() as management:
        with management.events(anything) as stream:
            management.load("alpha", anything)
            told = await heard(stream)
            assert isinstance(told[-1]["data"]["info"].pop("created"), int)
            progress = {"stages": ["text_model"], "current": "text_model"}
            modalities = {"input_modalities": ["text"], "output_modalities": ["text"]}
            info = {"id": "alpha", "aliases": ["alpha"], "tags": [], "object": "model", "architecture": modalities}
            info |= {"owned_by": "llamacpp", "meta": {"n_ctx": 4096}}
            assert [(event["model"], event["event"], event["data"]) for event in told] == [
                ("alpha", "model_status", {"status": "loading"}),
                ("alpha", "status_change", {"status": "loading", "progress": {**progress, "value": 0.0}}),
                ("alpha", "status_change", {"status": "loading", "progress": {**progress, "value": 1.0}}),
                ("alpha", "status_change", {"status": "loaded", "info": info}),
            ]
            management.unload("alpha", anything)
            (told,) = await heard(stream)
            assert told == {"model": "alpha", "event": "status_change", "data": {"status": "unloaded", "exit_code": 0}}
            await desk.stage.fleet.load(desk.stage["main"], "beta")
            await heard(stream)
            desk.stage.hosts["main"].process.crash("beta")
            told = (await heard(stream))[0]
            assert told == {"model": "beta", "event": "status_change", "data": {"status": "unloaded", "exit_code": 1}}


async def test_a_load_that_cannot_begin_is_told_as_a_failure(tmp_path: Path) -> None:
    """A model that is too large for every budget was answered 200: who waits for its load hears that it is over."""
    desk = Desk(tmp_path, "huge", gib=40)
    async with desk.open(oversize="refuse") as management:
        with management.events(anything) as stream:
            assert management.load("huge", anything).status == 200
            (told,) = await heard(stream)
            assert told["data"] == {"status": "unloaded", "exit_code": 1}
        assert await desk.statuses() == {"huge": "unloaded"}


async def test_a_load_that_finds_no_room_is_given_up(tmp_path: Path) -> None:
    """Others keep what is loaded, and nothing moves; it is listed as loading until it is refused."""
    desk = Desk(tmp_path, "alpha", "beta", "gamma")
    async with desk.open() as management:
        clients = [desk.stage.client(name) for name in ("alpha", "beta")]
        await desk.stage.until(lambda: all(client.has_it for client in clients))
        management.load("gamma", anything)
        await anyio.sleep(STALL_S / 2)
        assert (await desk.statuses())["gamma"] == "loading"
        with management.events(anything) as stream:
            await anyio.sleep(STALL_S)
            assert [event["data"] for event in await heard(stream)] == [{"status": "unloaded", "exit_code": 1}]
        assert (await desk.statuses())["gamma"] == "unloaded"


async def test_what_happens_elsewhere_to_a_loaded_model_is_not_told(desk: Desk) -> None:
    """It leaves one router while another goes on answering: for clients it is loaded."""
    async with desk.open(desk.stage.router("main"), desk.stage.router("other")) as management:
        for router in ("main", "other"):
            await desk.stage.fleet.load(desk.stage[router], "alpha")
        with management.events(anything) as stream:
            desk.stage.hosts["other"].process.evict("alpha")
            assert await heard(stream) == []
            desk.stage.hosts["main"].process.evict("alpha")
            assert [event["data"]["status"] for event in await heard(stream)] == ["unloaded"]


async def test_a_failure_on_one_of_two_routers_is_told(desk: Desk) -> None:
    """And listed: who waits for the load must not wait for ever."""
    desk.stage.models["alpha"].exit_code = 1
    async with desk.open(desk.stage.router("main"), desk.stage.router("other")) as management:
        with management.events(anything) as stream:
            management.load("alpha", anything)
            assert (await heard(stream))[-1]["data"] == {"status": "unloaded", "exit_code": 1}
        assert (await desk.listed())["alpha"]["status"]["failed"] is True


async def test_the_end_of_a_router_is_told_of_its_models(desk: Desk) -> None:
    """Though another one lists them."""
    async with desk.open(desk.stage.router("main"), desk.stage.router("other")) as management:
        await desk.stage.fleet.load(desk.stage["main"], "alpha")
        desk.stage.hosts["main"].starts.append(FakeStart(ready_at=math.inf))
        with management.events(anything) as stream:
            desk.stage.hosts["main"].process.end(KILLED)
            await anyio.sleep(1)
            told = events_in(await anext(stream))
            assert told[0]["data"] == {"status": "unloaded", "exit_code": 0}


async def test_a_model_that_wakes_is_no_new_load(desk: Desk) -> None:
    """It has no `model_status`, as with llama-server: that stands for a new process."""
    async with desk.open() as management:
        await desk.stage.fleet.load(desk.stage["main"], "alpha")
        model = {"router": "main", "model": "alpha"}
        with management.events(anything) as stream:
            desk.stage.bus.publish(ModelSleeping(**model))
            desk.stage.bus.publish(ModelLoading(**model, is_requested=False))
            desk.stage.bus.publish(ModelProgress(**model, stage="mmproj_model", progress=0.5))
            desk.stage.bus.publish(ModelLoaded(**model, load_s=1.0))
            desk.stage.bus.publish(ModelLoading(**model, is_requested=False))
            told = events_in(await anext(stream))
        words = [(event["event"], event["data"]["status"]) for event in told]
        loading, loaded = ("status_change", "loading"), ("status_change", "loaded")
        assert words == [("status_change", "sleeping"), loading, loaded, ("model_status", "loading")]
        progress = {"stages": ["text_model", "mmproj_model"], "current": "mmproj_model", "value": 0.5}
        assert told[1]["data"]["progress"] == progress


async def test_what_a_loaded_model_says_of_itself_goes_before_its_header(desk: Desk) -> None:
    """Also in words of a future build; when it has left, the header counts again."""
    async with desk.open() as management:
        await desk.stage.fleet.load(desk.stage["main"], "alpha")
        modalities = {"input_modalities": ["text", "video"], "output_modalities": ["text"]}
        info = {"architecture": modalities, "meta": {"n_ctx": 8, "new": 1}}
        for listener in desk.stage.hosts["main"].process.listeners:
            listener.send_nowait(StatusEvent(model="alpha", state=ModelState.LOADED, n_ctx=8, info=info))
        await desk.stage.until(lambda: desk.stage["main"].table.get("alpha").info)
        item = (await desk.listed())["alpha"]
        assert (item["architecture"], item["meta"]) == (modalities, {"n_ctx": 8, "new": 1})
        management.unload("alpha", anything)
        await desk.until_status("alpha", "unloaded")
        assert (await desk.listed())["alpha"]["architecture"]["input_modalities"] == ["text"]


async def test_many_models_that_come_at_once_are_one_event(desk: Desk) -> None:
    """Which bears no name: the list is to be read again."""
    async with desk.open() as management:
        with management.events(anything) as stream:
            for number in range(KEPT // 2):
                desk.stage.bus.publish(ModelAdded(router="main", model=str(number), path="/"))
            assert await heard(stream) == [{"model": "*", "event": "models_reload"}]


async def test_a_reader_that_does_not_keep_up_is_cut_off(desk: Desk) -> None:
    """And nobody else."""
    async with desk.open() as management:
        with management.events(anything) as slow, management.events(anything) as quick:
            for number in range(KEPT + 1):
                if number == KEPT:
                    assert len(events_in(await anext(quick))) == KEPT
                event = ModelProgress(router="main", model="alpha", stage="text_model", progress=number)
                desk.stage.bus.publish(event)
            assert [len(events_in(part)) async for part in slow] == [KEPT]
            assert len(events_in(await anext(quick))) == 1


async def test_streams_of_events_end_with_the_daemon(desk: Desk) -> None:
    """Those that are open, and those that come later."""
    async with desk.open() as management:
        with management.events(anything) as stream:
            management.close()
            assert [part async for part in stream] == []
        with management.events(anything) as late:
            assert [part async for part in late] == []


async def test_a_reload_has_the_folders_looked_at(desk: Desk) -> None:
    """What is new in them is listed in the very answer; many who ask at once share the work."""
    async with desk.open() as management:
        watch, process = desk.stage.watches[0], desk.stage.hosts["main"].process
        file = ModelFile("/models/gamma.gguf", FileId(1, 9, 1000, 1))
        watch.entries["gamma"] = Entry(name="gamma", state=EntryState.READY, files=(file,))
        looks, reloads = watch.looks, process.reloads
        names: list[list[str]] = []

        async def ask() -> None:
            _, document = read(await management.models(anything, reload=True))
            names.append([item["id"] for item in document["data"]])

        async with anyio.create_task_group() as clients:
            for _ in range(20):
                clients.start_soon(ask)
        assert names == [["alpha", "beta", "gamma"]] * 20
        assert (watch.looks - looks, process.reloads - reloads) == (1, 1)


async def test_a_reload_whose_client_leaves_is_made_by_the_next(desk: Desk) -> None:
    """Nobody is given the outcome of a look that was broken off, or of one before that."""
    async with desk.open() as management:
        watch = desk.stage.watches[0]
        watch.is_hanging = True
        statuses: dict[str, int] = {}

        async def ask(name: str, *, leaves_after_s: float = 60.0) -> None:
            with anyio.move_on_after(leaves_after_s):
                statuses[name] = (await management.models(anything, reload=True)).status

        async with anyio.create_task_group() as clients:
            clients.start_soon(ask, "first")
            await anyio.sleep(1)
            clients.start_soon(lambda: ask("leaves", leaves_after_s=LOOK_S + 1))
            await anyio.sleep(1)
            clients.start_soon(ask, "next")
            await anyio.sleep(LOOK_S - 1)
            assert statuses == {"first": 500}
            await anyio.sleep(1.5)
            watch.is_hanging = False
        assert statuses == {"first": 500, "next": 200}


async def test_a_reload_that_fails_says_why(desk: Desk) -> None:
    """As llama-server does: 500 with the reason."""
    async with desk.open() as management:
        desk.stage.watches[0].is_hanging = True
        status, document = read(await management.models(anything, reload=True))
        assert (status, document["error"]["code"], document["error"]["type"]) == (500, 500, "server_error")
        assert "was not looked at within 10 s" in document["error"]["message"]


async def test_the_fleet_says_that_it_is_a_router(desk: Desk) -> None:
    """In the words of a router that has spoken, which the web UI needs, but for what is ours to say."""
    async with desk.open(desk.stage.router("main", models_max=2), desk.stage.router("other", models_max=3)) as it:
        status, props = read(it.props())
        assert status == 200
        assert (props["role"], props["models_autoload"], props["max_instances"]) == ("router", True, 5)
        assert props["default_generation_settings"] == {"params": None, "n_ctx": 0}
        said = {"build_info": "b1-abc", "models_autoload": False, "max_instances": 0, "ui_settings": {"theme": "dark"}}
        desk.stage["main"].props = Props(is_router=True, build="b1-abc", document=said)
        _, props = read(it.props())
        assert (props["build_info"], props["ui_settings"]) == ("b1-abc", {"theme": "dark"})
        assert (props["models_autoload"], props["max_instances"]) == (True, 5)


async def test_a_download_that_makes_no_sense_is_refused(desk: Desk) -> None:
    """In llama-server's words; nothing is asked of the Hub."""
    bad = "error: invalid HF repo format, expected <user>/<model>[:quant]\n"
    async with desk.open() as it:
        assert read(it.download("")) == error(400, "model must be a non-empty string", "invalid_request_error")
        assert read(it.download("nobody")) == error(400, bad, "invalid_request_error")
        assert read(it.download("a/../b")) == error(400, bad, "invalid_request_error")


async def test_a_download_that_cannot_begin_is_told_as_failed(desk: Desk) -> None:
    """It was answered by then; until it has failed it is not begun twice."""
    async with desk.open() as it:
        with it.events(anything) as stream:
            assert read(it.download("user/repo:Q4_0")) == (200, {"success": True})
            exists = error(400, "model 'user/repo:Q4_0' already exists", "invalid_request_error")
            assert read(it.download("user/repo:Q4_0")) == exists
            told = [(each["model"], each["event"]) for each in await heard(stream)]
        assert told == [("user/repo:Q4_0", "model_status"), ("user/repo:Q4_0", "download_failed")]
        assert "user/repo:Q4_0" not in await desk.statuses()


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"model":"alpha"}', "alpha"),
        (b'{"model":"alpha","model":"beta"}', "beta"),
        (b'\xef\xbb\xbf{"model":"alpha"}', "alpha"),
        (b'{"model":5}', ""),
        (b'{"model":null}', ""),
        (b"{}", ""),
        (b"[1]", ""),
        (b'"alpha"', ""),
        (b"", None),
        (b"{", None),
        (b'{"model":"alpha"} x', None),
        (b'{"model":"alpha","x":NaN}', None),
        (b'{"model":"alpha","x":1e999}', None),
        (b'{"model":"\\ud800"}', None),
        (b'{"model":"\xff"}', None),
        (b"[" * 100_000, None),
    ],
)
def test_a_body_names_a_model_as_llama_server_reads_it(body: bytes, name: str | None) -> None:
    """The last of several; nothing if it is no string; and what is no JSON is left to llama-server."""
    assert named_in(body) == name


async def test_a_model_that_has_changed_is_described_anew(desk: Desk) -> None:
    """What is known of a file is kept only as long as it is the same."""
    async with desk.open():
        assert (await desk.listed())["alpha"]["architecture"]["input_modalities"] == ["text"]
        old = desk.stage.watches[0].entries["alpha"]
        file = ModelFile(old.path, FileId(1, 77, 1000, 2))
        projector = ModelFile("/models/mmproj.gguf", FileId(1, 78, 1000, 2))
        entry = Entry(
            name="alpha", state=EntryState.READY, files=(file,), projector=projector, senses=("image", "audio")
        )
        desk.stage.watches[0].put(entry)
        await anyio.sleep(60)
        assert (await desk.listed())["alpha"]["architecture"]["input_modalities"] == ["text", "image", "audio"]
