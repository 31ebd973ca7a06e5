"""How a model file gets into memory, in every build's words: `--load-mode`, and the flags that it replaced.

Builds up to 10034 have `--mmap`, `--mlock` and `--direct-io`; later ones have `--load-mode`, and those flags
too until they were removed shortly before 10883. Mapping was on by default, so the old `--mlock` alone maps
and locks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llamavisor.errors import OptionError
from llamavisor.helptext import FlagSet, normal

VALUED = ("--load-mode", "-lm")
_OLD = {
    "--mmap": ("mmap", True),
    "--no-mmap": ("mmap", False),
    "--mlock": ("mlock", True),
    "--direct-io": ("dio", True),
    "-dio": ("dio", True),
    "--no-direct-io": ("dio", False),
    "-ndio": ("dio", False),
}
SPELLINGS = (*VALUED, *_OLD)
_AS_FLAGS: Mapping[str, Mapping[str, bool]] = {
    "auto": {},
    "none": {"--mmap": False},
    "mmap": {"--mmap": True},
    "mlock": {"--mmap": False, "--mlock": True},
    "mmap+mlock": {"--mmap": True, "--mlock": True},
    "dio": {"--direct-io": True},
}


def from_words(source: str, words: Sequence[tuple[str, str]]) -> str:
    """The one mode that a table's args ask for.

    Args:
        source: the table, for messages.
        words: the spellings used and their values, "" for the flags; at least one.

    Raises:
        OptionError: they contradict each other.
    """
    named = [mode for word, mode in words if normal(word) in VALUED]
    asked = dict(_OLD[normal(word)] for word, _ in words if normal(word) in _OLD)
    if len(named) + len(asked) < len(words) or (named and asked):
        spelled = " and ".join(word for word, _ in words)
        raise OptionError(f"{source}: {spelled} in args contradict each other", hint='Set load_mode = "…" instead.')
    if named:
        return named[-1]
    if asked.get("dio"):
        return "dio"
    is_mapped = asked.get("mmap", True)
    if asked.get("mlock"):
        return "mmap+mlock" if is_mapped else "mlock"
    if not is_mapped:
        return "none"
    return "mmap" if "mmap" in asked else "auto"


def as_preset(mode: str, flags: FlagSet) -> Mapping[str, str] | None:
    """The preset's entries for `mode` in this build, none for its default; None if the build cannot do it."""
    option = flags.find("--load-mode")
    if option is not None:
        if mode in option.choices or not option.choices:
            return {option.key: mode}
        return {} if mode == "auto" else None
    if mode not in _AS_FLAGS:
        return None
    entries: dict[str, str] = {}
    for spelling, is_on in _AS_FLAGS[mode].items():
        known = flags.find(spelling)
        if known is None and (off := flags.find(spelling.replace("--", "--no-", 1))):
            known, is_on = off, not is_on  # noqa: PLW2901 - `--no-mmap` alone, without a `--mmap`
        if known is None:
            return None
        key, value = known.as_preset(is_on=is_on)
        entries[key] = value
    return entries
