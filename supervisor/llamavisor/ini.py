"""The INI dialect of llama-server's presets: what it can carry, and how it is written.

The grammar is the one of `parse_ini_from_file` in llama.cpp's `common/preset.cpp`. It has no quoting and no
escaping, and one line that it cannot read stops the whole router: what does not fit is refused before it is
written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

COMMON = "*"
"""Name of the section whose options every model gets."""

_BLANKS = " \t"
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_QUANT_TAG = re.compile(r"[-.]([A-Za-z0-9_]+)\Z")


def value_problem(value: str) -> str | None:
    """Why `value` cannot stand behind a `key =`, None if it can.

    An empty value could be written, but no option means anything by one: it is what an unset variable leaves.
    """
    if not value:
        return "is empty"
    if found := next((c for c in value if c in ";#"), None):
        return f"holds a {found!r}, where a preset file begins a comment"
    if any(c in value for c in "\n\r"):
        return "holds a line break"
    if value != value.strip(_BLANKS):
        return "begins or ends with a blank, which a preset file drops"
    return _text_problem(value)


def key_problem(key: str) -> str | None:
    """Why `key` cannot stand before an `=`, None if it can."""
    if not _KEY.fullmatch(key):
        return "is not a name of letters, digits, '_', '.' and '-' that begins with a letter"
    if key == "version":
        return "is skipped by the router"
    if key.startswith("LLAMA_"):
        return "is a variable's name, a second name of an option that should be written once"
    return None


def section_problem(name: str) -> str | None:
    """Why a model cannot be called `name` in a preset, None if it can."""
    if not name:
        return "is empty"
    if name == COMMON:
        return "is the section of the options that all models share"
    if any(c in name for c in "]\n\r"):
        return "holds a ']' or a line break"
    if name != name.strip(_BLANKS):
        return "begins or ends with a blank"
    prefix, colon, tag = name.rpartition(":")
    if colon and (renamed := _canonical_tag(tag)) != tag:
        return f"would be renamed to {prefix + colon + renamed!r}: a ':' begins a quantization for the router"
    return _text_problem(name)


def render(common: Mapping[str, str], sections: Mapping[str, Mapping[str, str]]) -> str:
    """The file's text: `[*]` first, then each section in the order given. Checks nothing."""
    lines: list[str] = []
    for name, table in ((COMMON, common), *sections.items()):
        lines += ["" if lines else "# Written by llamavisor; changes are lost.", f"[{name}]"]
        lines += [f"{key} = {value}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def _text_problem(text: str) -> str | None:
    if "\0" in text:
        return "holds a NUL"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "is not valid UTF-8, which stops the whole router"
    return None


def _canonical_tag(tag: str) -> str:
    """What the router makes of the text after a name's last ':' (`canonical_tag` in `common/preset.cpp`)."""
    found = _QUANT_TAG.search(tag)
    return "".join(c.upper() if c.isascii() else c for c in (found[1] if found else tag))
