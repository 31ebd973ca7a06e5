"""What a repository of a Hub of our own holds, which model of it is meant, and what its header says from afar."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.hub_server import Fault, HubFile, HubServer, Repository
from ggufs import ARRAY, F32, STRING, U32, GgufFile, Tensor
from llamavisor.gguf import GgufError, ShortError, parse, parse_beginning
from llamavisor.hub import Choice, Hub, HubError, Listing, Patience, RemoteFile, Why
from llamavisor.hub import parse as parse_spec
from llamavisor.hub.listing import arrange, is_gguf
from llamavisor.hub.record import plan

GIB = 1024**3
PATIENCE = Patience(connect_s=5.0, stall_s=5.0, delays_s=(0.01, 0.01, 0.01))


@functools.cache
def header(architecture: str = "llama", *, tokens: int = 300, before: int = 0) -> bytes:
    """The header of a model with so many tokens, and so many bytes of a license before what is about the model."""
    values = [
        ("general.architecture", (STRING, architecture)),
        ("general.name", (STRING, "A Model")),
        ("general.license", (STRING, "x" * before)),
        (f"{architecture}.context_length", (U32, 131072)),
        (f"{architecture}.block_count", (U32, 2)),
        (f"{architecture}.embedding_length", (U32, 64)),
        (f"{architecture}.attention.head_count", (U32, 4)),
        (f"{architecture}.rope.freq_base", (F32, 10000.0)),
        ("tokenizer.ggml.model", (STRING, "gpt2")),
        ("tokenizer.ggml.tokens", (ARRAY, (STRING, [f"token number {n}" for n in range(tokens)]))),
        ("general.file_type", (U32, 15)),
    ]
    return GgufFile(values, [Tensor("token_embd.weight")]).encode()


def listing(*paths: str) -> Listing:
    """A repository that holds these files."""
    return arrange("user/repo", "main", "a" * 40, [RemoteFile(path, 10) for path in paths if is_gguf(path)])


def choose(there: Listing, text: str = "user/repo", **more: str) -> Choice:
    """What `text` means there."""
    return there.choose(parse_spec(text, **more))


@pytest.mark.parametrize(
    ("paths", "picked"),
    [
        (["M-F16.gguf", "M-Q4_K_M.gguf", "M-Q8_0.gguf"], "M-Q4_K_M"),
        (["M-F16.gguf", "M-Q8_0.gguf", "M-Q2_K.gguf"], "M-Q8_0"),
        (["M-Q6_K.gguf", "M-Q2_K.gguf"], "M-Q2_K"),
        (["M-q4_k_m.gguf", "M-A.gguf"], "M-q4_k_m"),
        (["mmproj-Q4_K_M.gguf", "imatrix-Q4_K_M.gguf", "mtp-Q4_K_M.gguf", "M-F16.gguf"], "M-F16"),
        (["Q4_K_M/M-Q4_K_M-00001-of-00002.gguf", "Q4_K_M/M-Q4_K_M-00002-of-00002.gguf"], "M-Q4_K_M"),
        (["M.gguf"], "M"),
    ],
)
def test_the_usual_quantization(paths: list[str], picked: str) -> None:
    """Without a quantization it is Q4_K_M, else Q8_0, else the first, as llama-server's `-hf` has it."""
    assert choose(listing(*paths)).name == picked


def test_all_that_belongs_to_a_model() -> None:
    """A model comes with all its parts, the projector that the catalog would take, and its draft; each can be left."""
    there = listing(
        "BF16/M-BF16-00002-of-00002.gguf",
        "BF16/M-BF16-00001-of-00002.gguf",
        "M-Q4_K_M.gguf",
        "mmproj-BF16.gguf",
        "mmproj-F16.gguf",
        "mmproj-F32.gguf",
        "mtp-M-Q8_0.gguf",
        "README.md",
    )
    model = choose(there, "user/repo:bf16")
    assert [file.name for file in model.wanted(parse_spec("user/repo"))] == [
        "M-BF16-00001-of-00002.gguf",
        "M-BF16-00002-of-00002.gguf",
        "mmproj-F16.gguf",
        "mtp-M-Q8_0.gguf",
    ]
    bare = parse_spec("user/repo", with_projector=False, with_draft=False)
    assert len(model.wanted(bare)) == 2
    assert [file.name for file in there.others] == [
        "mmproj-BF16.gguf",
        "mmproj-F16.gguf",
        "mmproj-F32.gguf",
        "mtp-M-Q8_0.gguf",
    ]


@pytest.mark.parametrize(
    ("paths", "text", "file", "told"),
    [
        (["M-Q4_K_M.gguf", "M-Q8_0.gguf"], "user/repo:Q4_K_S", "", "Did you mean Q4_K_M? It has Q4_K_M, Q8_0."),
        (["M-Q4_K_M.gguf"], "user/repo", "*Q8*", "It has M-Q4_K_M.gguf."),
        (["M-Q8_0.gguf", "N-Q8_0.gguf"], "user/repo", "*Q8*", "Take one of them: M-Q8_0.gguf, N-Q8_0.gguf."),
        (["README.md", "model.safetensors"], "user/repo", "", "-GGUF"),
        (["mmproj-F16.gguf"], "user/repo", "", ""),
        (["M-Q4_0-00001-of-00002.gguf"], "user/repo", "", ""),
    ],
)
def test_what_is_not_there(paths: list[str], text: str, file: str, told: str) -> None:
    """What is not there, or not whole, is refused with what there is instead."""
    with pytest.raises(HubError) as raised:
        choose(listing(*paths), text, file=file)
    assert raised.value.why is Why.NO_FILE
    assert told in raised.value.hint


def test_models_of_one_quantization() -> None:
    """The first is meant by its name; each can be had, whatever they would be called in the hub's own cache."""
    there = listing("A-Q4_K_M.gguf", "B-Q4_K_M.gguf", "13b/D-Q4_K_M.gguf", "C-Q4_K_M-00001-of-00002.gguf")
    problems = {choice.first.path: choice.problem for choice in there.choices}
    assert [path for path, problem in problems.items() if problem] == ["C-Q4_K_M-00001-of-00002.gguf"]
    assert choose(there, "user/repo:Q4_K_M").first.path == "13b/D-Q4_K_M.gguf"
    assert choose(there, file="B-*").first.path == "B-Q4_K_M.gguf"


def test_files_that_no_preset_can_name() -> None:
    """Under another name one file can be had; of several each keeps its own."""
    alone, several = listing("a#b.gguf"), listing("c#-00001-of-00002.gguf", "c#-00002-of-00002.gguf")
    with pytest.raises(HubError, match="holds a '#'") as raised:
        plan(alone, parse_spec("user/repo"))
    assert "--name" in raised.value.hint
    assert plan(alone, parse_spec("user/repo"), "ab").name == "ab"
    with pytest.raises(HubError, match="no router could be told of its file"):
        plan(several, parse_spec("user/repo"), "c")


def test_a_pattern_takes_what_is_no_model_alone() -> None:
    """A pattern may name a projector, which comes by itself then."""
    there = listing("M-Q4_0.gguf", "mmproj-F16.gguf")
    assert [file.name for file in choose(there, file="mmproj*").files] == ["mmproj-F16.gguf"]
    assert choose(there, file="*Q4*").first.name == "M-Q4_0.gguf"


def test_names_that_climb_out_are_not_there() -> None:
    """A file with a name that leads out of a folder, or is hidden, is as good as none."""
    there = listing("../M-Q4_K_M.gguf", "/M-Q4_K_M.gguf", "a/../M-Q4_K_M.gguf", ".M-Q4_K_M.gguf", "M-F16.gguf")
    assert [choice.first.path for choice in there.choices] == ["M-F16.gguf"]


WHOLE = header(tokens=3000, before=1000)


@given(st.lists(st.integers(min_value=1, max_value=len(WHOLE)), max_size=20))
def test_the_beginning_is_the_same_however_it_comes(steps: list[int]) -> None:
    """However much is fetched at a time, the header says the same; and what is missing is never guessed."""
    there = parse(lambda offset, length: WHOLE[offset : offset + length], len(WHOLE))
    size = 0
    for step in [*steps, len(WHOLE)]:
        size = min(len(WHOLE), size + step)
        try:
            seen = parse_beginning(WHOLE[:size], len(WHOLE))
        except ShortError:
            assert size < len(WHOLE)
            continue
        assert seen.architecture == there.architecture == "llama"
        assert (seen.context_length, seen.layer_count) == (there.context_length, there.layer_count) == (131072, 2)
        assert (seen.embedding_length, seen.head_count) == (there.embedding_length, there.head_count)
        assert (seen.name, seen.kind, seen.layout.feed_forward_length) == (there.name, there.kind, None)
        assert (seen.vocabulary_size, seen.tokenizer) == (there.vocabulary_size, there.tokenizer) == (3000, "gpt2")
        assert seen.tensor_count == there.tensor_count
    assert size == len(WHOLE)


@given(st.binary(max_size=2000), st.integers(min_value=0, max_value=50 * GIB))
def test_a_beginning_of_anything(prefix: bytes, more: int) -> None:
    """Whatever a server sends is a model or an error, never something else."""
    with contextlib.suppress(GgufError):
        parse_beginning(prefix, len(prefix) + more)


@pytest.fixture
def server() -> Iterator[HubServer]:
    """A Hub with a repository of large models."""
    files = {
        "M-Q4_K_M.gguf": HubFile(header(tokens=150_000), size=40 * GIB),
        "M-Q8_0.gguf": HubFile(header(tokens=150_000, before=500_000), size=70 * GIB),
        "M-F16.gguf": HubFile(b"no model", size=140 * GIB),
        "README.md": HubFile(b"# M", is_lfs=False),
    }
    repositories = {
        "user/repo": Repository(files, revisions=("v1", "refs/pr/1")),
        "user/private": Repository(files, is_private=True),
        "user/gated": Repository(files, gated_to=("hf_good",)),
    }
    with HubServer(repositories, tokens=["hf_good", "hf_other"]) as hub:
        yield hub
        huggingface_hub.close_session()


def hub(server: HubServer, **environ: str) -> Hub:
    """The Hub as an environment like this has it."""
    return Hub({"HF_ENDPOINT": server.url, **environ}, PATIENCE)


@pytest.mark.anyio
@pytest.mark.parametrize("revision", ["main", "v1", "refs/pr/1", "a" * 40])
async def test_a_repository_is_one_question(server: HubServer, revision: str) -> None:
    """Commit, names, sizes and hashes of a repository cost one request, at any revision."""
    there = await hub(server).look(parse_spec("user/repo", revision=revision))
    assert there.commit == "a" * 40
    assert {choice.name: choice.size_bytes // GIB for choice in there.choices} == {
        "M-F16": 140,
        "M-Q4_K_M": 40,
        "M-Q8_0": 70,
    }
    assert there.choices[1].first.digest == server.repositories["user/repo"].files["M-Q4_K_M.gguf"].oid
    assert len(server.asked) == 1


@pytest.mark.anyio
@pytest.mark.parametrize(("name", "requests"), [("M-Q4_K_M", 3), ("M-Q8_0", 4)])
async def test_a_large_model_is_looked_at_for_little(server: HubServer, name: str, requests: int) -> None:
    """To know a model of 40 GB takes less than five requests and less than 4 MiB, its listing included."""
    there = await hub(server).look(parse_spec("user/repo"))
    (choice,) = (each for each in there.choices if each.name == name)
    async with hub(server).connect() as connection:
        seen = await hub(server).inspect(connection, there, choice)
    assert seen.header is not None
    assert (seen.header.architecture, seen.header.context_length) == ("llama", 131072)
    assert len(server.asked) == requests < 5
    assert sum(asked.sent[0] for asked in server.asked) < 4 * 1024**2


@pytest.mark.anyio
async def test_all_headers_of_a_repository(server: HubServer) -> None:
    """The headers of all models are read at once; what is no model is in the list without one."""
    there = await hub(server).look(parse_spec("user/repo"), reads_headers=True)
    assert {choice.name: choice.header is not None for choice in there.choices} == {
        "M-F16": False,
        "M-Q4_K_M": True,
        "M-Q8_0": True,
    }


@pytest.mark.anyio
async def test_what_is_meant_is_read_first(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many models not all are read, but that which would be pulled; of each other it is told why not."""
    monkeypatch.setattr("llamavisor.hub.remote.MAX_HEADERS", 2)
    there = await hub(server).look(parse_spec("user/repo:Q8_0"), reads_headers=True)
    assert {choice.name: choice.unread.partition(" ")[0] for choice in there.choices} == {
        "M-F16": "the",  # file begins with something else
        "M-Q4_K_M": "only",
        "M-Q8_0": "",
    }


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("text", "revision", "environ", "why", "told"),
    [
        ("user/none", "", {}, Why.NO_REPOSITORY, "a token is needed: HF_TOKEN"),
        ("user/none", "", {"HF_TOKEN": "hf_good"}, Why.NO_REPOSITORY, "Look at the name"),
        ("user/private", "", {}, Why.NO_REPOSITORY, "a token is needed: HF_TOKEN"),
        ("user/repo", "v9", {}, Why.NO_REVISION, ""),
        ("user/repo", "", {"HF_TOKEN": "hf_stale"}, Why.UNAUTHORIZED, "Make a new one"),
        ("user/repo", "", {"HF_TOKEN": "two words"}, Why.UNAUTHORIZED, ""),
        ("user/repo", "", {"HF_HUB_OFFLINE": "1"}, Why.OFFLINE, "Unset"),
        ("user/repo", "", {"HF_ENDPOINT": "ftp://x"}, Why.SPEC, "https://"),
    ],
)
async def test_who_is_refused_hears_why(
    server: HubServer, text: str, revision: str, environ: dict[str, str], why: Why, told: str
) -> None:
    """Each refusal says what it is, what to do, and nothing of the token."""
    with pytest.raises(HubError) as raised:
        await hub(server, **environ).look(parse_spec(text, revision=revision))
    assert raised.value.why is why
    assert told in raised.value.hint
    said = f"{raised.value!r} {raised.value} {raised.value.hint}"
    assert not any(secret in said for secret in ("hf_good", "hf_stale", "two words"))


@pytest.mark.anyio
async def test_a_private_repository_with_a_token(server: HubServer) -> None:
    """A token that may read a private repository reads it."""
    there = await hub(server, HF_TOKEN="hf_good").look(parse_spec("user/private"), reads_headers=True)
    assert there.choices[1].header is not None


@pytest.mark.anyio
async def test_a_gated_repository_is_listed_without_its_headers(server: HubServer) -> None:
    """What a gated repository holds is told to everybody, and what its files say to nobody else."""
    there = await hub(server).look(parse_spec("user/gated"), reads_headers=True)
    assert len(there.choices) == 3
    assert not any(choice.header for choice in there.choices)


@pytest.mark.anyio
@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_question_is_asked_again(server: HubServer, status: int) -> None:
    """What passes is asked again twice, as a person waits for the answer."""
    server.faults = [Fault(at="hub", status=status, times=2)]
    assert (await hub(server).look(parse_spec("user/repo"))).choices
    server.faults = [Fault(at="hub", status=status, times=3)]
    with pytest.raises(HubError) as raised:
        await hub(server).look(parse_spec("user/repo"))
    assert raised.value.why is (Why.BUSY if status == 429 else Why.SERVER)


@pytest.mark.anyio
async def test_a_hub_that_is_not_there(free_port: int) -> None:
    """A Hub that takes no connection is told of with the reason."""
    nowhere = Hub({"HF_ENDPOINT": f"http://127.0.0.1:{free_port}"}, PATIENCE)
    with pytest.raises(HubError, match="Connection refused") as raised:
        await nowhere.look(parse_spec("user/repo"))
    assert raised.value.why is Why.UNREACHABLE
    huggingface_hub.close_session()
