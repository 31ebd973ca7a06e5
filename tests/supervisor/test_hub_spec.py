"""What people write to name a model of the Hub, and what the Hub may call its files."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamavisor.hub import HubError, Spec, Why, parse
from llamavisor.hub.spec import path_problem


@pytest.mark.parametrize(
    ("text", "repository", "quantization"),
    [
        ("user/repo", "user/repo", ""),
        ("user/repo:Q4_K_M", "user/repo", "Q4_K_M"),
        ("user/repo:q4_k_m", "user/repo", "Q4_K_M"),
        ("unsloth/Qwen3-VL-8B-GGUF:UD-Q4_K_XL", "unsloth/Qwen3-VL-8B-GGUF", "UD-Q4_K_XL"),
        (" hf.co/user/re.po_1 ", "user/re.po_1", ""),
        ("https://huggingface.co/user/repo/", "user/repo", ""),
    ],
)
def test_what_is_understood(text: str, repository: str, quantization: str) -> None:
    """A repository, one with a quantization in any case, and the address of its page."""
    assert parse(text) == Spec(repository=repository, quantization=quantization)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "repo",
        "a/b/c",
        "/repo",
        "user/",
        "user/..",
        "../repo",
        "user/re..po",
        "user/re--po",
        "user/-repo",
        "user/repo.",
        "user/repo:",
        "user/repo:a/b",
        "user/repo:..",
        "user/repo:Q4:Q8",
        "user/re po",
        "user/re\0po",
        "user/" + "x" * 97,
        "http://user/repo",
    ],
)
def test_what_is_refused(text: str) -> None:
    """What is no repository is refused in one line that shows how one is written."""
    with pytest.raises(HubError) as raised:
        parse(text)
    assert raised.value.why is Why.SPEC
    assert "\n" not in str(raised.value)
    assert "USER/REPO" in raised.value.hint


@pytest.mark.parametrize("revision", ["..", "a/../b", "-x", "a b", "x" * 201, "/main"])
def test_revisions_that_are_refused(revision: str) -> None:
    """A revision leads nowhere else."""
    with pytest.raises(HubError, match="revision"):
        parse("user/repo", revision=revision)


def test_a_pattern_and_a_quantization() -> None:
    """Two ways to name a file are one too many."""
    with pytest.raises(HubError, match="both"):
        parse("user/repo:Q4_0", file="*.gguf")


@given(st.text(max_size=120), st.text(max_size=20), st.text(max_size=20))
def test_whatever_is_let_through_is_harmless(text: str, file: str, revision: str) -> None:
    """Whatever is written is refused as such, or names no folder above, no host and nothing hidden."""
    try:
        spec = parse(text, file=file, revision=revision)
    except HubError:
        return
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", spec.repository, re.ASCII)
    assert ".." not in spec.repository + spec.revision
    assert parse(str(Spec(repository=spec.repository, quantization=spec.quantization))).repository == spec.repository


NAMES = st.from_regex(r"[A-Za-z0-9_](?:[A-Za-z0-9_.]{0,20}[A-Za-z0-9_])?", fullmatch=True).filter(
    lambda name: ".." not in name
)


@given(NAMES, NAMES, st.sampled_from(["", "Q4_K_M", "IQ2_XXS", "UD-Q8_K_XL"]))
def test_what_is_right_is_understood(user: str, name: str, quantization: str) -> None:
    """Every name that the Hub allows comes out as it went in."""
    text = f"{user}/{name}" + (f":{quantization.lower()}" if quantization else "")
    spec = parse(text)
    assert (spec.repository, spec.quantization) == (f"{user}/{name}", quantization)


@pytest.mark.parametrize(
    "path",
    ["../a.gguf", "/a.gguf", "a//b.gguf", "a/./b.gguf", ".a.gguf", "a/.b.gguf", "a\\b.gguf", "a\nb.gguf", "x" * 201],
)
def test_paths_that_are_not_taken(path: str) -> None:
    """The Hub is not trusted with names: none climbs out, hides, or does something to a terminal."""
    assert path_problem(path)
    assert not path_problem("folder/Model-Q4_K_M-00001-of-00002.gguf")


def test_long_paths_are_not_taken() -> None:
    """A path through hundreds of folders is none that anybody means."""
    assert path_problem("a/" * 300 + "b.gguf")
    assert not path_problem("a/" * 30 + "b.gguf")
