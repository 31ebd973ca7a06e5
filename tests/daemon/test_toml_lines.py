"""On which line of a TOML file a key stands."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamavisord.toml_lines import Location, key_lines, line_of

FILE = '''\
# port = 1
title = "a # no comment"   # a comment

text = """
[router]
port = 2
a quote: \\""" and an end: """"
path = \'\'\'
[[router]]
\'\'\'
list = [
  "[metrics]", # ]
  [1, 2],
]
[metrics]
port = 9155
"quoted key" = 1
[ defaults . env ]
A = "1"
[[router]]
name = "a"
env = { B = "2" }
[[router]]
name = "b"
'c'.d = 1
[router.env]
C = "3"
'''


@pytest.mark.parametrize(
    ("location", "line"),
    [
        (("title",), 2),
        (("text",), 4),
        (("path",), 8),
        (("list",), 11),
        (("list", 1), 11),
        (("metrics",), 15),
        (("metrics", "port"), 16),
        (("metrics", "quoted key"), 17),
        (("defaults", "env", "A"), 19),
        (("router", 0), 20),
        (("router", 0, "name"), 21),
        (("router", 0, "env", "B"), 22),
        (("router", 1, "name"), 24),
        (("router", 1, "c", "d"), 25),
        (("router", 1, "env"), 26),
        (("router", 1, "env", "C"), 27),
        (("nowhere",), None),
    ],
)
def test_a_key_is_found_where_it_stands(location: Location, line: int | None) -> None:
    """Neither texts, lists, comments nor inline tables are taken for keys, and what is inside a value has its line."""
    tomllib.loads(FILE)
    assert line_of(key_lines(FILE), location) == line


_VALUES = st.sampled_from(
    [
        "1",
        "true",
        '"x"',
        "'#'",
        '"""\n[a]\nb = 1\n"""',
        "'''\n'''",
        '"""a\\\n  b"""',
        '[\n1,\n"]", # ]\n]',
        "{ a = [1] }",
        "[]",
    ]
)


@given(st.lists(st.tuples(st.sampled_from(["key", "header", "array", "comment", "blank"]), _VALUES), max_size=20))
def test_every_key_of_every_file_has_its_own_line(statements: list[tuple[str, str]]) -> None:
    """However values, tables and comments follow each other, each key is found on the line that it begins."""
    text, arrays = "", 0
    table: Location = ()
    expected: dict[Location, int] = {}
    for number, (kind, value) in enumerate(statements):
        line = text.count("\n") + 1
        if kind == "key":
            expected[*table, f"k{number}"] = line
            text += f"k{number} = {value} # = \n"
        elif kind == "header":
            table = (f"t{number}",)
            expected[table] = line
            text += f"[t{number}]\n"
        elif kind == "array":
            table = ("many", arrays)
            expected[table] = line
            arrays += 1
            text += "[[many]] # [x]\n"
        else:
            text += "# [c]\n" if kind == "comment" else "\n"
    tomllib.loads(text)
    found = key_lines(text)
    assert {location: found[location] for location in expected} == expected


@given(st.text(max_size=60))
def test_no_text_makes_the_search_fail_or_run_for_ever(text: str) -> None:
    """Text that parses is searched to its end."""
    try:
        tomllib.loads(text)
    except ValueError:
        return
    assert all(line >= 1 for line in key_lines(text.replace("\r\n", "\n")).values())
