"""What the header of a GGUF file says, and what keeps it from being read."""

from __future__ import annotations

import os
import pickle
import socket
from pathlib import Path

import pytest

from ggufs import ARRAY, BOOL, F32, I32, STRING, U8, U16, U32, GgufFile, Tensor, Typed, small_model
from llamavisor import gguf
from llamavisor.errors import LlamavisorError
from llamavisor.gguf import GgufError, Header, Kind, Places, Projector, Recurrence, Split, TypeShare
from llamavisor.gguf.chatfamily import find_family


def parse(raw: bytes) -> Header:
    """The header of a file that is only in memory."""
    return gguf.parse(lambda offset, length: raw[offset : offset + length], len(raw))


def model(*values: tuple[str | bytes, Typed], architecture: str = "llama", **changes: object) -> Header:
    """The header of a file with these values and a tensor."""
    first: tuple[str, Typed] = ("general.architecture", (STRING, architecture))
    return parse(GgufFile(**{"values": [first, *values], "tensors": [Tensor("a.weight")], **changes}).encode())


def refusal(raw: bytes) -> GgufError:
    """Why a file is refused."""
    with pytest.raises(GgufError) as caught:
        parse(raw)
    return caught.value


def test_a_header_is_read_from_a_file(tmp_path: Path) -> None:
    """Everything that a small file says comes out, whether it is named by a Path, a string or bytes."""
    path = tmp_path / "small.gguf"
    path.write_bytes(small_model().encode())
    header = gguf.read(path)
    assert header == gguf.read(str(path)) == gguf.read(os.fsencode(path))
    assert (header.kind, header.version) == (Kind.MODEL, 3)
    assert (header.architecture, header.name) == ("llama", "Small")
    assert (header.context_length, header.embedding_length, header.layer_count) == (4096, 64, 2)
    assert (header.head_count, header.head_count_kv) == ((4, 2), (4, 2))
    assert (header.tokenizer, header.vocabulary_size) == ("gpt2", 4)
    assert (header.chat_template, header.chat_family) == ("<|im_start|>{{ messages }}", "chatml")
    assert (header.parameter_count, header.tensor_count, header.quantization) == (256 + 64, 2, "Q4_0")
    assert header.type_mix == (TypeShare("F32", 1, 64, 256), TypeShare("Q4_0", 1, 256, 144))
    assert header.data_bytes == 160 + 256
    assert header.min_file_bytes == header.file_bytes == path.stat().st_size
    assert header.is_whole


def test_version_2_is_read_as_version_3() -> None:
    """The two differ in the order of bytes only, and only version 3 allows another one."""
    assert parse(small_model(version=2).encode()).version == 2


def test_what_a_file_does_not_say_is_none() -> None:
    """A header without numbers has none, instead of zeros that would be computed with."""
    header = model()
    assert header.context_length is header.layer_count is header.head_count is header.head_count_kv is None
    assert header.key_length is header.expert_count is header.pooling is header.vocabulary_size is None
    assert header.chat_template is header.chat_family is header.split is header.projector is None
    assert (header.name, header.tokenizer, header.rope_scaling) == ("", "", "")
    assert header.is_causal


def test_heads_share_the_embedding_where_nothing_else_is_said() -> None:
    """Keys and values are as long as llama.cpp makes them: what is said, else the embedding over the heads."""
    heads = ("llama.attention.head_count", (U32, 4))
    plain = model(("llama.embedding_length", (U32, 64)), heads)
    assert (plain.key_length, plain.value_length, plain.rope_dimension_count, plain.head_count_kv) == (16, 16, 16, 4)
    said = model(("llama.embedding_length", (U32, 64)), heads, ("llama.attention.key_length", (U32, 32)))
    assert (said.key_length, said.value_length, said.rope_dimension_count) == (32, 16, 32)


def test_what_varies_from_layer_to_layer_is_kept() -> None:
    """Heads and windows come per layer where they vary, and as one number where they do not."""
    header = model(
        ("llama.attention.head_count", (ARRAY, (I32, [8, 8, 8]))),
        ("llama.attention.head_count_kv", (ARRAY, (U32, [2, 0, 2]))),
        ("llama.attention.sliding_window", (U32, 512)),
        ("llama.attention.sliding_window_pattern", (ARRAY, (BOOL, [True, True, False]))),
    )
    assert (header.head_count, header.head_count_kv) == (8, (2, 0, 2))
    assert (header.sliding_window, header.sliding_window_pattern) == (512, (1, 1, 0))


def test_what_decides_about_memory_is_laid_out() -> None:
    """Recurrent layers, latent attention, windows of another size and networks per layer are told apart."""
    said = {"attention.key_length_swa": 128, "attention.value_length_swa": 64, "attention.key_length_mla": 192}
    said |= {"attention.indexer.key_length": 32, "attention.shared_kv_layers": 3, "full_attention_interval": 4}
    said |= {"ssm.conv_kernel": 4, "ssm.inner_size": 512, "ssm.state_size": 16, "ssm.group_count": 2}
    said |= {"wkv.head_size": 8, "token_shift_count": 1, "shortconv.l_cache": 5, "kda.head_dim": 6}
    said |= {"expert_feed_forward_length": 99}
    values = [(f"llama.{key}", (U32, number)) for key, number in said.items()]
    arrays = {
        "feed_forward_length": (ARRAY, (I32, [7, 0])),
        "attention.recurrent_layers": (ARRAY, (BOOL, [False, True])),
    }
    layout = model(*values, *((f"llama.{key}", typed) for key, typed in arrays.items())).layout
    assert (layout.key_length_swa, layout.value_length_swa, layout.key_length_mla) == (128, 64, 192)
    assert (layout.indexer_key_length, layout.shared_kv_layer_count, layout.full_attention_interval) == (32, 3, 4)
    assert layout.recurrence == Recurrence(4, 512, 16, 2, 8, 1, 5, 6)
    assert (layout.feed_forward_length, layout.expert_feed_forward_length) == ((7, 0), 99)
    assert layout.recurrent_layers == (0, 1)
    plain = model().layout
    assert plain.recurrence is plain.key_length_mla is plain.feed_forward_length is None


def test_every_byte_of_a_tensor_has_its_place() -> None:
    """Input, layers, their experts and the rest are summed up by the tensors' names."""
    tensors = [
        Tensor("token_embd.weight", (32,), 0, 128),
        Tensor("blk.0.attn_q.weight", (64,), 0, 256),
        Tensor("blk.2.ffn_up_exps.weight", (96,), 0, 384),
        Tensor("blk.2.ffn_norm.weight", (32,), 0, 128),
        Tensor("blk.x.odd", (8,), 0, 32),
        Tensor("output.weight", (16,), 0, 64),
    ]
    assert model(tensors=tensors).layout.places == Places(128, (256, 0, 512), (0, 0, 384), 96)
    far = [Tensor("blk.99999.a", (8,), 0, 32), Tensor("blk.123456.a", (8,), 0, 32)]
    assert model(tensors=far).layout.places == Places(0, (), (), 64)
    newer = [Tensor("blk.1.a", (8,), 900, 64), Tensor("output.weight", (8,), 0, 32, offset=64)]
    assert model(tensors=newer).layout.places == Places(0, (0, 64), (0, 0), 32)


def test_a_value_of_another_type_is_as_good_as_none() -> None:
    """What only informs does not condemn a file: whether such a model loads is for llama-server to say."""
    header = model(
        ("llama.context_length", (STRING, "many")),
        ("llama.block_count", (I32, -1)),
        ("llama.embedding_length", (BOOL, True)),
        ("llama.attention.head_count", (ARRAY, (F32, [1.5]))),
        ("general.name", (U32, 7)),
        ("llama.attention.head_count_kv", (ARRAY, (U32, []))),
    )
    assert header.context_length is header.layer_count is header.embedding_length is header.head_count is None
    assert header.name == ""


def test_the_order_of_values_does_not_matter() -> None:
    """What is said about an architecture counts also before the architecture is said."""
    values = [("qwen3.context_length", (U32, 7)), ("general.architecture", (STRING, "qwen3"))]
    assert parse(GgufFile(values, [Tensor("a")]).encode()).context_length == 7


def test_only_the_values_of_its_architecture_count() -> None:
    """Keys of another architecture, left over by a converter, are not taken for its own."""
    assert model(("qwen3.context_length", (U32, 7))).context_length is None


@pytest.mark.parametrize(
    ("architecture", "values", "tensors", "kind"),
    [
        ("llama", {}, ["token_embd.weight"], Kind.MODEL),
        ("bert", {}, ["token_embd.weight"], Kind.EMBEDDING),
        ("qwen3", {"qwen3.pooling_type": (U32, 3)}, ["token_embd.weight"], Kind.EMBEDDING),
        ("qwen3", {"qwen3.pooling_type": (U32, 4)}, ["token_embd.weight"], Kind.RERANK),
        ("llama", {"llama.pooling_type": (U32, 0)}, ["token_embd.weight"], Kind.MODEL),
        ("bert", {"bert.pooling_type": (U32, 4)}, ["token_embd.weight"], Kind.RERANK),
        ("bert", {}, ["token_embd.weight", "cls.output.weight"], Kind.RERANK),
        ("bert", {"bert.pooling_type": (U32, 2)}, ["cls.weight"], Kind.EMBEDDING),
        ("clip", {"general.type": (STRING, "mmproj")}, ["v.patch_embd.weight"], Kind.PROJECTOR),
        ("llama", {"general.type": (STRING, "adapter"), "adapter.type": (STRING, "lora")}, ["a.lora_a"], Kind.LORA),
        ("llama", {"general.type": (STRING, "adapter")}, ["a"], Kind.OTHER),
        ("controlvector", {"controlvector.model_hint": (STRING, "llama")}, ["direction.1"], Kind.CONTROL_VECTOR),
        ("eagle3", {}, ["fc.weight"], Kind.DRAFT),
        ("llama", {"tokenizer.ggml.tokens": (ARRAY, (STRING, ["a"]))}, [], Kind.VOCABULARY),
        ("llama", {"split.count": (U16, 2), "split.no": (U16, 0)}, [], Kind.MODEL),
        ("", {"split.count": (U16, 2), "split.no": (U16, 1)}, ["a"], Kind.PART),
        ("", {"general.type": (STRING, "imatrix")}, ["a.in_sum2"], Kind.IMATRIX),
        ("", {}, ["a"], Kind.OTHER),
    ],
)
def test_the_purpose_of_a_file_is_told(
    architecture: str, values: dict[str, Typed], tensors: list[str], kind: Kind
) -> None:
    """Models, embedding models, rerankers, projectors, drafts and what changes other models are told apart."""
    file = GgufFile(list(values.items()), [Tensor(name) for name in tensors])
    if architecture:
        file.values = [("general.architecture", (STRING, architecture)), *file.values]
    assert parse(file.encode()).kind is kind


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        (["token_embd.weight", "blk.47.attn_norm.weight", "blk.47.nextn.eh_proj.weight"], Kind.DRAFT),
        (["blk.0.attn_norm.weight", "blk.47.nextn.eh_proj.weight"], Kind.MODEL),
        (["token_embd.weight", "blk.x.attn_norm.weight"], Kind.MODEL),
    ],
)
def test_a_file_of_prediction_layers_alone_is_a_draft(tensors: list[str], kind: Kind) -> None:
    """Layers for multi-token prediction without the model before them are of use only beside that model."""
    numbers = [("glm4moe.block_count", (U32, 48)), ("glm4moe.nextn_predict_layers", (U32, 1))]
    header = model(*numbers, architecture="glm4moe", tensors=[Tensor(name) for name in tensors])
    assert (header.kind, header.nextn_layer_count) == (kind, 1)


def test_a_control_vector_names_the_model_it_is_for() -> None:
    """Its own architecture is no architecture; what it hints at is."""
    hint = ("controlvector.model_hint", (STRING, "mistral3"))
    assert model(hint, architecture="controlvector").architecture == "mistral3"


def test_a_projector_says_what_it_adds() -> None:
    """Vision or audio, llama.cpp's name of the projector, and the size that the model's embedding must have."""
    header = model(
        ("clip.has_vision_encoder", (BOOL, True)),
        ("clip.projector_type", (STRING, "gemma3")),
        ("clip.vision.projection_dim", (U32, 2560)),
        architecture="clip",
    )
    assert header.projector == Projector("gemma3", has_vision=True, has_audio=False, projection_length=2560)


def test_a_part_of_a_split_file_says_which() -> None:
    """The number, the count and the tensors of all parts together; a file split into one is not split."""
    numbers = [("split.no", (U16, 2)), ("split.count", (U16, 3)), ("split.tensors.count", (I32, 99))]
    assert parse(GgufFile(numbers, [Tensor("a")]).encode()).split == Split(2, 3, 99)
    assert parse(GgufFile([("split.count", (U16, 1))], [Tensor("a")]).encode()).split is None


@pytest.mark.parametrize(
    ("file_type", "codes", "name"),
    [
        ((U32, 15), [12], "Q4_K_M"),
        ((U32, 38), [39], "MXFP4_MOE"),
        ((U32, 0), [0], "F32"),
        ((U32, 1024 + 15), [8], "Q4_K_M"),
        ((U32, 999), [12, 0], "Q4_K"),
        (None, [0, 14, 14], "Q6_K"),
        (None, [], ""),
    ],
)
def test_the_quantization_has_the_name_that_people_use(file_type: Typed | None, codes: list[int], name: str) -> None:
    """The file type as llama-quantize spells it; without one that is known, the type that takes the most bytes."""
    kinds = {0: (1, 1024), 8: (1, 272), 12: (16, 2304), 14: (16, 3360), 39: (1, 136)}
    tensors = [Tensor(f"{at}", (256, kinds[code][0]), code, kinds[code][1]) for at, code in enumerate(codes)]
    header = model(*([("general.file_type", file_type)] if file_type else []), tensors=tensors)
    assert header.quantization == name


@pytest.mark.parametrize(
    ("family", "template"),
    [
        ("chatml", "<|im_start|>system"),
        ("qwen", "<|im_start|>system\nYou are Qwen"),
        ("llama3", "<|start_header_id|>user<|end_header_id|>"),
        ("llama4", "<|header_start|>user<|header_end|>"),
        ("llama2", "[INST] <<SYS>>"),
        ("mistral-v1", "{{ ' [INST] ' + system_message }}"),
        ("mistral-v3", "[AVAILABLE_TOOLS]{{ '[INST]' }}"),
        ("mistral-v3-tekken", '[AVAILABLE_TOOLS]{{ "[INST]" }}'),
        ("mistral-v7", "[SYSTEM_PROMPT][INST]"),
        ("gemma", "<start_of_turn>user"),
        ("phi3", "<|user|>hi<|end|><|assistant|>"),
        ("phi4", "<|im_start|>user<|im_sep|>"),
        ("deepseek3", "<｜User｜>hi<｜Assistant｜>"),  # noqa: RUF001
        ("command-r", "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>"),
        ("gpt-oss", "<|start|>assistant<|channel|>final<|message|>"),
        ("granite", "<|start_of_role|>user"),
        (None, "{{ messages }}"),
        (None, ""),
    ],
)
def test_a_chat_template_is_told_by_what_it_writes(family: str | None, template: str) -> None:
    """The usual families are recognised; anything else is no family instead of a wrong one."""
    assert find_family(template) == family


def test_a_chat_template_that_is_too_long_is_left_out() -> None:
    """One of 256 KiB is kept as it is; a longer one is not, and the rest of the header is read."""
    longest = "<|im_start|>\n".ljust(256 * 1024, "x")
    kept = model(("tokenizer.chat_template", (STRING, longest)), ("general.name", (STRING, "after")))
    assert (kept.chat_template, kept.chat_family, kept.name) == (longest, "chatml", "after")
    left = model(("tokenizer.chat_template", (STRING, longest + "x")), ("general.name", (STRING, "after")))
    assert (left.chat_template, left.chat_family, left.name) == (None, None, "after")


def test_text_is_fit_to_be_shown() -> None:
    """Bytes that are no UTF-8, line breaks, escapes and what follows a zero byte do no harm in a terminal."""
    assert model(("general.name", (STRING, b"a\xffb"))).name == "a\ufffdb"
    assert model(("general.name", (STRING, "a\n\x1b[31mb"))).name == "a\\n\\x1b[31mb"
    assert model(("general.name", (STRING, b"a\0b"))).name == "a"
    assert len(model(("general.name", (STRING, "x" * 100_000))).name) == 1024


@pytest.mark.parametrize("strings", [["x"] * 5, ["x" * 1000] * 5, [""] * 300_000, ["x" * 300_000, "y", "z" * 600_000]])
def test_a_list_of_strings_is_passed_over(strings: list[str]) -> None:
    """Short lists, long lists, and strings longer than what is read at once: what comes after them is read."""
    header = model(("tokenizer.ggml.tokens", (ARRAY, (STRING, strings))), ("general.name", (STRING, "after")))
    assert (header.vocabulary_size, header.name) == (len(strings), "after")


def test_a_file_without_tensors_needs_no_data() -> None:
    """A vocabulary alone ends with its header, without padding."""
    raw = GgufFile([("general.architecture", (STRING, "llama"))]).encode()
    header = parse(raw)
    assert (header.tensor_count, header.parameter_count, header.data_bytes) == (0, 0, 0)
    assert header.min_file_bytes == len(raw)
    assert header.is_whole


def test_the_padding_after_the_last_tensor_may_be_missing() -> None:
    """llama.cpp needs the last tensor and not its padding; it pads to what the file says."""
    value = ("general.alignment", (U32, 256))
    raw = GgufFile([value], [Tensor("a", (8,), 24, 8), Tensor("b", (8,), 24, 8)], alignment=256).encode()
    header = parse(raw)
    assert header.data_offset % 256 == 0
    assert (header.data_bytes, header.last_tensor_bytes) == (256 + 8, 8)
    assert parse(raw[: header.min_file_bytes]).is_whole
    assert not parse(raw[: header.min_file_bytes - 1]).is_whole


def test_a_type_that_is_newer_than_this_program_is_no_error() -> None:
    """The llama-server in use may know it; its size is where the next tensor begins."""
    tensors = [Tensor("a", (64, 2), 77, 96), Tensor("b", (32,), 0, 128), Tensor("c", (10,), 78, 5)]
    header = model(tensors=tensors)
    assert header.type_mix == (
        TypeShare("F32", 1, 32, 128),
        TypeShare("type 77", 1, 128, 96),
        TypeShare("type 78", 1, 10, 0),
    )
    assert (header.data_bytes, header.parameter_count) == (96 + 128, 128 + 32 + 10)
    askew = [Tensor("a", (64, 2), 77, 96), Tensor("b", offset=97)]
    assert "would begin at 97 instead of 0" in refusal(small_model(tensors=askew).encode()).reason


def replaced(what: str, value: int, *, nth: int = 0) -> tuple[bytes, GgufFile]:
    """A small model with one of its numbers replaced."""
    file = small_model()
    raw = bytearray(file.encode())
    place = file.find(what, nth)
    raw[place.offset : place.offset + place.size] = (value % 2 ** (8 * place.size)).to_bytes(place.size, "little")
    return bytes(raw), file


_TOKENS = 1
"""Number of the array that holds the tokens."""


@pytest.mark.parametrize(
    ("what", "nth", "value", "where", "reason"),
    [
        ("version", 0, 0, "version", "version 0 is not known"),
        ("version", 0, 1, "version", "version 1 of 2023"),
        ("version", 0, 4, "version", "version 4 is not known"),
        ("version", 0, 0x03000000, "version", "big-endian"),
        ("tensor count", 0, 2**63, "tensor count", "tensors"),
        ("tensor count", 0, 1_000_000, "tensor count", "1000000 tensors"),
        ("tensor count", 0, 1000, "key length", "the file ends at"),
        ("value count", 0, 1_000_000, "value count", "1000000 values"),
        ("value count", 0, 2**64 - 1, "value count", "-1 values"),
        ("key length", 0, 0, "key length", "the key of value 0 would have 0 bytes"),
        ("key length", 0, 2**40, "key length", "the key of value 0 would have 1099511627776 bytes"),
        ("value type", 1, 13, "value type", "the value of general.name is of type 13, which GGUF does not have"),
        ("value type", 0, 9, "value type", "general.architecture is of type array; llama.cpp takes only string"),
        ("string length", 0, 2**63, "after", "beyond any header"),
        ("string length", 0, 5000, "after", "the file ends at"),
        ("array type", 0, 9, "array type", "an array of arrays"),
        ("array type", 0, 99, "array type", "an array of type 99"),
        ("array length", 0, 2**64 - 1, "after", "beyond any header"),
        ("array length", _TOKENS, 2**64 - 1, "after", "strings, more than any model"),
        ("array length", _TOKENS, 4_000_000, "after", "the file ends at"),
        ("string length", 6, 2**63, "string length", "beyond any header"),
        ("name length", 0, 64, "name length", "the name of tensor 0 would have 64 bytes"),
        ("dimension count", 0, 5, "dimension count", "5 dimensions"),
        ("dimension", 0, -1, "name length", "-1"),
        ("dimension", 1, 2**62, "name length", "elements"),
        ("dimension", 0, 33, "name length", "rows of 33, and Q4_0 stores 32 together"),
        ("tensor type", 0, 4, "name length", "Q4_2, which llama.cpp no longer reads"),
        ("tensor type", 0, -1, "name length", "type -1"),
        ("tensor type", 0, 2**30, "name length", "which ggml does not have"),
        ("tensor offset", 0, 32, "name length", "would begin at 32 instead of 0"),
    ],
)
def test_a_wrong_number_is_refused_with_its_place(what: str, nth: int, value: int, where: str, reason: str) -> None:
    """Each number that is absurd gives the one error, which says why and where."""
    raw, file = replaced(what, value, nth=nth)
    error = refusal(raw)
    assert reason in error.reason
    assert str(error).endswith(f"(byte {error.offset})")
    if where == "after":
        place = file.find(what, nth)
        assert error.offset == place.offset + place.size
    else:
        assert error.offset == file.find(where, nth if where == what else 0).offset


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "the file is empty"),
        (b"GG", "the file ends at byte 2"),
        (bytes(100), "the file begins with bytes 00 00 00 00, not with GGUF"),
        (b"RIFF" + bytes(96), 'the file begins with "RIFF", not with GGUF'),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "web page"),
        (b"PK\x03\x04" + bytes(96), "zip"),
        (b"tjgg" + bytes(96), "before GGUF"),
        (small_model(order=">").encode(), "big-endian"),
        (small_model(tensors=[Tensor("a"), Tensor("a")]).encode(), "the tensor a is there twice"),
        (small_model(tensors=[Tensor(b"a\0b"), Tensor(b"a\0c")]).encode(), "the tensor a is there twice"),
        (small_model(tensors=[Tensor("a"), Tensor("b", offset=0)]).encode(), "would begin at 0 instead of 128"),
        (small_model(tensors=[Tensor("a"), Tensor("b", offset=2**64 - 32)]).encode(), "instead of 128"),
        (small_model(tensors=[Tensor("a", (2**61,), 24, 0), Tensor("b")]).encode(), "instead of 2305843009213693952"),
        (small_model(tensors=[Tensor("a", (2**60, 2), 28, 0)]).encode(), "bytes"),
        (GgufFile([("a.b", (U8, 1)), ("a.b", (U8, 1))]).encode(), "the key a.b is there twice"),
        (GgufFile([("general.alignment", (U32, 24))]).encode(), "24, not a power of two"),
        (GgufFile([("general.alignment", (U32, 0))]).encode(), "0, not a power of two"),
        (GgufFile([("general.alignment", (STRING, "8"))]).encode(), "of type string; llama.cpp takes only u32"),
        (GgufFile([("split.no", (U32, 0))]).encode(), "of type u32; llama.cpp takes only u16"),
    ],
)
def test_what_is_no_gguf_file_is_refused_with_the_reason(raw: bytes, reason: str) -> None:
    """Other formats, other byte orders and contradictions give the one error, which says what it is."""
    assert reason in refusal(raw).reason


def test_what_may_still_become_whole_is_told_from_what_never_will() -> None:
    """A file that is being copied is short or goes on in zeros; one that is wrong stays wrong."""
    raw = small_model().encode()
    assert all(refusal(partial).is_partial for partial in (b"", raw[:2], raw[:500]))
    assert not refusal(small_model(version=4).encode()).is_partial
    assert not refusal(replaced("string length", 2**63)[0]).is_partial
    assert not refusal(b"<html>").is_partial


def test_a_copy_of_full_size_that_goes_on_in_zeros_may_become_whole() -> None:
    """Room that was taken before the bytes came is no malformed header, wherever the copy has come to."""
    file = small_model(tensors=[Tensor(f"blk.{at}.weight") for at in range(200)])
    raw = file.encode_header()
    counts_end = file.find("key length").offset
    last = file.fields[-1]
    # The offset of the last tensor is there with its first two bytes, its others are zeros anyway.
    for size in range(counts_end, last.offset + 2):
        assert refusal(raw[:size].ljust(len(raw) + 200 * 128, b"\0")).is_partial, size


def test_an_error_crosses_from_the_worker_process(tmp_path: Path) -> None:
    """Errors and headers are the same after pickling, with all that they say."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/old\n\xff.gguf"))
    path.write_bytes(small_model(version=1).encode())
    with pytest.raises(GgufError) as caught:
        gguf.read(path)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value) == f"{tmp_path}/old\\n\\udcff.gguf: {copy.reason} (byte 4)"
    assert (copy.offset, copy.is_partial, copy.hint) == (4, False, "Convert the model again.")
    assert isinstance(copy, LlamavisorError)
    assert copy.code == "gguf_invalid"
    header = parse(small_model().encode())
    assert pickle.loads(pickle.dumps(header)) == header


def test_what_is_no_regular_file_is_never_opened(tmp_path: Path) -> None:
    """A FIFO that nobody writes to, a directory, a socket and a device are refused at once."""
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "folder.gguf").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.gguf"))
        for name, what in (("fifo", "a FIFO"), ("folder", "a directory"), ("s", "a socket")):
            with pytest.raises(GgufError, match=f"{name}.gguf: this is {what}"):
                gguf.read(tmp_path / f"{name}.gguf")
    with pytest.raises(GgufError, match="this is a device"):
        gguf.read("/dev/zero")


def test_a_fifo_that_took_the_place_of_a_file_does_not_block(tmp_path: Path) -> None:
    """Between the look and the opening a file may be replaced; the descriptor is looked at again."""
    os.mkfifo(tmp_path / "fifo")
    fd = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(GgufError, match="x: this is a FIFO"):
            gguf.read_fd(fd, "x")
    finally:
        os.close(fd)


def test_what_the_system_refuses_is_the_systems_error(tmp_path: Path) -> None:
    """A file that is gone, a dangling link and a loop of links are no malformed files."""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("gone", "dangling", "loop"):
        with pytest.raises(OSError, match=name):
            gguf.read(tmp_path / name)


def test_a_file_is_read_through_links(tmp_path: Path) -> None:
    """As in the cache of Hugging Face, where every model is a link to a blob."""
    (tmp_path / "blob").write_bytes(small_model().encode())
    (tmp_path / "model.gguf").symlink_to("blob")
    assert gguf.read(tmp_path / "model.gguf").name == "Small"


def test_a_sparse_file_is_read_by_what_it_says(tmp_path: Path) -> None:
    """A hole of any size reads as zeros: of full size it is whole by its size, and alone it is no GGUF yet."""
    raw = small_model().encode_header()
    path = tmp_path / "sparse.gguf"
    path.write_bytes(raw)
    assert not gguf.read(path).is_whole
    os.truncate(path, 2**40)
    assert gguf.read(path).is_whole
    path.write_bytes(b"")
    os.truncate(path, 2**40)
    with pytest.raises(GgufError, match="begins with") as caught:
        gguf.read(path)
    assert caught.value.is_partial


def test_a_file_that_is_cut_off_while_it_is_read_is_an_error() -> None:
    """Reads that come short of the size that was seen are the one error too, and never a signal."""
    raw = small_model().encode()
    with pytest.raises(GgufError, match="was cut off at byte 700") as caught:
        gguf.parse(lambda offset, length: raw[:700][offset : offset + length], len(raw))
    assert caught.value.is_partial


def test_a_stream_that_gives_a_little_at_a_time_is_read() -> None:
    """Bytes from elsewhere may come in pieces; only none at all is the end."""
    raw = small_model().encode()
    header = gguf.parse(lambda offset, length: raw[offset : offset + min(length, 3)], len(raw))
    assert header == parse(raw)
