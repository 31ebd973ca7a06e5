"""The manual page: it is what the code says now, roff that no formatter complains of, and nothing is missing in it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from llamavisord.cli import program
from llamavisord.cli.arguments import make_parser, parse
from llamavisord.exit_codes import ExitCode
from llamavisord.reference import manual
from llamavisord.reference.commands import COMMON, taken
from llamavisord.variables import KEYS, Variable

PAGE = Path(__file__).parents[2] / "deploy" / "man" / "llamavisor.1"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a tool that reads the page; without it the test is skipped."""
    if shutil.which(words[0]) is None:
        pytest.skip(f"no {words[0]}: install the package {'man-db' if words[0] == 'man' else words[0]}")
    env = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MANWIDTH": "100", "MANROFFOPT": "-c", "TERM": "dumb"}
    return subprocess.run(words, capture_output=True, text=True, check=False, env=env, timeout=60)


def test_the_page_is_what_the_code_says() -> None:
    """The file in deploy is what would be generated now."""
    if PAGE.read_text(encoding="utf-8") != manual():
        pytest.fail("deploy/man/llamavisor.1 is stale: run `make manual`", pytrace=False)


def test_it_is_true_what_may_stand_before_a_command() -> None:
    """What is said to be taken before the command is what is taken there."""
    may, only_behind = COMMON.split("may also stand before the command")
    taken_before = {spelling for action in taken(make_parser()) for spelling in action.option_strings}
    assert set(re.findall(r"`(--[a-z]+)`", may)) == taken_before - {"--version", "-h", "--help"}
    assert "`--json` only behind" in only_behind
    with pytest.raises(SystemExit):
        parse(["--json", "status"])
    assert parse(["--debug", "status", "--json"]).json


def test_no_formatter_complains() -> None:
    """Neither man's warnings nor the lint of mandoc have anything to say."""
    shown = run("man", "--warnings", "-l", str(PAGE))
    assert shown.returncode == 0
    assert shown.stderr == ""
    lint = run("mandoc", "-T", "lint", str(PAGE))
    # It wants a date, which would differ with every build.
    assert [line for line in lint.stdout.splitlines() if "missing date" not in line] == []


def test_everything_is_on_it() -> None:
    """As a reader sees it: every command, flag, exit code, variable, and where files are."""
    text = run("man", "-l", str(PAGE)).stdout
    squeezed = " ".join(text.split())  # lines are filled to both margins
    for name in set(program._COMMANDS) - {"config"}:
        assert f"llamavisor {name}" in squeezed, name
    for said in (
        "llamavisor config check",
        "--no-wait",
        "--dry-run",
        "~/.config/llamavisor/llamavisor.toml",
        "SEE ALSO",
    ):
        assert said in squeezed, said
    for code in ExitCode:
        assert f"\n       {code.value}" in text, code
    for name in (*KEYS, *Variable):
        assert name in text, name
    assert "`" not in text
    assert "\\" not in text
