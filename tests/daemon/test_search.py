"""Commands for models that are not listed: files that have only just come are waited for, all else is told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import pytest

from daemon.stage import Asked, Stage, entry
from llamavisor.catalog import EntryState
from llamavisor.errors import LlamavisorError, ModelNotFoundError, RouterNotFoundError
from llamavisor.rules import ModelRule, ModelSettings
from llamavisor.states import ModelState
from llamavisord.control import WaitTimeoutError, _Api
from llamavisord.daemon import Daemon

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("virtual_time")]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """An empty stage."""
    return Stage(tmp_path)


def rule(pattern: str, **settings: Any) -> ModelRule:
    """A table of a configuration."""
    return ModelRule.of(pattern, ModelSettings.model_validate(settings))


async def load(daemon: Daemon, name: str, **query: str) -> dict[str, Any]:
    """What the control API answers to a load."""
    return dict(json.loads((await _Api(daemon).load(Asked(name, **query))).body))  # type: ignore[arg-type]


async def test_a_file_that_nobody_has_seen_yet_is_loaded(stage: Stage) -> None:
    """The folder is looked at, and the model is loaded once its router was told of it."""
    watch = stage.put(entry("alpha"))
    async with stage.running(stage.config(("main", "a"))) as daemon:
        watch.entries["beta"] = entry("beta")
        answer = await load(daemon, "beta", wait="60")
    assert (answer["model"]["name"], answer["model"]["state"], answer["changed"]) == ("beta", "loaded", True)


@pytest.mark.parametrize("word", ["beta", "folder", "first"])
async def test_a_file_that_is_being_written_is_waited_for(stage: Stage, word: str) -> None:
    """Called by its name or by an alias of its folder or of its table; it is loaded when it is whole."""
    watch = stage.put(entry("alpha"))
    rules = (rule("beta", aliases=["first"]),)
    async with stage.running(stage.config(("main", "a"), rules=rules)) as daemon, anyio.create_task_group() as group:
        watch.put(entry("beta", EntryState.SETTLING, reason="it is being written", aliases=("folder",)))
        answers: list[dict[str, Any]] = []

        async def ask() -> None:
            answers.append(await load(daemon, word, wait="true"))

        group.start_soon(ask)
        await anyio.sleep(5)
        assert answers == []
        watch.put(entry("beta", content=2, aliases=("folder",)))
        await stage.until(lambda: answers)
        assert answers[0]["model"]["state"] == "loaded"


async def test_a_model_that_is_written_anew_is_loaded_when_it_is_whole(stage: Stage) -> None:
    """Listed as it still may be: what it would read is half a file."""
    watch = stage.put(entry("alpha"))
    async with stage.running(stage.config(("main", "a"))) as daemon, anyio.create_task_group() as group:
        router = stage.fleet["main"]
        watch.put(entry("alpha", EntryState.SETTLING, content=2, reason="it is being written"))
        assert router.table.get("alpha") is not None
        answers: list[dict[str, Any]] = []

        async def ask() -> None:
            answers.append(await load(daemon, "alpha", wait="true"))

        group.start_soon(ask)
        await anyio.sleep(3)
        assert answers == []
        watch.put(entry("alpha", content=3))
        await stage.until(lambda: answers)
        assert answers[0]["model"]["size_bytes"] == 1000


async def test_what_turns_out_to_be_junk_ends_the_waiting(stage: Stage) -> None:
    """With the reason."""
    watch = stage.put(entry("alpha"))
    async with stage.running(stage.config(("main", "a"))) as daemon, anyio.create_task_group() as group:
        watch.put(entry("beta", EntryState.SETTLING, reason="it is being written"))

        async def go_bad() -> None:
            await anyio.sleep(5)
            watch.put(entry("beta", EntryState.INVALID, reason="not a GGUF file"))

        group.start_soon(go_bad)
        began = anyio.current_time()
        with pytest.raises(ModelNotFoundError, match="model beta is invalid: not a GGUF file") as caught:
            await load(daemon, "beta", wait="60")
        assert anyio.current_time() - began < 7
    assert caught.value.hint == "/models/beta.gguf"


async def test_nobody_waits_for_longer_than_they_said(stage: Stage) -> None:
    """What is awaited is told; without `wait` it is told at once."""
    watch = stage.put(entry("alpha"))
    async with stage.running(stage.config(("main", "a"))) as daemon:
        watch.put(entry("beta", EntryState.SETTLING, reason="it is being written"))
        with pytest.raises(WaitTimeoutError, match="beta is settling: it is being written; not loaded within 3 s"):
            await load(daemon, "beta", wait="3")
        began = anyio.current_time()
        with pytest.raises(ModelNotFoundError, match="model beta is settling: it is being written"):
            await load(daemon, "beta")
        assert anyio.current_time() == began


async def test_a_folder_that_hangs_keeps_nobody_for_long(stage: Stage) -> None:
    """What is not known then is not there."""
    watch = stage.put(entry("alpha"))
    async with stage.running(stage.config(("main", "a"))) as daemon:
        watch.is_hanging = True
        began = anyio.current_time()
        with pytest.raises(ModelNotFoundError, match="no model 'beta'"):
            await load(daemon, "beta", wait="60")
        assert anyio.current_time() - began < 2


@pytest.mark.parametrize(
    ("name", "query", "told", "hint"),
    [
        ("only-b", {"router": "a"}, 'model only-b: router = ["b"] in [model."only-b"] keeps it from router a', ""),
        ("nobody", {}, 'model nobody: router = [] in [model."nobody"] keeps it from every router', ""),
        ("nobody", {"router": "a"}, 'model nobody: router = [] in [model."nobody"] keeps it from router a', ""),
        ("shy", {"router": "a"}, "model shy is withheld from router a: no projector", ""),
        ("junk", {"router": "a"}, "model junk is invalid: no GGUF", "/models/junk.gguf"),
        ("part", {}, "model part is incomplete: part 2 of 3 is missing", "/models/part.gguf"),
        ("zzz", {"router": "a"}, "no model 'zzz' on router a", "see `llamavisor models`"),
        ("zzz", {}, "no model 'zzz'", "see `llamavisor models`"),
        ("far", {"router": "a"}, "no model 'far' on router a", "router c has it"),
    ],
)
@pytest.mark.parametrize("wait", [{}, {"wait": "true"}])
async def test_why_a_model_cannot_be_loaded(
    stage: Stage, name: str, query: dict[str, str], told: str, hint: str, wait: dict[str, str]
) -> None:
    """The tables, the router that does not take it, its file, or that there is no such thing; never after a wait."""
    stage.put(
        *(entry(each) for each in ("only-b", "nobody", "shy")),
        entry("junk", EntryState.INVALID, reason="no GGUF"),
        entry("part", EntryState.INCOMPLETE, reason="part 2 of 3 is missing"),
    )
    stage.put(entry("far"), folder="c")
    stage.withholds["a"] = {"shy": "no projector"}
    rules = (rule("only-b", router=["b"]), rule("nobody", router=[]))
    async with stage.running(stage.config(("a", "a"), ("b", "a"), ("c", "c"), rules=rules)) as daemon:
        began = anyio.current_time()
        with pytest.raises(ModelNotFoundError) as caught:
            await load(daemon, name, **query, **wait)
        assert anyio.current_time() - began < 1
    assert (str(caught.value), caught.value.hint) == (told, hint)


async def test_a_router_that_takes_it_is_asked(stage: Stage) -> None:
    """Whatever the others have against it; and an unload goes where it is loaded."""
    stage.put(entry("only-b"), entry("shy"))
    stage.withholds["a"] = {"shy": "no"}
    rules = (rule("only-b", router=["b"], aliases=["nick"]),)
    async with stage.running(stage.config(("a", "a"), ("b", "a"), rules=rules)) as daemon:
        for name in ("shy", "nick"):
            assert (await load(daemon, name, wait="true"))["model"]["router"] == "b"
        await _Api(daemon).unload(Asked("nick", wait="true"))  # type: ignore[arg-type]
        model = stage.fleet["b"].table.get("only-b")
        assert model is not None
        assert model.state is ModelState.UNLOADED


async def test_a_router_that_is_not_there(stage: Stage) -> None:
    """It is told as that, before anything is waited for; one that is down says so itself."""
    stage.put(entry("alpha"))
    async with stage.running(stage.config(("main", "a"))) as daemon:
        with pytest.raises(RouterNotFoundError):
            await load(daemon, "beta", router="other", wait="true")
        stage.fleet["main"].stop()
        await stage.until(lambda: not stage.fleet["main"].is_serving)
        with pytest.raises(LlamavisorError, match=r"router main is stop\w+"):
            await load(daemon, "beta", router="main", wait="true")
