"""What one build of llama-server can do, read from its own `--help`.

llama-server has no machine-readable list of its options, and their names change between builds; the help text
is all that every build has. Its layout is the one of `common_arg::to_string` in llama.cpp's `common/arg.cpp`,
the same from build 9093 to 11434: the spellings and the value's placeholder first, the help from column 40,
on the same line if there is room, else on the lines below.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from llamavisor.likeness import near

_HELP_COLUMN = 40
_GAP = slice(_HELP_COLUMN - 3, _HELP_COLUMN)
"""Three blanks before the help column tell a head with room for its help from a longer head."""
_SPELLING = re.compile(r"--?[A-Za-z][\w.-]*")
_SEPARATOR = re.compile(r",\s+(?=-)")
_BRACKETED = re.compile(r"<[^>]*>|\[[^\]]*\]|\{[^}]*\}")
_BRACED_CHOICES = re.compile(r"\{([^}]*)\}|\[([^\]|]*(?:\|[^\]|]*)+)\]")
_LISTED_CHOICES = re.compile(r"allowed values: ([\w, ]+)")
_BULLET_CHOICE = re.compile(r"^- ([\w+-]+)(?: \(default\))?:", re.MULTILINE)
_REMOVED = "the argument has been removed"
_DOWNLOADS = "can download weights from the internet"


@dataclass(frozen=True, slots=True)
class HelpOption:
    """One option of one build.

    Attributes:
        spellings: every way to write it, with dashes, the positive ones before the negated ones.
        negations: those of `spellings` that switch it off.
        placeholder: what the help prints for its value, empty for a flag.
        values: how many values it takes: 0, 1 or 2.
        help: the help text, one line per line of the help.
        has_separate_off: the negations are an option of their own in this build, which a preset must name.
    """

    spellings: tuple[str, ...]
    negations: tuple[str, ...]
    placeholder: str
    values: int
    help: str
    has_separate_off: bool = False

    @property
    def spelling(self) -> str:
        """The last positive spelling: the long one, which llama-server itself treats as the option's name."""
        return [spelling for spelling in self.spellings if spelling not in self.negations][-1]

    @property
    def key(self) -> str:
        """The option's name in a preset: its spelling without dashes."""
        return self.spelling.lstrip("-")

    @property
    def is_repeatable(self) -> bool:
        """Whether several values may be given at once, joined with commas."""
        return self.placeholder.endswith(",...") or re.search(r"comma[- ]separated", self._flat) is not None

    @property
    def is_download(self) -> bool:
        """Whether it is a ready-made choice of model that llama-server fetches by itself."""
        return _DOWNLOADS in self._flat

    @property
    def removal(self) -> str | None:
        """What the help says in place of an option that this build no longer has, None while it has it."""
        return re.sub(r"\s*\(env: \w+\)$", "", self._flat) if self._flat.startswith(_REMOVED) else None

    @property
    def choices(self) -> tuple[str, ...]:
        """The only values that this build takes, as far as its help lists them; empty when it does not."""
        if braced := _BRACED_CHOICES.search(self.placeholder):
            return tuple(re.split(r"\s*[,|]\s*", braced[1] or braced[2]))
        if listed := _LISTED_CHOICES.search(self._flat.split("(default", 1)[0]):
            return tuple(listed[1].strip().split(", "))
        return tuple(_BULLET_CHOICE.findall(self.help))

    @property
    def _flat(self) -> str:
        return " ".join(self.help.split())

    def as_preset(self, *, is_on: bool) -> tuple[str, str]:
        """The preset entry that switches this flag on or off.

        With "0" the router writes the negation for a model, and leaves a flag without one out.
        """
        if not is_on and self.has_separate_off:
            return self.negations[-1].lstrip("-"), "1"
        return self.key, "1" if is_on else "0"


class FlagSet:
    """The options of one build, found by any of their spellings."""

    __slots__ = ("_by_key", "_by_spelling", "_options")

    def __init__(self, options: Iterable[HelpOption]) -> None:
        self._options = _join_separate_negations(options)
        self._by_spelling = {spelling: option for option in self._options for spelling in option.spellings}
        self._by_key = {spelling.lstrip("-"): option for spelling, option in self._by_spelling.items()}

    def __repr__(self) -> str:
        return f"<FlagSet of {len(self._options)} options>"

    def __len__(self) -> int:
        return len(self._options)

    def __iter__(self) -> Iterator[HelpOption]:
        return iter(self._options)

    def find(self, spelling: str) -> HelpOption | None:
        """The option that this build knows by `spelling`, dashes included; None too if it was removed."""
        option = self._by_spelling.get(normal(spelling))
        return None if option is None or option.removal else option

    def find_key(self, key: str) -> HelpOption | None:
        """The option that this build knows by a preset's key, that is a spelling without its dashes."""
        option = self._by_key.get(key)
        return None if option is None or option.removal else option

    def removal(self, spelling: str) -> str | None:
        """Why `spelling` is no longer an option, in the build's words; None if it never was or still is."""
        option = self._by_spelling.get(normal(spelling))
        return option.removal if option else None

    def similar(self, spelling: str) -> str | None:
        """The known spelling that somebody who wrote `spelling` most likely meant."""
        known = [known for known, option in self._by_spelling.items() if not option.removal]
        return next(iter(near(normal(spelling), known, like=0.8)), None)  # they all begin with dashes, and often alike


def normal(spelling: str) -> str:
    """`spelling` as the help prints it: llama-server takes `--ctx_size` for `--ctx-size`."""
    return spelling.replace("_", "-") if spelling.startswith("--") else spelling


def parse_help(text: str) -> FlagSet:
    """The options that a `--help` text describes; none at all for the text of some other program.

    Lines that fit nothing (section titles, what a GPU backend prints while it starts) are passed over.
    """
    options: list[HelpOption] = []
    for line in text.splitlines():
        if line.startswith("-") and (option := _parse_head(line)):
            options.append(option)
        elif options and line.startswith(" " * _HELP_COLUMN):
            last = options[-1]
            options[-1] = replace(last, help=f"{last.help}\n{line[_HELP_COLUMN:]}".lstrip("\n"))
    return FlagSet(options)


def _parse_head(line: str) -> HelpOption | None:
    has_help = line[_GAP].isspace() and len(line) > _HELP_COLUMN
    head = line[: _GAP.start].rstrip() if has_help else line.rstrip()
    spellings: list[str] = []
    at = 0
    while found := _SPELLING.match(head, at):
        spellings.append(found[0])
        at = found.end()
        if not (comma := _SEPARATOR.match(head, at)):
            break
        at = comma.end()
    if not spellings:
        return None
    placeholder = head[at:].strip()
    return HelpOption(
        spellings=tuple(spellings),
        negations=() if placeholder else _negations(spellings),
        placeholder=placeholder,
        values=len(_BRACKETED.sub("x", placeholder).split()),
        help=line[_HELP_COLUMN:] if has_help else "",
    )


def _negations(spellings: list[str]) -> tuple[str, ...]:
    # The help prints the positive spellings first and does not mark where the negated ones begin, some of
    # which are short (`-kvo, --kv-offload, -nkvo, --no-kv-offload`); the positive ones end with a long one.
    long_positives = [i for i, s in enumerate(spellings) if s.startswith("--") and not s.startswith("--no-")]
    if not long_positives or not any(spelling.startswith("--no-") for spelling in spellings):
        return ()
    return tuple(spellings[long_positives[-1] + 1 :])


def _join_separate_negations(options: Iterable[HelpOption]) -> tuple[HelpOption, ...]:
    """Makes one option of `--cont-batching` and a `--no-cont-batching` that an old build lists on its own."""
    joined = list(options)
    flags = {option.spelling: option for option in joined if not option.values and not option.negations}
    for spelling, off in flags.items():
        positive = flags.get(spelling.replace("--no-", "--", 1)) if spelling.startswith("--no-") else None
        if positive is not None:
            joined.remove(off)
            joined[joined.index(positive)] = replace(
                positive,
                spellings=positive.spellings + off.spellings,
                negations=off.spellings,
                has_separate_off=True,
            )
    return tuple(joined)
