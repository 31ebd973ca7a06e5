"""Reading the options of a build from its help text."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builds import NEW, OLD, OLDEST
from llamavisor.helptext import FlagSet, HelpOption, normal, parse_help

_NAMES = st.from_regex(r"[a-z][a-z0-9]{0,8}(-[a-z0-9.]{1,9}){0,3}", fullmatch=True).filter(
    lambda name: not name.startswith("no-")
)
_SHORTS = st.from_regex(r"-[a-zA-Z]{1,5}", fullmatch=True)
_PLACEHOLDERS = st.sampled_from(
    [
        "N",
        "FNAME",
        "[on|off|auto]",
        "{none,layer,row}",
        "<dev1,dev2,..>",
        "<a b>=<c d>,...",
        "lo-hi",
        "START END",
    ]
)
_HELP_LINES = st.lists(st.from_regex(r"[a-z(][a-z0-9 ,.:'-]{0,60}[a-z0-9.)]", fullmatch=True), min_size=1, max_size=4)


@st.composite
def _described(draw: st.DrawFn) -> tuple[tuple[str, ...], tuple[str, ...], str, list[str]]:
    """Positive spellings, negated ones, placeholder and help lines of one option."""
    names = draw(st.lists(_NAMES, min_size=1, max_size=2, unique=True))
    positive = (*draw(st.lists(_SHORTS, max_size=1)), *(f"--{name}" for name in names))
    if draw(st.booleans()):
        return positive, tuple(f"--no-{name}" for name in names), "", draw(_HELP_LINES)
    return positive, (), draw(st.one_of(st.just(""), _PLACEHOLDERS)), draw(_HELP_LINES)


def _printed(spellings: tuple[str, ...], placeholder: str, lines: list[str]) -> str:
    """One option as `common_arg::to_string` in llama.cpp's common/arg.cpp prints it."""
    first, *others = spellings
    head = first if not others else f"{first}, ".ljust(7) + ", ".join(others)
    head += f" {placeholder}" if placeholder else ""
    head = f"{head}\n{' ' * 40}" if len(head) > 37 else head.ljust(40)
    return head + f"\n{' ' * 40}".join(lines) + "\n"


@settings(deadline=None)
@given(_described())
def test_an_option_is_read_as_it_was_printed(
    described: tuple[tuple[str, ...], tuple[str, ...], str, list[str]],
) -> None:
    """Spellings, negations, placeholder and help come out as they went into llama-server's own layout."""
    positive, negated, placeholder, lines = described
    (option,) = parse_help("----- common params -----\n\n" + _printed(positive + negated, placeholder, lines))
    assert option.spellings == positive + negated
    assert option.negations == negated
    assert option.placeholder == placeholder
    assert option.help.splitlines() == lines
    assert option.key == positive[-1].removeprefix("--")


@settings(deadline=None)
@given(st.text())
def test_any_text_can_be_read(text: str) -> None:
    """A text that is no help at all is no error; what is found in it can be looked up."""
    for option in parse_help(text):
        assert option.spellings
        assert option.key


@pytest.mark.parametrize(
    ("spelling", "placeholder", "values"),
    [
        ("--metrics", "", 0),
        ("--threads", "N", 1),
        ("--flash-attn", "[on|off|auto]", 1),
        ("--split-mode", "{none,layer,row,tensor}", 1),
        ("--device", "<dev1,dev2,..>", 1),
        ("--override-tensor", "<tensor name pattern>=<buffer type>,...", 1),
        ("--docker-repo", "[<repo>/]<model>[:quant]", 1),
        ("--control-vector-layer-range", "START END", 2),
    ],
)
def test_values_are_counted_from_the_placeholder(spelling: str, placeholder: str, values: int) -> None:
    """Brackets, braces and angles hold one value, whatever stands in them; two bare words are two."""
    option = _found(NEW, spelling)
    assert (option.placeholder, option.values) == (placeholder, values)


@pytest.mark.parametrize(
    "spelling",
    ["--override-kv", "--lora", "--lora-scaled", "--rpc", "--tensor-split", "--device", "--spec-type"],
)
def test_what_may_be_repeated_is_known_from_its_help(spelling: str) -> None:
    """A placeholder that ends in ",..." or a word about commas makes an option repeatable."""
    assert _found(NEW, spelling).is_repeatable
    assert not _found(NEW, "--threads").is_repeatable


def test_presets_that_download_are_known_from_their_help() -> None:
    """Options that fetch a model of their own choice say so, even where the line breaks in between."""
    downloads = {option.spelling for option in NEW if option.is_download}
    assert {"--gpt-oss-20b-default", "--fim-qwen-7b-spec", "--embd-gemma-default"} <= downloads
    assert all(re.search(r"-(default|spec)$", spelling) for spelling in downloads)


def test_a_removed_option_is_unknown_and_says_why() -> None:
    """An option that is only listed to say that it is gone is not found; its help text is the reason."""
    assert NEW.find("--draft-max") is None
    assert NEW.find_key("draft-max") is None
    assert NEW.removal("--draft-max") == (
        "the argument has been removed. use --spec-draft-n-max or --spec-ngram-mod-n-max"
    )
    assert NEW.removal("--threads") is None


def test_short_negations_are_told_from_short_spellings() -> None:
    """-nkvo negates although nothing marks it, and -no-kvu too; --no-host is an option of its own."""
    assert _found(NEW, "-kvo").negations == ("-nkvo", "--no-kv-offload")
    assert _found(NEW, "-no-kvu").negations == ("-no-kvu", "--no-kv-unified")
    assert _found(NEW, "--no-mmproj").key == "mmproj-auto"
    assert _found(NEW, "--no-host").negations == ()


@pytest.mark.parametrize(
    ("spelling", "choices"),
    [
        ("--split-mode", ("none", "layer", "row", "tensor")),
        ("--flash-attn", ("on", "off", "auto")),
        ("--cache-type-k", ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")),
        ("--load-mode", ("auto", "none", "mmap", "mlock", "mmap+mlock", "dio")),
        ("--threads", ()),
    ],
)
def test_choices_are_read_wherever_the_help_lists_them(spelling: str, choices: tuple[str, ...]) -> None:
    """Choices stand in the placeholder, after "allowed values:", or as bullets."""
    assert _found(NEW, spelling).choices == choices


def test_older_layouts_are_read_too() -> None:
    """Bare flags, separate negations and lone negations of earlier builds are what they were."""
    assert _found(OLDEST, "-fa").values == 0
    assert _found(OLDEST, "--no-mmap").key == "no-mmap"
    assert _found(OLDEST, "-cb") is _found(OLDEST, "--no-cont-batching")
    assert _found(OLDEST, "-cb").as_preset(is_on=False) == ("no-cont-batching", "1")
    assert _found(OLDEST, "--no-mmproj") is not _found(OLDEST, "--mmproj")
    assert _found(OLD, "--mmap") is _found(OLD, "--no-mmap")
    assert _found(OLD, "--mmap").as_preset(is_on=False) == ("mmap", "0")


def test_underscores_are_dashes_in_long_options_only() -> None:
    """llama-server takes --ctx_size for --ctx-size; a short option or a value is left alone."""
    assert NEW.find("--ctx_size") is NEW.find("-c")
    assert normal("-a_b") == "-a_b"


def test_a_misspelled_option_has_a_suggestion() -> None:
    """A near miss finds its option; something else finds nothing, and never what has been removed."""
    assert NEW.similar("--ctx-sizes") == "--ctx-size"
    assert NEW.similar("--frobnicate") is None
    assert NEW.similar("--draft-maxx") != "--draft-max"


def test_a_flag_set_shows_its_size() -> None:
    """The one-line picture of a build says how many options it has."""
    assert repr(NEW) == f"<FlagSet of {len(NEW)} options>"


@pytest.mark.real
def test_every_option_that_the_binary_completes_is_read(llama_server: Path) -> None:
    """What is read from the help is exactly what llama-server itself offers to a shell for completion."""
    flags = parse_help(_said_by(llama_server, "--help"))
    completed = re.search(r'opts="([^"]*)"', _said_by(llama_server, "--completion-bash"))
    assert completed
    read = {spelling for option in flags for spelling in option.spellings if spelling not in option.negations}
    assert read == set(completed[1].split())


def _found(flags: FlagSet, spelling: str) -> HelpOption:
    option = flags.find(spelling)
    assert option is not None
    return option


def _said_by(binary: Path, option: str) -> str:
    return subprocess.run([binary, option], capture_output=True, text=True, timeout=60, check=True).stdout
