"""Why an option, or its value, cannot be used: each refusal with what to do instead."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NoReturn

from llamavisor.errors import OptionError
from llamavisor.helptext import FlagSet, HelpOption, normal
from llamavisor.ini import value_problem
from llamavisor.options import OptionLayer
from llamavisor.reserved import find_reserved
from llamavisor.spellings import LISTENER

_TEMPLATES = re.compile(r"list of built-in templates: ((?:[\w.-]+, )*[\w.-]+)")
_OPTION = re.compile(r"--?[A-Za-z]")
_TWO_IN_ONE = re.compile(r"(--?[A-Za-z][\w.-]*)[= ]\s*(.+)", re.DOTALL)


def looks_like_option(word: str) -> bool:
    """Whether a word of args is an option, as far as that can be seen without the build's help."""
    return _OPTION.match(word) is not None


def refuse_two_in_one(source: str, word: str) -> None:
    """Raises an OptionError if an option and its value stand in one word."""
    if two := _TWO_IN_ONE.fullmatch(word):
        raise OptionError(
            f"{source}: {word!r} in args is one word, and llama-server wants two",
            hint=f'Write "{two[1]}", "{two[2]}".',
        )


def refuse_reserved(source: str, word: str, spellings: Sequence[str]) -> None:
    """Raises an OptionError if an option would fight the supervisor."""
    if reserved := find_reserved(spellings):
        raise OptionError(f"{source}: {word} in args is refused: {reserved.reason}", hint=reserved.instead)


def refuse_listener(layer: OptionLayer, word: str, spellings: Sequence[str]) -> None:
    """Raises an OptionError if a table of single models has an option of the router itself."""
    positive = [normal(spelling).replace("--no-", "--", 1) for spelling in spellings]
    if layer.options.is_per_model and not LISTENER.isdisjoint(positive):
        raise OptionError(
            f"{layer.source}: {word} in args is refused: it is about the router itself, not about one model",
            hint="Write it into args of [defaults] or of a [[router]].",
        )


def refuse_twice(source: str, first: str, second: str) -> NoReturn:
    """Raises an OptionError: one table says one thing twice."""
    what = f"{first} is given twice" if first == second else f"{first} and {second} set the same option"
    raise OptionError(f"{source}: {what}", hint="Keep one of them; a later table may set it again.")


def refuse_unfit(source: str, written: str, value: str, flags: FlagSet | None = None) -> None:
    """Raises an OptionError if a value cannot be written into a preset."""
    problem = value_problem(value)
    if problem is None:
        return
    in_file = flags.find(f"{written}-file") if flags else None
    if in_file:
        hint = f"Put the value into a file and name that with {in_file.spelling}."
    elif normal(written) == "--samplers":
        hint = "Write the same with --sampling-seq, one letter for each sampler."
    else:
        hint = "It reaches models through a preset file, which cannot quote." if value else f"Leave {written} out."
    raise OptionError(f"{source}: the value {value!r} of {written} {problem}", hint=hint)


def refuse_unknown_choice(source: str, name: str, text: str, option: HelpOption, binary: str) -> None:
    """Raises an OptionError if a value is none of those that the build takes."""
    choices, asked = option.choices, [text]
    if name == "draft_type":  # a list of choices, and the help shows them as one
        choices, asked = tuple(option.placeholder.split(",")), text.split(",")
    elif name == "chat_template" and (listed := _TEMPLATES.search(" ".join(option.help.split()))):
        # With Jinja on, llama-server takes a name that it does not know for the text of a template.
        choices = () if option.key.endswith("-file") else tuple(listed[1].split(", "))
    if choices and not set(asked) <= set(choices):
        raise OptionError(
            f"{source}: {name} = {text!r} is not known to {binary}",
            hint=f"It takes {', '.join(choices)}.",
        )
