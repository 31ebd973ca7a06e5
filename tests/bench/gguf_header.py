"""How quickly the header of a GGUF file is read, over the reader of the `gguf` package."""

from __future__ import annotations

import random
import string
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf as package
from report import Row, fastest_s, median_s

from ggufs import ARRAY, I32, STRING, U32, GgufFile, Tensor, Typed
from llamavisor import gguf
from llamavisord.tiny_model import write_tiny_model

TOKENS, MERGES, LAYERS = 128_256, 280_147, 32
"""Those of Llama 3.1 8B."""
FASTER = 100
SMALL_S = 0.0005
"""10,000 small files are to be scanned in 5 s: this is one file's share."""
MEMORY_BYTES = 1_000_000


def measure(folder: Path) -> list[Row]:
    """The header of a large model and of a small one, and the memory that the large one takes.

    Args:
        folder: where the two files go, 10 MB.
    """
    large, small = folder / "large.gguf", folder / "small.gguf"
    large.write_bytes(large_model().encode())
    write_tiny_model(small, ["small"])
    ours, theirs = median_s(lambda: gguf.read(large)), fastest_s(lambda: package.GGUFReader(large))
    little = median_s(lambda: gguf.read(small))
    memory = peak_bytes(lambda: gguf.read(large))
    return [
        Row(
            f"GGUF header, {TOKENS // 1000}k tokens, over gguf.GGUFReader",
            f"{ours * 1e3:.0f} ms",
            f"{theirs * 1e3:.0f} ms",
            f"{theirs / FASTER * 1e3:.0f} ms",
            ours <= theirs / FASTER,
        ),
        Row("GGUF header, small", f"{little * 1e3:.2f} ms", "", f"{SMALL_S * 1e3:.2f} ms", little <= SMALL_S),
        Row(
            f"GGUF header, {TOKENS // 1000}k tokens, memory",
            f"{memory / 1e6:.2f} MB",
            f"{large.stat().st_size / 1e6:.0f} MB",
            f"{MEMORY_BYTES / 1e6:.2f} MB",
            memory <= MEMORY_BYTES,
        ),
    ]


def large_model() -> GgufFile:
    """The header of an 8B model with its whole vocabulary, and hardly any data."""
    dice = random.Random(1)
    words = ["".join(dice.choices(string.ascii_lowercase, k=dice.randint(1, 13))) for _ in range(TOKENS)]
    merges = [f"{words[at % TOKENS]} {words[at * 7 % TOKENS]}" for at in range(MERGES)]
    values: list[tuple[str | bytes, Typed]] = [
        ("general.architecture", (STRING, "llama")),
        ("general.file_type", (U32, 15)),
        ("llama.context_length", (U32, 131_072)),
        ("llama.embedding_length", (U32, 4096)),
        ("llama.block_count", (U32, LAYERS)),
        ("llama.attention.head_count", (U32, 32)),
        ("llama.attention.head_count_kv", (U32, 8)),
        ("tokenizer.ggml.model", (STRING, "gpt2")),
        ("tokenizer.ggml.tokens", (ARRAY, (STRING, words))),
        ("tokenizer.ggml.token_type", (ARRAY, (I32, [1] * TOKENS))),
        ("tokenizer.ggml.merges", (ARRAY, (STRING, merges))),
        ("tokenizer.chat_template", (STRING, "<|start_header_id|>{{ role }}<|end_header_id|>" * 100)),
    ]
    parts = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    tensors = [Tensor(f"blk.{layer}.{part}.weight", (256,), 12, 144) for layer in range(LAYERS) for part in parts]
    return GgufFile(values, tensors)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that Python takes for one run."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
