"""From option tables to what one build of llama-server is told: a preset's entries, and a few words of argv.

Nothing that concerns models goes onto the router's command line, because there it beats every section of the
preset. Tables are laid over each other by option, whatever the spelling: `-c 4096` in a later table's `args`
replaces an earlier `ctx_size`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from llamavisor import loadmode
from llamavisor.errors import OptionError
from llamavisor.helptext import FlagSet, HelpOption, normal
from llamavisor.options import ModelOptions, OptionLayer
from llamavisor.refusals import (
    looks_like_option,
    refuse_listener,
    refuse_reserved,
    refuse_twice,
    refuse_two_in_one,
    refuse_unfit,
    refuse_unknown_choice,
)
from llamavisor.rules import is_template_file, split_scale
from llamavisor.spellings import ALL_SPELLINGS, LISTENER, typed_name

__all__ = ["LaunchOptions", "ModelOptions", "OptionLayer", "check", "resolve", "spelled"]

_ALL_LAYERS = "999"
"""More layers than any model has: how "all" was said before builds knew the word."""
_DEVICE_OPTIONS = ("--device", "--device-draft", "--mmproj-device")
_NOT_AWAITED = re.compile(r"none|CPU|RPC", re.IGNORECASE)
"""Devices that --list-devices never shows: the CPU, and other machines', which exist only with --rpc."""
_SIBLINGS = (
    frozenset({"chat-template", "chat-template-file"}),
    frozenset({"lora", "lora-scaled"}),
    frozenset({"grammar", "grammar-file", "json-schema", "json-schema-file"}),
)
"""Keys of options that replace each other: with one of them a later table takes back the others.

In args of one table they may stand together, as llama-server lets them.
"""
_MAY_COME_IN_PIECES = (
    *("devices", "tensor_split", "load_mode"),
    *("draft_devices", "draft_type", "chat_template", "lora"),
)
"""What args may say in several words, as far as that can be known without the build's help."""
_WORDS = 'Write one string per word: ["--threads", "8"].'


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """What option tables come to, for the build found: those of a router, or all that speak for one model.

    Attributes:
        preset: entries for a section of the preset, sorted by key.
        listener_args: words for the router's own command line.
        required_devices: devices by name that must be visible before a model can load.
        needs_gpu: whether a model is to be put onto a GPU, be it a named one or any.
        may_use_gpus: whether it is left to llama-server to put models onto whatever GPU there is.
    """

    preset: Mapping[str, str]
    listener_args: tuple[str, ...] = ()
    required_devices: tuple[str, ...] = ()
    needs_gpu: bool = False
    may_use_gpus: bool = True


@dataclass(frozen=True, slots=True)
class _Choice:
    """What one table says about one option: `text` for `option`, or for load modes the preset's entries.

    `text` is "on" or "off" for a flag, None where the build has no word for what is its default anyway.
    """

    name: str
    written: str
    option: HelpOption | None = None
    text: str | None = None
    entries: Mapping[str, str] = field(default_factory=dict)
    is_typed: bool = False


def only_for_routers(layers: Sequence[OptionLayer]) -> tuple[OptionLayer, ...]:
    """The same tables with what they say to a router's own process, and nothing of what they say to its models.

    Without the build's help the words of `args` cannot be told apart from their values: if one of them is for the
    router, all of the table are kept.
    """
    told = (layer.options.args for layer in layers)
    return tuple(
        OptionLayer("", ModelOptions(args=args)) for args in told if any(normal(word) in LISTENER for word in args)
    )


def check(layers: Sequence[OptionLayer]) -> None:
    """Refuses what no build of llama-server could make good, so that it fails with the configuration.

    Without the build's help it cannot be known whether a word is an option or the value of the one before it:
    what looks like an option is taken for one.

    Raises:
        OptionError: an option is reserved for the supervisor, a value does not fit into a preset, or one
            table says the same thing twice.
    """
    for layer in layers:
        source, options = layer.source, layer.options
        seen = {name: name for name in ALL_SPELLINGS if getattr(options, name, None) is not None}
        for name in seen:
            value = getattr(options, name)
            if value and isinstance(value, str | tuple):
                refuse_unfit(source, name, spelled(value))
        previous = ""
        for word in options.args:
            if looks_like_option(word):
                refuse_two_in_one(source, word)
                refuse_reserved(source, word, (word,))
                refuse_listener(layer, word, (word,))
                typed = typed_name(word)
                if typed in seen and (typed not in _MAY_COME_IN_PIECES or seen[typed] == typed):
                    refuse_twice(source, seen[typed], word)
                if typed is not None:
                    seen[typed] = word
            elif not previous:
                raise OptionError(f"{source}: args begin with {word!r}, which is not an option", hint=_WORDS)
            elif normal(previous) not in LISTENER:
                refuse_unfit(source, previous, word)
            previous = word


def resolve(layers: Sequence[OptionLayer], flags: FlagSet, *, binary: str) -> LaunchOptions:
    """What llama-server must be told so that models run as `layers` say.

    Pure. What the build spells differently is translated; what it does not know is an error, never left out.

    Args:
        layers: option tables, lowest precedence first.
        flags: the options that the found build knows.
        binary: its path, for messages.

    Raises:
        OptionError: an option is unknown to the build, reserved for the supervisor, given twice in one table,
            or has a value that the build does not take or that a preset cannot carry.
    """
    chosen: dict[str, _Choice] = {}
    for layer in layers:
        table: dict[str, _Choice] = {}
        for choice in (*_typed_choices(layer, flags, binary), *_args_choices(layer, flags, binary)):
            earlier = table.get(choice.name)
            table[choice.name] = choice if earlier is None else _joined(layer.source, earlier, choice)
        for sibling in _siblings(layer.source, table):
            chosen.pop(sibling, None)
        chosen.update(table)
    preset: dict[str, str] = {}
    listener_args: list[str] = []
    for choice in chosen.values():
        if _is_listener(choice.option):
            listener_args += _as_argv(choice)
        else:
            preset |= _as_preset(choice)
    devices = _required_devices(preset, flags)
    return LaunchOptions(
        preset=dict(sorted(preset.items())),
        listener_args=tuple(listener_args),
        required_devices=devices,
        needs_gpu=bool(devices) or _offloads(preset, flags),
        may_use_gpus=not _keeps_off_gpus(preset, flags),
    )


def _typed_choices(layer: OptionLayer, flags: FlagSet, binary: str) -> Iterator[_Choice]:
    for name in ALL_SPELLINGS:
        value = getattr(layer.options, name, None)
        if value is None:
            continue
        if name == "load_mode":
            entries = _load_mode_entries(layer.source, name, value, flags, binary)
            yield _Choice("load-mode", name, entries=entries, is_typed=True)
            continue
        spellings = _spellings(name, value)
        option = next((known for spelling in spellings if (known := flags.find(spelling))), None)
        if option is None and _is_nothing(name, value):
            continue
        if option is None:
            removal = next((why for spelling in spellings if (why := flags.removal(spelling))), None)
            raise OptionError(
                f"{layer.source}: {name} needs {spellings[0]}, which {binary} does not know",
                hint=removal or f"Remove {name}, or set llama_server to a build that has the option.",
            )
        text = None if _is_nothing(name, value) else _typed_text(name, value, option)
        if option.values and text is not None:
            refuse_unknown_choice(layer.source, name, text, option, binary)
            refuse_unfit(layer.source, name, text)
        yield _Choice(option.key, name, option, text, is_typed=True)


def _spellings(name: str, value: object) -> tuple[str, ...]:
    """A template is named or read from a file, and adapters have scales or none: by options of their own."""
    if name == "chat_template" and isinstance(value, str):
        return ("--chat-template-file",) if is_template_file(value) else ("--chat-template",)
    if name == "lora" and isinstance(value, tuple):
        return ("--lora-scaled",) if any(map(_is_scaled, value)) else ("--lora",)
    return ALL_SPELLINGS[name]


def _is_nothing(name: str, value: object) -> bool:
    """Whether a value takes back what earlier tables say: llama-server has no word for "no projector"."""
    return name in ("mmproj", "draft", "lora") and (isinstance(value, bool) or value == ())


def _is_scaled(adapter: str) -> bool:
    return split_scale(adapter)[1] is not None


def _typed_text(name: str, value: object, option: HelpOption) -> str | None:
    """How this build spells a typed value.

    1. Builds that take only numbers of layers: "all" is a number beyond any model, "auto" is left out.
    2. Builds whose --flash-attn is a bare flag: "on" sets it; "off" is the default, and "auto" becomes that.
    3. Adapters of which some are scaled: all are.
    4. Everything else is spelled alike in all builds.
    """
    if name in ("gpu_layers", "draft_gpu_layers") and value in ("auto", "all") and f"'{value}'" not in option.help:
        return _ALL_LAYERS if value == "all" else None
    if name == "flash_attn" and not option.values:
        return "on" if value == "on" else None
    if name == "lora" and isinstance(value, tuple) and any(map(_is_scaled, value)):
        return ",".join(each if _is_scaled(each) else f"{each}:1" for each in value)
    return spelled(value)


def spelled(value: object) -> str:
    """A typed value in llama-server's words."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(spelled, value))
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _args_choices(layer: OptionLayer, flags: FlagSet, binary: str) -> Iterator[_Choice]:
    words = list(layer.options.args)
    mode_words: list[tuple[str, str]] = []
    previous = ""
    while words:
        word = words.pop(0)
        option = _find(layer, word, previous, flags, binary)
        takes_value = normal(word) in loadmode.VALUED if option is None else option.values > 0
        text = ""
        if takes_value:
            if not words or (words[0].startswith("--") and flags.find(words[0])):
                raise OptionError(f"{layer.source}: {word} in args needs a value")
            text = words.pop(0)
        elif option is not None:
            text = "off" if normal(word) in option.negations else "on"
        if option is None or normal(word) in loadmode.SPELLINGS:
            mode_words.append((word, text))
        else:
            if takes_value and not _is_listener(option):
                refuse_unfit(layer.source, word, text, flags)
            yield _Choice(option.key, word, option, text)
        previous = word
    if mode_words:
        mode = loadmode.from_words(layer.source, mode_words)
        written = mode_words[-1][0]
        yield _Choice("load-mode", written, entries=_load_mode_entries(layer.source, written, mode, flags, binary))


def _find(layer: OptionLayer, word: str, previous: str, flags: FlagSet, binary: str) -> HelpOption | None:
    """The option that `word` stands for; None if it is about load modes, in the words of another build."""
    source = layer.source
    if not looks_like_option(word):
        after = f" after {previous}" if previous else ""
        raise OptionError(f"{source}: {word!r} in args{after} is not an option", hint=_WORDS)
    refuse_two_in_one(source, word)
    option = flags.find(word)
    refuse_reserved(source, word, option.spellings if option else (word,))
    refuse_listener(layer, word, option.spellings if option else (word,))
    if option is None:
        if normal(word) in loadmode.SPELLINGS:
            return None
        hint = flags.removal(word)
        if hint is None and (similar := flags.similar(word)):
            hint = f"Did you mean {similar}?"
        raise OptionError(
            f"{source}: {word} in args is not an option of {binary}",
            hint=hint or "Its --help lists what it takes.",
        )
    if option.is_download:
        raise OptionError(
            f"{source}: {word} in args is refused: it downloads one model and makes every model be that one",
            hint="Put the GGUF file into models_dir.",
        )
    if option.values > 1:
        raise OptionError(f"{source}: {word} in args is refused: it takes two values, which a router cannot hand on")
    return option


def _load_mode_entries(source: str, written: str, mode: str, flags: FlagSet, binary: str) -> Mapping[str, str]:
    entries = loadmode.as_preset(mode, flags)
    if entries is None:
        raise OptionError(
            f"{source}: {written} asks for the load mode {mode!r}, which {binary} does not have",
            hint=f"Remove {written}, or set llama_server to a build that has it.",
        )
    return entries


def _joined(source: str, first: _Choice, second: _Choice) -> _Choice:
    """One choice of two that a table makes of one option, if both stand in args and it may be repeated."""
    option = second.option
    if first.is_typed or option is None or not option.values or not option.is_repeatable:
        refuse_twice(source, first.written, second.written)
    return replace(second, text=f"{first.text},{second.text}")


def _siblings(source: str, table: Mapping[str, _Choice]) -> Iterator[str]:
    """The names that what `table` says replaces besides its own."""
    for family in _SIBLINGS:
        here = [choice for name, choice in table.items() if name in family]
        if len(here) > 1 and any(choice.is_typed for choice in here):
            refuse_twice(source, here[0].written, here[1].written)
        if here:
            yield from family


def _is_listener(option: HelpOption | None) -> bool:
    return option is not None and not LISTENER.isdisjoint(option.spellings)


def _as_argv(choice: _Choice) -> tuple[str, ...]:
    if choice.option is None or choice.text is None:
        return ()
    if choice.option.values:
        return choice.option.spelling, choice.text
    return (choice.option.spelling if choice.text == "on" else choice.option.negations[-1],)


def _as_preset(choice: _Choice) -> Mapping[str, str]:
    if choice.option is None or choice.text is None:
        return choice.entries
    if choice.option.values:
        return {choice.option.key: choice.text}
    return dict([choice.option.as_preset(is_on=choice.text == "on")])


def _required_devices(preset: Mapping[str, str], flags: FlagSet) -> tuple[str, ...]:
    options = [option for spelling in _DEVICE_OPTIONS if (option := flags.find(spelling))]
    names = [name.strip() for option in options for name in preset.get(option.key, "").split(",")]
    return tuple(dict.fromkeys(name for name in names if name and not _NOT_AWAITED.match(name)))


def _keeps_off_gpus(preset: Mapping[str, str], flags: FlagSet) -> bool:
    device, layers = flags.find("--device"), flags.find("--n-gpu-layers")
    is_none = device is not None and preset.get(device.key) == "none"
    return is_none or (layers is not None and preset.get(layers.key) == "0")


def _offloads(preset: Mapping[str, str], flags: FlagSet) -> bool:
    layers = flags.find("--n-gpu-layers")
    if layers is None or _keeps_off_gpus(preset, flags):
        return False
    text = preset.get(layers.key, "")
    return text == "all" or (text.isdecimal() and int(text) > 0)
