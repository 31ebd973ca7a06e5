"""The fleet as it tells of its models, beside a bare router of the true llama-server that has the same ones."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.abc
import anyio.to_thread
import pytest

from fakes.bare_router import BareRouter
from gateway import Gateway
from ggufs import BOOL, STRING, U32, GgufFile, Tensor
from llamavisor.states import RouterState
from llamavisord.gateway.management import Management, named_in
from llamavisord.gateway.notices import Stream
from llamavisord.gateway.replies import Reply
from llamavisord.tiny_model import write_tiny_model

pytestmark = [pytest.mark.anyio, pytest.mark.real, pytest.mark.timeout(120)]

NAMES = ("alpha", "embeds", "sees")
PRESET = "[*]\nthreads = 1\nctx-size = 8192\n"
BODIES = ('{"model":"alpha"}', '{"model":"nope"}', "{}", '{"model":5}', "[1]", '{"model":"nope","model":"alpha"}')
WAIT_S = 30.0
MIB = 1024 * 1024


@dataclass(frozen=True)
class Told:
    """What a router tells in the course of one story: a load, a second one, an unload.

    Attributes:
        props: of GET /props.
        unloaded: of GET /models before.
        loaded: likewise while the first model is loaded.
        answers: status and body for each request to load or unload, in order.
        events: about the first model.
    """

    props: Mapping[str, object]
    unloaded: Mapping[str, dict[str, object]]
    loaded: Mapping[str, dict[str, object]]
    answers: Sequence[tuple[str, str, int, object]]
    events: Sequence[dict[str, object]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One that talks, one that embeds, one that sees; its projector is a header that nobody loads."""
    models = tmp_path / "models"
    (models / "sees").mkdir(parents=True)
    write_tiny_model(models / "alpha.gguf", ["I", "am", "alpha"])
    write_tiny_model(models / "embeds.gguf", ["I", "am", "embeds"], pooling=1)
    write_tiny_model(models / "sees" / "sees.gguf", ["I", "see"], n_ctx=2048)
    projector = GgufFile(
        values=[
            ("general.architecture", (STRING, "clip")),
            ("general.type", (STRING, "mmproj")),
            ("general.file_type", (U32, 0)),
            ("clip.has_vision_encoder", (BOOL, True)),
            ("clip.has_audio_encoder", (BOOL, False)),
            ("clip.projector_type", (STRING, "mlp")),
            ("clip.vision.projection_dim", (U32, 32)),
        ],
        tensors=[Tensor("v.patch_embd.weight", (32, 4), 0, 512)],
    )
    path = models / "sees" / "mmproj-sees.gguf"
    path.write_bytes(projector.encode())
    an_hour_ago = time.time() - 3600  # else its zeros are taken for a copy that is under way
    os.utime(path, (an_hour_ago, an_hour_ago))
    return models


async def test_the_fleet_tells_what_a_router_tells(folder: Path, tmp_path: Path, llama_server: Path) -> None:
    """Field by field, but for what is ours to keep, and with more for a model that is not loaded."""
    with BareRouter(llama_server, tmp_path / "bare", folder, preset=PRESET) as bare:
        theirs = await anyio.to_thread.run_sync(story_of_router, bare)
    gateway = Gateway(tmp_path / "fleet", folder, llama_server, memory=200 * MIB)
    async with gateway.running(*NAMES), anyio.create_task_group() as tasks:
        ours = await story_of_fleet(gateway, Management(gateway.fleet, gateway.bus, tasks))
        tasks.cancel_scope.cancel()

    assert {**ours.props, "max_instances": 4} == theirs.props
    assert ours.answers == theirs.answers
    assert list(ours.unloaded) == list(theirs.unloaded) == list(NAMES)
    for name in NAMES:
        mine, real = ours.unloaded[name], theirs.unloaded[name]
        meta = mine.pop("meta")
        assert meta["n_ctx_train"] == (2048 if name == "sees" else 4096)
        assert list(mine) == list(real)
        assert list(mine["status"]) == list(real["status"])
        assert shown(mine) == shown(real)
        assert mine["status"]["args"] == []
        assert mine["status"]["preset"] == ""
    assert ours.unloaded["sees"]["architecture"]["input_modalities"] == ["text", "image"]
    mine, real = ours.loaded["alpha"], theirs.loaded["alpha"]
    assert list(mine) == list(real)
    assert shown(mine) == shown(real)
    assert meta_of(ours, "alpha") == {**real["meta"], "n_ctx": 4096}
    assert [without_times(event) for event in ours.events] == [without_times(event) for event in theirs.events]


async def test_what_the_header_says_is_what_the_model_turns_out_to_be(
    folder: Path, tmp_path: Path, llama_server: Path
) -> None:
    """For a model that embeds, too; and its router's end changes nothing of it."""
    gateway = Gateway(tmp_path / "fleet", folder, llama_server, memory=200 * MIB)
    async with gateway.running(*NAMES), anyio.create_task_group() as tasks:
        management = Management(gateway.fleet, gateway.bus, tasks)
        for name in ("alpha", "embeds"):
            before = (await listed(management))[name]
            assert management.load(name, anything).status == 200
            after = await until(management, name, "loaded")
            assert {**before["meta"], "n_ctx": 4096} == after["meta"]
            assert gateway.router.table.get(name).info == {key: after[key] for key in ("architecture", "meta")}
            assert before["architecture"] == after["architecture"]
        gateway.router.stop()
        await gateway.router.wait_until(lambda: gateway.router.state is RouterState.STOPPED)
        assert shown((await listed(management))["embeds"]) == shown(before)
        tasks.cancel_scope.cancel()


def anything(_: str) -> bool:
    """A client that may use every model."""
    return True


def shown(item: Mapping[str, object]) -> dict[str, object]:
    """What must be the same: all but where a model comes from, what is kept to ourselves, and the time."""
    kept = {key: value for key, value in item.items() if key not in {"created", "source"}}
    hidden = ("args", "preset")
    return {**kept, "status": {key: value for key, value in item["status"].items() if key not in hidden}}


def without_times(event: dict[str, object]) -> dict[str, object]:
    """An event but for the time in it."""
    info = event.get("data", {}).get("info", {})
    info.pop("created", None)
    return event


def meta_of(told: Told, name: str) -> object:
    """What is said of a loaded model."""
    return told.loaded[name]["meta"]


def story_of_router(bare: BareRouter) -> Told:
    """Have a bare router tell it."""
    answers = []

    def post(path: str, body: str) -> None:
        answer = bare.call("POST", path, body)
        answers.append((path, body, answer.status, answer.json))

    with bare.events() as events:
        props, unloaded = bare.call("GET", "/props").json, bare.models()
        post("/models/load", BODIES[0])
        events.wait_for_status("alpha", "loaded")
        loaded = bare.models()
        for body in BODIES:
            post("/models/load", body)
        post("/models/unload", BODIES[0])
        events.wait_for_status("alpha", "unloaded")
        for body in BODIES:
            post("/models/unload", body)
        return Told(props, unloaded, loaded, answers, events.of("alpha"))


async def story_of_fleet(gateway: Gateway, management: Management) -> Told:
    """Have a fleet tell the same."""
    answers = []

    def post(path: str, body: str) -> None:
        move = management.load if path == "/models/load" else management.unload
        name = named_in(body.encode())
        assert name is not None
        reply = move(name, anything)
        answers.append((path, body, reply.status, json.loads(reply.body)))

    with management.events(anything) as stream:
        props, unloaded = json.loads(management.props().body), await listed(management)
        post("/models/load", BODIES[0])
        loaded = {"alpha": await until(management, "alpha", "loaded")}
        for body in BODIES:
            post("/models/load", body)
        post("/models/unload", BODIES[0])
        await until(management, "alpha", "unloaded")
        for body in BODIES:
            post("/models/unload", body)
        events = await heard(management, stream)
        return Told(props, unloaded, loaded, answers, [event for event in events if event["model"] == "alpha"])


async def listed(management: Management) -> dict[str, dict[str, object]]:
    """GET /models, by name."""
    reply: Reply = await management.models(anything)
    assert reply.status == 200
    return {item["id"]: item for item in json.loads(reply.body)["data"]}


async def until(management: Management, name: str, status: str) -> dict[str, object]:
    """Wait until a model is listed so."""
    with anyio.fail_after(WAIT_S):
        while (item := (await listed(management))[name])["status"]["value"] != status:
            await anyio.sleep(0.01)
    return item


async def heard(management: Management, stream: Stream) -> list[dict[str, object]]:
    """All events so far."""
    management.close()
    parts = b"".join([part async for part in stream])
    return [json.loads(part.removeprefix("data: ")) for part in parts.decode().split("\n\n") if part]
