"""Memory on the command line: who is in it, who is to stay, and who would leave it for another."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.control_stub import ControlStub, device, memory, occupant
from llamavisord.cli import main
from llamavisord.cli.client import model_path
from llamavisord.exit_codes import ExitCode

GIB = 2**30
GPU = device("CUDA0 (NVIDIA H200)", id="0000:01:00.0")


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ControlStub]:
    """A scripted daemon where every command looks for one."""
    path = tmp_path / "control.sock"
    monkeypatch.setenv("LLAMAVISOR_SOCKET", str(path))
    with ControlStub(path) as stub:
        yield stub


def in_memory(*models: dict[str, object], **changes: object) -> dict[str, object]:
    """The answer to `ps`."""
    return {"models": list(models), **memory(device(), GPU), "queues": [], "quarantined": [], **changes}


def cells(line: str) -> list[str]:
    """The cells of one line of a table."""
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


# --- ps ---------------------------------------------------------------------------------------------------------------


def test_models_in_memory_are_a_table(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes of all devices together with the names of these, and how long each model stays."""
    big = occupant(
        "big",
        expected_bytes={"0000:01:00.0": 20 * GIB, "RAM": GIB},
        measured_bytes={"RAM": GIB, "0000:01:00.0": 19 * GIB},
        in_flight=2,
        idle_s=0.0,
        pinned=True,
    )
    idle = occupant(router="b", idle_s=192.0, ttl_s=600.0, ttl_left_s=408.0)
    stub.answer("GET", "/control/v1/ps", in_memory(big, idle))
    assert main(["ps"]) == ExitCode.OK
    out, err = capsys.readouterr()
    header, first, second = out.splitlines()
    assert header.split() == [
        *("MODEL", "ROUTER", "STATE", "DEVICES", "EXPECTED", "MEASURED"),
        *("CONTEXT", "IN-FLIGHT", "IDLE", "TTL", "PINNED"),
    ]
    assert cells(first) == [
        *("big", "main", "loaded", "RAM+CUDA0", "21.0 GiB", "20.0 GiB"),
        *("4096", "2", "0.0s", "-", "yes"),
    ]
    assert cells(second) == [
        *("alpha", "b", "loaded", "RAM", "2.0 GiB", "1.0 GiB"),
        *("4096", "0", "3m 12s", "6m 48s", "no"),
    ]
    assert err == ""


def test_what_is_not_known_is_a_dash(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """Never a zero: a model that has just begun to load, and of which nobody could reckon anything."""
    fresh = occupant(
        state="loading",
        expected_bytes={},
        measured_bytes={},
        expected_from=None,
        in_flight=None,
        idle_s=None,
        n_ctx=None,
        n_ctx_asked=None,
    )
    stub.answer("GET", "/control/v1/ps", in_memory(fresh))
    assert main(["ps"]) == ExitCode.OK
    line = capsys.readouterr().out.splitlines()[1]
    assert cells(line) == ["alpha", "main", "loading", *["-"] * 7, "no"]


def test_models_that_are_left_alone_are_told(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """With the reason, which is llama-server's own word and may hold anything, and how long that lasts."""
    bad = {
        "model": "broken",
        "router": "main",
        "failures": 2,
        "reason": "error\x1b[31m loading",
        "left_s": 42.0,
        "until_unix": 0.0,
    }
    stub.answer("GET", "/control/v1/ps", in_memory(quarantined=[bad]))
    assert main(["ps"]) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "no model is in memory"
    assert cells(lines[-1]) == ["broken", "main", "2", "42s", "error\\x1b[31m loading"]


def test_bytes_that_are_not_all_of_it_are_marked(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """A cache without a bound, a device that could not be looked at; one that is expected to stay empty is no lack."""
    half_seen = occupant(
        "half-seen", expected_bytes={"RAM": GIB, "0000:01:00.0": 4 * GIB}, measured_bytes={"RAM": GIB // 2}
    )
    unbound = occupant("unbound", growth_bytes=None, expected_bytes={"RAM": 2 * GIB, "0000:01:00.0": 0})
    stub.answer("GET", "/control/v1/ps", in_memory(half_seen, unbound))
    assert main(["ps"]) == ExitCode.OK
    first, second = map(cells, capsys.readouterr().out.splitlines()[1:])
    assert first[3:6] == ["RAM+CUDA0", "5.0 GiB", ">512.0 MiB"]
    assert second[3:6] == ["RAM", ">2.0 GiB", "1.0 GiB"]


def test_a_context_that_is_not_what_was_asked_for_is_explained(
    stub: ControlStub, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the cell, and once below the table; more than was asked for, as llama.cpp rounds it up, is no lack."""
    short, shorter = occupant("a", n_ctx=8192, n_ctx_asked=32768), occupant("b", n_ctx=512, n_ctx_asked=1024)
    ours = occupant("c", n_ctx=16384, n_ctx_asked=16384, n_ctx_ours=True)
    both = occupant("d", n_ctx=4096, n_ctx_asked=16384, n_ctx_ours=True)
    rounded = occupant("e", n_ctx=1024, n_ctx_asked=1000)
    unasked = occupant("f", n_ctx_asked=None)
    stub.answer("GET", "/control/v1/ps", in_memory(short, shorter, ours, both, rounded, unasked))
    assert main(["ps"]) == ExitCode.OK
    out, err = capsys.readouterr()
    assert [cells(line)[6] for line in out.splitlines()[1:]] == [
        *("8192 of 32768", "512 of 1024", "16384 (ours)", "4096 of 16384 (ours)", "1024", "4096")
    ]
    assert err.splitlines() == [
        "llamavisor: a context is shorter than it was to be: llama.cpp shortens it when memory is short",
        "llamavisor: a context with (ours) is llamavisor's choice: no ctx_size is configured for the model",
    ]


def test_without_models_it_says_so(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """It is an answer and no failure."""
    stub.answer("GET", "/control/v1/ps", in_memory())
    assert main(["ps"]) == ExitCode.OK
    assert capsys.readouterr() == ("no model is in memory\n", "")


def test_who_waits_and_why_is_shown(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """A second table for those who wait, and a message while memory is short."""
    queue = {"model": "big", "demands": 3, "since_unix": 0.0, "waiting_s": 12.0, "obstacle": "waited for alpha\x1b"}
    stub.answer("GET", "/control/v1/ps", in_memory(queues=[queue], strain="RAM is short\x1b"))
    assert main(["ps"]) == ExitCode.OK
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[:2] == ["no model is in memory", ""]
    assert cells(lines[3]) == ["big", "3", "12s", "waited for alpha\\x1b"]
    assert err == "llamavisor: no model is loaded for now: RAM is short\\x1b\n"


def test_devices_of_one_name_are_told_apart(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """With CUDA_VISIBLE_DEVICES every router's card may be called CUDA0; one that is not listed has its id."""
    other = device("CUDA0 (NVIDIA H200)", id="0000:02:00.0")
    model = occupant(expected_bytes={"0000:02:00.0": 1, "MIG-7": 1, "0000:01:00.0": 1})
    stub.answer("GET", "/control/v1/ps", in_memory(model, devices=[device(), GPU, other]))
    assert main(["ps"]) == ExitCode.OK
    assert cells(capsys.readouterr().out.splitlines()[1])[3] == "RAM+0000:01:00.0+0000:02:00.0+MIG-7"


def test_the_json_of_ps_is_what_the_daemon_said(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of what this version does not know."""
    answer = {**in_memory(occupant()), "new": 1}
    stub.answer("GET", "/control/v1/ps", answer)
    assert main(["ps", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == answer


def test_a_name_is_shortened_on_a_terminal_alone_and_commands_none(
    stub: ControlStub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is piped on is whole."""
    stub.answer("GET", "/control/v1/ps", in_memory(occupant("a" * 60 + "\x1b"), occupant("b", state="draining")))
    assert main(["ps"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith("a" * 60 + "\\x1b  main")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert main(["ps"]) == ExitCode.OK
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("a" * 24 + "…" + "a" * 19 + "\\x1b  main")
    assert "\x1b[33mdraining\x1b[0m" in second


# --- pin and unpin ----------------------------------------------------------------------------------------------------


def kept(name: str, *, is_pinned: bool, changed: bool) -> dict[str, object]:
    """The answer to `pin` and `unpin`."""
    return {"model": name, "pinned": is_pinned, "changed": changed, "event_id": 7}


def test_models_are_pinned_and_unpinned(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """Several at once, each named once; what was so already is no failure."""
    stub.answer("POST", model_path("org/a", "pin"), kept("org/a", is_pinned=True, changed=True))
    stub.answer("POST", model_path("b", "pin"), kept("b", is_pinned=True, changed=False))
    assert main(["pin", "org/a", "b", "org/a"]) == ExitCode.OK
    assert capsys.readouterr() == ("org/a: pinned\nb: already pinned\n", "")
    assert [path for _, path, _ in stub.requests] == [model_path("org/a", "pin"), model_path("b", "pin")]
    stub.answer("POST", model_path("b", "unpin"), kept("b", is_pinned=False, changed=True))
    assert main(["unpin", "b"]) == ExitCode.OK
    stub.answer("POST", model_path("b", "unpin"), kept("b", is_pinned=False, changed=False))
    assert main(["unpin", "b"]) == ExitCode.OK
    assert capsys.readouterr() == ("b: not pinned any more\nb: was not pinned\n", "")


def test_a_name_that_nobody_has_keeps_no_other_from_being_pinned(
    stub: ControlStub, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is that of the first failure; in JSON there is a list of what succeeded."""
    stub.problem("POST", model_path("x", "pin"), "model_not_found", "no model 'x'", "see `llamavisor models`", http=404)
    answer = kept("b", is_pinned=True, changed=True)
    stub.answer("POST", model_path("b", "pin"), answer)
    assert main(["pin", "x", "b"]) == ExitCode.NOT_FOUND
    assert capsys.readouterr() == ("b: pinned\n", "llamavisor: no model 'x'; see `llamavisor models`\n")
    assert main(["pin", "x", "b", "--json"]) == ExitCode.NOT_FOUND
    assert json.loads(capsys.readouterr().out) == [answer]
    assert main(["pin", "b", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == answer
    assert main(["pin", "x", "--json"]) == ExitCode.NOT_FOUND
    assert capsys.readouterr().out == ""


def test_without_a_daemon_nobody_is_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said once, not for every name."""
    monkeypatch.setenv("LLAMAVISOR_SOCKET", str(tmp_path / "none.sock"))
    assert main(["pin", "a", "b"]) == ExitCode.UNREACHABLE
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)


# --- evict ------------------------------------------------------------------------------------------------------------


def forecast(**changes: object) -> dict[str, object]:
    """What would happen for "big", as the control API shows it; there is room if nothing else is said."""
    return {
        "model": "big",
        "router": "main",
        "resident": False,
        "victims": [],
        "waits_for": [],
        "needed_bytes": {"RAM": GIB, "0000:01:00.0": 4 * GIB},
        "refusal": None,
        "hint": None,
        **memory(device(), GPU, enforced=True),
        **changes,
    }


def test_eviction_is_only_foretold(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --dry-run the daemon is not even asked, and the way out is told."""
    assert main(["evict", "big"]) == ExitCode.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "llamavisor: models are evicted by themselves when another needs their room; "
        "`llamavisor evict --dry-run big` shows which, `llamavisor unload` takes one away\n"
    )
    assert stub.requests == []


def test_those_who_would_leave_are_told_in_order(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """With what they give back and how long nobody has used them; measured counts before expected."""
    victims = [
        occupant(
            "z", idle_s=3700.0, expected_bytes={"0000:01:00.0": 5 * GIB}, measured_bytes={"0000:01:00.0": 3 * GIB}
        ),
        occupant("a", router="b", idle_s=61.0, measured_bytes={}),
        occupant("m", state="unloaded", idle_s=None, measured_bytes={}, expected_bytes={}),
    ]
    answer = forecast(victims=victims, waits_for=[occupant("q\x1b")])
    stub.answer("GET", model_path("big", "forecast"), answer)
    assert main(["evict", "--dry-run", "big", "--router", "main"]) == ExitCode.OK
    out, err = capsys.readouterr()
    first, header, *rows, last = out.splitlines()
    assert first == (
        "big: needs RAM 1.0 GiB, CUDA0 4.0 GiB on router main; these would be unloaded for it, in this order:"
    )
    assert header.split() == ["MODEL", "ROUTER", "DEVICES", "BYTES", "IDLE"]
    assert [cells(row) for row in rows] == [
        ["z", "main", "CUDA0", "3.0 GiB", "1h 1m"],
        ["a", "b", "RAM", "2.0 GiB", "1m 1s"],
        ["m", "main", "-", "-", "-"],
    ]
    assert last == "it would wait for those that are leaving: q\\x1b"
    assert err == ""
    assert stub.requests == [("GET", model_path("big", "forecast"), {"router": "main"})]
    assert main(["evict", "--dry-run", "big", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == answer


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"resident": True}, "big: in memory already, or on its way there (router main)"),
        ({}, "big: needs RAM 1.0 GiB, CUDA0 4.0 GiB on router main; no model would be unloaded for it"),
        ({"needed_bytes": {}}, "big: what it needs on router main is not known; no model would be unloaded for it"),
    ],
)
def test_nobody_has_to_leave_for_what_is_there_or_fits(
    stub: ControlStub, capsys: pytest.CaptureFixture[str], changes: dict[str, object], told: str
) -> None:
    """One line is all there is to say."""
    stub.answer("GET", model_path("big", "forecast"), forecast(**changes))
    assert main(["evict", "--dry-run", "big"]) == ExitCode.OK
    assert capsys.readouterr() == (f"{told}\n", "")


def test_a_forecast_that_nobody_keeps_to_says_so(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """llama-server evicts by its own rule; a model that is there has no forecast to doubt."""
    stub.answer("GET", model_path("big", "forecast"), forecast(enforced=False))
    assert main(["evict", "--dry-run", "big"]) == ExitCode.OK
    told = 'llamavisor: with serve = "router" budgets are not enforced: llama-server itself decides who leaves\n'
    assert capsys.readouterr().err == told
    stub.answer("GET", model_path("big", "forecast"), forecast(enforced=False, resident=True))
    assert main(["evict", "--dry-run", "big"]) == ExitCode.OK
    assert capsys.readouterr().err == ""


def test_a_model_that_cannot_be_loaded_is_a_failure(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """With the reason and what to do, also in JSON; a victim that was found on the way is not told."""
    answer = forecast(
        refusal="model big: there is 4.00 GiB of RAM, and what is pinned leaves too little: a",
        hint="unpin a",
        victims=[occupant("b")],
    )
    stub.answer("GET", model_path("big", "forecast"), answer)
    assert main(["evict", "--dry-run", "big"]) == ExitCode.FAILED
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "llamavisor: model big cannot be loaded now: there is 4.00 GiB of RAM, and what is pinned leaves too little: a;"
        " unpin a\n"
    )
    assert main(["evict", "--dry-run", "big", "--json"]) == ExitCode.FAILED
    assert json.loads(capsys.readouterr().out) == answer


def test_of_a_model_that_nobody_has_nothing_is_foretold(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """Like every command."""
    stub.problem("GET", model_path("x", "forecast"), "model_not_found", "no model 'x'", http=404)
    assert main(["evict", "--dry-run", "x"]) == ExitCode.NOT_FOUND
    assert capsys.readouterr() == ("", "llamavisor: no model 'x'\n")
