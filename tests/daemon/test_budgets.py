"""Budgets in `status`: bars on a terminal, numbers everywhere, and nothing unknown that looks like a number."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.control_stub import ControlStub, device, memory, status
from llamavisord.cli import main
from llamavisord.cli.budgets import bar, show_budgets
from llamavisord.cli.render import Screen

GIB = 2**30
TEXT = "16.0 of 24.0 GiB for models, 2.0 GiB by others"


class _Terminal:
    """A stream that may be a terminal, and keeps what is written."""

    def __init__(self, *, is_terminal: bool = True) -> None:
        self.text = ""
        self._is_terminal = is_terminal

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        """There is nothing to flush."""

    def isatty(self) -> bool:
        return self._is_terminal


def shown(answer: dict[str, object], *, is_terminal: bool = True, **environ: str) -> list[str]:
    """The lines that a person sees."""
    stream = _Terminal(is_terminal=is_terminal)
    show_budgets(Screen(stream, environ), answer)  # type: ignore[arg-type]
    return stream.text.splitlines()


def test_status_shows_budgets_between_routers_and_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of an older daemon goes without."""
    path = tmp_path / "control.sock"
    monkeypatch.setenv("LLAMAVISOR_SOCKET", str(path))
    with ControlStub(path) as stub:
        answer = status(warnings=["odd"])
        stub.answer("GET", "/control/v1/status", answer)
        assert main(["status"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[-6:] if line] == ["main", "MEMORY", "RAM", "warning:"]
        del answer["memory"]
        stub.answer("GET", "/control/v1/status", answer)
        assert main(["status"]) == 0
        assert "MEMORY" not in capsys.readouterr().out


def test_on_a_terminal_each_device_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models from the left, others from the right, a mark at the budget; names are aligned."""
    monkeypatch.setenv("COLUMNS", "120")
    gpu = device("CUDA0 (NVIDIA H200)", models_bytes=0, measured_bytes=0, others_bytes=0, budget_bytes=32 * GIB)
    lines = shown(memory(device(), gpu, enforced=True), NO_COLOR="1")
    assert lines == [
        "",
        "MEMORY",
        f"RAM                  [############......|...==]  {TEXT}",
        "CUDA0 (NVIDIA H200)  [........................]  0 B of 32.0 GiB for models, 0 B by others",
    ]


def test_without_a_terminal_there_are_numbers_alone() -> None:
    """A log needs no bars."""
    assert shown(memory(device(), enforced=True), is_terminal=False) == ["", "MEMORY", f"RAM  {TEXT}"]


def test_budgets_that_nobody_keeps_to_are_shown_as_such() -> None:
    """With serve = "router" llama-server decides."""
    assert shown(memory(device()), is_terminal=False)[1] == (
        'MEMORY (budgets are shown and not enforced: serve = "router")'
    )


def test_without_devices_nothing_is_shown() -> None:
    """Before the first look."""
    assert shown(memory()) == []


@pytest.mark.parametrize("columns", [1, 20, 40, 62, 63, 70, 79, 80, 120, 500])
def test_a_narrow_terminal_has_a_shorter_bar_or_none(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """The numbers are always whole, and no line is longer than it must be."""
    monkeypatch.setenv("COLUMNS", str(columns))
    *_, line = shown(memory(device()), NO_COLOR="1")
    assert line.startswith("RAM  ")
    assert line.endswith(TEXT)
    assert len(line) <= max(columns, len(f"RAM  {TEXT}"))
    drawn = re.search(r"\[(.*)\]", line)
    assert (drawn is None) == (columns < 63)
    assert drawn is None or 8 <= len(drawn[1]) <= 24


def test_a_bar_is_worth_more_than_the_rest_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a usual terminal a GPU has its first word; where several have the same one, their ids."""
    monkeypatch.setenv("COLUMNS", "80")
    gpus = [device("CUDA0 (NVIDIA H200)", id="0000:01:00.0"), device("CUDA1 (NVIDIA H200)", id="0000:02:00.0")]
    lines = shown(memory(device(), *gpus), NO_COLOR="1")[2:]
    assert [line.split("  ")[0] for line in lines] == ["RAM", "CUDA0", "CUDA1"]
    assert all(len(line) <= 80 and "[####" in line for line in lines)
    gpus[1]["name"] = gpus[0]["name"]
    lines = shown(memory(device(), *gpus), NO_COLOR="1")[2:]
    assert [line.split("  ")[0] for line in lines] == ["RAM", "0000:01:00.0", "0000:02:00.0"]
    assert all(len(line) <= 80 and "[####" in line for line in lines)


@pytest.mark.parametrize(("environ", "is_coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_of_a_bar_have_no_width(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], is_coloured: bool
) -> None:
    """They add to what the characters say, and can be turned off."""
    monkeypatch.setenv("COLUMNS", "100")
    *_, line = shown(memory(device()), **environ)
    assert ("\x1b[32m############\x1b[0m" in line) == is_coloured
    assert re.sub(r"\x1b\[\d+m", "", line) == f"RAM  [############......|...==]  {TEXT}"


def test_a_long_name_leaves_room_on_a_terminal_and_commands_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the name the middle is left out there."""
    monkeypatch.setenv("COLUMNS", "100")
    answer = memory(device("CUDA0 (" + "x" * 50 + "\x1b)"))
    assert shown(answer, NO_COLOR="1")[2].startswith("CUDA0 (xxxxx…xxxxxx\\x1b)  [")
    assert shown(answer, is_terminal=False)[2].startswith("CUDA0 (" + "x" * 50 + "\\x1b)  16.0 of")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {
                "models_bytes": 0,
                "measured_bytes": None,
                "others_bytes": None,
                "budget_bytes": None,
                "total_bytes": None,
            },
            "unknown (the driver hangs)",
        ),
        (
            {"others_bytes": None, "budget_bytes": None, "total_bytes": None},
            "16.0 GiB for models, else unknown (the driver hangs)",
        ),
        ({"budget_bytes": None}, "16.0 GiB of unknown for models, 2.0 GiB by others (the driver hangs)"),
        ({"models_bytes": None}, "unknown of 24.0 GiB for models, 2.0 GiB by others (the driver hangs)"),
        (
            {"measured_bytes": None, "others_bytes": None},
            "16.0 of 24.0 GiB expected for models, unknown by others (the driver hangs)",
        ),
        ({"models_bytes": 512 * 2**20}, "512.0 MiB of 24.0 GiB for models, 2.0 GiB by others"),
    ],
)
def test_what_is_not_known_is_said_with_the_reason(changes: dict[str, object], told: str) -> None:
    """Never as zero. A reason of which nothing is missing is not told."""
    answer = memory(device(reason="the driver hangs", **changes))
    assert shown(answer, is_terminal=False)[2] == f"RAM  {told}"


def test_what_is_not_known_is_not_drawn_as_free() -> None:
    """All of a device whose size is not known, and what is left of one whose others are not."""
    assert bar(device(total_bytes=None), 8) == "????????"
    assert bar(device(others_bytes=None, budget_bytes=None), 8) == "####????"
    assert bar(device(models_bytes=None, others_bytes=None), 8) == "??????|?"


_SIZES = st.one_of(st.none(), st.just(0), st.integers(1, 2**44))


@given(total=_SIZES, models=_SIZES, others=_SIZES, budget=_SIZES, width=st.integers(8, 40))
def test_a_bar_is_as_wide_as_it_is_to_be(
    total: int | None, models: int | None, others: int | None, budget: int | None, width: int
) -> None:
    """Whatever the numbers are; models that are there are seen, and the mark is where the budget ends."""
    cells = bar(device(total_bytes=total, models_bytes=models, others_bytes=others, budget_bytes=budget), width)
    assert len(cells) == width
    assert set(cells) <= set("#.=|?")
    if total and models and budget is None:
        assert cells[0] == "#"
    if total and budget is not None and budget < total:
        assert abs(cells.index("|") - width * budget / total) <= 1
    if None in (total or None, models, others):
        assert "." not in cells
