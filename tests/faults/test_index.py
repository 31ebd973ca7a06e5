"""README.md of this folder holds one line for each fault, and each names tests that are there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

HERE = Path(__file__).parent
FAULTS = {"P": 12, "H": 6, "N": 4, "F": 15, "R": 5, "C": 11, "D": 12, "T": 3, "M": 11, "X": 2}
"""How many faults there are of each kind."""
ROWS = [f"{kind}{number}" for kind, most in FAULTS.items() for number in range(1, most + 1)]


def table() -> list[tuple[str, str, list[str]]]:
    """The lines of the page: number, fault, and tests as FILE::TEST."""
    lines = re.findall(
        r"^\| ([A-Z]\d+) \|([^|]*)\|([^|]*)\|$", (HERE / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    return [(row, fault.strip(), re.findall(r"`([^`]+)`", tests)) for row, fault, tests in lines]


def names_in(path: Path) -> Iterator[str]:
    """The tests of a file, by their names."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) if name.startswith("test_"):
                yield name
            case ast.ClassDef(name=name) if name.startswith("Test"):
                yield name
            case ast.Assign(targets=[ast.Name(id=name)]) if name.startswith("Test"):
                yield name


def all_tests() -> list[str]:
    """All tests of this folder but those of this file, as FILE::TEST."""
    files = sorted(set(HERE.glob("test_*.py")) - {Path(__file__)})
    return list(chain.from_iterable((f"{path.name}::{name}" for name in names_in(path)) for path in files))


def row_of(test: str) -> str | None:
    """The number that the name of a test carries."""
    found = re.match(r"(?:test_|Test)([a-z]\d+_|[A-Z]\d+)", test.rpartition("::")[2])
    return found[1].rstrip("_").upper() if found else None


def test_every_fault_has_one_line() -> None:
    """The page has each fault once, in order, and says what it is."""
    assert [row for row, _, _ in table()] == ROWS
    assert [row for row, fault, _ in table() if not fault] == []


def test_every_fault_has_a_test() -> None:
    """Each names a test at least that carries its number, and none that is not there."""
    there = set(all_tests())
    assert [test for _, _, named in table() for test in named if test not in there] == []
    assert [row for row, _, named in table() if row not in map(row_of, named)] == []


def test_every_test_has_its_fault() -> None:
    """Each test carries the number of a fault, and is found under it."""
    listed = {row: named for row, _, named in table()}
    assert [test for test in all_tests() if test not in listed.get(row_of(test) or "", [])] == []


def test_every_promise_names_its_tests() -> None:
    """Each line of the table of promises in README.md of the project names tests that are there."""
    page = (HERE.parents[1] / "README.md").read_text(encoding="utf-8")
    promises = page.partition("## What is promised")[2].partition("\n## ")[0]
    lines = [line for line in promises.splitlines() if line.startswith("| ") and not line.startswith("| when ")]
    proofs = [re.findall(r"`(test_\w+)`", line.split("|")[3]) for line in lines]
    assert len(lines) > 30
    assert [line for line, tests in zip(lines, proofs, strict=True) if not tests] == []
    there = {name for path in HERE.parent.rglob("test_*.py") for name in defined_in(path)}
    assert [test for tests in proofs for test in tests if test not in there] == []


def defined_in(path: Path) -> Iterator[str]:
    """All functions of a file, by their names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
