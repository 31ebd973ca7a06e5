"""The header reader held against the `gguf` package, and its tables against llama.cpp itself."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import gguf as package
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType, LlamaFileType, PoolingType

from fakes.bare_router import BareRouter
from llamavisor import gguf
from llamavisor.gguf import Header, Kind, Split
from llamavisor.gguf.tensortypes import FILE_TYPES, REMOVED_TYPES, TENSOR_TYPES
from llamavisord.tiny_model import write_tiny_model

ARCHITECTURES = sorted(set(MODEL_ARCH_NAMES.values()) - {"clip"})


def write_model(path: Path, architecture: str, dice: random.Random, **how: object) -> None:
    """Write a model with every number drawn, per layer or for all layers, and some left out."""
    writer = package.GGUFWriter(path, architecture, **how)
    layers = dice.randint(1, 5)
    writer.add_block_count(layers)
    for add, value in (
        (writer.add_name, f"A {architecture} of {layers}"),
        (writer.add_size_label, "8x7B"),
        (writer.add_context_length, dice.randint(1, 2**20)),
        (writer.add_embedding_length, 64 * dice.randint(1, 4)),
        (writer.add_head_count, dice.choice([4, [dice.randint(1, 8) for _ in range(layers)]])),
        (writer.add_head_count_kv, dice.choice([2, [dice.randint(0, 4) for _ in range(layers)]])),
        (writer.add_key_length, dice.randint(1, 256)),
        (writer.add_value_length, dice.randint(1, 256)),
        (writer.add_sliding_window, dice.randint(1, 4096)),
        (writer.add_sliding_window_pattern, dice.choice([6, [dice.random() < 0.5 for _ in range(layers)]])),
        (writer.add_expert_count, dice.randint(1, 256)),
        (writer.add_expert_used_count, dice.randint(1, 8)),
        (writer.add_rope_dimension_count, dice.randint(1, 128)),
        (writer.add_rope_freq_base, dice.choice([1e4, 5e5, 1e6])),
        (writer.add_rope_scaling_type, package.RopeScalingType.YARN),
        (writer.add_rope_scaling_factor, 4.0),
        (writer.add_causal_attention, False),
        (writer.add_pooling_type, dice.choice(list(PoolingType))),
        (writer.add_file_type, dice.choice(list(LlamaFileType))),
        (writer.add_chat_template, "{{ messages }}"),
        (writer.add_custom_alignment, dice.choice([8, 32, 64, 256])),
    ):
        if dice.random() < 0.8:
            add(value)
    writer.add_tokenizer_model(dice.choice(["llama", "gpt2", "bert"]))
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"{i}é" for i in range(dice.randint(1, 500))])
    writer.add_token_scores([0.0] * 7)
    for number in range(dice.randint(1, 12)):
        code = dice.choice([code for code in GGMLQuantizationType if code != GGMLQuantizationType.Q8_1])
        _, block_bytes = GGML_QUANT_SIZES[code]
        shape = [dice.randint(1, 3) for _ in range(dice.randint(0, 3))]
        data = np.zeros((*shape, dice.randint(1, 3) * block_bytes), np.uint8)
        writer.add_tensor(f"blk.{number}.weight", data, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_same(header: Header, reader: package.GGUFReader) -> None:
    """Every answer of ours is the one that the package's fields and tensors give."""

    def field(key: str, default: object = None) -> object:
        found = reader.get_field(key)
        return default if found is None else found.contents()

    def per_layer(key: str) -> object:
        found = field(key)
        if isinstance(found, list):
            found = tuple(int(item) for item in found)
            return found[0] if len(set(found)) == 1 else found
        return found

    arch = header.architecture
    first_heads = per_layer(f"{arch}.attention.head_count")
    heads = first_heads[0] if isinstance(first_heads, tuple) else first_heads
    length = field(f"{arch}.embedding_length", 0) // heads if heads else None
    key_length = field(f"{arch}.attention.key_length", length or None)
    pooling = field(f"{arch}.pooling_type")
    assert arch == field("general.architecture")
    assert header.name == field("general.name", "")
    assert header.size_label == field("general.size_label", "")
    assert header.context_length == field(f"{arch}.context_length")
    assert header.embedding_length == field(f"{arch}.embedding_length")
    assert header.layer_count == field(f"{arch}.block_count")
    assert header.head_count == first_heads
    assert header.head_count_kv == (
        per_layer(f"{arch}.attention.head_count_kv")
        if reader.get_field(f"{arch}.attention.head_count_kv")
        else first_heads
    )
    assert header.key_length == key_length
    assert header.value_length == field(f"{arch}.attention.value_length", length or None)
    assert header.sliding_window == field(f"{arch}.attention.sliding_window")
    assert header.sliding_window_pattern == per_layer(f"{arch}.attention.sliding_window_pattern")
    assert header.expert_count == field(f"{arch}.expert_count")
    assert header.expert_used_count == field(f"{arch}.expert_used_count")
    assert header.rope_dimension_count == field(f"{arch}.rope.dimension_count", key_length)
    assert header.rope_freq_base == field(f"{arch}.rope.freq_base")
    assert header.rope_scaling == field(f"{arch}.rope.scaling.type", "")
    assert header.rope_scaling_factor == field(f"{arch}.rope.scaling.factor")
    assert header.is_causal == field(f"{arch}.attention.causal", default=True)
    assert header.pooling == (None if pooling is None else PoolingType(pooling).name.lower())
    assert header.tokenizer == field("tokenizer.ggml.model", "")
    assert header.tokenizer_pre == field("tokenizer.ggml.pre", "")
    tokens = reader.get_field("tokenizer.ggml.tokens")
    assert header.vocabulary_size == (None if tokens is None else len(tokens.data))
    assert header.chat_template == field("tokenizer.chat_template")
    assert header.file_type == field("general.file_type")
    assert_same_tensors(header, reader)


def assert_same_tensors(header: Header, reader: package.GGUFReader) -> None:
    """Counts, sizes and the place of the data are those of the package."""
    assert header.tensor_count == len(reader.tensors)
    assert header.parameter_count == sum(tensor.n_elements for tensor in reader.tensors)
    assert header.data_offset == reader.data_offset
    ends = [int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors]
    assert header.min_file_bytes == max(ends)
    assert header.is_whole
    counts = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    sizes: Counter[str] = Counter()
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    assert {share.type: (share.tensors, share.size_bytes) for share in header.type_mix} == {
        name: (counts[name], sizes[name]) for name in counts
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_package_gives_the_same_answers(tmp_path: Path, architecture: str) -> None:
    """Files of every architecture that the package can write are read as the package reads them."""
    dice = random.Random(architecture)
    for number in range(3):
        path = tmp_path / f"{number}.gguf"
        write_model(path, architecture, dice)
        assert_same(gguf.read(path), package.GGUFReader(path))


def test_the_parts_of_a_split_file_are_told(tmp_path: Path) -> None:
    """Parts as the package splits them: each says which it is, the first alone says what they are."""
    write_model(tmp_path / "m.gguf", "llama", random.Random(4), split_max_tensors=2)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) > 2
    headers = [gguf.read(part) for part in parts]
    total = sum(header.tensor_count for header in headers)
    assert [header.split for header in headers] == [Split(at, len(parts), total) for at in range(len(parts))]
    assert [header.kind for header in headers[1:]] == [Kind.PART] * (len(parts) - 1)
    assert headers[0].architecture == "llama"
    for header, part in zip(headers, parts, strict=True):
        assert_same_tensors(header, package.GGUFReader(part))


def test_a_first_part_without_tensors_is_the_model(tmp_path: Path) -> None:
    """With `small_first_shard` the first part is header only; it still says what they all are."""
    write_model(tmp_path / "m.gguf", "llama", random.Random(4), split_max_tensors=2, small_first_shard=True)
    header = gguf.read(min(tmp_path.iterdir()))
    assert (header.architecture, header.tensor_count) == ("llama", 0)
    assert header.kind not in (Kind.VOCABULARY, Kind.PART, Kind.OTHER)
    assert header.is_whole


def test_a_big_endian_file_of_the_package_is_refused(tmp_path: Path) -> None:
    """What the package writes for other machines is recognised as that."""
    write_model(tmp_path / "m.gguf", "llama", random.Random(4), endianess=package.GGUFEndian.BIG)
    with pytest.raises(gguf.GgufError, match="big-endian"):
        gguf.read(tmp_path / "m.gguf")


def test_the_package_knows_no_type_that_is_not_here() -> None:
    """Types of tensors and files, their names and sizes, are those of the package; it calls Q8_1, wrongly, 40 bytes."""
    ours = {code: (kind.name, kind.block, kind.block_bytes) for code, kind in TENSOR_TYPES.items()}
    theirs = {int(code): (code.name, *sizes) for code, sizes in GGML_QUANT_SIZES.items()}
    del ours[GGMLQuantizationType.Q8_1], theirs[GGMLQuantizationType.Q8_1]
    assert theirs.items() <= ours.items()
    names = {int(code): code.name.removeprefix("MOSTLY_").removeprefix("ALL_") for code in LlamaFileType}
    del names[LlamaFileType.GUESSED]
    assert names.items() <= FILE_TYPES.items()


_TABLES = """
import ctypes, json, sys
ggml = ctypes.CDLL(sys.argv[1] + "/libggml-base.so")
llama = ctypes.CDLL(sys.argv[1] + "/libllama.so")
ggml.ggml_type_name.restype = llama.llama_ftype_name.restype = ctypes.c_char_p
ggml.ggml_blck_size.restype = ggml.ggml_type_size.restype = ctypes.c_int64
types = {}
for code in json.loads(sys.argv[2]):
    types[code] = [ggml.ggml_type_name(code).decode(), ggml.ggml_blck_size(code), ggml.ggml_type_size(code)]
files = {code: llama.llama_ftype_name(code).decode() for code in range(64)}
print(json.dumps([types, files]))
"""


@pytest.mark.real
def test_llama_cpp_has_the_same_tables(llama_server: Path) -> None:
    """Sizes and names of tensor types, those that were removed, and names of file types are llama.cpp's own."""
    if not llama_server.with_name("libggml-base.so").exists():
        pytest.skip("this llama-server has its libraries inside")
    codes = json.dumps([*TENSOR_TYPES, *REMOVED_TYPES])
    command = [sys.executable, "-I", "-S", "-c", _TABLES, str(llama_server.parent), codes]
    types, files = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    for code, kind in TENSOR_TYPES.items():
        assert types[str(code)] == [types[str(code)][0], kind.block, kind.block_bytes]
        assert types[str(code)][0].upper() == kind.name
    assert {types[str(code)][1] for code in REMOVED_TYPES} == {0}
    for code, said in files.items():
        known = FILE_TYPES.get(int(code))
        assert (known is None) == said.startswith("unknown"), (code, said)
        # llama.cpp says "Q4_K - Medium", "IQ2_XXS - 2.0625 bpw" and "IQ3_S mix" for what people call by other names.
        spelled = said.replace(" - Small", "_S").replace(" - Medium", "_M").replace(" - Large", "_L").split(" - ")[0]
        spelled = {"all F32": "F32", "Q2_K_M": "Q2_K", "IQ3_S mix": "IQ3_M", "MXFP4 MoE": "MXFP4_MOE"}.get(
            spelled, spelled
        )
        assert known is None or known == spelled


def _aligned_copy(source: Path, target: Path, alignment: int) -> None:
    """Write a model again with more room between its tensors."""
    reader = package.GGUFReader(source)
    writer = package.GGUFWriter(target, "llama")
    writer.add_custom_alignment(alignment)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.real
def test_llama_server_loads_what_is_whole(llama_server: Path, tmp_path: Path) -> None:
    """A model without the padding after its last tensor is whole and loads; one byte shorter it is not and does not."""
    models = tmp_path / "models"
    models.mkdir()
    write_tiny_model(tmp_path / "tiny.gguf", ["whole"])
    _aligned_copy(tmp_path / "tiny.gguf", models / "padded.gguf", 8192)
    raw = (models / "padded.gguf").read_bytes()
    needed = gguf.read(models / "padded.gguf").min_file_bytes
    assert needed < len(raw)
    (models / "exact.gguf").write_bytes(raw[:needed])
    (models / "short.gguf").write_bytes(raw[: needed - 1])
    assert gguf.read(models / "exact.gguf").is_whole
    assert not gguf.read(models / "short.gguf").is_whole
    with BareRouter(llama_server, tmp_path / "router", models) as router:
        router.load("exact")
        with router.events() as events:
            assert router.call("POST", "/models/load", {"model": "short"}).status == 200
            ended = events.wait_for_status("short", "unloaded")
        assert ended["data"]["exit_code"] != 0
        assert "not within the file bounds" in router.stdout + router.stderr
