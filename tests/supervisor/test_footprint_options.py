"""What presets say about memory, and what llama-fit-params is asked and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builds import NEW
from llamavisor.capture import Captured
from llamavisor.catalog import FileId
from llamavisor.errors import BinaryError
from llamavisor.flags import resolve
from llamavisor.footprint import FitParams, FitRow, MemoryOptions, Plan, find_tool, read_options, read_said, said_by
from llamavisor.footprint.fitparams import FAILURE_KEPT_S, MAX_KNOWN, argv, parse
from llamavisor.options import ModelOptions, OptionLayer
from llamavisor.rules import ModelSettings

MIB = 1024 * 1024
PLAN = Plan(options=MemoryOptions(), n_ctx=4096)
FILES = (FileId(1, 2, 3, 4),)


def test_nothing_said_is_what_llama_server_does() -> None:
    """An empty preset is the defaults: four slots that share a cache, and 8 GiB for prompts."""
    options = read_options({})
    assert options == MemoryOptions()
    assert (options.slots, options.is_unified, options.is_mapped) == (4, True, True)
    assert options.prompt_cache_bytes == 8192 * MIB


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"ctx-size": "8192", "parallel": "2"}, {"ctx_size": 8192, "parallel": 2}),
        ({"c": "0", "np": "-1"}, {"ctx_size": 0, "parallel": None}),
        ({"ctx_size": "many"}, {"ctx_size": None}),
        ({"n-gpu-layers": "auto"}, {"gpu_layers": None}),
        ({"ngl": "12", "dev": "CUDA0, CUDA1"}, {"gpu_layers": 12, "devices": ("CUDA0", "CUDA1")}),
        ({"device": "none"}, {"devices": ()}),
        ({"tensor-split": "3,1", "sm": "row", "mg": "1"}, {"tensor_split": (3, 1), "split_mode": "row", "main_gpu": 1}),
        ({"ts": "a,b"}, {"tensor_split": ()}),
        ({"flash-attn": "1"}, {"flash_attn": "on"}),
        ({"fa": "off"}, {"flash_attn": "off"}),
        ({"cache-type-k": "Q8_0", "ctv": "q4_0"}, {"cache_type_k": "q8_0", "cache_type_v": "q4_0"}),
        ({"kv-unified": "1"}, {"kv_unified": True}),
        ({"no-kv-unified": "1"}, {"kv_unified": False}),
        ({"kv-unified": "0"}, {"kv_unified": False}),
        ({"no-kv-offload": "true"}, {"kv_offload": False}),
        (
            {"swa-full": "1", "ub": "128", "batch-size": "256"},
            {"swa_full": True, "ubatch_size": 128, "batch_size": 256},
        ),
        ({"no-repack": "1", "n-cpu-moe": "7"}, {"repack": False, "cpu_moe_layers": 7}),
        ({"load-mode": "dio"}, {"load_mode": "dio"}),
        ({"mmap": "0"}, {"load_mode": "none"}),
        ({"no-mmap": "1", "direct-io": "0"}, {"load_mode": "none"}),
        ({"direct-io": "1"}, {"load_mode": "dio"}),
        ({"embeddings": "1"}, {"is_embedding": True}),
        ({"pooling": "mean"}, {"is_embedding": True}),
        ({"rerank": "0", "pooling": "none"}, {"is_embedding": False}),
        ({"mmproj": "/p", "no-mmproj-offload": "1"}, {"mmproj": "/p", "mmproj_offload": False}),
        (
            {"model-draft": "/d", "spec-type": "draft-mtp, ngram-mod", "ngld": "3", "devd": "none"},
            {"draft": "/d", "draft_types": ("draft-mtp", "ngram-mod"), "draft_gpu_layers": 3, "draft_devices": ()},
        ),
        ({"lora-scaled": "/a:0.5,/b:1", "control-vector": "/c"}, {"adapters": ("/a", "/b", "/c")}),
        ({"cache-ram": "100"}, {"cache_ram_bytes": 100 * MIB}),
        ({"cram": "-1"}, {"cache_ram_bytes": -1}),
        ({"swa-checkpoints": "0", "cms": "0"}, {"ctx_checkpoints": 0, "checkpoint_step": 0}),
        ({"ot": "x=CPU", "top-k": "40"}, {"unknown": ("override_tensor",)}),
    ],
)
def test_every_spelling_is_read(entries: Mapping[str, str], expected: Mapping[str, object]) -> None:
    """Keys of any build, short or long, with both kinds of dashes; what is no number is not said."""
    assert read_options(entries) == replace(MemoryOptions(), **expected)


def test_a_section_wins_over_all() -> None:
    """Whatever it is spelled like."""
    options = read_options({"ctx-size": "1", "kv-unified": "1"}, {"c": "2", "no-kv-unified": "1"})
    assert (options.ctx_size, options.kv_unified) == (2, False)


@pytest.mark.parametrize(
    "tables",
    [
        [{}],
        [{"ctx_size": 512, "parallel": 2}, {"ctx_size": 0}],
        [{"ctx_size": 512}, {"args": ["-c", "1024", "--top-k", "3", "-np", "-1"]}, {"args": ["--parallel", "3"]}],
        [{"gpu_layers": "all", "devices": ["CUDA0", "CUDA1"], "tensor_split": [3, 1.5], "split_mode": "row"}],
        [{"gpu_layers": "all"}, {"gpu_layers": "auto", "devices": ["none"]}, {"args": ["-ngl", "12"]}],
        [{"flash_attn": True, "cache_type_k": "q8_0"}, {"flash_attn": "auto", "args": ["--swa-full"]}],
        [{"args": ["--kv-unified", "-nkvo"]}, {"args": ["--no-kv-unified"]}, {"args": ["--kv-offload"]}],
        [{"load_mode": "mlock"}, {"args": ["--no-mmap"]}],
        [{"args": ["--load-mode", "dio"]}, {"load_mode": "auto"}],
        [{"embeddings": True}, {"embeddings": False, "reranking": True}],
        [{"mmproj": "/p", "draft": "/d", "lora": ["/a", "/b:0.5"], "draft_gpu_layers": 3, "draft_max": 8}],
        [{"mmproj": "/p", "draft": "/d", "lora": ["/a"]}, {"mmproj": False, "draft": False, "lora": []}],
        [{"args": ["--lora", "/a", "--lora", "/b"]}, {"args": ["--cpu-moe", "--cache-ram", "100", "-ot", "x=CPU"]}],
        [{"batch_size": 64, "ubatch_size": 32, "args": ["--ctx_checkpoints", "3", "--no-repack", "--temp", "-1"]}],
    ],
)
def test_tables_are_read_as_the_build_would(tables: list[dict[str, object]]) -> None:
    """Without its help, and with the same outcome: the last word counts, whatever it is spelled like."""
    layers = [OptionLayer(f"[{number}]", ModelSettings.model_validate(each)) for number, each in enumerate(tables)]
    entries = resolve(layers, NEW, binary="").preset
    assert read_said(said_by(layers)) == read_options(entries)


def test_what_only_tables_are_asked_for() -> None:
    """Whether somebody has bounded what is fitted is known too; a time to live is none of memory's options."""
    layer = OptionLayer("x", ModelOptions(fit=False, ttl=60, args=("-fitt", "1024,2048", "--cache-ram", "-1")))
    assert said_by([layer]) == {"fit": "off", "fit_target": "1024,2048", "cache_ram": "-1"}


def test_a_prompt_cache_may_have_no_bound() -> None:
    """None is no bound, 0 is no cache."""
    assert read_options({"cache-ram": "-1"}).prompt_cache_bytes is None
    assert read_options({"cache-ram": "0"}).prompt_cache_bytes == 0


def test_a_draft_runs_beside_its_model() -> None:
    """It has the context and the slots of the model, and types and devices of its own where they are said."""
    options = read_options(
        {"ctx-size": "77", "parallel": "3", "dev": "CUDA0", "ctk": "q8_0", "spec-draft-type-k": "q4_0", "md": "/d"}
    )
    draft = options.for_draft()
    assert (draft.ctx_size, draft.slots, draft.devices, draft.cache_type_k) == (77, 3, ("CUDA0",), "q4_0")
    assert draft.draft is None
    assert replace(options, draft_devices=("CUDA1",)).for_draft().devices == ("CUDA1",)


@given(st.dictionaries(st.sampled_from(["ctx-size", "np", "ts", "device", "kvu", "fa", "lora", "pooling"]), st.text()))
def test_options_of_any_text_are_read(entries: Mapping[str, str]) -> None:
    """Nothing raises, and the same text is the same digest."""
    options = read_options(entries)
    assert options.digest(1, []) == read_options(dict(entries)).digest(1, [])


def test_a_digest_tells_plans_apart() -> None:
    """Another option, context or device is another digest; what was asked for in other words is not."""
    said = Plan(options=read_options({"c": "4096"}), n_ctx=4096)
    assert said.digest == PLAN.digest
    others = [replace(PLAN, n_ctx=8192), replace(PLAN, options=MemoryOptions(parallel=2))]
    others += [replace(PLAN, options=MemoryOptions(adapters=("/a",)))]
    assert len({plan.digest for plan in (PLAN, *others)}) == 4
    assert len(fields(MemoryOptions)) > 30  # all of them are in it, since it is made of the whole


# --- llama-fit-params -------------------------------------------------------------------------------------------------


class _Tool:
    """Answers as the tool, and counts how often it is started."""

    def __init__(self, *answers: Captured | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[Sequence[str], Mapping[str, str]]] = []

    def __call__(self, words: Sequence[str], env: Mapping[str, str]) -> Captured:
        self.asked.append((words, env))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


GOOD = Captured(0, "Host 714 32 86 \n", "")


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    """A file where the tool would be."""
    path = tmp_path / "llama-fit-params"
    path.touch()
    return path


def test_the_tool_stands_beside_the_server(tool: Path) -> None:
    """Builds without it have None."""
    assert find_tool(tool.with_name("llama-server")) == tool
    tool.unlink()
    assert find_tool(tool.with_name("llama-server")) is None


def test_answers_are_read_past_greetings() -> None:
    """Rows of GPUs and, last, the host's; other lines do not matter, and without the host's there is no answer."""
    text = "ggml_cuda_init: found 1 CUDA devices:\n  Device 0: NVIDIA 1 2 x\nCUDA0 4000 512 300 \nHost 300 0 20 \n"
    assert parse(text) == (
        FitRow("CUDA0", 4000 * MIB, 512 * MIB, 300 * MIB),
        FitRow(None, 300 * MIB, 0, 20 * MIB),
    )
    assert parse("CUDA0 1 2 3\n") is None
    assert parse("") is None
    assert parse("Host 1 2\n") is None


@given(st.text())
def test_any_text_is_an_answer_or_none(text: str) -> None:
    """The parser is total."""
    rows = parse(text)
    assert rows is None or rows[-1].device is None


def test_the_tool_is_asked_as_the_server_runs() -> None:
    """Everything that it knows of memory is handed on, and slots that share a cache are asked for as one."""
    assert argv(Path("/t"), "/m", PLAN)[:7] == ("/t", "--model", "/m", "--fit-print", "on", "--ctx-size", "4096")
    assert "--parallel 1 " in " ".join(argv(Path("/t"), "/m", PLAN))
    options = MemoryOptions(
        parallel=3,
        flash_attn="off",
        cache_type_k="q8_0",
        swa_full=True,
        kv_offload=False,
        gpu_layers=7,
        devices=(),
        split_mode="row",
        main_gpu=1,
        tensor_split=(3, 0.5),
        cpu_moe_layers=4,
        repack=False,
    )
    said = " ".join(argv(Path("/t"), "/m", replace(PLAN, options=options)))
    for words in (
        *("--parallel 3", "--flash-attn off", "--cache-type-k q8_0", "--swa-full", "--no-kv-offload", "--no-repack"),
        *("--n-gpu-layers 7", "--device none", "--split-mode row --main-gpu 1", "--tensor-split 3,0.5"),
        "--n-cpu-moe 4",
    ):
        assert words in said
    assert "--cpu-moe" in argv(Path("/t"), "/m", replace(PLAN, options=read_options({"cmoe": "1"})))


def test_an_answer_is_remembered_by_all_that_it_depends_on(tool: Path) -> None:
    """The tool runs again for other files, options, environments and another build of itself, and only then."""
    run = _Tool(GOOD)
    asked = FitParams(run)
    for _ in range(2):
        assert asked.ask(tool, "/m", FILES, PLAN, env={}) == (FitRow(None, 714 * MIB, 32 * MIB, 86 * MIB),)
    assert len(run.asked) == 1
    asked.ask(tool, "/m", (FileId(1, 2, 3, 5),), PLAN, env={})
    asked.ask(tool, "/m", FILES, replace(PLAN, n_ctx=1), env={})
    asked.ask(tool, "/m", FILES, PLAN, env={"CUDA_VISIBLE_DEVICES": "1"})
    tool.unlink()
    assert asked.ask(tool, "/m", FILES, PLAN, env={}) is None
    tool.write_text("new")
    asked.ask(tool, "/m", FILES, PLAN, env={})
    assert len(run.asked) == 5
    assert repr(asked) == "<FitParams of 5>"


@pytest.mark.parametrize(
    "failure",
    [OSError("gone"), BinaryError("late"), ValueError("NUL"), Captured(1, "Host 1 2 3\n", ""), Captured(0, "?", "")],
)
def test_a_failure_is_none_and_tried_again_later(tool: Path, failure: Captured | Exception) -> None:
    """A tool that fails, hangs or says something else is no worse than none, and not asked again at once."""
    now = [0.0]
    run = _Tool(failure, GOOD)
    asked = FitParams(run, clock=lambda: now[0])
    assert asked.ask(tool, "/m", FILES, PLAN, env={}) is None
    now[0] = FAILURE_KEPT_S - 1
    assert asked.ask(tool, "/m", FILES, PLAN, env={}) is None
    now[0] = FAILURE_KEPT_S
    assert asked.ask(tool, "/m", FILES, PLAN, env={}) is not None
    assert len(run.asked) == 2


def test_the_longest_unused_answers_are_forgotten(tool: Path) -> None:
    """Memory is bounded, and what is used stays."""
    run = _Tool(GOOD)
    asked = FitParams(run)
    for number in range(MAX_KNOWN + 1):
        asked.ask(tool, f"/{number}", FILES, PLAN, env={})
        asked.ask(tool, "/0", FILES, PLAN, env={})
    assert len(run.asked) == MAX_KNOWN + 1
    asked.ask(tool, "/1", FILES, PLAN, env={})
    assert len(run.asked) == MAX_KNOWN + 2


def test_a_true_program_is_run_bounded(tmp_path: Path) -> None:
    """The default way to start it gives its output, and None when it cannot start."""
    script = tmp_path / "llama-fit-params"
    script.write_text("#!/bin/sh\necho Host 1 2 3\n")
    assert FitParams().ask(script, "/m", FILES, PLAN, env={}) is None
    script.chmod(0o755)
    assert FitParams().ask(script, "/m", FILES, PLAN, env={}) == (FitRow(None, MIB, 2 * MIB, 3 * MIB),)
