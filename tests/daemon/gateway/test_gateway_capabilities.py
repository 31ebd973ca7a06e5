"""What a model's header says of it, in llama-server's words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ggufs import STRING, U32, GgufFile, Tensor, small_model
from llamavisor import gguf
from llamavisor.catalog import FileId
from llamavisor.sections import ModelSpec
from llamavisord.gateway.capabilities import architecture_of, meta_of
from llamavisord.tiny_model import write_tiny_model


def spec_of(header: gguf.Header | None, **more: object) -> ModelSpec:
    """A model with that header."""
    known = {"files": (FileId(1, 1, 1000, 1),), "header": header, **more}
    return ModelSpec(name="model", path="/models/model.gguf", **known)


def header_of(file: GgufFile) -> gguf.Header:
    """The header of a file of this content."""
    data = file.encode()
    return gguf.parse(lambda offset, length: data[offset : offset + length], len(data))


def with_type(code: int | None, *, tensors: list[Tensor] | None = None) -> gguf.Header:
    """The header of a model that calls itself of this file type."""
    said = [] if code is None else [("general.file_type", (U32, code))]
    values = [("general.architecture", (STRING, "llama")), *said]
    return header_of(small_model(values=values, tensors=tensors or [Tensor("token_embd.weight", (32, 4), 8, 136)]))


def test_a_header_says_what_llama_server_says_of_a_loaded_model(tmp_path: Path) -> None:
    """The numbers are those of build b11434 for this very model, without the context that it would get."""
    path = tmp_path / "alpha.gguf"
    write_tiny_model(path, ["I", "am", "alpha"])
    assert meta_of(spec_of(gguf.read(path))) == {
        "vocab_type": 1,
        "n_vocab": 262,
        "n_ctx_train": 4096,
        "n_embd": 32,
        "n_params": 24032,
        "size": 96128,
        "ftype": "all F32",
    }


def test_what_a_file_does_not_say_is_left_out() -> None:
    """Rather than guessed; and of a file that could not be read nothing is said."""
    header = with_type(7)
    assert meta_of(spec_of(header)) == {"n_params": 128, "size": 136, "ftype": "Q8_0"}
    assert meta_of(spec_of(None)) == {}


def test_a_split_model_is_all_of_its_parts() -> None:
    """Its parameters are counted by the catalog, and its files are as large as its tensors but for their headers."""
    parts = tuple(FileId(1, number, 1000, 1) for number in range(3))
    meta = meta_of(spec_of(with_type(15), files=parts, parameter_count=999))
    assert (meta["n_params"], meta["size"], meta["ftype"]) == (999, 3000, "Q4_K - Medium")
    projector = replace(spec_of(with_type(15), files=parts[:2]), projector="/models/mmproj.gguf")
    assert meta_of(projector)["size"] == 136


@pytest.mark.parametrize(
    ("code", "title"),
    [
        (0, "all F32"),
        (1, "F16"),
        (18, "Q6_K"),
        (27, "IQ3_S mix - 3.66 bpw"),
        (38, "MXFP4 MoE"),
        (1024 + 17, "(guessed) Q5_K - Medium"),
        (999, "unknown, may not work"),
    ],
)
def test_a_file_type_has_llama_cpps_title(code: int, title: str) -> None:
    """Also one that a newer llama.cpp wrote, and one that was guessed when the file was made."""
    assert meta_of(spec_of(with_type(code)))["ftype"] == title


def test_a_file_type_that_is_not_said_is_guessed_as_llama_cpp_does() -> None:
    """By the type of the most tensors, not of the most bytes."""
    large = Tensor("token_embd.weight", (256, 64), 0, 65536)
    small = [Tensor(f"blk.{number}.attn_norm.weight", (256,), 12, 144) for number in range(3)]
    assert meta_of(spec_of(with_type(None, tensors=[large, *small])))["ftype"] == "(guessed) Q4_K - Medium"
    assert meta_of(spec_of(with_type(None, tensors=[large])))["ftype"] == "(guessed) all F32"


def test_a_projector_lets_a_model_see_and_hear() -> None:
    """In the order in which llama-server tells it; what comes out is text."""
    assert architecture_of(spec_of(None, senses=("image", "audio"))) == {
        "input_modalities": ["text", "image", "audio"],
        "output_modalities": ["text"],
    }
