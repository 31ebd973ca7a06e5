"""Makes a tiny GGUF model that a real llama-server loads and that says what it is told to say.

For the demo and the tests: nothing is downloaded, nothing is trained, and every machine gives the same answer.

The model is a `llama` whose attention and feed-forward weights are all zero. What reaches the output matrix is
then the embedding of the last token alone, and the output matrix becomes a lookup table from one token to the next:
any token of a prompt leads to the first word, each word to the one after it, the last word to the end of the text.

The format is described in ggml's docs/gguf.md; checked against llama-server b11434.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

_MAGIC = b"GGUF"
_VERSION = 3
_ALIGNMENT = 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_TENSOR_F32 = 0

_UNKNOWN, _CONTROL, _BYTE, _NORMAL = 2, 3, 6, 1
_BOS, _EOS, _UNK = 1, 2, 0
_WORD_START = "\u2581"
"""How SentencePiece writes the space before a word."""

_WIDTH = 32
"""Size of the embedding, rounded up to a multiple of this; llama.cpp computes in rows of 32 floats."""
_GAIN = 20.0
"""RMS normalisation makes 5.7 of the one in a row of 32, so the next token leads by 113: certain when sampled too."""


def write_tiny_model(
    path: Path,
    words: Sequence[str],
    *,
    loop: bool = False,
    n_layer: int = 1,
    n_ctx: int = 4096,
    pad_bytes: int = 0,
    pooling: int | None = None,
) -> None:
    """Put a model of about 100 KB at `path`, whole from the first moment on; it takes a few milliseconds.

    Args:
        path: file to write; an existing one is replaced.
        words: what the model answers to everything, joined by spaces; each word once.
        loop: begin again after the last word, until the client has enough.
        n_layer: number of layers, 28 KB each; 300 with `n_ctx` 100,000 take llama-server seconds to load.
        n_ctx: context length in tokens.
        pad_bytes: zero bytes after the end, a hole in the file that needs no room on disk. llama-server reads through
            it when it maps the file.
        pooling: llama.cpp's number of how vectors of tokens become one; 1 (mean) makes an embedding model of it.

    Raises:
        ValueError: no words, or a word twice (the table has one successor per token).
        OSError: the file cannot be written.
    """
    if not words or len(set(words)) != len(words):
        raise ValueError(f"a tiny model needs at least one word and each only once, not {list(words)}")
    width = -(-(len(words) + 1) // _WIDTH) * _WIDTH
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [_UNKNOWN, _CONTROL, _CONTROL, *([_BYTE] * 256)]
    first = len(tokens)
    tokens += [_WORD_START + word for word in words]
    kinds += [_NORMAL] * len(words)
    scores = struct.pack(f"<{len(tokens)}f", *[0.0] * len(tokens))
    kind_bytes = struct.pack(f"<{len(kinds)}i", *kinds)

    metadata = [
        _entry("general.architecture", _STRING, _string("llama")),
        _entry("general.file_type", _UINT32, struct.pack("<I", 0)),
        _entry("llama.context_length", _UINT32, struct.pack("<I", n_ctx)),
        _entry("llama.embedding_length", _UINT32, struct.pack("<I", width)),
        _entry("llama.block_count", _UINT32, struct.pack("<I", n_layer)),
        _entry("llama.feed_forward_length", _UINT32, struct.pack("<I", width)),
        _entry("llama.attention.head_count", _UINT32, struct.pack("<I", 1)),
        _entry("llama.attention.layer_norm_rms_epsilon", _FLOAT32, struct.pack("<f", 1e-5)),
        _entry("tokenizer.ggml.model", _STRING, _string("llama")),
        _entry("tokenizer.ggml.tokens", _ARRAY, _array(_STRING, len(tokens), map(_string, tokens))),
        _entry("tokenizer.ggml.scores", _ARRAY, _array(_FLOAT32, len(tokens), [scores])),
        _entry("tokenizer.ggml.token_type", _ARRAY, _array(_INT32, len(kinds), [kind_bytes])),
        _entry("tokenizer.ggml.bos_token_id", _UINT32, struct.pack("<I", _BOS)),
        _entry("tokenizer.ggml.eos_token_id", _UINT32, struct.pack("<I", _EOS)),
        _entry("tokenizer.ggml.unknown_token_id", _UINT32, struct.pack("<I", _UNK)),
        _entry("tokenizer.ggml.add_bos_token", _BOOL, b"\x01"),
    ]
    if pooling is not None:
        metadata.append(_entry("llama.pooling_type", _UINT32, struct.pack("<I", pooling)))
    ones, zeros = struct.pack("<f", 1.0) * width, bytes(4 * width * width)
    tensors = [
        ("token_embd.weight", (width, len(tokens)), _embedding(width, first, len(words))),
        ("output_norm.weight", (width,), ones),
        ("output.weight", (width, len(tokens)), _successors(width, first, len(words), loop=loop)),
    ]
    for layer in range(n_layer):
        tensors += [(f"blk.{layer}.{norm}.weight", (width,), ones) for norm in ("attn_norm", "ffn_norm")]
        tensors += [
            (f"blk.{layer}.{matrix}.weight", (width, width), zeros)
            for matrix in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        ]
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("wb") as file:
        file.write(_header(metadata, tensors))
        file.writelines(data for _, _, data in tensors)
        file.truncate(file.tell() + pad_bytes)
    # The kernel's clock for files ticks every few milliseconds, and a rename in the same tick as the last write could
    # not be told from a write.
    now = time.time()
    os.utime(draft, (now, now - 0.1))
    draft.replace(path)


def _embedding(width: int, first: int, n_words: int) -> bytes:
    """One row per token: every ordinary token lies on axis 0, word i on axis i + 1."""
    return _row(width, 0) * first + b"".join(_row(width, at + 1) for at in range(n_words))


def _successors(width: int, first: int, n_words: int, *, loop: bool) -> bytes:
    """One row per token, holding the gain at the axis of every token that it follows."""
    table = bytearray(4 * width * (first + n_words))
    followers = [first, *range(first + 1, first + n_words), first if loop else _EOS]
    for axis, token in enumerate(followers):
        struct.pack_into("<f", table, 4 * (token * width + axis), _GAIN)
    return bytes(table)


def _row(width: int, axis: int) -> bytes:
    return bytes(4 * axis) + struct.pack("<f", 1.0) + bytes(4 * (width - axis - 1))


def _header(metadata: Sequence[bytes], tensors: Sequence[tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """Everything before the data of the tensors, whose sizes are all multiples of the alignment."""
    pieces = [_MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)), *metadata]
    offset = 0
    for name, shape, data in tensors:
        shape_bytes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        pieces += [_string(name), shape_bytes, struct.pack("<IQ", _TENSOR_F32, offset)]
        offset += len(data)
    header = b"".join(pieces)
    return header + bytes(-len(header) % _ALIGNMENT)


def _entry(key: str, kind: int, value: bytes) -> bytes:
    return _string(key) + struct.pack("<I", kind) + value


def _array(kind: int, count: int, values: Iterable[bytes]) -> bytes:
    return struct.pack("<IQ", kind, count) + b"".join(values)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
