"""What the models of a folder are called."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamavisor import ini
from llamavisor.catalog.hub import Snapshot, repository
from llamavisor.catalog.naming import Named, Place, Standing, assign, name_problem, stem_of


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


def shown(found: dict[str, Named]) -> list[tuple[str, tuple[str, ...]]]:
    """Names and aliases."""
    return [(named.name, named.aliases) for named in found.values()]


def test_of_several_models_in_a_folder_the_oldest_has_its_name() -> None:
    """Of the same age the usual quantization, then the first; the others have the names of their files."""
    old, new = place("fam/fam-Q8_0.gguf", mtime_ns=1), place("fam/fam-Q4_K_M.gguf", mtime_ns=2)
    assert shown(names(new, old)) == [("fam-Q4_K_M", ()), ("fam", ("fam-Q8_0",))]
    found = names("qwen/m-IQ2_M.gguf", "qwen/m-Q4_K_M.gguf")
    assert shown(found) == [("m-IQ2_M", ()), ("qwen", ("m-Q4_K_M",))]
    assert names("qwen/m-Q8_0.gguf", "qwen/m-Q5_0.gguf")["qwen/m-Q5_0.gguf"].name == "qwen"
    settling = place("qwen/m-Q4_K_M.gguf", standing=Standing.COMING)
    assert names("qwen/m-IQ2_M.gguf", settling)["qwen/m-IQ2_M.gguf"].name == "qwen"


def test_another_quantization_changes_nothing_about_the_first() -> None:
    """Neither its name nor its aliases, also where it has lost its folder's name to another, or has a plain stem."""
    for others in ([], ["fam.gguf"], ["m.gguf"], [place("other/m.gguf", mtime_ns=3)]):
        first = place("fam/m.gguf", mtime_ns=2, is_head=True)
        alone = names(first, *others)[first.rel]
        assert names(first, *others, place("fam/n-Q4_K_M.gguf", mtime_ns=3))[first.rel] == alone
        assert names(first, *others, place("fam/n-Q4_K_M.gguf", mtime_ns=1))[first.rel] == alone, "an older file"
    assert names("fam/fam.gguf")["fam/fam.gguf"] == Named(name="fam"), "its name is no alias"


def test_a_folder_whose_name_no_router_can_have_names_none_of_several() -> None:
    """They are served under the names of their files."""
    assert shown(names("a,b/x.gguf", "a,b/y.gguf")) == [("x", ()), ("y", ())]
    assert names("a,b/x.gguf")["a,b/x.gguf"].problem


def test_what_works_keeps_its_name_from_what_does_not() -> None:
    """A broken file that is less deep gets another name, and a copy under way gets its own when it works."""
    for standing in (Standing.COMING, Standing.BROKEN, Standing.UNKNOWN):
        found = names(place("fam.gguf", standing=standing), "fam/m.gguf")
        assert (found["fam/m.gguf"].name, found["fam.gguf"].name) == ("fam", "fam-2")


def test_two_files_of_one_quantization_are_told_apart_without_the_revision() -> None:
    """By their own names, whichever revisions they are of; in folders of the repository by those too."""
    for one, two in (("abc", "abc"), ("abc", "def"), ("def", "abc")):
        places = [
            place(f"models--bob--Tiny/snapshots/{revision}/{rel}", snapshot=Snapshot("bob/Tiny", folder))
            for revision, rel in ((one, "a-Q8_0.gguf"), (two, "b-Q8_0.gguf"), (two, "x/b-Q8_0.gguf"))
            for folder in [f"models--bob--Tiny/snapshots/{revision}"]
        ]
        assert [named.name for named in assign(places)] == ["bob/Tiny:Q8_0", "bob/Tiny:b-Q8_0", "bob/Tiny:x-b-Q8_0"]


def test_junk_takes_no_name_from_a_model() -> None:
    """A half copied file beside a model, or under its name, does not rename it."""
    junk, twin = place("qwen/half.gguf", standing=Standing.UNKNOWN), place("solo.gguf", standing=Standing.UNKNOWN)
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


@given(
    st.lists(st.tuples(RELS, st.sampled_from(Standing), st.booleans()), unique_by=lambda item: item[0]), st.randoms()
)
def test_names_are_unique_and_follow_from_what_is_there(
    rels: list[tuple[str, Standing, bool]], shuffled: random.Random
) -> None:
    """The order in which a folder is listed changes nothing; no two share a name; what has no problem is servable."""
    places = [place(f"{rel}.gguf", standing=standing, is_copy=is_copy) for rel, standing, is_copy in rels]
    found = names(*places)
    shuffled.shuffle(places)
    assert names(*places) == found
    called = [name for named in found.values() for name in (named.name, *named.aliases)]
    assert len(called) == len(set(called))
    for named in found.values():
        if not named.problem:
            assert not name_problem(named.name)
            assert ini.section_problem(named.name) is None
