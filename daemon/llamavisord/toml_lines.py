"""On which line of a TOML file a key stands; tomllib does not say.

Reads no values: it only finds where each of them ends. The text has been parsed before, so what stands here
need not judge it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping

Location = tuple[str | int, ...]
"""The way to a value: keys, and indices of tables in an array, such as ("router", 1, "port")."""

_DEPTH = 4
"""How deep keys are followed; router, index, env, variable is the deepest that a configuration goes."""

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_KEY = re.compile(r"""(?:"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[A-Za-z0-9_-]|[ \t]*\.[ \t]*)+""")
_VALUE_PIECE = re.compile(
    r'''
      """ (?:[^\\]|\\.)*? """ "{0,2}    # of up to five closing quotes two belong to the text
    | \'\'\' .*? \'\'\' '{0,2}
    | " (?:[^"\\\n]|\\.)* "
    | ' [^'\n]* '
    | \# [^\n]*
    | [\[\]{}\n]
    | [^"'\#\[\]{}\n]+
    ''',
    re.DOTALL | re.VERBOSE,
)


def key_lines(text: str) -> dict[Location, int]:
    """The line, from 1, of every table and every key in `text`, except keys inside a value (an inline table).

    Args:
        text: TOML that tomllib accepts.
    """
    lines: dict[Location, int] = {}
    arrays: dict[Location, int] = {}  # how many tables of each array were seen
    table: Location = ()
    position, line = 0, 1
    while True:
        start = _end(_BLANK, text, position)
        line += text.count("\n", position, start)
        position = start
        if position >= len(text):
            return lines
        is_array = text.startswith("[[", position)
        is_header = text.startswith("[", position)
        if is_header:
            position = _end(_BLANK, text, position + 1 + is_array)
        end = _end(_KEY, text, position)
        if end == position:  # nothing that a parsed file can hold
            return lines
        pieces = _pieces(text[position:end])
        if is_header:
            table = _table(pieces, arrays, is_array=is_array)
            lines.setdefault(table, line)
            end = _end_of_line(text, end)
        else:
            for depth in range(1, len(pieces) + 1):
                lines.setdefault(table + pieces[:depth], line)
            end = _end_of_value(text, end)
        line += text.count("\n", position, end)
        position = end


def line_of(lines: Mapping[Location, int], location: Location) -> int | None:
    """The line of the value at `location`, or of the nearest thing around it; None for the whole file."""
    while location:
        if (line := lines.get(location)) is not None:
            return line
        location = location[:-1]
    return None


def _pieces(dotted: str) -> tuple[str, ...]:
    """The keys that `dotted` is made of; tomllib itself reads the quotes and escapes."""
    pieces = []
    value: object = tomllib.loads(f"{dotted} = 0")
    while isinstance(value, dict):
        ((piece, value),) = value.items()
        pieces.append(piece)
    return tuple(pieces[:_DEPTH])


def _table(pieces: tuple[str, ...], arrays: dict[Location, int], *, is_array: bool) -> Location:
    """Where the table of a header is: inside the last table of every array on the way."""
    table: Location = ()
    for piece in pieces[:-1]:
        table += (piece,)
        if table in arrays:
            table += (arrays[table] - 1,)
    table += pieces[-1:]
    if is_array:
        arrays[table] = arrays.get(table, 0) + 1
    return (*table, arrays[table] - 1) if table in arrays else table


def _end_of_line(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end


def _end_of_value(text: str, position: int) -> int:
    """Where the value ends that follows the key which ends at `position`."""
    depth = 0
    while found := _VALUE_PIECE.match(text, position):
        piece = found[0]
        if piece == "\n" and depth == 0:
            return position
        depth += (piece in ("[", "{")) - (piece in ("]", "}"))
        position = found.end()
    return len(text)


def _end(pattern: re.Pattern[str], text: str, position: int) -> int:
    found = pattern.match(text, position)
    return found.end() if found else position
