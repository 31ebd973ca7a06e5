"""The options of llama-server: read from its own help text, on a command line and in a preset file."""

from __future__ import annotations

import re

_BLOCK = re.compile(r"^(?!-----)-.*(?:\n(?!-|\n).*)*", re.MULTILINE)
_ENVIRONMENT = re.compile(r"\(env: (\w+)\)")
_SECTION = re.compile(r"\[[ \t]*([^]]+?)[ \t]*\][ \t]*(?:[;#].*)?")
_PAIR = re.compile(r"([A-Za-z_][A-Za-z0-9_.-]*)[ \t]*=[ \t]*(.*?)[ \t]*(?:[;#].*)?")
_BLANK = re.compile(r"[ \t]*(?:[;#].*)?")
_PRESET_ONLY = ("load-on-startup", "stop-timeout", "dedup-cache-models")
_NUMBERS = frozenset({"N", "PORT", "INDEX", "SECONDS", "SEED"})
_WORDS_FOR_NUMBERS = frozenset({"auto", "all"})


class UsageError(Exception):
    """Raised when a command line cannot be understood; the message is what llama-server prints."""


class PresetError(Exception):
    """Raised when a preset cannot be used; the message is llama-server's."""


class Option:
    """One option of the help text.

    Attributes:
        spellings: how it is switched on or given, in the order of the help.
        negations: how it is switched off.
        hint: what stands for its value in the help, "" = it takes none.
        env: its environment variable, "" = none.
        block: its part of the help.
    """

    def __init__(self, spellings: list[str], negations: list[str], hint: str, env: str, block: str) -> None:
        self.spellings = spellings
        self.negations = negations
        self.hint = hint
        self.env = env
        self.block = block

    def __repr__(self) -> str:
        return f"<Option {self.spellings[-1]}>"

    @property
    def is_preset_only(self) -> bool:
        """Whether it exists in preset files only."""
        return not self.spellings[0].startswith("-")


class OptionTable:
    """All options of one build, found by any spelling, preset key or environment variable."""

    def __init__(self, help_text: str, missing: list[str]) -> None:
        found = [_read_block(block) for block in _BLOCK.findall(help_text)]
        known = [option for option in found if not set(missing) & {*option.spellings, *option.negations}]
        self.help_text = help_text
        for option in found:
            if option not in known:
                self.help_text = self.help_text.replace(option.block + "\n", "", 1)
        self._by_spelling = {spelling: one for one in known for spelling in one.spellings + one.negations}
        self._by_key = {spelling.lstrip("-"): option for spelling, option in self._by_spelling.items()}
        self._by_key |= {option.env: option for option in known if option.env}
        self._by_key |= {key: Option([key], [], "N", key, "") for key in _PRESET_ONLY}

    def of(self, key: str) -> Option:
        """The option with this preset key or environment variable."""
        return self._by_key[key]

    def parse(self, arguments: list[str]) -> dict[Option, str]:
        """The options on a command line, switches as "1" and "0".

        Raises:
            UsageError: unknown, or without a value that fits.
        """
        given: dict[Option, str] = {}
        rest = iter(arguments)
        for argument in rest:
            option = self._by_spelling.get(argument)
            if option is None:
                raise UsageError(f"error: invalid argument: {argument}")
            if not option.hint:
                given[option] = "0" if argument in option.negations else "1"
                continue
            value = next(rest, None)
            if complaint := _complaint(option, argument, value):
                usage = f"usage:\n{option.block}\n\n\nto show complete usage, run with -h"
                raise UsageError(f'error while handling argument "{argument}": {complaint}\n\n{usage}')
            given[option] = str(value)
        return given

    def read_preset(self, path: str) -> dict[str, dict[Option, str]]:
        """The sections of a preset file, the common one as "*".

        Raises:
            PresetError: missing, malformed, or with a key that no option has.
        """
        try:
            with open(path, encoding="utf-8", newline="") as file:
                text = file.read()
        except FileNotFoundError as exc:
            raise PresetError(f"preset file does not exist: {path}") from exc
        raw: dict[str, dict[str, str]] = {}
        section = "default"
        for line in re.split("\r\n|\n|\r", text):
            if found := _SECTION.fullmatch(line):
                section = found[1]
                raw[section] = {}
            elif found := _PAIR.fullmatch(line):
                raw.setdefault(section, {})[found[1]] = found[2]
            elif not _BLANK.fullmatch(line):
                raise PresetError(f"failed to parse server config file: {path}")
        named = {_canonical(name): pairs for name, pairs in sorted(raw.items())}
        sections = {name: self._options_of(name, pairs) for name, pairs in named.items()}
        return {name: options for name, options in sections.items() if options or name != "default"}

    def _options_of(self, name: str, pairs: dict[str, str]) -> dict[Option, str]:
        options = {}
        for key, value in sorted(pairs.items()):
            if key == "version":
                continue
            option = self._by_key.get(key)
            if option is None:
                raise PresetError(f"option '{key}' not recognized in preset '{name}'")
            negated = key in {spelling.lstrip("-") for spelling in option.negations}
            options[option] = ("false" if is_on(value) else "true") if negated else value
        return options


def is_on(value: str) -> bool:
    """Whether a value switches something on."""
    return value in {"on", "enabled", "true", "1"}


def is_off(value: str) -> bool:
    """Whether a value switches something off."""
    return value in {"off", "disabled", "false", "0"}


def render(options: dict[Option, str]) -> list[str]:
    """Options as arguments of a command line, in llama-server's order."""
    arguments: list[str] = []
    for option in sorted(options, key=lambda option: option.spellings[0]):
        if option.is_preset_only:
            continue
        if option.hint:
            arguments += [option.spellings[-1], options[option]]
        elif not is_off(options[option]):
            arguments.append(option.spellings[-1])
        elif option.negations:
            arguments.append(option.negations[-1])
    return arguments


def to_ini(name: str, options: dict[Option, str]) -> str:
    """Options as the section of a preset file, as GET /models shows them."""
    ordered = sorted(options, key=lambda option: option.spellings[0])
    lines = [f"{option.spellings[-1].lstrip('-')} = {options[option]}\n" for option in ordered]
    return f"[{name}]\n{''.join(lines)}\n"


def _read_block(block: str) -> Option:
    """`-x, --long, --no-long HINT   what it does`, where what it does may stand on the next lines."""
    first = block.partition("\n")[0]
    spellings: list[str] = []
    rest = first
    while found := re.match(r"(-[^\s,]+)(?:,\s+|\s|$)", rest):
        spellings.append(found[1])
        rest = rest[found.end() :]
    hint = "" if rest.startswith(" ") else re.split(r"\s{2,}", rest)[0]
    env = _ENVIRONMENT.search(block)
    negations = _negations(spellings)
    positives = [spelling for spelling in spellings if spelling not in negations]
    return Option(positives, negations, hint, env[1] if env else "", block)


def _negations(spellings: list[str]) -> list[str]:
    at = next((at for at, spelling in enumerate(spellings) if re.match("--no-|-n", spelling)), 0)
    is_pair = any(spelling.startswith("--no-") for spelling in spellings) and at > 0
    return spellings[at:] if is_pair else []


def _complaint(option: Option, argument: str, value: str | None) -> str:
    """What llama-server has against a value, "" = nothing."""
    if value is None:
        return "expected value for argument"
    if option.hint in _NUMBERS and not (value in _WORDS_FOR_NUMBERS and "'auto'" in option.block):
        return "" if re.match(r"\s*[+-]?\d", value) else "stoi"
    if option.hint == "[on|off|auto]" and not (is_on(value) or is_off(value) or value == "auto"):
        return f"error: unknown value for {argument}: '{value}'\n"
    return ""


def _canonical(section: str) -> str:
    """Text after the last colon is a quantization tag to llama-server, and written in capitals."""
    name, colon, tag = section.rpartition(":")
    if not colon:
        return section
    found = re.search(r"[-.]([A-Za-z0-9_]+)$", tag)
    return f"{name}:{(found[1] if found else tag).upper()}"
