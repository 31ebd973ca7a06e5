"""What llama.cpp itself says a model will take: `llama-fit-params --fit-print on`, which loads no weights.

It stands beside llama-server in most builds, and prints for each device the MiB of weights, context and compute
buffers. Four things it gets otherwise than the server of the same build (b11434); `estimate` puts them right:

1. It reserves outputs for a whole batch, where the server has one for each slot: too much for compute buffers.
2. It has no word for a KV cache that slots share: sliding windows and states are told for one slot.
3. Weights that the CPU stores anew lie in a buffer that it counts nowhere.
4. Prompt cache, checkpoints, projector, draft and adapters are no concern of it.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamavisor.capture import Captured, capture
from llamavisor.catalog import FileId
from llamavisor.errors import BinaryError
from llamavisor.footprint.formula import MIB, Plan
from llamavisor.footprint.options import ALL_LAYERS

NAME = "llama-fit-params"
TIMEOUT_S = 10.0
"""It takes 20 to 150 ms on a CPU; a GPU's driver may need seconds to wake up."""
FAILURE_KEPT_S = 300.0
"""A failure may be the machine's and not the model's: it is tried again."""
MAX_KNOWN = 1_000
"""Answers that are remembered, the latest used."""
_LIMIT_BYTES = 256 * 1024
_HOST = "Host"
_ROW = re.compile(r"^(\S.*?) (\d+) (\d+) (\d+)\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class FitRow:
    """What goes onto one device, in bytes, each number rounded down to MiB.

    Attributes:
        device: the router's name of it; None for the host.
        weights: of the model.
        context: KV cache and states.
        compute: compute buffers.
    """

    device: str | None
    weights: int
    context: int
    compute: int


Fit = tuple[FitRow, ...]
"""A row for each GPU and, last, one for the host."""

Run = Callable[[Sequence[str], Mapping[str, str]], Captured]


def find_tool(llama_server: Path) -> Path | None:
    """The tool that belongs to a llama-server; None when its build comes without. One `stat`."""
    tool = llama_server.with_name(NAME)
    return tool if tool.is_file() else None


def argv(tool: Path, model: str, plan: Plan) -> tuple[str, ...]:
    """How the tool is asked. It knows no `--kv-unified`: caches that slots share are asked for as one slot's."""
    options = plan.options
    words = [str(tool), "--model", model, "--fit-print", "on", "--ctx-size", str(plan.n_ctx)]
    words += ["--parallel", "1" if options.is_unified else str(options.slots)]
    words += ["--batch-size", str(options.batch_size), "--ubatch-size", str(options.ubatch_size)]
    words += ["--flash-attn", options.flash_attn]
    words += ["--cache-type-k", options.cache_type_k, "--cache-type-v", options.cache_type_v]
    words += ["--swa-full"] if options.swa_full else []
    words += [] if options.kv_offload else ["--no-kv-offload"]
    words += [] if options.repack else ["--no-repack"]
    words += [] if options.gpu_layers is None else ["--n-gpu-layers", str(options.gpu_layers)]
    words += [] if options.devices is None else ["--device", ",".join(options.devices) or "none"]
    if options.split_mode != "layer":
        words += ["--split-mode", options.split_mode, "--main-gpu", str(options.main_gpu)]
    if options.tensor_split:
        words += ["--tensor-split", ",".join(f"{share:.10g}" for share in options.tensor_split)]
    if options.cpu_moe_layers >= ALL_LAYERS:
        words.append("--cpu-moe")
    elif options.cpu_moe_layers:
        words += ["--n-cpu-moe", str(options.cpu_moe_layers)]
    return tuple(words)


def parse(text: str) -> Fit | None:
    """The rows of an answer; None when it is none. Other lines, such as a driver's greetings, are passed over."""
    rows = []
    for name, *numbers in _ROW.findall(text):
        weights, context, compute = (int(number) * MIB for number in numbers)
        rows.append(FitRow(None if name == _HOST else name, weights, context, compute))
        if name == _HOST:
            return tuple(rows)
    return None


def _capture(words: Sequence[str], env: Mapping[str, str]) -> Captured:
    return capture(words, env, timeout_s=TIMEOUT_S, limit_bytes=_LIMIT_BYTES)


class FitParams:
    """Asks the tool, and remembers its answers by everything that they depend on.

    Safe to use from several threads; at worst a model is asked for twice.

    Args:
        run: starts the tool; raises what `capture` raises.
        clock: monotonic seconds.
    """

    def __init__(self, run: Run = _capture, clock: Callable[[], float] = time.monotonic) -> None:
        self._run = run
        self._clock = clock
        self._lock = threading.Lock()
        self._known: OrderedDict[object, tuple[Fit | None, float]] = OrderedDict()

    def __repr__(self) -> str:
        return f"<FitParams of {len(self._known)}>"

    def ask(
        self, tool: Path, model: str, files: tuple[FileId, ...], plan: Plan, *, env: Mapping[str, str]
    ) -> Fit | None:
        """What a model will take; None when the tool cannot say. Blocking: call it in a worker thread.

        With a GPU it wakes the driver and takes a few hundred MiB of the GPU's memory for as long as it runs.

        Args:
            tool: as `find_tool` found it.
            model: path of the model's first file.
            files: which contents it is made of.
            plan: how it is to be run.
            env: the router's environment, which decides what devices are seen.
        """
        words = argv(tool, model, plan)
        try:
            status = tool.stat()
        except OSError:
            return None
        key = words, files, status.st_ino, status.st_mtime_ns, tuple(sorted(env.items()))
        with self._lock:
            known = self._known.get(key)
            if known is not None and (known[0] is not None or self._clock() - known[1] < FAILURE_KEPT_S):
                self._known.move_to_end(key)
                return known[0]
        fit = self._ask(words, env)
        with self._lock:
            self._known[key] = fit, self._clock()
            self._known.move_to_end(key)
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return fit

    def _ask(self, words: Sequence[str], env: Mapping[str, str]) -> Fit | None:
        try:
            answer = self._run(words, env)
        except (OSError, BinaryError, ValueError):  # ValueError: a NUL in a path
            return None
        return parse(answer.stdout) if answer.returncode == 0 else None
