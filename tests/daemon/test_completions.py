"""Completions, in the shells themselves: what stands on the line after Tab is what the command would get."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil
import pytest

from fakes.control_stub import ControlStub, model, router
from fakes.waiting import eventually
from llamavisord.cli import complete, main
from llamavisord.completions import SHELLS
from llamavisord.completions.outline import Kind, outline

REPOSITORY = Path(__file__).parents[2]
FILES = {"bash": "llamavisor", "zsh": "_llamavisor", "fish": "llamavisor.fish"}
PATIENCE_S = 20.0
PATIENT = "import sys, llamavisord.cli.complete as each; from llamavisord.cli import main; each.PATIENCE_S = 60.0"
"""On a busy machine a daemon may take longer to tell names than people wait for a Tab."""


class Shell:
    """An interactive shell at a terminal; a context manager that ends it.

    Args:
        name: which.
        folder: its home; `llamavisor` in it writes down what it was called with, and completes as the true one does,
            but for its patience.
        socket: where the daemon is.
    """

    def __init__(self, name: str, folder: Path, socket: Path) -> None:
        self._name = name
        self._folder = folder
        self._said = folder / "said"
        program = folder / "llamavisor"
        program.write_text(
            f'#!/bin/sh\n[ "$1" = __complete ] && exec {sys.executable} -c "{PATIENT}; sys.exit(main())" "$@"\n'
            f'for each; do echo "<$each>"; done > {self._said}.new && mv {self._said}.new {self._said}\n'
        )
        program.chmod(0o755)
        self._env = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "HOME": str(folder),
            "TERM": "xterm",
            "LLAMAVISOR_SOCKET": str(socket),
            "PS1": "$ ",
            "LC_ALL": "C.UTF-8",
        }
        self.shown = b""

    def __enter__(self) -> Self:
        """Start it, and have it read its completions."""
        argv = {
            "bash": ["bash", "--norc", "--noprofile", "-i"],
            "zsh": ["zsh", "-f", "-i"],
            "fish": ["fish", "--no-config", "--interactive"],
        }[self._name]
        self._fd, terminal = os.openpty()
        try:
            self._popen = subprocess.Popen(
                ["setsid", "--ctty", *argv],
                stdin=terminal,
                stdout=terminal,
                stderr=terminal,
                cwd=self._folder,
                env=self._env,
            )
        finally:
            os.close(terminal)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        file = REPOSITORY / "deploy" / "completions" / FILES[self._name]
        if self._name == "zsh":
            self._write(f"fpath=({file.parent} $fpath); autoload -Uz compinit; compinit -u -D\r")
        else:
            self._write(f"source {file}\r")
        return self

    def __exit__(self, *_: object) -> None:
        """End it, and what it has left in its session, which comes to us."""
        self._popen.kill()
        self._popen.wait()
        eventually(lambda: not self._end_some(), what="the end of its session")
        self._reader.join()
        os.close(self._fd)

    def _end_some(self) -> bool:
        """Kill and reap what of its session is ours by now; whether there is more of it, which its parent has still."""
        found = False
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, ProcessLookupError, ChildProcessError):
                if os.getsid(process.pid) == self._popen.pid:
                    found = True
                    process.kill()
                    os.waitpid(process.pid, 0)
        return found

    def typed(self, keys: str) -> list[str]:
        """What `llamavisor` is called with after these keys and Enter."""
        self._said.unlink(missing_ok=True)
        self._write(f"{keys}\r")
        try:
            eventually(self._said.exists, what="a command that was run", within_s=PATIENCE_S)
        except AssertionError:
            sys.stderr.write(self.shown.decode("utf-8", "replace"))
            raise
        return [line[1:-1] for line in self._said.read_text().splitlines()]

    def _write(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def _read(self) -> None:
        with suppress(OSError):  # it has ended
            while chunk := os.read(self._fd, 65536):
                self.shown += chunk


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[ControlStub]:
    """A daemon that knows models and routers."""
    with ControlStub(tmp_path / "control.sock") as stub:
        names = ("alpha", "ggml-org/gemma-3:Q4_K_M", "name with blanks", "qwen3-8b")
        models = [model(name, aliases=["little"] if name == "alpha" else []) for name in names]
        stub.answer("GET", "/control/v1/models", {"models": models, "folders": []})
        stub.answer("GET", "/control/v1/routers", {"routers": [router("gpu0"), router("spare")]})
        pulls = [{"id": "new-0123", "state": "under_way"}, {"id": "new-4567", "state": "done"}]
        stub.answer("GET", "/control/v1/pulls", {"pulls": pulls})
        yield stub


@pytest.fixture(params=sorted(SHELLS))
def shell(request: pytest.FixtureRequest, tmp_path: Path, daemon: ControlStub) -> Iterator[Shell]:
    """Each of the shells, beside a daemon that knows names."""
    if shutil.which(request.param) is None:
        pytest.skip(f"no {request.param}: install the package {request.param}")
    (tmp_path / "folder-of-models").mkdir()
    (tmp_path / "special.toml").touch()
    with Shell(request.param, tmp_path, daemon.path) as shell:
        yield shell


CASES = {
    "llamavisor stat\t": ["status"],
    "llamavisor config sh\t": ["config", "show"],
    "llamavisor install\t --dry\t": ["install-service", "--dry-run"],
    "llamavisor load al\t": ["load", "alpha"],
    "llamavisor load litt\t": ["load", "little"],
    "llamavisor load --no\t qw\t": ["load", "--no-wait", "qwen3-8b"],
    "llamavisor show ggml-org/gemma-3:Q\t": ["show", "ggml-org/gemma-3:Q4_K_M"],
    "llamavisor show gg\t": ["show", "ggml-org/gemma-3:Q4_K_M"],
    "llamavisor pin alpha qw\t": ["pin", "alpha", "qwen3-8b"],
    "llamavisor rm alpha qwen3-8b ggml-org/gemma-3:Q4_K_M \t": [
        "rm",
        "alpha",
        "qwen3-8b",
        "ggml-org/gemma-3:Q4_K_M",
        "name with blanks",
    ],
    "llamavisor quantize spec\t Q4_K_M": ["quantize", "special.toml", "Q4_K_M"],
    "llamavisor quantize qw\t Q8\t": ["quantize", "qwen3-8b", "Q8_0"],
    "llamavisor quantize --force gg\t MX\t spec\t": [
        "quantize",
        "--force",
        "ggml-org/gemma-3:Q4_K_M",
        "MXFP4_MOE",
        "special.toml",
    ],
    "llamavisor run alpha qw\t": ["run", "alpha", "qw"],
    "llamavisor unload --router sp\t alpha": ["unload", "--router", "spare", "alpha"],
    "llamavisor unload --router=sp\t alpha": ["unload", "--router=spare", "alpha"],
    "llamavisor pull --cancel ne\t": ["pull", "--cancel", "new-0123"],
    "llamavisor restart gp\t": ["restart", "gpu0"],
    "llamavisor config check spec\t": ["config", "check", "special.toml"],
    "llamavisor serve --config spec\t": ["serve", "--config", "special.toml"],
    "llamavisor serve --models-d\t folder-\t": ["serve", "--models-dir", "folder-of-models"],
    "llamavisor show nam\t": ["show", "name with blanks"],
    "llamavisor --debug sho\t alp\t": ["--debug", "show", "alpha"],
    "llamavisor models load\t": ["models", "load"],
}
"""Keys, and what the command gets."""


def test_what_is_typed_is_completed(shell: Shell) -> None:
    """Commands, flags, files, folders, and names that the daemon knows, whatever characters they have."""
    for keys, words in CASES.items():
        assert [word.rstrip("/") for word in shell.typed(keys)] == words, keys


def test_without_a_daemon_nothing_is_completed_and_nothing_is_said(shell: Shell, daemon: ControlStub) -> None:
    """The word stays as it is; no message disturbs the line."""
    daemon.path.unlink()
    assert shell.typed("llamavisor load al\t") == ["load", "al"]
    assert b"no daemon" not in shell.shown


@pytest.mark.parametrize("name", sorted(SHELLS))
def test_the_files_are_what_the_parser_says(name: str) -> None:
    """Those in deploy/completions are what would be generated now."""
    written = (REPOSITORY / "deploy" / "completions" / FILES[name]).read_text(encoding="utf-8")
    if written != SHELLS[name]():
        pytest.fail(f"deploy/completions/{FILES[name]} is stale: run `make completions`", pytrace=False)


def test_every_name_of_a_model_or_router_is_completed() -> None:
    """What is called so is known to be one, wherever it stands."""
    commands = {" ".join(command.path): command for command in outline()}
    for words in ("load", "unload", "show", "pin", "models", "evict", "rm", "run"):
        assert commands[words].values[0].kind is Kind.MODELS, words
    for command in commands.values():
        for flag in command.flags:
            if "--router" in flag.spellings:
                assert flag.value is not None
                assert flag.value.kind is Kind.ROUTERS
    assert "__complete" not in commands


# The command behind them


def test_names_are_told_in_order(
    daemon: ControlStub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models, then their aliases; routers; nothing for what nobody knows. A socket on the line is heeded."""
    monkeypatch.setenv("LLAMAVISOR_SOCKET", "/nowhere/control.sock")
    monkeypatch.setattr(complete, "PATIENCE_S", 60.0)

    def said(*words: str) -> list[str]:
        assert main(["__complete", *words]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out.split("\n")[:-1]

    socket = ("--socket", str(daemon.path))
    assert said("models", "llamavisor", *socket, "load") == [
        "alpha",
        "ggml-org/gemma-3:Q4_K_M",
        "name with blanks",
        "qwen3-8b",
        "little",
    ]
    assert said("routers", "llamavisor", f"--socket={daemon.path}") == ["gpu0", "spare"]
    assert said("models", "llamavisor", "load") in ([], [""])
    assert said("nonsense", *socket) in ([], [""])
    assert said() in ([], [""])


def test_a_daemon_that_does_not_answer_keeps_nobody(
    daemon: ControlStub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer is not waited for; then there is no completion, and no word of it."""
    monkeypatch.setenv("LLAMAVISOR_SOCKET", str(daemon.path))

    def hold(_: dict[str, str]) -> tuple[int, str, bytes]:
        daemon.closing.wait()
        return 500, "text/plain", b""

    daemon.answer_with("GET", "/control/v1/models", hold)
    assert complete.PATIENCE_S <= 1.0
    assert main(["__complete", "models"]) == 0
    eventually(lambda: ("GET", "/control/v1/models", {}) in daemon.requests, what="a question")
    assert capsys.readouterr() == ("", "")


def test_a_tab_imports_nothing_heavy(daemon: ControlStub) -> None:
    """The libraries of the daemon are not paid for by who completes a word."""
    code = f"{PATIENT}; main(['__complete', 'models']); print(*sys.modules)"
    env = {**os.environ, "LLAMAVISOR_SOCKET": str(daemon.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=90)
    *names, imported = done.stdout.splitlines()
    assert names[0] == "alpha"
    assert not set(imported.split()) & {"pydantic", "httpx", "aiohttp", "anyio", "psutil", "asyncio", "tomllib"}
