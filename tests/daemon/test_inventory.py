"""Every model that is known, and everything about one: fake routers over fake folders, on virtual time."""

from __future__ import annotations

import gc
import json
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Self

import anyio
import pytest
from prometheus_client import generate_latest

from daemon.stage import Asked, Stage, entry
from llamavisor.api import RouterApi
from llamavisor.catalog import Entry, EntryState
from llamavisor.catalog.disk import Disk
from llamavisor.errors import ModelNotFoundError
from llamavisor.events import FolderLooked, ModelAdded
from llamavisor.gguf import Header, Kind
from llamavisor.rules import ModelRule, ModelSettings
from llamavisor.watch import Looked, ModeChanged, WorkerDied
from llamavisord.cli.models import _ALL_NAMES
from llamavisord.control import _Api
from llamavisord.details import describe
from llamavisord.exposition import Exposition
from llamavisord.inventory import Inventory, folders_view

pytestmark = pytest.mark.anyio

_SAID: dict[str, Any] = {
    "kind": Kind.EMBEDDING,
    "architecture": "bert",
    "quantization": "Q8_0",
    "context_length": 512,
    "type_mix": (),
    "head_count": (1, 2),
    "chat_template": "{{ x }}",
    "rope_freq_base": float("inf"),
}
HEADER = Header(**{field.name: _SAID.get(field.name) for field in fields(Header)})


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """An empty stage."""
    return Stage(tmp_path)


@pytest.mark.usefixtures("virtual_time")
async def test_everything_that_is_known_is_listed_once(stage: Stage) -> None:
    """Models of routers with what the files say, and those that no router lists with the reason."""
    stage.put(
        entry("alpha", header=HEADER, parameter_count=7, aliases=("nick",), notes=("an odd name",)),
        entry("half", EntryState.SETTLING, reason="it is being written"),
        entry("junk", EntryState.INVALID, reason="not a GGUF file"),
        entry("part", EntryState.INCOMPLETE, reason="part 2 of 3 is missing"),
        entry("shy"),
    )
    stage.withholds["main"] = {"shy": "[model.shy]: mmproj /x is not there"}
    async with stage.running(stage.config(("main", "a"))):
        await stage.fleet["main"].load("alpha")
        items = {item["name"]: item for item in await stage.items()}
    assert [(name, item["router"], item["state"], item["file_state"]) for name, item in items.items()] == [
        ("alpha", "main", "loaded", "ready"),
        ("half", None, "settling", "settling"),
        ("junk", None, "invalid", "invalid"),
        ("part", None, "incomplete", "incomplete"),
        ("shy", None, "withheld", "ready"),
    ]
    assert [item["problem"] for item in items.values()] == [
        *(None, "it is being written", "not a GGUF file", "part 2 of 3 is missing"),
        "[model.shy]: mmproj /x is not there",
    ]
    alpha = items["alpha"]
    assert (alpha["kind"], alpha["architecture"], alpha["quantization"]) == ("embedding", "bert", "Q8_0")
    assert (alpha["size_bytes"], alpha["parameter_count"], alpha["n_ctx_train"]) == (1000, 7, 512)
    assert alpha["notes"] == ["an odd name"]
    assert alpha["used_unix"] == pytest.approx(time.time(), abs=60)
    assert all(item.keys() == alpha.keys() for item in items.values())


@pytest.mark.usefixtures("virtual_time")
async def test_two_routers_of_one_folder_each_list_a_model(stage: Stage) -> None:
    """What one router is not told and another serves is a note, no model of its own."""
    stage.put(entry("alpha"), entry("beta"))
    stage.withholds["b"] = {"beta": "no"}
    own = ModelRule.of("alpha", ModelSettings.model_validate({"router": ["b"], "tags": ["x"]}))
    async with stage.running(stage.config(("a", "a"), ("b", "a"), rules=(own,))):
        items = await stage.items()
    assert [(item["name"], item["router"]) for item in items] == [("alpha", "b"), ("beta", "a")]
    assert items[0]["tags"] == ["x"]
    assert items[1]["notes"] == ["withheld from router b: no"]


@pytest.mark.usefixtures("virtual_time")
@pytest.mark.parametrize(
    ("changes", "policy", "stale", "problem"),
    [
        ({"inode": 99}, "reload", "replaced", "its file was replaced; it is loaded again as soon as it is idle"),
        ({"content": 2}, "unload", "overwritten", "; it is unloaded as soon as it is idle"),
        ({"content": 2}, "keep", "overwritten", "; it serves until it is unloaded"),
        (None, "reload", "gone", "its file is gone; it serves until it is unloaded"),
    ],
)
async def test_a_model_that_is_stale_says_what_will_be_done(
    stage: Stage, changes: dict[str, int] | None, policy: Any, stale: str, problem: str
) -> None:
    """The change and the remedy, as long as it is in memory; and the metric goes with it."""
    before = entry("alpha")
    watch = stage.put(before)
    async with stage.running(stage.config(("main", "a"), on_overwrite=policy)) as daemon:
        exposition = Exposition(daemon)
        await stage.fleet["main"].load("alpha")
        stage.hosts["main"].process.busy.add("alpha")
        await anyio.sleep(2)
        assert b"llamavisor_model_stale{" not in generate_latest(exposition.registry)
        if changes is None:
            watch.remove("alpha")
        else:
            (file,) = before.files
            id_ = replace(file.id, inode=changes.get("inode", file.id.inode), mtime_ns=changes.get("content", 1))
            watch.put(replace(before, files=(replace(file, id=id_),)))
        await anyio.sleep(2)
        (item,) = await stage.items(on_overwrite=policy)
        shown = generate_latest(exposition.registry).decode()
    assert (item["state"], item["stale"]) == ("loaded", stale)
    assert item["file_state"] == ("gone" if changes is None else "ready")
    assert item["problem"].endswith(problem)
    assert 'llamavisor_model_stale{model="alpha",router="main"} 1.0' in shown
    assert 'llamavisor_model_requests_in_flight{model="alpha",router="main"} 1.0' in shown


@pytest.mark.usefixtures("virtual_time")
async def test_what_is_loaded_is_not_described_by_what_took_its_place(stage: Stage) -> None:
    """Its size stays that of what is in memory; nothing is said of it that only its file knew; the reason is told."""
    before = entry("alpha", header=HEADER, parameter_count=7)
    watch = stage.put(before)
    async with stage.running(stage.config(("main", "a"), on_overwrite="keep")):
        await stage.fleet["main"].load("alpha")
        (file,) = before.files
        cut = replace(file, id=replace(file.id, size=10, mtime_ns=9))
        reason = "cut off: 10 bytes instead of 1000"
        watch.put(Entry(name="alpha", state=EntryState.INVALID, reason=reason, files=(cut,), parameter_count=3))
        await anyio.sleep(2)
        (item,) = await stage.items(on_overwrite="keep")
    assert (item["size_bytes"], item["quantization"], item["parameter_count"]) == (1000, None, None)
    assert item["n_ctx_train"] == 512
    assert item["problem"].endswith(f"{reason}; it serves until it is unloaded")


@pytest.mark.usefixtures("virtual_time")
async def test_a_list_of_models_tells_of_folders(stage: Stage) -> None:
    """As status does."""
    watch = stage.put(entry("alpha"))
    async with stage.running(stage.config(("main", "a"))) as daemon:
        watch.look(problem="is not there")
        told = json.loads((await _Api(daemon).models(Asked())).body)
    assert [(folder["path"], folder["stale"]) for folder in told["folders"]] == [(str(watch.root), "is not there")]
    assert [model["name"] for model in told["models"]] == ["alpha"]


@pytest.mark.usefixtures("virtual_time")
async def test_a_model_is_described_by_name_and_by_alias(stage: Stage) -> None:
    """With its header whole, the tables in order, and what the router is told; what nobody can answer is null."""
    rule = ModelRule.of("al*", ModelSettings.model_validate({"threads": 3, "tags": ["x"]}))
    stage.put(entry("alpha", header=HEADER, aliases=("nick",)), entry("beta", EntryState.INVALID, reason="junk"))
    async with stage.running(stage.config(("main", "a"), rules=(rule,))):
        told = await describe(Inventory(stage.fleet), "nick")
        json.dumps(told, allow_nan=False)
        assert told["model"]["name"] == "alpha"
        assert [item["router"] for item in told["model"]["routers"]] == ["main"]
        assert told["files"] == [{"path": "/models/alpha.gguf", "size_bytes": 1000, "mtime_unix": 1e-9}]
        assert told["header"]["kind"] == "embedding"
        assert told["header"]["chat_template"] == "{{ x }}"
        assert told["header"]["head_count"] == [1, 2]
        assert told["header"].keys() == {field.name for field in fields(Header)}
        assert told["layers"] == {"main": ["automatic (an embedding model)", '[model."al*"]']}
        assert told["effective"]["main"]["model"] == "/models/alpha.gguf"
        assert told["origins"]["main"]["metrics"] == "always"
        assert told["command"] == {"main": None}
        broken = await describe(Inventory(stage.fleet), "beta")
        assert (broken["model"]["state"], broken["model"]["problem"]) == ("invalid", "junk")
        assert (broken["model"]["routers"], broken["command"], broken["header"]) == ([], {}, None)


class _Teller:
    """A router that tells a command line with a secret in it, or is silent."""

    is_silent = False

    def __init__(self, url: str, *, api_key: str | None) -> None:
        self.url = url

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def command_line(self, name: str) -> tuple[str, ...]:
        """After ever, if it is silent."""
        if self.is_silent:
            await anyio.sleep_forever()
        return ("/bin/llama-server", "--alias", name, "--hf-token", "hush")


@pytest.mark.usefixtures("virtual_time")
@pytest.mark.parametrize("is_silent", [False, True])
async def test_the_command_line_holds_no_secret(stage: Stage, monkeypatch: pytest.MonkeyPatch, is_silent: bool) -> None:
    """Each router tells its own; one that does not answer keeps nobody waiting for long."""
    monkeypatch.setattr("llamavisord.details.RouterApi", _Teller)
    monkeypatch.setattr(_Teller, "is_silent", is_silent)
    stage.put(entry("alpha"))
    async with stage.running(stage.config(("a", "a"), ("b", "a"))):
        began = anyio.current_time()
        told = await describe(Inventory(stage.fleet), "alpha")
        assert anyio.current_time() - began < 6
        command = None if is_silent else ["/bin/llama-server", "--alias", "alpha", "--hf-token", "(set)"]
        assert told["command"] == {"a": command, "b": command}
        assert (await describe(Inventory(stage.fleet), "alpha", router="b"))["command"] == {"b": command}


@pytest.mark.usefixtures("virtual_time")
@pytest.mark.parametrize(
    ("name", "hint"),
    [("lpha", "did you mean alpha?"), ("alhpa", "did you mean alpha?"), ("zzz", "see `llamavisor models`")],
)
async def test_a_name_that_nobody_knows_has_near_ones(stage: Stage, name: str, hint: str) -> None:
    """Part of a name, or one with a slip, is enough."""
    stage.put(entry("alpha"), entry("beta"))
    async with stage.running(stage.config(("main", "a"))):
        with pytest.raises(ModelNotFoundError, match=f"no model '{name}'") as caught:
            await describe(Inventory(stage.fleet), name)
    assert caught.value.hint == hint


def test_every_field_of_a_header_has_its_place() -> None:
    """What a new reader finds out is shown where it belongs, not at the end."""
    assert {field.name for field in fields(Header)} == _ALL_NAMES


# --- what the daemon says of its folders ------------------------------------------------------------------------------


@pytest.mark.usefixtures("virtual_time")
async def test_folders_that_are_not_well_are_warnings(stage: Stage) -> None:
    """Stale with the reason, polling with the reason, and what to do about an empty one; nothing when all is well."""
    watch = stage.put(entry("alpha"))
    async with stage.running(stage.config(("main", "a"))) as daemon:
        assert daemon.warnings() == []
        watch.push(ModeChanged("polling", "too many watches", 1))
        assert daemon.warnings() == [f"folder {watch.root}: watched by polling: too many watches"]
        watch.look(problem="is not there")
        assert daemon.warnings() == [f"folder {watch.root}: is not there; what was known of it stays"]
        (view,) = folders_view(stage.fleet)
        assert view == {
            "path": str(watch.root),
            "stale": "is not there",
            "mode": "polling",
            "mode_reason": "too many watches",
            "models": {"ready": 1},
        }


@pytest.mark.usefixtures("virtual_time")
async def test_a_router_without_models_says_what_to_do(stage: Stage) -> None:
    """Put files there; or, when there are files, look what is wrong with them. Nothing needs a reload."""
    watch = stage.put()
    async with stage.running(stage.config(("main", "a"))) as daemon:
        assert daemon.warnings() == [f"no models: put GGUF files into {watch.root}, or `llamavisor pull USER/REPO`"]
        stage.put(entry("junk", EntryState.INVALID, reason="no"))
        assert daemon.warnings() == [f"no model in {watch.root} can be served: see `llamavisor models`"]
        stage.put(entry("alpha"))
        await stage.until(lambda: len(stage.fleet["main"].table))
        assert daemon.warnings() == []


@pytest.mark.usefixtures("virtual_time")
async def test_tables_that_match_no_model_are_warnings(stage: Stage) -> None:
    """As long as it is known what is in the folder."""
    watch = stage.put(entry("alpha"), entry("junk", EntryState.INVALID, reason="no"))
    rules = tuple(
        ModelRule.of(pattern, ModelSettings.model_validate({"threads": 3}))
        for pattern in ("alpha", "al*", "junk", "alhpa", "qwen*")
    )
    async with stage.running(stage.config(("main", "a"), rules=rules)) as daemon:
        assert daemon.warnings() == [
            f'[model."alhpa"] matches no model in {watch.root}, did you mean alpha?',
            f'[model."qwen*"] matches no model in {watch.root}',
        ]
        watch.look(problem="is not there")
        assert not any("matches" in warning for warning in daemon.warnings())


# --- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("virtual_time")
async def test_metrics_tell_of_folders(stage: Stage) -> None:
    """States of models, how and how long is looked, and failures; and nothing of a folder that is not watched."""
    watch = stage.put(entry("alpha"), entry("junk", EntryState.INVALID, reason="no"))
    async with stage.running(stage.config(("main", "a"))) as daemon:
        exposition = Exposition(daemon)
        watch.push(ModeChanged("inotify", "", 0), WorkerDied("killed", 1.0))
        stage.bus.publish(FolderLooked(folder=str(watch.root), duration_s=0.02, file_count=2, headers_read=0))
        stage.bus.publish(ModelAdded(router="main", model="alpha", path="/x", wait_s=0.3))
        stage.bus.publish(ModelAdded(router="main", model="beta", path="/x", wait_s=None))
        shown = generate_latest(exposition.registry).decode()
        for line in (
            f'llamavisor_catalog_models{{folder="{watch.root}",state="ready"}} 1.0',
            f'llamavisor_catalog_models{{folder="{watch.root}",state="invalid"}} 1.0',
            f'llamavisor_catalog_models{{folder="{watch.root}",state="gone"}} 0.0',
            f'llamavisor_catalog_stale{{folder="{watch.root}"}} 0.0',
            f'llamavisor_watcher_mode{{folder="{watch.root}",mode="inotify"}} 1.0',
            f'llamavisor_watcher_mode{{folder="{watch.root}",mode="polling"}} 0.0',
            f'llamavisor_watcher_errors_total{{folder="{watch.root}"}} 1.0',
            f'llamavisor_catalog_scan_duration_seconds_count{{folder="{watch.root}"}} 1.0',
            'llamavisor_model_servable_seconds_bucket{le="0.5",router="main"} 1.0',
            'llamavisor_model_servable_seconds_count{router="main"} 1.0',
        ):
            assert line in shown
        assert "disk_free_bytes{" not in shown
        watch.push(Looked(disk=Disk(1000, 250)))
        shown = generate_latest(exposition.registry).decode()
        assert f'llamavisor_catalog_disk_total_bytes{{folder="{watch.root}"}} 1000.0' in shown
        assert f'llamavisor_catalog_disk_free_bytes{{folder="{watch.root}"}} 250.0' in shown
        watch.push(Looked(problem="is not there"))
        assert "disk_free_bytes{" not in generate_latest(exposition.registry).decode()
        stage.put(entry("alpha"), folder="b")
        await stage.fleet.apply(stage.config(("main", "b")).fleet_settings())
        exposition._forget_vanished()
        shown = generate_latest(exposition.registry).decode()
        assert f'folder="{watch.root}"' not in shown
        assert f'folder="{stage.folder / "b"}"' in shown


@pytest.mark.usefixtures("virtual_time")
async def test_models_that_were_never_loaded_have_no_series(stage: Stage) -> None:
    """One that is loaded has them, and keeps them when it is unloaded."""
    stage.put(entry("alpha"), entry("beta"))
    async with stage.running(stage.config(("main", "a"))) as daemon:
        exposition = Exposition(daemon)
        await stage.fleet["main"].load("alpha")
        await stage.fleet["main"].unload("alpha")
        shown = generate_latest(exposition.registry).decode()
    assert 'model="beta"' not in shown
    assert 'llamavisor_model_state{model="alpha",router="main",state="unloaded"} 1.0' in shown
    assert 'llamavisor_model_last_use_timestamp_seconds{model="alpha",router="main"}' in shown


# --- many -------------------------------------------------------------------------------------------------------------


async def test_ten_thousand_models_let_others_have_their_turn(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Telling of them keeps nobody waiting for longer than a blink, and status leaves out those that do nothing."""
    stage.put(*(entry(f"model-{number:05}", header=HEADER) for number in range(10_000)))
    stage.put(entry("junk", EntryState.INVALID))
    async with stage.running(stage.config(("main", "a"))) as daemon:
        monkeypatch.setattr(daemon, "view", dict)
        api = _Api(daemon)
        assert await stage.fleet["main"].load("model-00042")
        longest = 0.0

        async def feel() -> None:
            nonlocal longest
            while True:
                before = time.thread_time()
                await anyio.sleep(0)
                longest = max(longest, time.thread_time() - before)

        async def ask(handler: Any, asked: Asked) -> dict[str, Any]:
            nonlocal longest
            await anyio.sleep(0)
            gc.disable()  # it walks all that other tests have left in this process
            try:
                longest, before = 0.0, time.thread_time()
                body = (await handler(asked)).body
                took = time.thread_time() - before
                await anyio.sleep(0)
            finally:
                gc.enable()
            print(f"{took * 1000:.0f} ms, {longest * 1000:.0f} ms at a stretch, {len(body)} bytes")
            assert longest < 0.15  # of CPU: 15 ms
            return dict(json.loads(body))

        async with anyio.create_task_group() as group:
            group.start_soon(feel)
            listed = (await ask(api.models, Asked()))["models"]
            assert len(listed) == 10_001
            status = await ask(api.status, Asked())
            assert [model["name"] for model in status["models"]] == ["model-00042"]
            assert status["models_left_out"] == 10_000
            assert status["routers"][0]["model_count"] == 10_000
            assert status["routers"][0]["loaded_count"] == 1
            assert status["folders"][0]["models"] == {"ready": 10_000, "invalid": 1}
            one = (await ask(api.models, Asked(name="model-00007")))["models"]
            assert [(model["name"], model["router"]) for model in one] == [("model-00007", "main")]
            assert (await ask(api.model, Asked("model-00007")))["model"]["name"] == "model-00007"
            group.cancel_scope.cancel()


async def test_a_command_line_is_found_in_a_long_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in one that is read piece by piece; what nobody lists has none."""
    data = [{"id": f"m{number}", "status": {"value": "unloaded", "args": ["x" * 99, "y"]}} for number in range(4000)]
    data[3210]["status"] = {"value": "loaded", "args": ["llama-server", "--alias", "m3210"]}

    async def call(*_: object, **__: object) -> bytes:
        return json.dumps({"data": data}).encode("ascii")

    async with RouterApi("http://127.0.0.1:9") as api:
        monkeypatch.setattr(api, "_call", call)
        assert await api.command_line("m3210") == ("llama-server", "--alias", "m3210")
        assert await api.command_line("m4000") is None
        assert len(await api.models()) == 4000
