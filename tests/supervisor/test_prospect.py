"""What a model of a Hub would take, reckoned from the beginning of its header, against the same of the whole header."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builds import NEW
from ggufs import ARRAY, STRING, U32, GgufFile, Tensor, Typed
from llamavisor import budgets, gguf, preset
from llamavisor.capacity import Capacity
from llamavisor.footprint import Device, Plan, Weights, context_size, estimate, read_options
from llamavisor.hub import Choice, RemoteFile, parse
from llamavisor.hub.listing import arrange
from llamavisor.options import ModelOptions, OptionLayer
from llamavisor.prospect import Prospect, foresee
from llamavisor.router import Router
from llamavisor.rules import ModelRule, ModelSettings
from llamavisor.sections import section, specify
from llamavisor.settings import RouterSettings
from llamavisor.states import RouterState

GIB = 1024**3
KEYS = (
    *("context_length", "block_count", "embedding_length", "feed_forward_length", "attention.head_count"),
    *("attention.head_count_kv", "attention.key_length", "attention.sliding_window", "expert_count", "vocab_size"),
)
Q4_K, Q6_K = (12, 144 / 256), (14, 210 / 256)
WIDTH, HEADS_KV, INNER, LAYERS, TOKENS = 4096, 1024, 14336, 32, 128_256
GPU = Device("CUDA0", "0000:01:00.0")


@functools.cache
def llama_8b(*, tied: bool = False) -> GgufFile:
    """A llama of 8 billion parameters as llama-quantize stores it as Q4_K_M."""
    said: list[tuple[str | bytes, Typed]] = [
        ("general.architecture", (STRING, "llama")),
        ("llama.context_length", (U32, 131_072)),
        ("llama.block_count", (U32, LAYERS)),
        ("llama.embedding_length", (U32, WIDTH)),
        ("llama.feed_forward_length", (U32, INNER)),
        ("llama.attention.head_count", (U32, 32)),
        ("llama.attention.head_count_kv", (U32, 8)),
        ("tokenizer.ggml.model", (STRING, "gpt2")),
        ("tokenizer.ggml.tokens", (ARRAY, (STRING, [str(number) for number in range(TOKENS)]))),
        ("general.file_type", (U32, 15)),
    ]
    tensors = [_tensor("token_embd", WIDTH, TOKENS, Q6_K if tied else Q4_K)]
    for layer in range(LAYERS):
        better = Q6_K if layer % 2 else Q4_K
        for name, rows, length, stored in (
            ("attn_q", WIDTH, WIDTH, Q4_K),
            ("attn_k", HEADS_KV, WIDTH, Q4_K),
            ("attn_v", HEADS_KV, WIDTH, better),
            ("attn_output", WIDTH, WIDTH, Q4_K),
            ("ffn_gate", INNER, WIDTH, Q4_K),
            ("ffn_up", INNER, WIDTH, Q4_K),
            ("ffn_down", WIDTH, INNER, better),
        ):
            tensors.append(_tensor(f"blk.{layer}.{name}", length, rows, stored))
    if not tied:
        tensors.append(_tensor("output", WIDTH, TOKENS, Q6_K))
    return GgufFile(values=said, tensors=tensors)


def _tensor(name: str, length: int, rows: int, stored: tuple[int, float]) -> Tensor:
    code, number_bytes = stored
    return Tensor(f"{name}.weight", (length, rows), code, int(length * rows * number_bytes))


def on_the_hub(model: GgufFile, *beside: RemoteFile, name: str = "L-Q4_K_M.gguf") -> Choice:
    """It in a repository, as it is known when the beginning of its header was read."""
    size = size_of(model)
    (choice,) = arrange("user/repo", "main", "a" * 40, [RemoteFile(name, size), *beside]).choices
    return replace(choice, header=gguf.parse_beginning(model.encode_header()[: 64 * 1024], size))


def size_of(model: GgufFile) -> int:
    """Bytes of its file."""
    return len(model.encode_header()) + sum(tensor.size for tensor in model.tensors)


class Place:
    """A router and what its models may take.

    Args:
        room: bytes by device id.
        gpus: what it sees.
        options: of its models.
    """

    def __init__(self, room: Mapping[str, int | None], gpus: Sequence[Device] = (), **options: object) -> None:
        layer = OptionLayer("[defaults]", ModelOptions.model_validate(options))
        self.settings = RouterSettings(name="main", models_dir=Path("/m"), layers=(layer,))
        self.limits = {device: budgets.Limit(size, size, is_auto=False) for device, size in room.items()}
        self.gpus = tuple(gpus)
        self.allowance = budgets.allow(self.limits, gpus, 1)
        self.launch: object = SimpleNamespace(found=SimpleNamespace(flags=NEW, path=Path("/opt/llama-server")))

    def foresee(self, choice: Choice, *rules: ModelRule, **wanted: bool) -> Prospect:
        """How a model would do there."""
        capacity = SimpleNamespace(
            limits=lambda _: self.limits, allowance=lambda _: self.allowance, devices_of=lambda _: self.gpus
        )
        router = SimpleNamespace(name="main", settings=self.settings, launch=self.launch, state=RouterState.STOPPED)
        spec = parse("user/repo", **wanted)
        return foresee(choice, spec, cast("Router", router), capacity=cast("Capacity", capacity), rules=rules)

    def reckon(self, model: GgufFile) -> dict[str, int]:
        """What the model would take if it were there."""
        raw, size = model.encode_header(), size_of(model)
        header = gguf.parse(lambda offset, length: raw[offset : offset + length], size)
        entry = replace(on_the_hub(model).entry or pytest.fail("no entry"), header=header)
        spec = specify(entry, (), router="main", base=self.settings.layers, allowance=self.allowance)
        assert spec is not None
        options = read_options(preset.ALWAYS, section(spec, NEW, binary=""))
        plan = Plan(options=options, n_ctx=context_size(header, options), devices=self.gpus)
        footprint = estimate(Weights(header=header, size_bytes=size), plan)
        assert footprint is not None
        return footprint.grown()


IN_RAM = Place({"RAM": 32 * GIB})
ON_GPU = Place({"RAM": 32 * GIB, GPU.id: 24 * GIB}, [GPU])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("place", [IN_RAM, ON_GPU], ids=["RAM", "GPU"])
def test_the_beginning_tells_nearly_as_much_as_all(place: Place, tied: bool) -> None:
    """On every device it is within a tenth, and in all within a twentieth, of what the whole header comes to."""
    model = llama_8b(tied=tied)
    prospect, whole = place.foresee(on_the_hub(model)), place.reckon(model)
    assert prospect.bytes.keys() == whole.keys()
    for device, size in whole.items():
        assert prospect.bytes[device] == pytest.approx(size, rel=0.1), device
    assert sum(prospect.bytes.values()) == pytest.approx(sum(whole.values()), rel=0.05)
    assert (prospect.is_fitting, prospect.reason) == (True, "")


def test_all_that_comes_along_counts_if_it_is_wanted() -> None:
    """A projector is reckoned with, unless it is not to come."""
    choice = on_the_hub(llama_8b(), RemoteFile("mmproj-F16.gguf", GIB))
    alone, both = (IN_RAM.foresee(choice, with_projector=wanted).bytes["RAM"] for wanted in (False, True))
    assert both - alone == GIB


@pytest.mark.parametrize(
    ("room", "is_fitting"),
    [({"RAM": 32 * GIB}, True), ({"RAM": 5 * GIB}, False), ({"RAM": None}, None)],
)
def test_what_fits(room: dict[str, int | None], is_fitting: bool | None) -> None:
    """Files that alone would go in do not fit where context and caches do not; of unknown memory nothing is said."""
    prospect = Place(room).foresee(on_the_hub(llama_8b()))
    assert prospect.is_fitting is is_fitting
    assert prospect.bytes["RAM"] > size_of(llama_8b())


def test_the_context_is_what_one_request_could_have() -> None:
    """Options count: of a context for all slots together each has its share."""
    place = Place({"RAM": 32 * GIB}, ctx_size=8192, parallel=4)
    assert place.foresee(on_the_hub(llama_8b())).n_ctx == 2048
    rule = ModelRule.of("L-*", ModelSettings.model_validate({"ctx_size": 4096}))
    assert place.foresee(on_the_hub(llama_8b()), rule).n_ctx == 1024


def test_why_nobody_can_say() -> None:
    """It is told what is missing; files that are too large alone do not fit all the same."""
    choice = on_the_hub(llama_8b())
    unread, place = replace(choice, header=None), Place({"RAM": 32 * GIB})
    elsewhere = ModelRule.of("L-*", ModelSettings.model_validate({"router": ["other"]}))
    impossible = ModelRule.of("L-*", ModelSettings.model_validate({"args": ["--no-such-option"]}))
    assert place.foresee(unread) == Prospect(reason="its header was not read")
    assert place.foresee(choice, elsewhere).reason == "the tables of the configuration keep it from router main"
    assert "--no-such-option" in place.foresee(choice, impossible).reason
    assert Place({"RAM": GIB}).foresee(unread).is_fitting is False
    place.launch = None
    assert place.foresee(choice).reason == "router main is stopped"


@given(st.dictionaries(st.sampled_from(KEYS), st.integers(0, 2**32 - 1) | st.lists(st.integers(0, 2**31 - 1))))
def test_headers_of_strangers(said: dict[str, int | list[int]]) -> None:
    """Whatever a header says, there is an answer."""
    values: list[tuple[str | bytes, Typed]] = [("general.architecture", (STRING, "llama"))]
    for key, value in said.items():
        values.append((f"llama.{key}", (U32, value) if isinstance(value, int) else (ARRAY, (U32, value))))
    model = GgufFile(values=values, tensors=[Tensor("token_embd.weight")])
    for place in (IN_RAM, ON_GPU):
        prospect = place.foresee(on_the_hub(model))
        assert prospect.reason or all(size >= 0 for size in prospect.bytes.values())
