"""What the models of a folder are called."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamavisor import ini
from llamavisor.catalog.hub import Snapshot, repository
from llamavisor.catalog.naming import Named, Place, assign, name_problem, stem_of


def place(rel: str, **changes: object) -> Place:
    """A model whose first file lies there."""
    return Place(**{"rel": rel, "stem": stem_of(rel.rpartition("/")[2]), **changes})


def names(*places: Place | str) -> dict[str, Named]:
    """What models are called, by where they lie."""
    known = [item if isinstance(item, Place) else place(item) for item in places]
    return {item.rel: named for item, named in zip(known, assign(known), strict=True)}


def snapshot(rel: str, **changes: object) -> Place:
    """A model in the hub's cache."""
    folder = "models--bob--Tiny-GGUF/snapshots/abc"
    return place(f"{folder}/{rel}", snapshot=Snapshot("bob/Tiny-GGUF", folder), **changes)


@pytest.mark.parametrize(
    ("file_name", "stem"),
    [
        ("a.gguf", "a"),
        ("a.gguf.gguf", "a"),
        ("a.gguf.b.gguf", "a.b"),
        ("A.GGUF", "A"),
        ("a-Q4_K_M.gguf", "a-Q4_K_M"),
    ],
)
def test_a_file_is_called_as_the_router_calls_it(file_name: str, stem: str) -> None:
    """Every `.gguf` is dropped; a suffix that the router does not know is dropped as well."""
    assert names(file_name)[file_name].name == stem


def test_a_folder_with_one_model_gives_it_its_name() -> None:
    """The router's rule; it ends one level down."""
    found = names("qwen/model-Q8_0.gguf", "deep/er/other.gguf", "x.gguf/y.gguf")
    assert [named.name for named in found.values()] == ["qwen", "other", "x.gguf"]


def test_a_folder_with_several_models_is_an_alias_of_one() -> None:
    """Of the usual quantization if that is there, else of the first; but never of one that cannot be used."""
    found = names("qwen/m-IQ2_M.gguf", "qwen/m-Q4_K_M.gguf")
    assert [(named.name, named.aliases) for named in found.values()] == [("m-IQ2_M", ()), ("m-Q4_K_M", ("qwen",))]
    assert names("qwen/m-Q8_0.gguf", "qwen/m-Q5_0.gguf")["qwen/m-Q5_0.gguf"].aliases == ("qwen",)
    settling = place("qwen/m-Q4_K_M.gguf", is_usable=False)
    assert names("qwen/m-IQ2_M.gguf", settling)["qwen/m-IQ2_M.gguf"].aliases == ("qwen",)


def test_junk_takes_no_name_from_a_model() -> None:
    """A half copied file beside a model, or under its name, does not rename it."""
    junk, twin = place("qwen/half.gguf", is_known=False), place("solo.gguf", is_known=False)
    found = names(junk, twin, "qwen/m.gguf", "solo/m.gguf")
    assert [named.name for named in found.values()] == ["half", "solo-2", "qwen", "solo"]


def test_a_collision_is_won_by_what_is_less_deep_and_told() -> None:
    """The others get the names of their folders, as many as it takes."""
    found = names("a.gguf", "x/y/a.gguf", "w/x/y/a.gguf", "a/b.gguf")
    assert {rel: named.name for rel, named in found.items()} == {
        "a.gguf": "a",
        "a/b.gguf": "a-b",
        "x/y/a.gguf": "y-a",
        "w/x/y/a.gguf": "x-y-a",
    }
    assert found["x/y/a.gguf"].notes == ("it would be called 'a', as a.gguf is",)
    assert not found["a.gguf"].notes


def test_a_model_of_the_hub_is_called_as_by_hf() -> None:
    """USER/REPO:QUANT by the file's name, else by its header; the repository alone means the usual one."""
    found = names(
        snapshot("Tiny-Q8_0.gguf"), snapshot("Tiny.q4_k_m.gguf"), snapshot("Tiny-Instruct.gguf", quantization="F16")
    )
    assert [(named.name, named.aliases) for named in found.values()] == [
        ("bob/Tiny-GGUF:Q8_0", ()),
        ("bob/Tiny-GGUF:Q4_K_M", ("bob/Tiny-GGUF",)),
        ("bob/Tiny-GGUF:F16", ()),
    ]


def test_the_folder_of_a_repository_names_it() -> None:
    """As huggingface_hub encodes it."""
    assert repository("models--bob--Tiny--GGUF") == "bob/Tiny--GGUF"
    assert repository("models--gpt2") == "gpt2"
    assert repository("datasets--bob--x") is repository("models--") is repository("models--bob--") is None


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("-m", "option"),
        ("a,b", "','"),
        ("a]b", "']'"),
        ("a\nb", "line break"),
        ("a\x1bb", "control"),
        (" a", "blank"),
        ("*", "section"),
        ("a\udcffb", "UTF-8"),
        ("llama:latest", "renamed"),
    ],
)
def test_a_name_that_no_router_can_have_is_refused_and_shown_escaped(name: str, why: str) -> None:
    """Its reason says what to do."""
    found = names(f"{name}.gguf")[f"{name}.gguf"]
    assert why in found.problem
    assert found.problem.endswith("rename it")
    assert found.name.isprintable()


@pytest.mark.parametrize("name", ["👨‍👩‍👧", "模型", "a b", "ü" * 120, "a'b\"c", "[x", "a=b"])
def test_an_unusual_name_is_kept(name: str) -> None:
    """The router serves it, so do we."""
    assert names(f"{name}.gguf")[f"{name}.gguf"] == Named(name=name)


PARTS = st.sampled_from(["a", "b", "a-b", "b-a", "x.gguf", "-c", "a,b", "d\n", "Q4_K_M", "models--u--r"])
RELS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)


@given(st.lists(st.tuples(RELS, st.booleans(), st.booleans()), unique_by=lambda item: item[0]), st.randoms())
def test_names_are_unique_and_follow_from_what_is_there(
    rels: list[tuple[str, bool, bool]], shuffled: random.Random
) -> None:
    """The order in which a folder is listed changes nothing; no two share a name; what has no problem is servable."""
    places = [place(f"{rel}.gguf", is_known=is_known, is_copy=is_copy) for rel, is_known, is_copy in rels]
    found = names(*places)
    shuffled.shuffle(places)
    assert names(*places) == found
    called = [name for named in found.values() for name in (named.name, *named.aliases)]
    assert len(called) == len(set(called))
    for named in found.values():
        if not named.problem:
            assert not name_problem(named.name)
            assert ini.section_problem(named.name) is None
