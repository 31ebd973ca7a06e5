"""Models of any size and shape that a true llama-server loads; their files are holes, as a rule.

A hole that is read through a mapping is a page of the page cache like any other and counts as resident, and
llama-server reads all of a file that it maps; so nothing is written to the disk. Whoever watches a folder takes a
hole for a copy that is under way: what it is to serve has zeros instead.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ggufs import ARRAY, F32, I32, STRING, U32, GgufFile, Tensor, Typed
from llamavisor.catalog import FileId
from llamavisor.gguf.tensortypes import TENSOR_TYPES

F16, Q4_0, Q8_0 = 1, 2, 8
_ZEROS = memoryview(bytes(1 << 20))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model to be made; the weights are mostly vocabulary, which costs room and no time."""

    arch: str = "llama"
    code: int = F16
    layers: int = 2
    width: int = 1024
    heads: int = 8
    heads_kv: int = 2
    head: int = 64
    forward: int = 1024
    vocabulary: int = 32_000
    window: int = 0


def file_id(path: Path) -> FileId:
    """Which content of which file."""
    status = path.stat()
    return FileId(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def write_model(path: Path, shape: Shape, *, is_whole: bool = False) -> None:
    """A model that llama-server loads and that says nothing sensible: a header, and a hole for its weights.

    Args:
        path: its file.
        shape: what it is like.
        is_whole: whether there are zeros in the place of the hole, and the file has been there for an hour.
    """
    file = GgufFile(values=list(_values(shape)), tensors=list(_tensors(shape)))
    header = file.encode_header()
    left = sum(tensor.size + -tensor.size % 32 for tensor in file.tensors)
    with path.open("wb") as out:
        out.write(header)
        out.truncate(len(header) + left)
        while is_whole and left:
            left -= out.write(_ZEROS[:left])
    if is_whole:
        an_hour_ago = time.time() - 3600
        os.utime(path, (an_hour_ago, an_hour_ago))


def _values(shape: Shape) -> Iterator[tuple[str, Typed]]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]  # so that it can read any text
    kinds = [2, 3, 3, *[6] * 256, *[1] * (shape.vocabulary - len(tokens))]
    tokens += (f"t{number}" for number in range(shape.vocabulary - len(tokens)))
    yield "general.architecture", (STRING, shape.arch)
    numbers = {
        "context_length": 131_072,
        "embedding_length": shape.width,
        "block_count": shape.layers,
        "feed_forward_length": shape.forward,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.heads_kv,
        "attention.key_length": shape.head,
        "attention.value_length": shape.head,
    }
    if shape.window:
        numbers["attention.sliding_window"] = shape.window
    if shape.arch == "mamba":
        numbers |= {"attention.head_count": 0, "feed_forward_length": 0}
        numbers |= {"ssm.conv_kernel": 4, "ssm.inner_size": 2 * shape.width, "ssm.state_size": 16}
        numbers |= {"ssm.time_step_rank": shape.width // 16}
    if shape.arch == "deepseek2":
        numbers |= {"attention.head_count_kv": 1, "attention.key_length": 576, "attention.value_length": 512}
        numbers |= {"attention.key_length_mla": 192, "attention.value_length_mla": 128, "rope.dimension_count": 64}
        numbers |= {"attention.kv_lora_rank": 512, "attention.q_lora_rank": 384, "leading_dense_block_count": 9}
        numbers |= {"expert_feed_forward_length": 64, "expert_shared_count": 1, "vocab_size": shape.vocabulary}
    for key, number in numbers.items():
        yield f"{shape.arch}.{key}", (U32, number)
    yield f"{shape.arch}.attention.layer_norm_rms_epsilon", (F32, 1e-5)
    yield "tokenizer.ggml.model", (STRING, "llama")
    yield "tokenizer.ggml.tokens", (ARRAY, (STRING, tokens))
    yield "tokenizer.ggml.scores", (ARRAY, (F32, [0.0] * len(tokens)))
    yield "tokenizer.ggml.token_type", (ARRAY, (I32, kinds))
    yield "tokenizer.ggml.bos_token_id", (U32, 1)
    yield "tokenizer.ggml.eos_token_id", (U32, 2)


def _tensors(shape: Shape) -> Iterator[Tensor]:
    width = shape.width
    yield _tensor("token_embd", shape.code, width, shape.vocabulary)
    yield _tensor("output_norm", 0, width)
    if shape.arch != "gemma3":
        yield _tensor("output", shape.code, width, shape.vocabulary)
    for layer in range(shape.layers):
        for name, *sizes in _LAYERS[shape.arch](shape):
            is_small = len(sizes) == 1 or name in ("ssm_a", "ssm_conv1d")
            yield _tensor(f"blk.{layer}.{name}", 0 if is_small else shape.code, *sizes)


def _llama(shape: Shape) -> Iterator[tuple[str, *tuple[int, ...]]]:
    width, queries, keys = shape.width, shape.heads * shape.head, shape.heads_kv * shape.head
    yield "attn_norm", width
    yield "attn_q", width, queries
    yield "attn_k", width, keys
    yield "attn_v", width, keys
    yield "attn_output", queries, width
    yield from _forward(shape)


def _forward(shape: Shape) -> Iterator[tuple[str, *tuple[int, ...]]]:
    yield "ffn_norm", shape.width
    yield "ffn_gate", shape.width, shape.forward
    yield "ffn_up", shape.width, shape.forward
    yield "ffn_down", shape.forward, shape.width


def _gemma3(shape: Shape) -> Iterator[tuple[str, *tuple[int, ...]]]:
    yield from _llama(shape)
    yield from (("attn_q_norm", shape.head), ("attn_k_norm", shape.head))
    yield from (("post_attention_norm", shape.width), ("post_ffw_norm", shape.width))


def _mamba(shape: Shape) -> Iterator[tuple[str, *tuple[int, ...]]]:
    width, inner, rank = shape.width, 2 * shape.width, shape.width // 16
    yield "attn_norm", width
    yield "ssm_in", width, 2 * inner
    yield "ssm_conv1d", 4, inner
    yield "ssm_conv1d.bias", inner
    yield "ssm_x", inner, rank + 32
    yield "ssm_dt", rank, inner
    yield "ssm_dt.bias", inner
    yield "ssm_a", 16, inner
    yield "ssm_d", inner
    yield "ssm_out", inner, width


def _deepseek2(shape: Shape) -> Iterator[tuple[str, *tuple[int, ...]]]:
    width, heads = shape.width, shape.heads
    yield "attn_norm", width
    yield from (("attn_q_a_norm", 384), ("attn_kv_a_norm", 512))
    yield "attn_q_a", width, 384
    yield "attn_q_b", 384, heads * 192
    yield "attn_kv_a_mqa", width, 576
    yield "attn_k_b", 128, 512, heads
    yield "attn_v_b", 512, 128, heads
    yield "attn_output", heads * 128, width
    yield from _forward(shape)


_LAYERS = {"llama": _llama, "gemma3": _gemma3, "mamba": _mamba, "deepseek2": _deepseek2}


def _tensor(name: str, code: int, *sizes: int) -> Tensor:
    elements = 1
    for size in sizes:
        elements *= size
    kind = TENSOR_TYPES[code]
    has_no_suffix = name.endswith((".bias", ".ssm_a", ".ssm_d"))
    return Tensor(name if has_no_suffix else f"{name}.weight", sizes, code, elements // kind.block * kind.block_bytes)
