"""`run` against a whole daemon with a true llama-server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from fakes.waiting import PATIENCE_S, eventually
from llamavisord.exit_codes import ExitCode
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon, config_of
from terminal import END, INTERRUPT, Terminal

pytestmark = pytest.mark.real


def run(daemon: RunningDaemon, *argv: str | Path, piped: str = "") -> subprocess.CompletedProcess[str]:
    """The command with pipes all around."""
    return subprocess.run(
        command(argv),
        input=piped,
        env=env_for(daemon),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )


def command(argv: Sequence[str | Path]) -> list[str]:
    """The words of a command line."""
    return [sys.executable, "-m", "llamavisord", "run", *map(str, argv)]


def env_for(daemon: RunningDaemon) -> dict[str, str]:
    """An environment in which the command finds this daemon."""
    return {**daemon.env, "LLAMAVISOR_SOCKET": str(daemon.socket), "XDG_STATE_HOME": str(daemon.socket.parent / "xdg")}


def test_a_model_is_asked_in_a_pipe(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """It is loaded, answers as its grammar, its schema and its limit allow, and tells how fast it was."""
    grammar, schema, template = tmp_path / "g.gbnf", tmp_path / "schema.json", tmp_path / "t.jinja"
    grammar.write_text('root ::= " am" " I"', encoding="utf-8")
    schema.write_text('{"const": true}', encoding="utf-8")
    # Where a schema is to be followed, llama-server reads the beginning of an answer that a template makes by the
    # schema too, and a vocabulary without the template's own tokens does not survive that.
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
    options = ("--threads", "1", "--chat-template-file", str(template))
    with RunningDaemon(tmp_path, models_dir, llama_server, options=options) as daemon:
        daemon.wait_for_gateway()
        first = run(daemon, "alpha", "who", "are", "you?", "--stats", piped="a file")
        assert (first.returncode, first.stdout) == (0, " I am alpha\n")
        prompt, answer, _ = first.stderr.splitlines()
        assert prompt.startswith("prompt: ")
        assert answer.startswith("answer: 4 tokens in ")
        cut = run(daemon, "alpha", "--max-tokens", "2", "who?")
        assert (cut.stdout, cut.stderr.count("cut off")) == (" I am\n", 1)
        assert run(daemon, "alpha", "who?", "--grammar", grammar).stdout == " am I\n"
        assert run(daemon, "alpha", "who?", "--json-schema", schema).stdout == "true\n"
        near = run(daemon, "alhpa", "who?")
        assert (near.returncode, near.stderr) == (
            ExitCode.NOT_FOUND,
            "llamavisor: no model 'alhpa'; did you mean alpha?\n",
        )


def test_what_ends_an_answer_or_keeps_it_away_is_named(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """A context that is full is told from a limit, and a form that the model cannot keep to with the model."""
    endless, schema = tmp_path / "endless.gbnf", tmp_path / "schema.json"
    endless.write_text('root ::= " am" root', encoding="utf-8")
    schema.write_text('{"const": true}', encoding="utf-8")
    with RunningDaemon(tmp_path, models_dir, llama_server, options=("--threads", "1", "--ctx-size", "256")) as daemon:
        daemon.wait_for_gateway()
        full = run(daemon, "alpha", "who?", "--grammar", endless)
        assert (full.returncode, full.stdout[:6]) == (0, " am am")
        assert "cut off: the context of 256 tokens is full" in full.stderr
        cut = run(daemon, "alpha", "who?", "--grammar", endless, "--max-tokens", "9")
        assert (cut.returncode, cut.stderr) == (0, "the answer was cut off: --max-tokens gives it 9\n")
        unable = run(daemon, "alpha", "who?", "--json-schema", schema)
    said = f"llamavisor: model alpha cannot answer by --json-schema {schema}: Failed to initialize samplers: "
    assert (unable.returncode, unable.stderr.startswith(said)) == (ExitCode.FAILED, True)
    assert unable.stderr.endswith("; `llamavisor logs` has the reason\n")


def test_a_bad_grammar_is_told_in_llama_servers_words(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """As one line, with the exit code of a failure."""
    grammar = tmp_path / "g.gbnf"
    grammar.write_text("root ::= nothing", encoding="utf-8")
    with RunningDaemon(tmp_path, models_dir, llama_server) as daemon:
        daemon.wait_for_gateway()
        done = run(daemon, "alpha", "who?", "--grammar", grammar)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (ExitCode.FAILED, "", 1)
    assert "grammar" in done.stderr


def test_an_interrupt_in_a_chat_cancels_the_generation(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """The model is idle again, and answers the next line."""
    write_tiny_model(models_dir / "endless.gguf", ["on", "and"], loop=True, n_ctx=100_000)
    options = ("--threads", "1", "--ctx-size", "100000")
    with RunningDaemon(tmp_path, models_dir, llama_server, options=options) as daemon:
        daemon.wait_for_gateway()
        with Terminal(command(["endless", "--stats"]), env_for(daemon)) as terminal:
            for _ in range(2):
                terminal.until(">>> ")
                terminal.type("go\r")
                terminal.until("on and on")
                terminal.until("stopped", press=INTERRUPT)
                assert eventually(lambda: daemon.status()["gateway"]["in_flight"] == {}, what="an idle gateway")
            terminal.until(">>> ")
            terminal.type(END)
            assert terminal.wait() == ExitCode.OK


def test_a_load_is_shown_until_the_answer_comes(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """A model that takes seconds to load; the line of its progress is gone when it speaks."""
    write_tiny_model(models_dir / "slow.gguf", ["at", "last"], n_layer=150, n_ctx=100_000)
    options = ("--threads", "1", "--ctx-size", "100000")
    with RunningDaemon(tmp_path, models_dir, llama_server, options=options) as daemon:
        daemon.wait_for_gateway()
        with Terminal(command(["slow", "hi"]), env_for(daemon)) as terminal:
            terminal.until("slow [")
            terminal.until("loading")
            assert terminal.wait() == ExitCode.OK
    assert terminal.seen.endswith("\r\x1b[K at last\n")


def test_a_key_is_sent_to_a_gateway_that_wants_one(
    tmp_path: Path, models_dir: Path, llama_server: Path, free_port: int
) -> None:
    """Without it the command is not permitted; with it, it is answered."""
    keys = tmp_path / "keys"
    keys.write_text("sk-0123456789\n", encoding="ascii")
    keys.chmod(0o600)
    extra = f'api_key_file = "{keys}"\n[defaults]\nthreads = 1'
    config = config_of(models_dir, free_port, extra)
    with RunningDaemon(tmp_path, models_dir, llama_server, config=config) as daemon:
        daemon.wait_for_gateway()
        refused = run(daemon, "alpha", "who?")
        assert (refused.returncode, refused.stdout) == (ExitCode.NOT_PERMITTED, "")
        assert run(daemon, "alpha", "who?", "--api-key-file", keys).stdout == " I am alpha\n"


def test_a_router_without_a_gateway_is_asked_itself(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """With serve = "router"."""
    with RunningDaemon(tmp_path, models_dir, llama_server, serve="router") as daemon:
        daemon.wait_for_router("ready")
        daemon.wait_for_model("beta", "unloaded")
        assert run(daemon, "beta", "who?").stdout == " I am beta\n"
