"""The command line: what it asks, what it shows, and what it exits with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import llamavisor
import llamavisord
from fakes import FakeLlamaServer
from fakes.control_stub import (
    ControlStub,
    details,
    device,
    event,
    folder,
    gateway,
    memory,
    model,
    occupant,
    router,
    status,
)
from llamavisord import __version__
from llamavisord.activation import Activation
from llamavisord.cli import main
from llamavisord.cli.client import Client, find_socket, model_path
from llamavisord.cli.errors import UnreachableError
from llamavisord.cli.render import Progress, Screen
from llamavisord.config import Config, ConfigError
from llamavisord.exit_codes import ExitCode
from llamavisord.plain import plain
from terminal import INTERRUPT, Terminal

NOBODY = 65534
COMMAND = [sys.executable, "-m", "llamavisord"]
TIMEOUT_S = 30.0
HEAVY = {"pydantic", "httpx", "aiohttp", "anyio", "psutil", "asyncio", "prometheus_client", "tomllib"}


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ControlStub]:
    """A scripted daemon where every command looks for one."""
    path = tmp_path / "control.sock"
    monkeypatch.setenv("LLAMAVISOR_SOCKET", str(path))
    with ControlStub(path) as stub:
        stub.answer("GET", "/control/v1/status", status([router()], [model(), model("beta", state="unloaded")]))
        stub.answer("GET", "/control/v1/routers", {"routers": [router()]})
        yield stub


@pytest.fixture
def no_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path where no daemon listens, where every command looks for one."""
    path = tmp_path / "control.sock"
    monkeypatch.setenv("LLAMAVISOR_SOCKET", str(path))
    return path


class _Terminal:
    """A stream that says it is a terminal, and keeps what is written."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        """There is nothing to flush."""

    def isatty(self) -> bool:
        return True


# Looking


def test_status_shows_routers_and_what_is_wrong_with_them(
    stub: ControlStub, capsys: pytest.CaptureFixture[str]
) -> None:
    """A router that is down shows its reason, what to do, and its last lines; the daemon its warnings and errors."""
    failed = router(
        "gpu1",
        state="backoff",
        pid=None,
        reason="no llama-server found",
        hint="install one",
        retry_in_s=2.0,
        crash_loop=True,
        failures=12,
        log_tail=[f"line {number}" for number in range(9)],
    )
    answer = status([router(), failed], [model()], config_error="f.toml:1: bad", warnings=["no models"])
    stub.answer("GET", "/control/v1/status", answer)
    assert main(["status"]) == ExitCode.OK
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "llamavisor 0.1.0 is ready, pid 4710, up 1h 2m"
    assert any(line.split()[:5] == ["main", "ready", "http://127.0.0.1:8080", "4711", "1"] for line in lines)
    assert "gpu1: no llama-server found (crash loop, 12 failures in a row)" in lines
    assert lines[lines.index("  install one") + 1] == "  next try in 2.0s"
    assert [line for line in lines if line.startswith("  | ")] == [f"  | line {number}" for number in range(4, 9)]
    assert "  f.toml:1: bad" in lines
    assert "warning: no models" in lines
    assert err == ""


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (["status"], "/control/v1/status"),
        (["models"], "/control/v1/models"),
        (["show", "a"], "/control/v1/models/a"),
    ],
)
def test_json_is_what_the_daemon_said(
    stub: ControlStub, capsys: pytest.CaptureFixture[str], words: list[str], path: str
) -> None:
    """With --json nothing is added and nothing is lost, also of what this version does not know."""
    stub.answer("GET", path, {"models": [], "new": {"in": ["a", "later", "version"]}})
    assert main([*words, "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == {"models": [], "new": {"in": ["a", "later", "version"]}}


def test_models_are_a_table(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each, with what is known of it."""
    stub.answer(
        "GET",
        "/control/v1/models",
        {
            "models": [
                model(in_flight=2),
                model("b", state="failed", n_ctx=None, size_bytes=None, used_unix=0.0, problem="out of memory"),
                model("c", state="invalid", router=None, quantization=None, n_ctx=None, n_ctx_train=None, kind=None),
            ]
        },
    )
    assert main(["models"]) == ExitCode.OK
    header, first, second, third = capsys.readouterr().out.splitlines()
    assert header.split() == [
        "NAME",
        "STATE",
        "SIZE",
        "QUANT",
        "CONTEXT",
        "ARCH",
        "KIND",
        "LAST",
        "USE",
        "NOTE/PROBLEM",
    ]
    assert first.split() == ["alpha", "loaded", "1.5", "KiB", "Q4_K_M", "4096", "llama", "model", "now"]
    assert second.split()[:7] == ["b", "failed", "-", "Q4_K_M", "131072", "llama", "model"]
    assert second.endswith("out of memory")
    assert third.split() == ["c", "invalid", "1.5", "KiB", "-", "-", "llama", "-", "-"]


def test_the_table_of_models_has_notes_aliases_and_stale_folders(
    stub: ControlStub, capsys: pytest.CaptureFixture[str]
) -> None:
    """A note where there is no problem, aliases behind the name; what may be out of date is a message."""
    found = [
        model("a", aliases=["x", "y"], notes=["one", "two"]),
        model("b", notes=["odd"], problem="broken"),
    ]
    stale = folder("/b\x1b", stale="does not answer for 12 s")
    stub.answer("GET", "/control/v1/models", {"models": found, "folders": [folder(), stale]})
    assert main(["models"]) == ExitCode.OK
    out, err = capsys.readouterr()
    _, first, second = out.splitlines()
    assert first.startswith("a (x, y)  loaded")
    assert first.endswith("one; two")
    assert second.endswith("  broken")
    assert err == "llamavisor: folder /b\\x1b: does not answer for 12 s; what was known of it stays\n"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["qwen*"], ["qwen3-8b", "qwen3[1]"]),
        (["nick", "qwen3[1]"], ["beta", "qwen3[1]"]),
        (["be?a"], ["beta"]),
    ],
)
def test_models_are_filtered_by_name_alias_or_glob(
    stub: ControlStub, capsys: pytest.CaptureFixture[str], words: list[str], shown: list[str]
) -> None:
    """In the table and in JSON; a name with brackets is itself too."""
    found = [model("beta", aliases=["nick"]), model("qwen3-8b"), model("qwen3[1]")]
    stub.answer("GET", "/control/v1/models", {"models": found, "folders": []})
    assert main(["models", *words, "--json"]) == ExitCode.OK
    assert [each["name"] for each in json.loads(capsys.readouterr().out)["models"]] == shown
    assert main(["models", *words]) == ExitCode.OK
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["NAME", *shown]


def test_models_of_a_name_that_nobody_has(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """It is no advice about the folder, and not success."""
    stub.answer("GET", "/control/v1/models", {"models": [model()], "folders": []})
    assert main(["models", "beta", "g*"]) == ExitCode.NOT_FOUND
    assert capsys.readouterr().err == "llamavisor: no model is called beta or g*; see `llamavisor models`\n"


def test_long_names_are_shortened_on_a_terminal_alone(
    stub: ControlStub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names differ at both ends: the middle is left out. What is piped on is whole."""
    name = "a" * 50 + "b" * 50
    stub.answer("GET", "/control/v1/models", {"models": [model(name, aliases=["c" * 30])]})
    assert main(["models"]) == ExitCode.OK
    assert capsys.readouterr().out.splitlines()[1].startswith(f"{name} ({'c' * 30})  loaded")
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["models"]) == ExitCode.OK
    line = terminal.text.splitlines()[1]
    assert line.startswith(f"{'a' * 24}…{'b' * 23} ({'c' * 6}…{'c' * 5})  loaded")


@pytest.mark.parametrize(
    "words",
    [["--socket", "PATH", "status", "--json"], ["status", "--json", "--socket", "PATH"]],
)
def test_the_socket_may_be_named_before_the_command(
    stub: ControlStub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """And behind it; to a command that talks to nobody it means nothing."""
    monkeypatch.setenv("LLAMAVISOR_SOCKET", "/nowhere")
    assert main([str(stub.path) if word == "PATH" else word for word in words]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["pid"] == 4710
    assert main(["--socket", str(stub.path), "version"]) == ExitCode.USAGE
    assert "--socket means nothing to version" in capsys.readouterr().err


def test_the_words_for_llama_server_are_kept_behind_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value of a flag before the command is not taken for the command."""
    handed: list[object] = []
    monkeypatch.setattr("llamavisord.cli.serve.run", lambda arguments: handed.append(arguments) or 0)
    assert main(["--socket", "/s", "serve", "--models-dir", "/m", "--", "--threads", "8"]) == ExitCode.OK
    (arguments,) = handed
    assert (arguments.socket, arguments.server_args) == ("/s", ("--threads", "8"))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("count", "told"), [(1, "loaded, 1 request\n"), (2, "loaded, 2 requests\n")])
def test_one_request_is_not_several(
    stub: ControlStub, capsys: pytest.CaptureFixture[str], count: int, told: str
) -> None:
    """Grammar."""
    busy = model(in_flight=count, pid=None, n_ctx=None)
    stub.answer("GET", "/control/v1/models/alpha", details(busy))
    assert main(["show", "alpha"]) == ExitCode.OK
    assert told in capsys.readouterr().out


def test_what_only_estimates_need_is_not_shown(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """The bytes of each layer are for JSON."""
    stub.answer("GET", "/control/v1/models/alpha", details(header={**HEADER, "layout": {"places": [7, 8]}}))
    assert main(["show", "alpha"]) == ExitCode.OK
    assert "layout" not in capsys.readouterr().out


def test_of_several_routers_each_model_names_its_own(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """A column that would say the same of all is left out."""
    found = [model(), model(router="b", state="unloaded"), model("z", router=None, state="settling")]
    stub.answer("GET", "/control/v1/models", {"models": found})
    assert main(["models"]) == ExitCode.OK
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["NAME", "STATE", "ROUTER"],
        ["alpha", "loaded", "main"],
        ["alpha", "unloaded", "b"],
        ["z", "settling", "-"],
    ]


def test_a_long_problem_is_cut_on_a_terminal(stub: ControlStub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of a model with a usual name has no more than 100 columns there, and is whole everywhere else."""
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("COLUMNS", raising=False)
    found = model("qwen3-30b-a3b-q4_k_m", problem="its file was replaced; " * 20, architecture="qwen3moe")
    stub.answer("GET", "/control/v1/models", {"models": [found]})
    assert main(["models"]) == ExitCode.OK
    line = terminal.text.splitlines()[1]
    assert len(line) == 100
    assert line.endswith("...")
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["models"]) == ExitCode.OK
    assert len(terminal.text.splitlines()[-1]) == 120


HEADER: dict[str, object] = {
    "kind": "model",
    "architecture": "llama",
    "name": "Llama\x1b[2J",
    "size_label": "",
    "parameter_count": 8_030_261_248,
    "type_mix": [{"type": "Q4_K", "tensors": 193, "elements": 10, "size_bytes": 1024}],
    "context_length": 131_072,
    "head_count_kv": [8, 8, 0],
    "expert_count": None,
    "is_causal": True,
    "chat_template": "{{ a }}\n\t\x1b[2J",
    "split": {"number": 0, "count": 3, "tensor_count": None},
    "file_bytes": 2048,
    "of_a_later_version": 7,
}


def test_show_tells_everything(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """Header, files, options with their tables, the command line as a shell takes it; nothing commands a terminal."""
    answer = details(
        model(aliases=["a", "b"], used_unix=0.0, problem="its file was replaced"),
        header=HEADER,
        projector={"path": "/srv/models/mmproj.gguf", "size_bytes": 2048, "mtime_unix": 0.0},
        effective={"main": {"ctx-size": "4096", "metrics": "1"}},
        origins={"main": {"ctx-size": '[model."a*"]', "metrics": "always"}},
        layers={"main": ["[defaults]", '[model."a*"]']},
        command={"main": ["/usr/bin/llama-server", "--alias", "a b\x1b"]},
    )
    stub.answer("GET", "/control/v1/models/org%2Falpha", answer)
    assert main(["show", "org/alpha", "--router", "main"]) == ExitCode.OK
    assert stub.requests[-1][2] == {"router": "main"}
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for told in (
        "aliases a, b",
        "problem its file was replaced",
        "name Llama\\x1b[2J",
        "parameter count 8,030,261,248",
        "type mix Q4_K 1.0 KiB in 193 tensors",
        "head count kv 8 8 0",
        "causal yes",
        "chat template 13 characters, see --template",
        "split part 1 of 3",
        "file bytes 2.0 KiB (2,048 bytes)",
        "of a later version 7",
        'ctx-size 4096 [model."a*"]',
        "/usr/bin/llama-server --alias 'a b\\x1b'",
    ):
        assert told in lines
    assert any(line.startswith("/srv/models/mmproj.gguf 2.0 KiB") and line.endswith("projector") for line in lines)
    assert not any(line.startswith(("expert", "size label", "layers")) for line in lines)
    assert "\x1b" not in out


def test_show_of_what_cannot_be_used_says_why(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """A file without a header has a problem, and no router."""
    broken = model(state="invalid", router=None, problem="not a GGUF file")
    stub.answer("GET", "/control/v1/models/alpha", details(broken))
    assert main(["show", "alpha"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert "not a GGUF file" in out
    assert "invalid, served by no router" in out
    assert main(["show", "alpha", "--template"]) == ExitCode.FAILED
    assert "header of its file cannot be read; not a GGUF file" in capsys.readouterr().err


def test_the_template_is_as_it_stands_in_the_file(
    stub: ControlStub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte by byte for a pipe; on a terminal it cannot command it. Without one there is a message and a failure."""
    stub.answer("GET", "/control/v1/models/alpha", details(header=HEADER))
    assert main(["show", "alpha", "--template"]) == ExitCode.OK
    assert capsys.readouterr().out == "{{ a }}\n\t\x1b[2J"
    assert main(["show", "alpha", "--template", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == "{{ a }}\n\t\x1b[2J"
    with monkeypatch.context() as patched:
        terminal = _Terminal()
        patched.setattr(sys, "stdout", terminal)
        assert main(["show", "alpha", "--template"]) == ExitCode.OK
        assert terminal.text == "{{ a }}\n\t\\x1b[2J"
    stub.answer("GET", "/control/v1/models/alpha", details(header={**HEADER, "chat_template": None}))
    assert main(["show", "alpha", "--template"]) == ExitCode.FAILED
    assert capsys.readouterr() == ("", "llamavisor: model alpha has no chat template, or one of more than 256 KiB\n")


def test_without_models_a_person_is_told_where_to_put_them(
    stub: ControlStub, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hint is a message; the data is an empty table."""
    stub.answer("GET", "/control/v1/models", {"models": []})
    assert main(["models"]) == ExitCode.OK
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert err == "llamavisor: no models; put GGUF files into /srv/models, or `llamavisor pull USER/REPO`\n"


def test_a_name_cannot_command_the_terminal(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters, half characters and direction marks are shown as escapes."""
    stub.answer("GET", "/control/v1/models", {"models": [model("a\x1b[2J\n\u202eb\udcff")]})
    assert main(["models"]) == ExitCode.OK
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("a\\x1b[2J\\n\\u202eb\\udcff  loaded")


def test_events_are_shown_and_followed_until_the_daemon_ends(
    stub: ControlStub, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --follow the past is all; --json gives one object on each line; -n keeps the last ones."""
    stub.events([event(1, message="one"), event(2, message="two\x07")])
    assert main(["events"]) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ", 1)[1] for line in lines] == [
        "ModelLoaded            one",
        "ModelLoaded            two\\x07",
    ]
    assert main(["events", "--json", "-n", "1", "--since", "1"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == event(2, message="two\x07")
    assert [query for _, _, query in stub.requests] == [
        {"since": "0", "follow": "false"},
        {"since": "1", "follow": "false"},
    ]


def test_probes_and_progress_are_followed_only_when_asked_for(
    stub: ControlStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`events -f` is about what happens, `--all` about everything."""
    monkeypatch.setattr("llamavisord.cli.look.time.sleep", lambda _: stub.path.unlink())
    stub.events([event(1)])
    assert main(["events", "-f", "--all"]) == ExitCode.UNREACHABLE
    assert stub.requests[-1] == ("GET", "/control/v1/events", {"since": "0", "follow": "true", "all": "true"})


def test_config_check_escapes_what_the_options_say(
    tmp_path: Path, fake_llama_server: Callable[..., FakeLlamaServer], capsys: pytest.CaptureFixture[str]
) -> None:
    """A value cannot command the terminal."""
    path = tmp_path / "llamavisor.toml"
    text = f'llama_server = "{fake_llama_server()}"\nmodels_dir = "{tmp_path}"\n'
    path.write_text(f'{text}[defaults]\nargs = ["--no-such\\u001b[2J"]\n', encoding="utf-8")
    assert main(["config", "check", str(path)]) == ExitCode.BAD_CONFIG
    assert "--no-such\\x1b[2J" in capsys.readouterr().err


def test_following_events_goes_on_where_it_was_cut_off(
    stub: ControlStub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A daemon hangs up on a slow reader: the reader comes back for what it missed, and ends when nobody is there."""
    monkeypatch.setattr("llamavisord.cli.look.RETRY_S", 0.0)
    stub.events([event(8)])
    moves: Iterator[Callable[[], None]] = iter([lambda: stub.events([event(9)]), stub.path.unlink])
    monkeypatch.setattr("llamavisord.cli.look.time.sleep", lambda _: next(moves)())
    assert main(["events", "-f", "--json"]) == ExitCode.UNREACHABLE
    assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == [8, 9]
    assert [query["since"] for _, _, query in stub.requests] == ["0", "8"]


def test_logs_are_lines_and_as_json_know_their_router(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """What llama-server prints cannot command the terminal; of several routers each line names its own."""
    stub.stream("/control/v1/logs", ["a\tb\n\x1b[2Jc", "d\n"])
    assert main(["logs", "-n", "2", "main"]) == ExitCode.OK
    assert capsys.readouterr().out == "a\tb\n\\x1b[2Jcd\n"
    assert stub.requests[-1] == ("GET", "/control/v1/logs", {"router": "main", "lines": "2", "follow": "false"})
    assert main(["logs", "--json"]) == ExitCode.OK
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert first == {"router": "main", "line": "a\tb"}
    stub.answer("GET", "/control/v1/routers", {"routers": [router("a"), router("b")]})
    stub.stream("/control/v1/logs", ["[b] hello [x]\n"])
    assert main(["logs", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == {"router": "b", "line": "hello [x]"}


# Acting


def test_load_waits_and_says_what_became_of_it(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """The name is one piece of the path whatever it holds, and the daemon is asked to wait ten minutes."""
    path = model_path("org/a b:Q4", "load")
    assert path == "/control/v1/models/org%2Fa%20b%3AQ4/load"
    stub.answer("POST", path, {"model": model("org/a b:Q4"), "changed": True, "event_id": 1})
    assert main(["load", "org/a b:Q4", "--router", "main"]) == ExitCode.OK
    assert capsys.readouterr() == ("org/a b:Q4: loaded (router main)\n", "")
    assert stub.requests == [("POST", path, {"router": "main", "wait": "600.0"})]


def test_a_model_may_be_called_like_a_flag(stub: ControlStub) -> None:
    """Behind `--` everything is a name, also when a router is called like the one command that takes more there."""
    stub.answer("POST", model_path("--json", "load"), {"model": model("--json"), "changed": True, "event_id": 1})
    assert main(["load", "--router", "serve", "--", "--json"]) == ExitCode.OK
    assert stub.requests[0][1:] == (model_path("--json", "load"), {"router": "serve", "wait": "600.0"})


def test_load_of_what_is_loaded_says_so(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """It is no failure."""
    stub.answer("POST", model_path("alpha", "load"), {"model": model(), "changed": False, "event_id": 1})
    assert main(["load", "alpha"]) == ExitCode.OK
    assert capsys.readouterr().out == "alpha: already loaded (router main)\n"


def test_load_without_waiting_says_that_it_goes_on(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """The daemon is not asked to wait."""
    answer = {"model": model(state="loading"), "changed": True, "event_id": 1}
    stub.answer("POST", model_path("alpha", "load"), answer, code=202)
    assert main(["load", "--no-wait", "alpha"]) == ExitCode.OK
    assert capsys.readouterr().out == "alpha: loading, and goes on (router main)\n"
    assert stub.requests[0][2] == {}
    assert main(["load", "--no-wait", "--json", "alpha"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == answer


def test_load_shows_its_progress_on_a_terminal(
    stub: ControlStub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line is rewritten while it loads, and is gone when the result is printed."""
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    looked = threading.Event()

    def models(_: dict[str, str]) -> tuple[int, str, bytes]:
        looked.set()
        loading = model(state="loading", progress=0.5, stage="text_model")
        return 200, "application/json", json.dumps({"models": [loading]}).encode("ascii")

    def load(_: dict[str, str]) -> tuple[int, str, bytes]:
        looked.wait(TIMEOUT_S)
        answer = {"model": model(), "changed": True, "event_id": 1}
        return 200, "application/json", json.dumps(answer).encode("ascii")

    stub.answer_with("GET", "/control/v1/models", models)
    stub.answer_with("POST", model_path("alpha", "load"), load)
    assert main(["load", "alpha"]) == ExitCode.OK
    assert "\r\x1b[Kloading alpha [############............] 50% text_model 0." in terminal.text
    assert terminal.text.endswith("\r\x1b[K")
    assert capsys.readouterr().out == "alpha: loaded (router main)\n"
    assert ("GET", "/control/v1/models", {"name": "alpha"}) in stub.requests  # not all of ten thousand


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    """A log file gets whole lines, and not four of them a second."""
    progress = Progress("loading x", Screen(sys.stderr), every_s=0.0)
    progress.show(0.25, "text_model")
    progress.show(None, "")
    progress.close()
    rare = Progress("loading y", Screen(sys.stderr), every_s=1000.0)
    rare.show(0.5, "")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["loading x: 25% text_model 0.0s", "loading x: 0.0s"]


def test_an_interrupted_load_goes_on_and_says_so(
    stub: ControlStub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C ends the waiting, not the loading."""

    def interrupt(_: Progress, *__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "show", interrupt)
    asked = threading.Event()

    def load(_: dict[str, str]) -> tuple[int, str, bytes]:
        asked.wait(TIMEOUT_S)
        return 200, "application/json", b"{}"

    stub.answer("GET", "/control/v1/models", {"models": [model(state="loading")]})
    stub.answer_with("POST", model_path("alpha", "load"), load)
    try:
        assert main(["load", "alpha"]) == ExitCode.INTERRUPTED
    finally:
        asked.set()
    text = "llamavisor: interrupted; alpha goes on loading; `llamavisor unload alpha` ends it\n"
    assert capsys.readouterr() == ("", text)


@pytest.mark.parametrize(
    ("code", "http", "exit_code"),
    [
        ("model_not_found", 404, 3),
        ("router_not_found", 404, 3),
        ("not_found", 404, 3),
        ("wait_timeout", 504, 5),
        ("forbidden", 403, 77),
        ("config_invalid", 422, 78),
        ("model_load_failed", 500, 1),
        ("models_max_reached", 503, 1),
        ("device_missing", 503, 1),
        ("router_not_ready", 503, 1),
        ("internal", 500, 1),
        ("of_a_later_version", 400, 1),
    ],
)
def test_a_problem_is_one_line_and_its_exit_code(
    stub: ControlStub, capsys: pytest.CaptureFixture[str], code: str, http: int, exit_code: int
) -> None:
    """What the daemon says reaches the person, on standard error."""
    stub.problem("POST", model_path("x", "load"), code, "no model 'x'\x1b", "see `llamavisor models`", http=http)
    assert main(["load", "x"]) == exit_code
    assert capsys.readouterr() == ("", "llamavisor: no model 'x'\\x1b; see `llamavisor models`\n")


def test_routers_are_moved_by_name_or_alone_or_all(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """A lone router needs no name; of several one must be named, or all of them."""
    for name in ("main", "b"):
        path = f"/control/v1/routers/{name}/restart"
        stub.answer("POST", path, {"router": router(name), "changed": True, "event_id": 1})
    assert main(["restart"]) == ExitCode.OK
    assert capsys.readouterr().out == "main: ready, pid 4711\n"
    stub.answer("GET", "/control/v1/routers", {"routers": [router(), router("b")]})
    assert main(["restart"]) == ExitCode.USAGE
    assert capsys.readouterr().err == "llamavisor: there are several routers; name some of main, b, or use --all\n"
    assert main(["restart", "--all", "--json"]) == ExitCode.OK
    assert [each["router"]["name"] for each in json.loads(capsys.readouterr().out)] == ["main", "b"]
    assert main(["restart", "b", "--no-wait"]) == ExitCode.OK
    assert [path for method, path, _ in stub.requests if method == "POST"] == [
        f"/control/v1/routers/{name}/restart" for name in ("main", "main", "b", "b")
    ]


def test_a_router_that_does_not_come_up_is_a_failure(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """The daemon has done what it was asked; the person has not got what they wanted."""
    failed = router(state="failed", pid=None, reason="no llama-server", hint="install one")
    stub.answer("POST", "/control/v1/routers/main/start", {"router": failed, "changed": True, "event_id": 1})
    assert main(["start"]) == ExitCode.FAILED
    out, err = capsys.readouterr()
    assert (out, err) == (
        "main: failed\n",
        "llamavisor: router main is failed: no llama-server; install one\n",
    )
    stopped = router(state="stopped", pid=None)
    stub.answer("POST", "/control/v1/routers/main/stop", {"router": stopped, "changed": True, "event_id": 1})
    assert main(["stop"]) == ExitCode.OK


def test_reload_says_what_changed(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """And a refused one gives every problem its own line, and the exit code of a bad configuration."""
    stub.answer("POST", "/control/v1/reload", {"changed": ["gpu0"], "models": ["a"], "problems": [], "event_id": 1})
    assert main(["reload"]) == ExitCode.OK
    assert capsys.readouterr().out == "configuration reloaded, changed: router gpu0, model a\n"
    stub.answer(
        "POST", "/control/v1/reload", {"changed": [], "models": list("abcdefghijklm"), "problems": [], "event_id": 1}
    )
    assert main(["reload"]) == ExitCode.OK
    assert capsys.readouterr().out.endswith("model i, model j and 3 more\n")
    slow = ["folder /srv was not looked at within 10 s"]
    stub.answer("POST", "/control/v1/reload", {"changed": [], "models": [], "problems": slow, "event_id": 1})
    assert main(["reload"]) == ExitCode.FAILED
    said = capsys.readouterr()
    assert said.out == "configuration reloaded, changed: nothing\n"
    assert said.err == f"llamavisor: {slow[0]}\n"
    stub.problem("POST", "/control/v1/reload", "config_invalid", "f.toml:1: a\nf.toml:2: b", http=422)
    assert main(["reload"]) == ExitCode.BAD_CONFIG
    assert capsys.readouterr().err == "llamavisor: f.toml:1: a\nllamavisor: f.toml:2: b\n"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "http://127.0.0.1:8080, http://[::1]:8080 open: 0 in flight, 0 waiting, 0 connections, no API keys"),
        (
            {"draining": True, "in_flight": {"a": 2, "b": 1}, "waiting": 4, "connections": 8, "held_bytes": 1536},
            (
                "http://127.0.0.1:8080, http://[::1]:8080 draining:"
                " 3 in flight, 4 waiting, 8 connections, no API keys, 1.5 KiB held"
            ),
        ),
        ({"urls": []}, "closed: 0 in flight, 0 waiting, 0 connections, no API keys"),
    ],
)
def test_status_has_a_line_for_the_gateway(
    stub: ControlStub, capsys: pytest.CaptureFixture[str], changes: dict[str, object], told: str
) -> None:
    """Where it is and what is in it; none where there is no gateway."""
    assert main(["status"]) == ExitCode.OK
    assert "gateway" not in capsys.readouterr().out
    stub.answer("GET", "/control/v1/status", status([router()], gateway=gateway(**changes)))
    assert main(["status"]) == ExitCode.OK
    assert f"gateway  {told}" in capsys.readouterr().out.splitlines()


def test_drain_waits_and_resume_takes_it_back(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """The daemon is asked to wait ten minutes, or not at all; --json is what it said."""
    drained = {"gateway": gateway(draining=True), "changed": True, "event_id": 1}
    stub.answer("POST", "/control/v1/drain", drained)
    assert main(["drain"]) == ExitCode.OK
    assert capsys.readouterr() == ("gateway: takes no new requests; 0 in flight, 0 waiting\n", "")
    assert stub.requests == [("POST", "/control/v1/drain", {"wait": "600.0"})]
    busy = {"gateway": gateway(draining=True, in_flight={"a": 2}), "changed": False, "event_id": 1}
    stub.answer("POST", "/control/v1/drain", busy, code=202)
    assert main(["drain", "--no-wait"]) == ExitCode.OK
    assert capsys.readouterr().out == "gateway: takes no new requests; 2 in flight, 0 waiting\n"
    assert stub.requests[-1][2] == {}
    assert main(["drain", "--no-wait", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == busy
    for changed, told in ((True, "takes requests again"), (False, "was taking requests")):
        stub.answer("POST", "/control/v1/resume", {"gateway": gateway(), "changed": changed, "event_id": 1})
        assert main(["resume"]) == ExitCode.OK
        assert capsys.readouterr().out == f"gateway: {told}\n"
    assert main(["resume", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["changed"] is False


def test_a_drain_that_was_taken_back_is_none(stub: ControlStub, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever waited for an empty gateway has not got one."""
    stub.answer("POST", "/control/v1/drain", {"gateway": gateway(), "changed": True, "event_id": 1})
    assert main(["drain"]) == ExitCode.FAILED
    assert capsys.readouterr() == ("", "llamavisor: the gateway was told meanwhile to take requests again\n")


@pytest.mark.parametrize(
    ("code", "http", "exit_code"), [("no_gateway", 409, 1), ("ending", 409, 1), ("wait_timeout", 504, 5)]
)
def test_a_drain_that_cannot_be_says_why(
    stub: ControlStub, capsys: pytest.CaptureFixture[str], code: str, http: int, exit_code: int
) -> None:
    """In one line."""
    for command in ("drain", "resume"):
        stub.problem("POST", f"/control/v1/{command}", code, "no", "do that", http=http)
        assert main([command]) == exit_code
        assert capsys.readouterr() == ("", "llamavisor: no; do that\n")


def test_drain_shows_what_is_still_there_and_may_be_interrupted(
    stub: ControlStub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C ends the waiting, not the draining."""
    shown: list[str] = []

    def interrupt(_: Progress, fraction: float | None, stage: str) -> None:
        shown.append(stage)
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "show", interrupt)
    monkeypatch.setattr("llamavisord.cli.act.DRAIN_TICK_S", 0.01)
    asked = threading.Event()

    def drain(_: dict[str, str]) -> tuple[int, str, bytes]:
        asked.wait(TIMEOUT_S)
        return 200, "application/json", b"{}"

    busy = gateway(draining=True, in_flight={"a": 2}, waiting=1)
    stub.answer("GET", "/control/v1/status", status([router()], gateway=busy))
    stub.answer_with("POST", "/control/v1/drain", drain)
    try:
        assert main(["drain"]) == ExitCode.INTERRUPTED
    finally:
        asked.set()
    assert shown == ["2 in flight, 1 waiting"]
    told = "llamavisor: interrupted; the gateway takes no new requests all the same; `llamavisor resume` ends that\n"
    assert capsys.readouterr() == ("", told)


# Nobody there


STARTS = {True: "`systemctl start llamavisor` or `llamavisor serve`", False: "`llamavisor serve`"}
"""How a daemon is started, with systemd and without."""


@pytest.mark.parametrize("has_systemd", [True, False])
def test_without_a_daemon_one_line_says_what_to_do(
    no_daemon: Path, has_systemd: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names the socket, and the reason: nothing there, nobody behind it, or not a socket at all."""
    monkeypatch.setattr("llamavisord.cli.client.has_systemd", lambda: has_systemd)
    start = f"start one: {STARTS[has_systemd]}"
    assert main(["status"]) == ExitCode.UNREACHABLE
    assert capsys.readouterr() == ("", f"llamavisor: no daemon at {no_daemon}: no such socket; {start}\n")
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(no_daemon))
    assert main(["load", "x"]) == ExitCode.UNREACHABLE
    assert capsys.readouterr().err == f"llamavisor: no daemon at {no_daemon}: nobody listens on it; {start}\n"
    other = no_daemon.with_name("file")
    other.touch()
    assert main(["status", "--socket", str(other)]) == ExitCode.UNREACHABLE
    assert f"no daemon at {other}: " in capsys.readouterr().err


def test_a_socket_path_that_is_too_long_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """The same words and the same exit code as the daemon's own refusal."""
    assert main(["status", "--socket", "/" + "x" * 107]) == ExitCode.BAD_CONFIG
    assert capsys.readouterr().err.startswith("llamavisor: AF_UNIX path too long: /x")


def test_a_daemon_that_is_silent_is_unreachable(tmp_path: Path) -> None:
    """A connection that is accepted proves nothing: the kernel does that for a stopped process too."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "silent.sock"))
        listener.listen()
        client = Client(tmp_path / "silent.sock")
        ticks: list[int] = []
        for tick in (None, lambda: ticks.append(1)):
            with pytest.raises(UnreachableError, match="does not answer") as caught:
                client.call("GET", "/control/v1/status", {}, timeout_s=0.05, tick=tick, tick_s=0.01)
            assert caught.value.exit_code == ExitCode.UNREACHABLE
    assert ticks


@pytest.mark.parametrize("has_systemd", [True, False])
def test_a_daemon_that_hangs_up_is_unreachable(
    tmp_path: Path, has_systemd: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may have been killed between the question and the answer."""
    monkeypatch.setattr("llamavisord.cli.client.has_systemd", lambda: has_systemd)
    path = tmp_path / "rude.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def hang_up() -> None:
            listener.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        assert main(["status", "--socket", str(path)]) == ExitCode.UNREACHABLE
        thread.join()
    where = "`systemctl status llamavisor`" if has_systemd else "its log"
    hint = f"see {where}, and `llamavisor config check`"
    assert capsys.readouterr().err == f"llamavisor: the daemon at {path} closed the connection; {hint}\n"


def test_something_else_that_answers_is_not_taken_for_a_daemon(
    stub: ControlStub, capsys: pytest.CaptureFixture[str]
) -> None:
    """A web server behind the socket is named as such."""
    stub.answer_with("GET", "/control/v1/status", lambda _: (200, "text/html", b"<html>"))
    assert main(["status"]) == ExitCode.FAILED
    assert "is no llamavisor (status 200, not JSON)" in capsys.readouterr().err


def test_without_permission_the_group_is_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Exit code 77 and what to do, for a user who may not enter the socket's folder."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    outer = Path(tempfile.mkdtemp(prefix="llamavisor-test-"))
    try:
        outer.chmod(0o755)
        folder = outer / "run"
        folder.mkdir(mode=0o750)
        os.chown(folder, 0, 1)  # the group daemon, on every Linux
        code, text = _as_nobody(["status", "--socket", str(folder / "control.sock")], outer / "err")
    finally:
        shutil.rmtree(outer)
    assert code == ExitCode.NOT_PERMITTED
    assert text == (
        f"llamavisor: not permitted to use {folder}/control.sock; "
        "join its group: `sudo usermod -aG daemon $USER`, then log in again\n"
    )


def _as_nobody(words: list[str], err: Path) -> tuple[int, str]:
    """Run a command in a copy of this process without any rights: a file of ours may be out of nobody's reach."""
    fd = os.open(err, os.O_CREAT | os.O_WRONLY)
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            sys.stderr = open(fd, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            code = main(words)
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(fd)
    _, wait_status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(wait_status), err.read_text(encoding="utf-8")


def test_the_socket_is_looked_for_where_a_daemon_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag, the variable, the configuration file, the user's own daemon, the system's."""
    system = tmp_path / "system"
    monkeypatch.setattr("llamavisord.places._SYSTEM_RUNTIME", system)
    monkeypatch.setattr("llamavisord.places._SYSTEM_CONFIG", tmp_path / "none")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    environ = {"XDG_RUNTIME_DIR": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "HOME": "/none"}
    own = tmp_path / "llamavisor/control.sock"
    assert find_socket(None, environ) == own
    system.mkdir()
    (system / "control.sock").touch()
    assert find_socket(None, environ) == system / "control.sock"
    own.parent.mkdir()
    own.touch()
    assert find_socket(None, environ) == own
    config = tmp_path / "llamavisor/llamavisor.toml"
    config.write_text('socket = "my.sock"\n', encoding="utf-8")
    assert find_socket(None, environ) == tmp_path / "llamavisor/my.sock"
    config.write_text('socket = "broken\n', encoding="utf-8")
    assert find_socket(None, environ) == own
    assert find_socket(None, environ | {"LLAMAVISOR_SOCKET": "/v"}) == Path("/v")
    assert find_socket("/f", environ | {"LLAMAVISOR_SOCKET": "/v"}) == Path("/f")


# Usage


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["sttus"],
        ["load"],
        ["pin"],
        ["evict", "--dry-run"],
        ["load", "x", "--timeout", "soon"],
        ["load", "x", "--timeout", "2h"],
        ["load", "x", "--timeout", "0"],
        ["logs", "-n", "-1"],
        ["serve", "words"],
        ["serve", "--port", "http"],
        ["config"],
        ["status", "--sock", "x"],
    ],
)
def test_a_command_line_that_makes_no_sense_is_a_usage_error(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and how it is written right; abbreviations of flags are none."""
    assert main(words) == ExitCode.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: llamavisor")


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("ls", "did you mean models?"),
        ("sttus", "did you mean status?"),
        ("download", "did you mean pull?"),
        ("x", "--help lists"),
    ],
)
def test_a_command_that_there_is_not_leads_to_one_that_there_is(
    word: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what looks alike, and by what other programs call it."""
    assert main(["--socket", "/nowhere", word]) == ExitCode.USAGE
    assert f"there is no command '{word}'" in (err := capsys.readouterr().err)
    assert told in err


def test_help_and_version_are_data(capsys: pytest.CaptureFixture[str]) -> None:
    """They are asked for, so they go to standard output."""
    assert main(["--help"]) == ExitCode.OK
    assert "exit codes:" in capsys.readouterr().out
    for words in (["version"], ["--version"]):
        assert main(words) == ExitCode.OK
        assert capsys.readouterr().out == f"llamavisor {__version__}\n"
    assert main(["version", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["version"] == __version__


def test_a_bug_is_one_line_and_a_traceback_only_on_demand(
    stub: ControlStub, capsys: pytest.CaptureFixture[str]
) -> None:
    """--debug may stand before the command or behind it."""
    stub.answer("GET", "/control/v1/status", {})
    assert main(["status"]) == ExitCode.FAILED
    assert capsys.readouterr().err == "llamavisor: KeyError: 'ready'; --debug shows where it comes from\n"
    for words in (["--debug", "status"], ["status", "--debug"]):
        assert main(words) == ExitCode.FAILED
        assert "Traceback (most recent call last)" in capsys.readouterr().err


# Configuration


def test_config_check_tells_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its file and line, on standard error, and exit code 78."""
    path = tmp_path / "llamavisor.toml"
    path.write_text("prot = 1\nmodels_max = -1\n", encoding="utf-8")
    assert main(["config", "check", str(path)]) == ExitCode.BAD_CONFIG
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(": ")[0] for line in err.splitlines()] == [f"{path}:1", f"{path}:2"]


def test_config_check_asks_the_llama_server_that_is_found(
    tmp_path: Path, llama_server: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An option that this build does not know is a problem; a llama-server that is not there is none."""
    path = tmp_path / "llamavisor.toml"
    text = f'models_dir = "{tmp_path}"\n[defaults]\nargs = ["--no-such-option"]\n'
    path.write_text(f'llama_server = "{llama_server}"\n{text}', encoding="utf-8")
    assert main(["config", "check", str(path)]) == ExitCode.BAD_CONFIG
    err = capsys.readouterr().err
    assert err.startswith("router main: [defaults]: --no-such-option in args is not an option of")
    path.write_text(f'llama_server = "/missing"\n{text}', encoding="utf-8")
    assert main(["config", "check", str(path)]) == ExitCode.OK
    out, err = capsys.readouterr()
    assert out == f"{path}: ok, routers: main\n"
    assert "router main: options not checked: " in err


def test_config_show_names_the_source_of_every_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a table and as JSON, without secrets."""
    (tmp_path / "key").write_text("sesame\n", encoding="ascii")
    path = tmp_path / "llamavisor.toml"
    path.write_text('models_dir = "m"\napi_key_file = "key"\n', encoding="utf-8")
    assert main(["config", "show", "--config", str(path)]) == ExitCode.OK
    out = capsys.readouterr().out
    assert "sesame" not in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert rows["router.main.models_dir"] == [f'"{tmp_path}/m"', f"{path}:1"]
    assert rows["api_keys"] == ['["key', 'admin"]', str(tmp_path / "key")]
    assert rows["metrics.port"] == ["9155", "default"]
    assert main(["config", "show", str(path), "--json"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert {"key": "metrics.port", "value": 9155, "from": "default"} in json.loads(out)
    assert "sesame" not in out


def test_serve_with_a_bad_configuration_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 78; not even a folder is made."""
    path = tmp_path / "llamavisor.toml"
    path.write_text(f'prot = 1\nstate_dir = "{tmp_path}/state"\n', encoding="utf-8")
    words = ["serve", "--config", str(path), "--socket", str(tmp_path / "run/s"), "--", "--threads", "8"]
    assert main(words) == ExitCode.BAD_CONFIG
    assert capsys.readouterr() == ("", f"{path}:1: prot: unknown key, did you mean port?\n")
    assert sorted(tmp_path.iterdir()) == [path]


def test_serve_hands_flags_over_and_reads_the_same_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that has gone since must make a reload fail, not go on without it."""
    path = tmp_path / "llamavisor.toml"
    path.write_text('models_dir = "/m"\n', encoding="utf-8")
    monkeypatch.setenv("LLAMAVISOR_CONFIG", str(path))
    seen: list[tuple[Config, Callable[[], Config]]] = []

    def run(config: Config, reload: Callable[[], Config], _: Activation) -> int:
        seen.append((config, reload))
        return 0

    monkeypatch.setattr("llamavisord.app.run", run)
    words = ["serve", "--port", "1", "--gpu-layers", "all", "--no-metrics", "--", "--top-k", "1", "--", "x"]
    assert main(words) == ExitCode.OK
    ((config, reload),) = seen
    (main_router,) = config.routers
    assert config.gateway is not None
    assert (config.gateway.port, config.metrics.enabled) == (1, False)
    assert main_router.layers[0].options.gpu_layers == "all"
    assert main_router.layers[0].options.args == ("--top-k", "1", "--", "x")
    assert reload() == config
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        reload()


# Looks


@pytest.mark.parametrize(
    ("environ", "is_coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_colours_are_for_terminals_and_can_be_turned_off(environ: dict[str, str], is_coloured: bool) -> None:
    """NO_COLOR counts when it is not empty, see no-color.org."""
    terminal = _Terminal()
    screen = Screen(terminal, environ)  # type: ignore[arg-type]
    screen.table(("NAME", "STATE"), [("a", "ready"), ("bb", "failed")])
    assert ("\x1b[32mready\x1b[0m" in terminal.text) == is_coloured
    assert ("\x1b" in terminal.text) == is_coloured


def test_a_table_is_aligned_with_colours_and_without() -> None:
    """A colour has no width."""
    texts = []
    for environ in ({}, {"NO_COLOR": "1"}):
        terminal = _Terminal()
        Screen(terminal, environ).table(("A", "STATE", "B"), [("x", "ready", "1"), ("yyy", "backoff", "2")])  # type: ignore[arg-type]
        texts.append(terminal.text)
    bare = texts[0]
    for code in ("1", "31", "32", "0"):
        bare = bare.replace(f"\x1b[{code}m", "")
    assert bare == texts[1] == "A    STATE    B\nx    ready    1\nyyy  backoff  2\n"


def test_text_that_is_plain_stays_as_it_is() -> None:
    """Letters of all languages are no control characters; what is None is a dash."""
    assert plain("naïve 模型 🦙") == "naïve 模型 🦙"
    assert plain(None) == "-"
    assert plain("a\tb", keep="\t") == "a\tb"


# As a process of its own


@pytest.mark.parametrize("words", [["status"], ["models"], ["show", "alpha"], ["ps"]])
def test_a_quick_command_imports_nothing_heavy(stub: ControlStub, words: list[str]) -> None:
    """What the daemon needs would cost `status` ten times its own time."""
    stub.answer("GET", "/control/v1/models", {"models": [model()]})
    stub.answer("GET", "/control/v1/models/alpha", details(header=HEADER, command={"main": ["a", "b c"]}))
    stub.answer("GET", "/control/v1/ps", {"models": [occupant()], **memory(device()), "queues": [], "quarantined": []})
    script = (
        f"import sys\nfrom llamavisord.cli import main\ncode = main({words!r})\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0
    imported = set(done.stderr.split())
    assert "llamavisord" in imported
    assert not imported & HEAVY


def test_a_reader_who_has_seen_enough_is_no_failure(stub: ControlStub) -> None:
    """`llamavisor models | head -1` ends silently and with success."""
    stub.answer("GET", "/control/v1/models", {"models": [model(f"model-{number}") for number in range(5000)]})
    done = subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", '"$@" | head -1', "bash", *COMMAND, "models"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.returncode, done.stdout.split()[0], done.stderr) == (0, "NAME", "")


def test_a_follower_whose_reader_leaves_ends(stub: ControlStub) -> None:
    """Also while the daemon goes on sending."""
    stub.events([event(number, message="x" * 1000) for number in range(1, 500)], hold=True)
    done = subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", '"$@" | head -1', "bash", *COMMAND, "events", "-f"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.returncode, len(done.stdout.splitlines()), done.stderr) == (0, 1, "")


def test_a_full_disk_is_a_failure(stub: ControlStub) -> None:
    """An answer that could not be written must not look like success."""
    with open("/dev/full", "w", encoding="ascii") as full:
        done = subprocess.run(
            [*COMMAND, "status"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=False
        )
    assert (done.returncode, done.stderr) == (
        1,
        "llamavisor: standard output: No space left on device\n",
    )


def test_a_narrow_encoding_shows_escapes_and_a_closed_output_is_survived(stub: ControlStub) -> None:
    """Neither the locale nor a missing standard output makes a traceback."""
    stub.answer("GET", "/control/v1/models", {"models": [model("模型")]})
    done = subprocess.run(
        [*COMMAND, "models"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.splitlines()[1].startswith("\\u6a21\\u578b")
    done = subprocess.run(
        ["/bin/sh", "-c", '"$@" >&-', "sh", *COMMAND, "models"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_output_that_is_piped_has_no_colours(stub: ControlStub) -> None:
    """Also without NO_COLOR."""
    environ = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    done = subprocess.run(
        [*COMMAND, "status"], env=environ, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0
    assert "ready" in done.stdout
    assert "\x1b" not in done.stdout


def test_ctrl_c_ends_a_follower_with_its_own_exit_code(stub: ControlStub) -> None:
    """No traceback on the most usual way to end `events -f`."""
    stub.events([event(1)], hold=True)
    with subprocess.Popen(
        [*COMMAND, "events", "-f"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as follower:
        assert follower.stdout is not None
        assert "ModelLoaded" in follower.stdout.readline()
        follower.send_signal(signal.SIGINT)
        _, err = follower.communicate(timeout=TIMEOUT_S)
    assert (follower.returncode, err) == (130, "llamavisor: interrupted\n")


@pytest.mark.parametrize(
    "module", ["signal", "threading", "llamavisord.cli.program", "argparse", "llamavisord.cli.look", "http.client"]
)
def test_ctrl_c_amid_the_imports_ends_as_it_does_later(stub: ControlStub, module: str) -> None:
    """From the first line of the program on there is no traceback."""
    code = (
        "import os, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), 2)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from llamavisord.cli import main\n"
        "sys.exit(main(['status']))\n"
    )
    # Without `site`, which may import for a path of an editable installation what is to be imported here.
    argv = [sys.executable, "-S", "-c", code]
    ours = [str(Path(package.__file__).parents[1]) for package in (llamavisor, llamavisord)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([*ours, *sys.path])}
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "llamavisor: interrupted\n")


def test_a_ctrl_c_on_a_terminal_stands_on_a_line_of_its_own(stub: ControlStub) -> None:
    """What is said of it begins a new one."""
    stub.events([event(1)], hold=True)
    with Terminal([*COMMAND, "events", "-f"], os.environ) as terminal:
        terminal.until("ModelLoaded")
        terminal.until("\n")
        terminal.type(INTERRUPT)
        assert terminal.wait() == 130
    assert terminal.seen.endswith("\n^C\nllamavisor: interrupted\n")
