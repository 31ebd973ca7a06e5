"""What a configuration says of single models: tables by name or glob, and which of them speak for a model.

All tables that match a name apply, laid over each other by option: the one with more literal characters wins, of two
with equally many the later one.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from llamavisor import ini
from llamavisor.options import CacheType, Count, Devices, GpuLayers, ModelOptions, Natural, OptionLayer, Share

_SCALED = re.compile(r"(?P<path>.+):(?P<scale>[+-]?(?:\d+\.?\d*|\.\d+))", re.DOTALL)
_BRACKET = re.compile(r"\[(!?+)(\]?+[^]]*)\]")
"""A set of characters in a glob, as `fnmatch.translate` reads it."""


def alias_problem(alias: str) -> str | None:
    """Why a model cannot be called `alias` besides its name, None if it can."""
    if problem := ini.section_problem(alias):
        return problem
    if alias.startswith("-"):
        return "begins with '-', as an option does"
    if "," in alias:
        return "holds a ',', which separates aliases"
    return ini.value_problem(alias)


def split_scale(lora: str) -> tuple[str, str | None]:
    """The path and the scale of `path:0.5`; None for a path without one."""
    found = _SCALED.fullmatch(lora)
    return (found["path"], found["scale"]) if found else (lora, None)


def is_template_file(template: str) -> bool:
    """Whether a `chat_template` names a file, and not one of the templates that llama-server has."""
    return "/" in template or template.endswith(".jinja")


def _texts(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _aliases(value: object) -> object:
    value = _texts(value)
    for alias in value if isinstance(value, list | tuple) else ():
        if isinstance(alias, str) and (problem := alias_problem(alias)):
            raise ValueError(f"the alias {alias!r} {problem}")
    return value


def _tags(value: object) -> object:
    value = _texts(value)
    for tag in value if isinstance(value, list | tuple) else ():
        problem = ini.value_problem(tag) if isinstance(tag, str) else None
        if problem or (isinstance(tag, str) and "," in tag):
            raise ValueError(f"the tag {tag!r} {problem or 'holds a comma'}")
    return value


def _json_object(value: object) -> object:
    """A table as compact JSON; `;` and `#` are escaped, since a preset would begin a comment there."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError("must be a table of names and values, such as { enable_thinking = false }") from None
    if not isinstance(value, Mapping):
        raise ValueError("must be a table of names and values, such as { enable_thinking = false }")  # noqa: TRY004
    try:
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("holds a value that JSON does not have, such as a date or an infinite number") from None
    return text.replace(";", "\\u003b").replace("#", "\\u0023")


def _path(value: object) -> object:
    if isinstance(value, str) and not value.strip():
        raise ValueError("must be a path, not empty")
    return value


def _path_or_bool(value: object) -> object:
    if not isinstance(value, str | bool):
        raise ValueError("must be a path in quotes, or false for none")  # noqa: TRY004 - pydantic reports ValueErrors
    return _path(value)


def _adapters(value: object) -> object:
    value = _texts(value)
    written = [each for each in value if isinstance(each, str)] if isinstance(value, list | tuple) else []
    is_scaled = any(split_scale(each)[1] is not None for each in written)
    for each in written:
        path, _ = split_scale(each)
        if not path.strip():
            raise ValueError("must be a list of paths, each with a scale if need be: path:0.5")
        if any(char in path for char in ',"'):
            raise ValueError(f"{each!r} holds a comma or a quote, which llama-server takes for the end of the path")
        if is_scaled and ":" in path:
            raise ValueError(f"{each!r} holds a ':' beside the one before a scale; rename the file")
    return value


_Text = Annotated[str, BeforeValidator(_path)]
_PathText = Annotated[_Text, Field(title="path")]
_PathOrBool = Annotated[str | bool, BeforeValidator(_path_or_bool), Field(title="path, true or false")]


class ModelSettings(ModelOptions):
    """What one `[model."NAME"]` table says: the options of all tables, and what makes sense for single models only.

    None, and an empty tuple that is not written, leave the choice to an earlier table. Paths are as they were written
    until `anchored` makes them absolute.
    """

    is_per_model: ClassVar[bool] = True

    aliases: Annotated[tuple[str, ...], BeforeValidator(_aliases)] = ()
    """More names that clients may call the model by; only in a table with an exact name."""
    tags: Annotated[tuple[str, ...], BeforeValidator(_tags)] = ()
    """Words that are shown with the model."""
    load_on_start: bool | None = None
    """Whether the model is loaded as soon as its router is ready."""
    pin: bool | None = None
    """Whether the model, once it is loaded, is unloaded neither to make room nor for being idle."""
    router: Annotated[tuple[str, ...], BeforeValidator(_texts), Field(title="name or list of names")] | None = None
    """The routers that may hold the model; all if it is not said, none for `[]`."""
    chat_template: _Text | None = None
    """Chat template: one that llama-server knows by name, or a file (a name with a / or that ends in .jinja)."""
    chat_template_kwargs: Annotated[str, BeforeValidator(_json_object), Field(title="table")] | None = None
    """Values for the chat template, as a table: { enable_thinking = false }."""
    mmproj: _PathOrBool | None = None
    """Projector file for images and sound; false for none, true for the one found beside the model."""
    draft: _PathOrBool | None = None
    """Draft model file for speculative decoding; false for none, true for the one found beside the model."""
    draft_type: _Text | None = None
    """Kind of speculative decoding, such as "draft-mtp"; by default it follows from the name of the draft's file."""
    draft_max: Natural | None = None
    """Tokens to draft at most."""
    draft_min: Natural | None = None
    """Tokens to draft at least."""
    draft_p_min: Annotated[Share, Field(le=1)] | None = None
    """Probability below which drafting stops."""
    draft_gpu_layers: GpuLayers | None = None
    """Layers of the draft model in GPU memory: "auto", "all", or a number."""
    draft_devices: Devices | None = None
    """Devices for the draft model."""
    draft_threads: Count | None = None
    """CPU threads for the draft model."""
    draft_cache_type_k: CacheType | None = None
    """Data type of the draft model's KV cache, keys."""
    draft_cache_type_v: CacheType | None = None
    """Data type of the draft model's KV cache, values."""
    lora: Annotated[tuple[str, ...], BeforeValidator(_adapters), Field(title="list of paths")] | None = None
    """LoRA adapter files, each with a scale if need be: ["a.gguf", "b.gguf:0.5"]; [] for none."""
    grammar_file: _PathText | None = None
    """File with the grammar that answers follow unless a request brings its own."""
    slot_save_path: _PathText | None = None
    """Folder for saved slots."""

    def anchored(self, resolve: Callable[[str], str]) -> ModelSettings:
        """The same with every path put through `resolve`, which makes it absolute.

        Raises:
            ValueError: the folder of an adapter cannot be written in a list. Whatever `resolve` raises comes through.
        """
        changed: dict[str, object] = {}
        for key in ("mmproj", "draft", "grammar_file", "slot_save_path"):
            value = getattr(self, key)
            if isinstance(value, str):
                changed[key] = resolve(value)
        if self.chat_template is not None and is_template_file(self.chat_template):
            changed["chat_template"] = resolve(self.chat_template)
        if self.lora:
            parts = [split_scale(each) for each in self.lora]
            changed["lora"] = _adapters(
                tuple(resolve(path) if scale is None else f"{resolve(path)}:{scale}" for path, scale in parts)
            )
        return self.model_copy(update=changed) if changed else self


@dataclass(frozen=True, slots=True)
class ModelRule:
    """One `[model."…"]` table.

    Attributes:
        pattern: a name, or a glob of them: `*`, `?`, `[…]` as in fnmatch, upper and lower case told apart.
        source: names the table in messages: `[model."qwen*"]`.
        settings: what it says, with absolute paths.
        literal_count: characters of the pattern that stand for themselves.
        name: the only name that it matches, None when it can match several.
        layer: the options in it.
    """

    pattern: str
    source: str
    settings: ModelSettings
    literal_count: int = field(init=False, repr=False, compare=False)
    name: str | None = field(init=False, repr=False, compare=False)
    layer: OptionLayer = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        literals, is_exact = _literals(self.pattern)
        object.__setattr__(self, "literal_count", len(literals))
        object.__setattr__(self, "name", literals if is_exact else None)
        object.__setattr__(self, "layer", OptionLayer(self.source, self.settings))

    @classmethod
    def of(cls, pattern: str, settings: ModelSettings) -> ModelRule:
        """The table of `pattern`, called as it is written in a file."""
        return cls(pattern, f"[model.{json.dumps(pattern, ensure_ascii=False)}]", settings)


def matching(rules: Sequence[ModelRule], name: str) -> tuple[ModelRule, ...]:
    """The rules that speak for a model called `name`, lowest precedence first.

    Pure. A tuple of rules is prepared once and remembered, so that ten thousand names cost tens of milliseconds.
    """
    book = _book(_Same(rules)) if isinstance(rules, tuple) else _Book(rules)
    return book.matching(name)


class _Book:
    """Rules ready to be looked up."""

    def __init__(self, rules: Sequence[ModelRule]) -> None:
        self._named: defaultdict[str, list[tuple[int, int, ModelRule]]] = defaultdict(list)
        self._globs: list[tuple[re.Pattern[str], tuple[int, int, ModelRule]]] = []
        for number, rule in enumerate(rules):
            ranked = (rule.literal_count, number, rule)
            if rule.name is not None:
                self._named[rule.name].append(ranked)
            else:
                self._globs.append((re.compile(fnmatch.translate(rule.pattern)), ranked))

    def matching(self, name: str) -> tuple[ModelRule, ...]:
        found = [ranked for pattern, ranked in self._globs if pattern.match(name)]
        found += self._named.get(name, ())
        found.sort()  # numbers are unique: the rules themselves are never compared
        return tuple(rule for _, _, rule in found)


@dataclass(frozen=True, slots=True, eq=False)
class _Same:
    """A tuple of rules that is equal to itself alone: comparing rules by content takes longer than using them."""

    rules: tuple[ModelRule, ...]

    def __hash__(self) -> int:
        return id(self.rules)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.rules is other.rules


@functools.lru_cache(maxsize=4)
def _book(same: _Same) -> _Book:
    return _Book(same.rules)


def _literals(pattern: str) -> tuple[str, bool]:
    """The characters of a glob that stand for themselves, and whether they are all there is to it.

    A set of one character, `[*]`, is that character: so a name that holds one can be written.
    """
    literals, is_exact, at = [], True, 0
    while at < len(pattern):
        char = pattern[at]
        bracket = _BRACKET.match(pattern, at) if char == "[" else None
        if bracket is not None:
            at = bracket.end()
            if not bracket[1] and len(bracket[2]) == 1:
                literals.append(bracket[2])
            else:
                is_exact = False
            continue
        at += 1
        if char in "*?":
            is_exact = False
        else:
            literals.append(char)
    return "".join(literals), is_exact
