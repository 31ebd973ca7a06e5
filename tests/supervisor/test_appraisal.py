"""What a model is expected to take: which files count, who is asked and how often, and what if nobody answers."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from fakes.waiting import PATIENCE_S
from ggufs import STRING, GgufFile, Tensor, small_model
from llamavisor import appraisal as appraisal_module
from llamavisor import gguf
from llamavisor.appraisal import DOUBTFUL_KEPT_S, KEPT_S, MAX_KNOWN, STUCK_MAX, Appraisal, Appraiser
from llamavisor.binary import Binary, Fingerprint
from llamavisor.budgets import Allowance
from llamavisor.catalog import FileId
from llamavisor.footprint import RAM, Device, FitParams, Source
from llamavisor.helptext import parse_help
from llamavisor.ledger import Footprints
from llamavisor.options import ModelOptions, OptionLayer
from llamavisor.sections import ModelSpec
from llamavisor.shelf import Offered

pytestmark = pytest.mark.anyio

MIB = 1024**2
GPU = Device("CUDA0", "0000:01:00.0")
TOOL = """#!/bin/sh
echo "$@" >> "$0.asked"
echo "CUDA is here"
[ -e "$0.silent" ] && exit 1
[ -e "$0.gpu" ] && echo "CUDA0 500 20 30"
echo "Host 100 20 30"
"""


class Stage:
    """A build with a tool that says what models take, and files of models."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tool = folder / "llama-fit-params"
        self.tool.write_text(TOOL)
        self.tool.chmod(0o755)
        path = folder / "llama-server"
        self.found = Binary(path, "fake", None, parse_help(""), Fingerprint(path, (("llama-server", 1, 0, 0),)))
        self.footprints = Footprints()
        self.now = 1000.0
        self.appraiser = Appraiser(FitParams(), self.footprints, lambda: self.now)
        self.model = self.write("model")
        self.entries: dict[str, str] = {"ctx-size": "8192", "cache-ram": "0"}

    @property
    def asked(self) -> list[str]:
        """How the tool was asked so far."""
        path = Path(f"{self.tool}.asked")
        return path.read_text().splitlines() if path.exists() else []

    def say(self, what: str) -> None:
        """Have the tool speak of a GPU, or not at all."""
        Path(f"{self.tool}.{what}").touch()

    def write(self, name: str, file: GgufFile | None = None) -> Path:
        """A model file, or any other."""
        path = self.folder / f"{name}.gguf"
        path.write_bytes((file or small_model()).encode())
        return path

    def offered(self, **changes: object) -> Offered:
        """The model as its router was told of it."""
        spec = ModelSpec(
            name="model", path=str(self.model), files=(file_id(self.model),), header=gguf.read(self.model), **changes
        )
        return Offered(spec, {"model": spec.path, **self.entries})

    async def appraise(
        self, offered: Offered | None = None, devices: tuple[Device, ...] = (), env: Mapping[str, str] | None = None
    ) -> Appraisal:
        """What it takes, which is known."""
        found = await self.appraiser.appraise(self.found, env or {}, offered or self.offered(), devices)
        assert found is not None
        return found


def file_id(path: Path) -> FileId:
    """Which content of which file."""
    status = path.stat()
    return FileId(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def projector(mebibytes: int) -> GgufFile:
    """A projector of so many MiB."""
    return GgufFile(
        values=[("general.architecture", (STRING, "clip")), ("clip.projector_type", (STRING, "mlp"))],
        tensors=[Tensor("v.patch_embd.weight", (mebibytes * MIB // 4,), 0, mebibytes * MIB)],
    )


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """A stage with one model."""
    return Stage(tmp_path)


async def test_the_build_is_asked_with_the_models_options(stage: Stage) -> None:
    """The tool of the build says it, for the context in the section and in the router's environment."""
    found = await stage.appraise()
    assert found.footprint.source is Source.FIT_PARAMS
    assert found.footprint.parts[RAM]["weights"] == 100 * MIB
    assert (found.footprint.n_ctx, found.is_ctx_ours, found.warnings) == (8192, False, ())
    assert found.footprint.prompt_cache_bytes == 0
    (words,) = stage.asked
    assert f"--model {stage.model}" in words
    assert "--ctx-size 8192" in words


async def test_bytes_are_of_physical_devices(stage: Stage) -> None:
    """The tool's names are the router's: they become the ids that all routers share."""
    stage.say("gpu")
    found = await stage.appraise(devices=(GPU,))
    assert found.footprint.parts[GPU.id]["weights"] == 500 * MIB
    assert found.key != (await stage.appraise(devices=(replace(GPU, id="0000:02:00.0"),))).key


async def test_without_the_tool_the_header_says_it(stage: Stage) -> None:
    """A build without the tool, and one whose tool fails, leave the formula."""
    stage.say("silent")
    assert (await stage.appraise()).footprint.source is Source.FORMULA
    stage.tool.unlink()
    stage.now += KEPT_S
    assert (await stage.appraise()).footprint.source is Source.FORMULA
    assert len(stage.asked) == 1


async def test_what_was_measured_counts(stage: Stage) -> None:
    """What is recorded under the key is the next estimate, at once; a later daemon need not even ask the tool."""
    first = await stage.appraise()
    assert await stage.appraise() is first
    stage.footprints.record(first.key, {RAM: 777 * MIB})
    found = await stage.appraise()
    assert (found.footprint.source, found.footprint.bytes) == (Source.MEASURED, {RAM: 777 * MIB})
    assert found.footprint.parts == first.footprint.parts
    stage.footprints.record(first.key, {RAM: 779 * MIB})
    assert (await stage.appraise()).footprint.bytes == {RAM: 778 * MIB}
    stage.appraiser = Appraiser(FitParams(), stage.footprints, lambda: stage.now)
    assert (await stage.appraise()).footprint.source is Source.MEASURED
    assert len(stage.asked) == 1


async def test_a_second_demand_costs_nothing(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts no process and reads no file, and is answered in a fraction of a millisecond."""
    stage.entries["mmproj"] = str(stage.write("eyes", projector(1)))
    offered = stage.offered(allowance=Allowance(64 * 1024 * MIB, (), 4))
    first = await stage.appraise(offered)
    monkeypatch.setattr(anyio.to_thread, "run_sync", None)
    times = []
    for _ in range(50):
        began = time.perf_counter()
        assert await stage.appraise(offered) is first
        times.append(time.perf_counter() - began)
    assert min(times) < 0.0002


async def test_nothing_is_asked_twice_until_it_changes(stage: Stage) -> None:
    """After some minutes it is looked at again, without a process if nothing has changed; else it is asked anew."""
    await stage.appraise()
    stage.now += KEPT_S
    await stage.appraise()
    assert len(stage.asked) == 1
    stage.entries["parallel"] = "2"
    other = await stage.appraise()
    assert len(stage.asked) == 2
    stage.model.write_bytes(small_model().encode() + bytes(64))
    assert (await stage.appraise()).key.files != other.key.files
    assert len(stage.asked) == 3
    await stage.appraise(env={"CUDA_VISIBLE_DEVICES": "1"})
    assert len(stage.asked) == 4


async def test_files_that_options_name_count(stage: Stage) -> None:
    """Projector, draft and adapters are in the estimate and in its key, wherever they lie."""
    plain = await stage.appraise()
    eyes, adapter = stage.write("eyes", projector(8)), stage.folder / "lora.bin"
    adapter.write_bytes(bytes(3 * MIB))
    stage.entries |= {"mmproj": str(eyes), "lora-scaled": f"{adapter}:0.5"}
    stage.entries["model-draft"] = str(stage.write("draft"))
    found = await stage.appraise()
    parts = found.footprint.parts[RAM]
    assert parts["projector"] == 10 * MIB
    assert parts["adapters"] == 3 * MIB
    assert parts["draft"] > 100 * MIB
    assert found.key.files != plain.key.files
    assert f"--model {stage.folder / 'draft.gguf'}" in stage.asked[-1]
    eyes.write_bytes(projector(16).encode())
    stage.now += KEPT_S
    assert (await stage.appraise()).footprint.parts[RAM]["projector"] == 20 * MIB


async def test_what_lies_beside_it_is_in_the_key_once(stage: Stage) -> None:
    """A projector that was found and one that is named are the same file."""
    eyes = stage.write("eyes", projector(8))
    stage.entries["mmproj"] = str(eyes)
    named = await stage.appraise()
    beside = stage.offered(projector=str(eyes))
    beside = Offered(replace(beside.spec, files=(*beside.spec.files, file_id(eyes))), beside.section)
    assert (await stage.appraise(beside)).key == named.key


async def test_files_that_cannot_be_read_are_told(stage: Stage) -> None:
    """One that is gone is left out with a warning, one that is no model counts by its size; both are tried again."""
    junk = stage.folder / "junk.gguf"
    junk.write_bytes(bytes(5 * MIB))
    gone = stage.folder / "gone.gguf"
    stage.entries |= {"mmproj": str(gone), "model-draft": str(junk)}
    found = await stage.appraise()
    assert found.warnings == (f"{gone} is not reckoned with: No such file or directory",)
    assert found.footprint.parts[RAM]["adapters"] == 5 * MIB
    gone.write_bytes(projector(8).encode())
    stage.now += DOUBTFUL_KEPT_S
    again = await stage.appraise()
    assert again.warnings == ()
    assert again.footprint.parts[RAM]["projector"] == 10 * MIB


async def test_a_dead_mount_costs_a_few_threads(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that never answer are left out after a while; no second thread waits for them, and few for all."""
    answers, looks = threading.Event(), []
    true = os.stat

    def stat(path: str | Path, **how: object) -> os.stat_result:
        if str(path).startswith("/dead"):
            looks.append(path)
            answers.wait()
        return true(path, **how)

    monkeypatch.setattr(appraisal_module.os, "stat", stat)
    monkeypatch.setattr(appraisal_module, "FILES_TIMEOUT_S", 0.5)
    try:
        for number in range(STUCK_MAX + 2):
            stage.entries["mmproj"] = f"/dead/{number}.gguf"
            offered = stage.offered()
            offered = Offered(replace(offered.spec, path=f"{offered.spec.path}{number}"), offered.section)
            for _ in range(2):
                found = await stage.appraise(offered)
                assert found.warnings == (f"/dead/{number}.gguf is not reckoned with: it does not answer",)
                stage.now += DOUBTFUL_KEPT_S
        assert len(looks) == STUCK_MAX
        del stage.entries["mmproj"]
        assert (await stage.appraise()).warnings == ()
    finally:
        answers.set()


async def test_a_header_that_the_catalog_does_not_have_is_read(stage: Stage) -> None:
    """A model whose header is not known is read; of one that is no model nobody can say anything."""
    offered = stage.offered()
    unread = Offered(replace(offered.spec, header=None), offered.section)
    assert (await stage.appraise(unread)).footprint == (await stage.appraise(offered)).footprint
    stage.model.write_bytes(b"junk")
    stage.now += KEPT_S
    unread = Offered(replace(unread.spec, files=(file_id(stage.model),)), unread.section)
    assert await stage.appraiser.appraise(stage.found, {}, unread, ()) is None


async def test_the_context_is_that_of_one_request(stage: Stage) -> None:
    """What is held against llama-server's word is what it speaks of: a slot's share, no more than was trained for."""
    stage.entries |= {"ctx-size": "2048", "parallel": "4"}
    found = await stage.appraise()
    assert (found.n_ctx, found.footprint.n_ctx) == (512, 2048)
    stage.entries |= {"ctx-size": "8192", "parallel": "1"}
    found = await stage.appraise()
    assert (found.n_ctx, found.footprint.n_ctx) == (gguf.read(stage.model).context_length, 8192)


async def test_whose_choice_the_context_is(stage: Stage) -> None:
    """It is ours when the budget's table has it, also when somebody else then writes the same number."""
    allowance = Allowance(64 * 1024 * MIB, (), 4)
    assert (await stage.appraise(stage.offered(allowance=allowance))).is_ctx_ours
    written = OptionLayer("[defaults]", ModelOptions(ctx_size=8192))
    assert not (await stage.appraise(stage.offered(allowance=allowance, base=(written,)))).is_ctx_ours
    del stage.entries["ctx-size"]
    found = await stage.appraise()
    assert (found.n_ctx, found.is_ctx_ours) == (gguf.read(stage.model).context_length, False)


async def test_options_that_no_estimate_follows_are_told(stage: Stage) -> None:
    """An estimate that cannot be trusted says so."""
    stage.entries["override-tensor"] = "exps=CPU"
    found = await stage.appraise()
    assert found.warnings == ("--override-tensor moves weights in ways that are not reckoned with",)


async def test_the_tool_runs_once_at_a_time(stage: Stage) -> None:
    """Each run wakes the driver of every GPU: demands at once are asked for one after the other, each model once."""
    at_once: list[int] = []
    lock = threading.Lock()
    ask = FitParams.ask

    class Watched(FitParams):
        def ask(self, *args: object, **how: object) -> object:
            assert lock.acquire(blocking=False), "two at once"
            try:
                at_once.append(1)
                time.sleep(0.01)
                return ask(self, *args, **how)
            finally:
                lock.release()

    stage.appraiser = Appraiser(Watched(), stage.footprints, lambda: stage.now)
    offers = []
    for parallel in ("1", "2", "3"):
        stage.entries["parallel"] = parallel
        offers += [stage.offered(), stage.offered()]
    async with anyio.create_task_group() as group:
        for offered in offers:
            group.start_soon(stage.appraise, offered)
    assert len(at_once) == len(offers)
    assert len(stage.asked) == 3


async def test_a_demand_that_is_given_up_leaves_nothing(stage: Stage) -> None:
    """Who does not wait any more does not leave a tool running or a lock held."""
    told = Path(f"{stage.tool}.pid")
    stage.tool.write_text('#!/bin/sh\necho $$ > "$0.new"\nmv "$0.new" "$0.pid"\nexec sleep 600\n')
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.appraise)
        with anyio.fail_after(PATIENCE_S):
            while not told.exists():
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    pid = int(told.read_text())
    with anyio.fail_after(PATIENCE_S):
        while Path(f"/proc/{pid}").exists():
            await anyio.sleep(0.01)
    stage.tool.write_text(TOOL)
    assert (await stage.appraise()).footprint.source is Source.FIT_PARAMS


async def test_little_is_remembered(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many models are, the latest asked for."""
    monkeypatch.setattr(appraisal_module, "MAX_KNOWN", 3)
    assert MAX_KNOWN > 3
    for parallel in range(1, 6):
        stage.entries["parallel"] = str(parallel)
        await stage.appraise()
    assert repr(stage.appraiser) == "<Appraiser of 3>"
