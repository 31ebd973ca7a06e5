"""`run`: what it asks the gateway, and what it shows in a pipe and on a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.control_stub import ControlStub, gateway, model, router, status
from fakes.talker import Talker, end, words
from fakes.waiting import PATIENCE_S
from llamavisord.exit_codes import ExitCode
from terminal import END, INTERRUPT, Terminal

COMMAND = [sys.executable, "-m", "llamavisord", "run"]
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
PNG = b"\x89PNG\r\n\x1a\n and so on"


@pytest.fixture
def talker() -> Iterator[Talker]:
    """A scripted gateway."""
    with Talker() as talker:
        yield talker


@pytest.fixture
def env(tmp_path: Path, talker: Talker) -> Iterator[dict[str, str]]:
    """The environment of a command whose daemon says that the gateway is the scripted one."""
    path = tmp_path / "control.sock"
    with ControlStub(path) as stub:
        stub.answer("GET", "/control/v1/status", status(gateway=gateway(urls=[talker.url])))
        stub.answer("GET", "/control/v1/models", {"models": [model()]})
        yield {"PATH": os.environ["PATH"], "LLAMAVISOR_SOCKET": str(path), "XDG_STATE_HOME": str(tmp_path / "state")}


def run(env: dict[str, str], *argv: str | Path, piped: bytes = b"") -> subprocess.CompletedProcess[str]:
    """The command with pipes all around."""
    done = subprocess.run(
        [*COMMAND, *map(str, argv)], input=piped, env=env, capture_output=True, check=False, timeout=PATIENCE_S
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


# In a pipe


def test_an_answer_goes_to_standard_output_and_nothing_else_does(env: dict[str, str], talker: Talker) -> None:
    """The text as it came, with a line break at its end; reasoning is left out, and control characters stay."""
    talker.say(words("hm, ", reasoning=True), words("\x1b[31mred", "\tand\n", "blue"), end())
    done = run(env, "alpha", "which", "colours?")
    assert (done.returncode, done.stdout, done.stderr) == (0, "\x1b[31mred\tand\nblue\n", "")
    assert talker.asked == [
        {"model": "alpha", "messages": [{"role": "user", "content": "which colours?"}], "stream": True}
    ]
    assert talker.headers[0]["X-Llamavisor-Heartbeat"] == "1"
    assert "Authorization" not in talker.headers[0]


def test_piped_text_follows_the_prompt(env: dict[str, str], talker: Talker) -> None:
    """And stands alone if there is no prompt."""
    talker.say(words("ok"), end())
    talker.say(words("ok"), end())
    run(env, "alpha", "summarise", piped="für dich\n".encode())
    run(env, "alpha", piped=b"only this")
    asked = [each["messages"] for each in talker.asked]
    assert asked == [
        [{"role": "user", "content": "summarise\n\nfür dich"}],
        [{"role": "user", "content": "only this"}],
    ]


def test_every_option_reaches_the_model(env: dict[str, str], talker: Talker, tmp_path: Path) -> None:
    """Whether it stands before the prompt or behind it."""
    talker.say(words("{}"), end())
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}', encoding="utf-8")
    options = ["--temperature", "0.5", "--top-p", "0.9", "--top-k", "40", "--min-p", "0.1", "--repeat-penalty", "1.1"]
    options += ["--max-tokens", "7", "--seed", "3", "--system", "be brief", "--json-schema", str(schema)]
    assert run(env, "alpha", *options, "--", "-1?").returncode == 0
    assert talker.asked == [
        {
            "model": "alpha",
            "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "-1?"}],
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 40,
            "min_p": 0.1,
            "repeat_penalty": 1.1,
            "max_tokens": 7,
            "seed": 3,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": {"type": "object"}},
            },
            "stream": True,
        }
    ]


def test_a_grammar_and_images_go_along(env: dict[str, str], talker: Talker, tmp_path: Path) -> None:
    """An image as a data URL of the type that its bytes say, whatever its name."""
    talker.say(words("a cat"), end())
    (tmp_path / "g.gbnf").write_text('root ::= "a cat"', encoding="utf-8")
    (tmp_path / "photo.jpg").write_bytes(PNG)
    (tmp_path / "other").write_bytes(b"RIFF1234WEBPVP8 ")
    images = ["--image", tmp_path / "photo.jpg", "--image", tmp_path / "other"]
    assert run(env, "alpha", "what?", *images, "--grammar", tmp_path / "g.gbnf").stdout == "a cat\n"
    [asked] = talker.asked
    assert asked["grammar"] == 'root ::= "a cat"'
    [message] = asked["messages"]  # type: ignore[misc]
    text, *pictures = message["content"]
    assert text == {"type": "text", "text": "what?"}
    urls = [each["image_url"]["url"].partition(",")[0] for each in pictures]
    assert urls == ["data:image/png;base64", "data:image/webp;base64"]


@pytest.mark.parametrize(
    ("argv", "piped", "said"),
    [
        (["hi", "--image", "x"], b"", "x is not an image of a kind that is known; it must be PNG"),
        (["hi", "--json-schema", "x"], b"", "x is not JSON"),
        (["hi", "--json-schema", "list"], b"", "list is not a JSON schema: it holds no object"),
        ([], b" \n", "nothing to ask: there is no prompt, and nothing is piped in"),
        (["hi", "--top-p", "1.5"], b"", "expected a number from 0 to 1"),
        (["hi", "--tpo-p", "1"], b"", "unrecognized arguments: --tpo-p"),
        (["hi", "--grammar", "x", "--json-schema", "x"], b"", "not allowed with argument"),
    ],
)
def test_what_makes_no_sense_is_not_asked(
    env: dict[str, str], talker: Talker, tmp_path: Path, argv: list[str], piped: bytes, said: str
) -> None:
    """One line says what is wrong, and the exit code is that of wrong usage."""
    (tmp_path / "x").write_bytes(b"neither this nor that")
    (tmp_path / "list").write_bytes(b"[]")
    done = run(env, "alpha", *(tmp_path / word if word in {"x", "list"} else word for word in argv), piped=piped)
    assert done.returncode == ExitCode.USAGE
    assert said in done.stderr
    assert talker.asked == []


def test_stats_are_llama_cpps_own(env: dict[str, str], talker: Talker) -> None:
    """On standard error, with what came from the cache."""
    timings = {"cache_n": 30, "prompt_n": 12, "prompt_ms": 500.0, "prompt_per_second": 24.0}
    timings |= {"predicted_n": 34, "predicted_ms": 1200.0, "predicted_per_second": 28.33}
    talker.say(words("so"), end(timings=timings))
    done = run(env, "alpha", "--stats", "hi")
    assert done.stdout == "so\n"
    prompt, answer, first = done.stderr.splitlines()
    assert prompt == "prompt: 12 tokens and 30 from the cache in 0.5s, 24.0 tokens/s"
    assert answer == "answer: 34 tokens in 1.2s, 28.3 tokens/s"
    assert first.startswith("first word after ")


def test_the_key_comes_from_a_file_or_the_environment(env: dict[str, str], talker: Talker, tmp_path: Path) -> None:
    """The file goes before; what it holds is not repeated if it is no key."""
    env["LLAMAVISOR_API_KEY"] = "of-the-environment"
    (tmp_path / "key").write_text("of-the-file\n", encoding="ascii")
    (tmp_path / "keys").write_text("secret\nsecret\n", encoding="ascii")
    for _ in range(2):
        talker.say(words("ok"), end())
    run(env, "alpha", "hi")
    run(env, "alpha", "hi", "--api-key-file", tmp_path / "key")
    assert [each["Authorization"] for each in talker.headers] == ["Bearer of-the-environment", "Bearer of-the-file"]
    refused = run(env, "alpha", "hi", "--api-key-file", tmp_path / "keys")
    assert refused.returncode == ExitCode.USAGE
    assert "does not hold exactly one line" in refused.stderr
    assert "secret" not in refused.stderr


@pytest.mark.parametrize(
    ("status_code", "message", "line", "code"),
    [
        (401, "Invalid API Key", "Invalid API Key; give another key", ExitCode.NOT_PERMITTED),
        (403, "not this model", "not this model; give another key", ExitCode.NOT_PERMITTED),
        (400, "model 'alpha' is invalid: why", "model 'alpha' is invalid: why; see", ExitCode.NOT_FOUND),
        (400, "model 'alpha' not found", "model 'alpha' not found; see `llamavisor models`", ExitCode.NOT_FOUND),
        (503, "it is too large", "it is too large; try again in 30 s", ExitCode.FAILED),
    ],
)
def test_a_refusal_is_one_line(
    env: dict[str, str], talker: Talker, status_code: int, message: str, line: str, code: ExitCode
) -> None:
    """In the words of the gateway, with what to do and an exit code that says what kind it is."""
    talker.refuse(status_code, message, Retry_After="30")
    done = run({**env, "LLAMAVISOR_API_KEY": "mine"}, "alpha", "hi")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
    assert done.stderr.startswith(f"llamavisor: {line}")


def test_a_key_that_is_wanted_and_was_not_given_is_told(env: dict[str, str], talker: Talker) -> None:
    """It is no invalid one."""
    talker.refuse(401, "Invalid API Key")
    done = run(env, "alpha", "hi")
    said = "llamavisor: an API key is wanted, and none was given; give one in LLAMAVISOR_API_KEY or with "
    assert (done.returncode, done.stderr) == (ExitCode.NOT_PERMITTED, f"{said}--api-key-file\n")


def test_wrong_usage_shows_the_usage_of_its_command(env: dict[str, str]) -> None:
    """Of one of several words, too; a prompt that looks like an option is told how to be one."""
    done = run(env, "alpha", "-x")
    assert done.stderr.startswith("usage: llamavisor run [-h]")
    assert "unrecognized arguments: -x; a prompt that begins with a dash stands behind --" in done.stderr
    nested = subprocess.run([*COMMAND[:-1], "config", "check", "--nix"], capture_output=True, text=True, check=False)
    assert nested.stderr.startswith("usage: llamavisor config check [-h]")


@pytest.mark.parametrize(
    ("flags", "timings", "why"),
    [
        (["--max-tokens", "7"], {"predicted_n": 7}, "--max-tokens gives it 7"),
        (["--max-tokens", "7"], {}, "--max-tokens gives it 7"),
        (
            ["--max-tokens", "5000"],
            {"cache_n": 90, "prompt_n": 1000, "predicted_n": 3006},
            "the context of 4096 tokens is full",
        ),
        (
            [],
            {"prompt_n": 10, "predicted_n": 20},
            "--max-tokens, max_tokens in the configuration, or the context",
        ),
        ([], {}, "a limit of tokens: "),
    ],
)
def test_an_answer_that_is_cut_off_says_by_what(
    env: dict[str, str], talker: Talker, flags: list[str], timings: dict[str, int], why: str
) -> None:
    """The command, the context, or what may have been."""
    talker.say(words("and"), end("length", timings=timings))
    done = run(env, "alpha", "hi", *flags)
    assert (done.returncode, done.stdout) == (0, "and\n")
    assert done.stderr.startswith("the answer was cut off: ")
    assert why in done.stderr


def test_a_form_that_a_model_cannot_keep_to_is_named(env: dict[str, str], talker: Talker, tmp_path: Path) -> None:
    """With the model, and where the reason stands; what has to do with something else is as it is."""
    schema = tmp_path / "schema.json"
    schema.write_text("{}", encoding="utf-8")
    said = "Failed to initialize samplers: std::exception"
    talker.refuse(400, said)
    done = run(env, "alpha", "hi", "--json-schema", schema)
    assert (done.returncode, done.stderr) == (
        ExitCode.FAILED,
        f"llamavisor: model alpha cannot answer by --json-schema {schema}: {said}; `llamavisor logs` has the reason\n",
    )
    talker.refuse(500, "out of luck")
    assert run(env, "alpha", "hi", "--json-schema", schema).stderr == "llamavisor: out of luck\n"


def test_a_request_beyond_the_context_says_what_would_help(env: dict[str, str], talker: Talker) -> None:
    """llama-server's words know of no chat that can be cleared, and of no table."""
    said = "request (20310 tokens) exceeds the available context size (4096 tokens), try increasing it"
    talker.refuse(400, said)
    done = run(env, "alpha", "hi")
    assert done.stderr.startswith(f"llamavisor: model alpha: {said}; ")
    assert "/clear" in done.stderr
    assert "ctx_size" in done.stderr


def test_an_answer_that_ends_with_an_error_keeps_what_was_said(env: dict[str, str], talker: Talker) -> None:
    """An error event amid the stream is the error of the command."""
    error = 'event: error\ndata: {"error": {"code": 502, "message": "the process died", "type": "x"}}\n\n'
    talker.say(words("half"), [error])
    done = run(env, "alpha", "hi")
    assert (done.returncode, done.stdout) == (ExitCode.FAILED, "half\n")
    assert done.stderr == "llamavisor: the process died\n"


@pytest.mark.parametrize("junk", ["", "data: nonsense\n\n", "data: [1]\n\n"])
def test_an_answer_that_is_cut_is_not_taken_for_whole(env: dict[str, str], talker: Talker, junk: str) -> None:
    """Nor is one that makes no sense."""
    talker.say(words("half"), [junk])
    done = run(env, "alpha", "hi")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (ExitCode.FAILED, "half\n", 1)


def test_a_name_that_nobody_has_is_told_with_those_that_are_near(tmp_path: Path) -> None:
    """Before anything is asked; the words are the daemon's."""
    path = tmp_path / "control.sock"
    with ControlStub(path) as stub:
        stub.answer("GET", "/control/v1/models", {"models": []})
        hint = "did you mean alpha?"
        stub.problem("GET", "/control/v1/models/alhpa", "model_not_found", "no model 'alhpa'", hint, http=404)
        done = run({"LLAMAVISOR_SOCKET": str(path)}, "alhpa", "hi")
    assert (done.returncode, done.stderr) == (
        ExitCode.NOT_FOUND,
        "llamavisor: no model 'alhpa'; did you mean alpha?\n",
    )


def test_without_a_gateway_the_router_is_asked_that_has_the_model(tmp_path: Path, talker: Talker) -> None:
    """With serve = "router": of two that know it the one where it is loaded."""
    path = tmp_path / "control.sock"
    with ControlStub(path) as stub:
        routers = [router("one", url="http://127.0.0.1:9"), router("two", url=talker.url)]
        stub.answer("GET", "/control/v1/status", status(routers))
        both = [model(router="one", state="unloaded"), model(router="two")]
        stub.answer("GET", "/control/v1/models", {"models": both})
        talker.say(words("here"), end())
        assert run({"LLAMAVISOR_SOCKET": str(path)}, "alpha", "hi").stdout == "here\n"


def test_a_gateway_that_is_not_there_is_told(tmp_path: Path) -> None:
    """One that does not listen yet, and one that does not answer."""
    path = tmp_path / "control.sock"
    with ControlStub(path) as stub:
        stub.answer("GET", "/control/v1/models", {"models": [model()]})
        for urls in ([], ["http://127.0.0.1:9"]):
            stub.answer("GET", "/control/v1/status", status(gateway=gateway(urls=urls)))
            done = run({"LLAMAVISOR_SOCKET": str(path)}, "alpha", "hi")
            assert done.returncode == ExitCode.UNREACHABLE
            assert "see `llamavisor status`" in done.stderr


# On a terminal


def test_what_a_model_says_cannot_command_the_terminal(env: dict[str, str], talker: Talker) -> None:
    """Control characters of both kinds are shown escaped; prose of every language is as it is."""
    talker.say(words("a\x1b]0;title\x07", "\x9b2J\r", "\u202f\u3000ok 👩\u200d🚀\n\tx"), end())
    with Terminal([*COMMAND, "alpha", "hi"], env) as terminal:
        assert terminal.wait() == ExitCode.OK
    assert terminal.seen == "a\\x1b]0;title\\x07\\x9b2J\\x0d\u202f\u3000ok 👩\u200d🚀\n\tx\n"


@pytest.mark.parametrize("colours", [True, False])
def test_reasoning_is_dimmed_and_stands_apart(env: dict[str, str], talker: Talker, colours: bool) -> None:
    """Also where colours are not wanted."""
    talker.say(words("so", " it is", reasoning=True), words("yes"), end())
    with Terminal([*COMMAND, "alpha", "hi"], env if colours else {**env, "NO_COLOR": "1"}) as terminal:
        assert terminal.wait() == ExitCode.OK
    shown = f"{DIM}so{PLAIN}{DIM} it is{PLAIN}\n\nyes\n" if colours else "so it is\n\nyes\n"
    assert terminal.seen == shown


def test_a_chat_keeps_what_was_said(env: dict[str, str], talker: Talker) -> None:
    """Until /clear; an empty line asks nothing, and /bye ends it with success."""
    for text in ("one", "two", "three"):
        talker.say(words(text), end())
    with Terminal([*COMMAND, "alpha", "--system", "s"], env) as terminal:
        for line, answer in (("a", "one"), ("b", "two"), ("/clear", ""), ("/what", "/bye or Ctrl-D"), ("", "")):
            terminal.until(">>> ")
            terminal.type(f"{line}\r")
            terminal.until(f"{answer}")
        terminal.until(">>> ")
        terminal.type("c\r")
        terminal.until("three\n")
        terminal.until(">>> ")
        terminal.type("/bye\r")
        assert terminal.wait() == ExitCode.OK
    said = [[each["content"] for each in asked["messages"]] for asked in talker.asked]  # type: ignore[attr-defined]
    assert said == [["s", "a"], ["s", "a", "one", "b"], ["s", "c"]]


def test_what_looks_like_a_command_is_not_sent(env: dict[str, str], talker: Talker) -> None:
    """Whatever follows the slash; between three quotation marks it is, as are several lines."""
    talker.say(words("fine"), end())
    with Terminal([*COMMAND, "alpha"], env) as terminal:
        for line, hint in (
            ("/set temperature 0", "/set is no command here, and was not sent"),
            ("/bye now", "/bye is no command here"),
            ("/?", "begins a message of several lines"),
            ("/help", f"kept in {env['XDG_STATE_HOME']}/llamavisor/chat_history"),
        ):
            terminal.until(">>> ")
            terminal.type(f"{line}\r")
            terminal.until(hint)
        terminal.until(">>> ")
        terminal.type('"""/etc is\r')
        terminal.until("... ")
        terminal.type("  a folder\r")
        terminal.until("... ")
        terminal.type('"""\r')
        terminal.until("fine\n")
        terminal.until(">>> ")
        terminal.type("/exit\r")
        assert terminal.wait() == ExitCode.OK
    [asked] = talker.asked
    assert asked["messages"] == [{"role": "user", "content": "/etc is\n  a folder"}]


@pytest.mark.parametrize("word", ["/bye", "/exit", "/quit", "exit", "quit"])
def test_a_chat_ends_in_many_words(env: dict[str, str], talker: Talker, word: str) -> None:
    """Those that other programs have, too; one without a slash is told how it would be sent."""
    with Terminal([*COMMAND, "alpha"], env) as terminal:
        terminal.until(">>> ")
        terminal.type(f"{word}\r")
        assert terminal.wait() == ExitCode.OK
    assert ("would send it" in terminal.seen) == (word[0] != "/")
    assert talker.asked == []


def test_what_was_typed_is_at_hand_in_the_next_chat(env: dict[str, str], talker: Talker) -> None:
    """In a file that is nobody else's; a link in its place has nothing kept."""
    for _ in range(2):
        talker.say(words("yes"), end())
    history = Path(env["XDG_STATE_HOME"], "llamavisor", "chat_history")
    for keys in ("are you there?\r", "\x1b[A\x1b[A\r"):  # the second is the line before /bye
        with Terminal([*COMMAND, "alpha"], env) as terminal:
            terminal.until(">>> ")
            terminal.type(keys)
            terminal.until("yes\n")
            terminal.until(">>> ")
            terminal.type("/bye\r")
            assert terminal.wait() == ExitCode.OK
        assert history.stat().st_mode & 0o777 == 0o600
    assert [asked["messages"] for asked in talker.asked] == [[{"role": "user", "content": "are you there?"}]] * 2
    kept = history.with_name("elsewhere")
    kept.touch()
    history.unlink()
    history.symlink_to(kept)
    with Terminal([*COMMAND, "alpha"], env) as terminal:
        terminal.until(">>> ")
        terminal.type("/help\r")
        terminal.until("What you type is not kept.")
        terminal.until(">>> ")
        terminal.type("/bye\r")
        assert terminal.wait() == ExitCode.OK
    assert kept.read_text() == ""


def test_an_interrupt_ends_the_answer_and_not_the_chat(env: dict[str, str], talker: Talker) -> None:
    """The client hangs up at once; what was said counts, and Ctrl-D ends the chat with success."""
    talker.say(words("for ", "ever"), hold=True)
    talker.say(words("then"), end())
    with Terminal([*COMMAND, "alpha"], env) as terminal:
        terminal.until(">>> ")
        terminal.type("a\r")
        terminal.until("for ever")
        terminal.until("stopped", press=INTERRUPT)
        assert talker.left.wait(PATIENCE_S)
        terminal.until(">>> ")
        terminal.until(">>> ", press=INTERRUPT)  # on an empty line: nothing to stop
        terminal.type("b\r")
        terminal.until("then\n")
        terminal.until(">>> ")
        terminal.type(END)
        assert terminal.wait() == ExitCode.OK
    said = [[each["content"] for each in asked["messages"]] for asked in talker.asked]  # type: ignore[attr-defined]
    assert said == [["a"], ["a", "for ever", "b"]]


def test_an_interrupt_ends_a_single_answer_with_130(env: dict[str, str], talker: Talker) -> None:
    """What was said stands on a line of its own."""
    talker.say(words("for ", "ever"), hold=True)
    with Terminal([*COMMAND, "alpha", "hi"], env) as terminal:
        terminal.until("for ever")
        terminal.type(INTERRUPT)
        assert terminal.wait() == ExitCode.INTERRUPTED
        assert talker.left.wait(PATIENCE_S)
    assert terminal.seen.endswith("for ever^C\nllamavisor: interrupted\n")


def test_a_chat_survives_an_answer_that_fails(env: dict[str, str], talker: Talker) -> None:
    """A question that had no answer is as if it had not been asked."""
    talker.refuse(503, "no room")
    talker.say(words("now"), end())
    with Terminal([*COMMAND, "alpha"], env) as terminal:
        terminal.until(">>> ")
        terminal.type("a\r")
        terminal.until("llamavisor: no room\n")
        terminal.until(">>> ")
        terminal.type("b\r")
        terminal.until("now\n")
    assert [len(asked["messages"]) for asked in talker.asked] == [1, 1]  # type: ignore[arg-type]


def test_a_model_that_is_loaded_is_shown_while_it_is(tmp_path: Path, talker: Talker) -> None:
    """The gateway's signs of life move a line on standard error, which has gone when the answer comes."""
    path = tmp_path / "control.sock"
    talker.say([": waiting\n\n"], words("here"), end())
    with ControlStub(path) as stub:
        stub.answer("GET", "/control/v1/status", status(gateway=gateway(urls=[talker.url])))
        loading = model(state="loading", progress=0.5, stage="text_model")
        stub.answer("GET", "/control/v1/models", {"models": [loading]})
        with Terminal([*COMMAND, "alpha", "hi"], {"LLAMAVISOR_SOCKET": str(path)}) as terminal:
            assert terminal.wait() == ExitCode.OK
        talker.say([": waiting\n\n"], words("here"), end())
        assert run({"LLAMAVISOR_SOCKET": str(path)}, "alpha", "hi").stderr == ""
    assert "alpha [############............] 50% loading text_model 0." in terminal.seen
    assert terminal.seen.endswith("\r\x1b[Khere\n")


def test_an_answer_on_the_terminal_goes_to_a_file_without_reasoning(
    env: dict[str, str], talker: Talker, tmp_path: Path
) -> None:
    """`llamavisor run alpha hi > file` types nothing into it but the answer."""
    talker.say(words("hm", reasoning=True), words("yes\x1b"), end())
    with Terminal([*COMMAND, "alpha", "hi"], env, output=tmp_path / "out") as terminal:
        assert terminal.wait() == ExitCode.OK
    assert (tmp_path / "out").read_text() == "yes\x1b\n"
    assert terminal.seen == ""


def test_it_is_quick_to_import(env: dict[str, str], talker: Talker) -> None:
    """Nothing heavy comes with it."""
    talker.say(words("ok"), end())
    code = "import sys; from llamavisord.cli import main; main(); print(*sys.modules, file=sys.stderr)"
    argv = [sys.executable, "-c", code, "run", "alpha", "hi"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True, input="", timeout=PATIENCE_S)
    heavy = {"pydantic", "httpx", "aiohttp", "anyio", "psutil", "asyncio", "tomllib", "difflib", "readline"}
    assert "llamavisord.cli.run" in done.stderr.split()
    assert not heavy & set(done.stderr.split())
