"""What models are expected to take, held against what a real llama-server takes: all three sources in one table.

The models are large enough that a wrong estimate shows: at least half a GiB of weights or of KV cache.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path

import pytest

from fakes.bare_router import free_port
from fakes.waiting import eventually
from llamavisor import gguf
from llamavisor.footprint import (
    RAM,
    Fit,
    FitParams,
    Footprint,
    Plan,
    Source,
    Weights,
    context_size,
    estimate,
    find_tool,
    read_options,
)
from llamavisor.ledger import FootprintKey, Footprints
from shapes import Q4_0, Q8_0, Shape, file_id, write_model

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]

MIB = 1024 * 1024
TOLERANCE = 0.10
LEAST_TOLERANCE = 64 * MIB
PROMPT_TOKENS = 600
"""More than a physical batch, so that compute buffers are touched as far as they ever will be."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and how it is run: keys of a preset."""

    name: str
    shape: Shape
    entries: Mapping[str, str]
    draft: Shape | None = None
    least_bytes: Mapping[str, int] = field(default_factory=dict)


_EMBEDDING = Shape(width=4096, vocabulary=64_000)
_CACHE = Shape(layers=16, heads=16, heads_kv=8, head=128, forward=2048)
_WINDOWS = Shape(arch="gemma3", layers=12, width=1024, heads=4, heads_kv=4, head=256, vocabulary=64_000, window=1024)
CASES = (
    Case(name="f16", shape=_EMBEDDING, entries={"ctx-size": "8192"}, least_bytes={"weights": 1024 * MIB}),
    Case(
        name="q8_0, grouped heads",
        shape=Shape(code=Q8_0, layers=6, width=2048, heads=32, heads_kv=4, forward=4096, vocabulary=96_000),
        entries={"ctx-size": "16384"},
        least_bytes={"weights": 512 * MIB},
    ),
    Case(
        name="q4_0, stored anew",
        shape=Shape(code=Q4_0, layers=2, width=4096, forward=2048, vocabulary=112_000),
        entries={"ctx-size": "4096"},
        least_bytes={"weights": 512 * MIB},
    ),
    Case(
        name="q4_0, stored anew and not mapped",
        shape=Shape(code=Q4_0, layers=2, width=4096, forward=2048, vocabulary=112_000),
        entries={"ctx-size": "4096", "load-mode": "none"},
        least_bytes={"weights": 512 * MIB},
    ),
    Case(name="cache of four", shape=_CACHE, entries={"ctx-size": "16384"}, least_bytes={"context": 1024 * MIB}),
    Case(
        name="two caches, q8_0",
        shape=_CACHE,
        entries={"ctx-size": "20480", "parallel": "2", "cache-type-k": "q8_0", "cache-type-v": "q8_0"},
        least_bytes={"context": 512 * MIB},
    ),
    Case(
        name="sliding windows",
        shape=_WINDOWS,
        entries={"ctx-size": "49152", "ctx-checkpoints": "0"},
        least_bytes={"context": 512 * MIB},
    ),
    Case(
        name="with a draft",
        shape=Shape(code=Q8_0, width=4096, vocabulary=64_000),
        draft=Shape(layers=8, width=512, heads=8, heads_kv=8, vocabulary=64_000),
        entries={"ctx-size": "16384", "spec-type": "draft-simple"},
        least_bytes={"weights": 512 * MIB, "draft": 256 * MIB},
    ),
)
_table: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def _shown() -> Iterator[None]:
    """Prints what was found, whether it held or not."""
    yield
    head = f"{'MiB':34}{'real':>8}{'fit-params':>12}{'formula':>9}{'again':>8}{'measured':>10}"
    print("\n" + "\n".join([head, *_table]))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for models that is empty again afterwards: pytest would keep them."""
    yield tmp_path
    for model in tmp_path.glob("*.gguf"):
        model.unlink()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(",", "").replace(" ", "-"))
def test_expected_is_what_is_taken(case: Case, folder: Path, llama_server: Path) -> None:
    """fit-params, formula and measurement say what a child takes after its first request, within 10 % or 64 MiB."""
    model = folder / "model.gguf"
    write_model(model, case.shape)
    entries = dict(case.entries) | {"threads": "1", "cache-ram": "0"}
    if case.draft is not None:
        write_model(folder / "draft.gguf", case.draft)
        entries["spec-draft-model"] = str(folder / "draft.gguf")
    weights = weigh(model, entries.get("spec-draft-model"))
    options = read_options({}, entries)
    plan = Plan(options=options, n_ctx=context_size(weights.header, options))
    tool = find_tool(llama_server)
    assert tool is not None
    asked = FitParams()
    fit = asked.ask(tool, str(model), (), plan, env=os.environ)
    draft_fit = asked.ask(tool, options.draft, (), plan.for_draft(), env=os.environ) if options.draft else None
    assert fit is not None
    by_tool = expect(weights, plan, Source.FIT_PARAMS, fit=fit, draft_fit=draft_fit)
    by_formula = expect(weights, plan, Source.FORMULA)
    for part, least in case.least_bytes.items():
        assert by_formula.parts[RAM][part] >= least, f"{part} is too small to fail"

    real = measure(llama_server, model, entries)
    key = FootprintKey.of((file_id(model),), plan.digest, ())
    learned = Footprints()
    learned.record(key, {RAM: real["Pss"]})
    again = measure(llama_server, model, entries)
    by_ledger = expect(weights, plan, Source.MEASURED, fit=fit, measured=learned.recall(key))
    numbers = (real["Pss"], by_tool.bytes[RAM], by_formula.bytes[RAM], again["Pss"], by_ledger.bytes[RAM])
    _table.append(f"{case.name:34}{{:8.0f}}{{:12.0f}}{{:9.0f}}{{:8.0f}}{{:10.0f}}".format(*(n / MIB for n in numbers)))

    if options.is_mapped:
        assert real["Pss_File"] >= by_formula.parts[RAM]["weights"] * 0.9, (
            "holes of a mapped file are not resident here"
        )
    for expected, taken in ((by_tool, real), (by_formula, real), (by_ledger, again)):
        off = expected.bytes[RAM] - taken["Pss"]
        assert abs(off) <= max(LEAST_TOLERANCE, TOLERANCE * taken["Pss"]), (
            f"{expected.source.value}: {off / MIB:+.0f} MiB off {taken['Pss'] / MIB:.0f}: {expected.parts}, {taken}"
        )


def test_windows_grow_by_their_checkpoints(folder: Path, llama_server: Path) -> None:
    """With checkpoints a child takes more than its footprint, and no more than the growth that is told besides."""
    model = folder / "model.gguf"
    write_model(model, _WINDOWS)
    entries = {"ctx-size": "16384", "threads": "1", "cache-ram": "0"}
    weights, options = weigh(model), read_options(entries)
    expected = expect(weights, Plan(options=options, n_ctx=16384), Source.FORMULA)
    bare = measure(llama_server, model, entries | {"ctx-checkpoints": "0"})
    grown = measure(llama_server, model, entries)
    more = grown["Pss_Anon"] - bare["Pss_Anon"]
    growth = expected.growth_bytes
    assert growth is not None
    assert 16 * MIB < more <= growth


@pytest.mark.parametrize(
    ("shape", "entries"),
    [
        (Shape(), {"ctx-size": "5000"}),
        (Shape(heads_kv=8, layers=5), {"ctx-size": "9000", "parallel": "3"}),
        (Shape(heads_kv=4, head=128), {"ctx-size": "4096", "cache-type-k": "q4_0", "cache-type-v": "q5_1"}),
        (Shape(arch="gemma3", layers=14, window=700), {"ctx-size": "32768", "parallel": "1"}),
        (Shape(arch="gemma3", layers=14, window=700), {"ctx-size": "32768", "parallel": "3"}),
        (Shape(arch="gemma3", layers=14, window=700), {"ctx-size": "32768", "parallel": "1", "swa-full": "1"}),
        (Shape(arch="mamba", layers=20, width=2048), {"ctx-size": "4096", "parallel": "5"}),
        (Shape(arch="deepseek2", layers=9, heads=16), {"ctx-size": "32768", "parallel": "1"}),
    ],
    ids=["padded", "slots", "quantized", "windows", "windows-of-slots", "windows-full", "states", "latent"],
)
def test_context_is_exact(shape: Shape, entries: Mapping[str, str], folder: Path, llama_server: Path) -> None:
    """For every kind of attention the formula's context is the one of llama.cpp, to the MiB that it is told in."""
    model = folder / "model.gguf"
    write_model(model, shape)
    weights, options = weigh(model), read_options(entries)
    plan = Plan(options=options, n_ctx=context_size(weights.header, options))
    tool = find_tool(llama_server)
    assert tool is not None
    fit = FitParams().ask(tool, str(model), (), plan, env=os.environ)
    assert fit is not None
    told = fit[-1].context // MIB
    assert told > 0
    assert expect(weights, plan, Source.FORMULA).parts[RAM]["context"] // MIB == told


def expect(
    weights: Weights,
    plan: Plan,
    source: Source,
    *,
    fit: Fit | None = None,
    draft_fit: Fit | None = None,
    measured: tuple[Mapping[str, int], ...] = (),
) -> Footprint:
    """The footprint from this source and no other."""
    found = estimate(weights, plan, fit=fit, draft_fit=draft_fit, measured=measured)
    assert found is not None
    assert found.source is source
    return found


def weigh(model: Path, draft: str | None = None) -> Weights:
    """The files of a model."""
    return Weights(
        header=gguf.read(model),
        size_bytes=model.stat().st_size,
        draft=gguf.read(draft) if draft else None,
        draft_bytes=Path(draft).stat().st_size if draft else 0,
    )


def measure(llama_server: Path, model: Path, entries: Mapping[str, str]) -> dict[str, int]:
    """What a llama-server has resident after its first request, by kind."""
    with serving(llama_server, model, entries) as (pid, port):
        prompt = {"prompt": [5] * PROMPT_TOKENS, "n_predict": 2}
        assert ask(port, "POST", "/completion", prompt) == 200
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return {name: int(size) * 1024 for name, size in re.findall(r"^(\w+): +(\d+) kB$", lines, re.MULTILINE)}


@contextmanager
def serving(llama_server: Path, model: Path, entries: Mapping[str, str]) -> Iterator[tuple[int, int]]:
    """A llama-server without a router that has loaded a model, and its port."""
    port = free_port()
    words = [str(llama_server), "--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    words += [word for key, value in entries.items() for word in (f"--{key}", value)]
    with model.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:

        def is_ready() -> bool:
            if process.poll() is not None:
                raise RuntimeError(model.with_suffix(".log").read_text(errors="replace")[-2000:])
            return ask(port, "GET", "/health") == 200

        eventually(is_ready, what="a model that is loaded", within_s=60)
        yield process.pid, port
    finally:
        process.kill()
        process.wait()


def ask(port: int, method: str, path: str, body: object = None) -> int:
    """The status of an answer, 0 when there is none."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        try:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
        except ConnectionError:
            return 0
        return answer.status
