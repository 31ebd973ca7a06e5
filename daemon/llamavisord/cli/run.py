"""`llamavisor run`: asks a model one thing, or talks with it line by line."""

from __future__ import annotations

import os
import re
import sys
from argparse import Namespace
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from llamavisor.units import format_duration
from llamavisord.api_key import read_api_key
from llamavisord.cli.answer import Answer, Door
from llamavisord.cli.chat import chat
from llamavisord.cli.client import Client, model_path
from llamavisord.cli.errors import CommandError, UnreachableError, with_hint
from llamavisord.cli.look import client_of
from llamavisord.cli.pull import PULLS, UNDER_WAY
from llamavisord.cli.question import Question, prompt_of
from llamavisord.cli.render import NAME_WIDTH, Progress, Screen, shortened
from llamavisord.exit_codes import ExitCode
from llamavisord.plain import plain
from llamavisord.variables import Variable

_FORM_TROUBLE = re.compile(r"sampler|grammar|schema", re.IGNORECASE)
"""What llama-server says of a form of the answer that it cannot keep to."""
_CONTEXT_TROUBLE = re.compile(r"context (?:size|length)", re.IGNORECASE)
"""What it says of a request that is longer than the model's context."""
_CONTEXT_SLACK = 1
"""llama-server may stop when one more token would fit."""
_LIMITS = "it has reached a limit of tokens: --max-tokens, max_tokens in the configuration, or the context"
_STAGES = {
    "loaded": "reading",
    "sleeping": "waking",
    "settling": "waiting for its file",
    "unloaded": "waiting for room",
}
"""What a model is waited for that is not loading."""


def run(arguments: Namespace) -> int:
    """Answer a prompt on standard output, or chat on the terminal if there is none."""
    question = Question(arguments)
    prompt = prompt_of(arguments.prompt)
    is_chat = not prompt and sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if not prompt and not is_chat and not arguments.image:
        raise CommandError("nothing to ask: there is no prompt, and nothing is piped in", exit_code=ExitCode.USAGE)
    client = client_of(arguments)
    session = _Session(client, _find_door(client, arguments), question, arguments)
    if is_chat:
        chat(session)
    else:
        session.answer(prompt)
    return ExitCode.OK


class _Session:
    """One model, on standard output; standard error has progress, notes and numbers."""

    def __init__(self, client: Client, door: Door, question: Question, arguments: Namespace) -> None:
        self.question = question
        self.model: str = arguments.model
        self.notes = Screen(sys.stderr)
        self._client = client
        self._door = door
        self._shows_stats: bool = arguments.stats
        self._screen = Screen()

    def answer(self, text: str) -> None:
        """Ask, and say the answer as it comes. Interrupted, the generation ends, and what was said counts.

        Raises:
            CommandError: it was refused, or broke off.
            KeyboardInterrupt: somebody has heard enough.
        """
        progress = _Waiting(self._client, self.model, self.notes)
        answer = Answer(self._door, self.question.ask(text), progress.tick)
        voice = _Voice(self._screen)
        try:
            with closing(answer.pieces()) as pieces:
                for piece in pieces:
                    progress.close()
                    voice.say(piece.text, is_reasoning=piece.is_reasoning)
        except CommandError as error:
            raise self._explained(error) from error
        except KeyboardInterrupt:
            voice.is_cut = self.notes.is_terminal
            raise
        finally:
            progress.close()
            voice.end()
            self.question.answered(answer.text)
        if answer.finish_reason == "length":
            self.note(f"the answer was cut off: {self._limit(answer)}")
        if self._shows_stats:
            for line in _stats(answer):
                self.note(line)

    def forget(self) -> None:
        """What was said is not known any more."""
        self.question.clear()

    def note(self, text: str) -> None:
        """Tell something that is no answer."""
        self.notes.line(self.notes.paint(plain(text), "dim"))

    def complain(self, error: CommandError) -> None:
        """Tell of an error that ends an answer and not the chat."""
        self.notes.line(f"llamavisor: {plain(with_hint(str(error), error.hint))}")

    def _limit(self, answer: Answer) -> str:
        """Whose limit has cut an answer off.

        1. That of the command.
        2. The context, which the prompt and the answer have filled.
        3. Who knows.
        """
        most = self.question.max_tokens
        if most is not None and _tokens(answer, "predicted_n", most) >= most:
            return f"--max-tokens gives it {most}"
        used = sum(_tokens(answer, key) for key in ("cache_n", "prompt_n", "predicted_n"))
        try:
            n_ctx = _nearest(self._client.get("/control/v1/models", name=self.model)["models"]).get("n_ctx")
        except CommandError:
            n_ctx = None
        if n_ctx and used >= n_ctx - _CONTEXT_SLACK:
            return f"the context of {n_ctx} tokens is full; ctx_size of the model says how long it is"
        return _LIMITS

    def _explained(self, error: CommandError) -> CommandError:
        """An error with the model and the file in it, where llama-server does not say what it could not do.

        1. It could not read all of the request, nor of the chat so far.
        2. It could not keep to the form of the answer.
        """
        if not error.hint and _CONTEXT_TROUBLE.search(str(error)):
            hint = "ask with less text (in a chat, /clear forgets what was said), or give it a larger ctx_size"
            return CommandError(f"model {self.model}: {error}", hint=hint, exit_code=error.exit_code)
        form = self.question.form
        if error.hint or not form or not _FORM_TROUBLE.search(str(error)):
            return error
        message = f"model {self.model} cannot answer by {form}: {error}"
        return CommandError(message, hint="`llamavisor logs` has the reason", exit_code=error.exit_code)


def _tokens(answer: Answer, key: str, otherwise: int = 0) -> int:
    count = answer.timings.get(key)
    return count if isinstance(count, int) else otherwise


class _Voice:
    """Says what a model says: reasoning dimmed on a terminal, and left out elsewhere.

    Attributes:
        is_cut: whether a ^C stands behind what was said, and who tells of it begins a new line.
    """

    def __init__(self, screen: Screen) -> None:
        self.is_cut = False
        self._screen = screen
        self._was_reasoning = False
        self._last = "\n"

    def say(self, text: str, *, is_reasoning: bool) -> None:
        if is_reasoning and not self._screen.is_terminal:
            return
        if self._was_reasoning and not is_reasoning:
            self._write("\n" if self._last == "\n" else "\n\n")
        self._was_reasoning = is_reasoning
        self._write(text, "dim" if is_reasoning else "")

    def end(self) -> None:
        """Have what comes next begin on a line of its own."""
        if self._last != "\n" and not (self.is_cut and self._screen.is_terminal):
            self._write("\n")

    def _write(self, text: str, colour: str = "") -> None:
        self._screen.prose(text, colour)
        self._last = text[-1]


class _Waiting:
    """Shows on a terminal what keeps a model from answering."""

    def __init__(self, client: Client, model: str, screen: Screen) -> None:
        self._client = client
        self._model = model
        self._progress = Progress(shortened(model, NAME_WIDTH), screen)
        self._is_wanted = screen.is_terminal
        self._is_shown = False

    def tick(self) -> None:
        if not self._is_wanted:
            return
        try:
            found = self._client.get("/control/v1/models", name=self._model)["models"]
        except CommandError:  # the answer itself will say what is wrong
            return
        model = _nearest(found)
        stage = _STAGES.get(model.get("state", ""), "")
        self._is_shown = True
        self._progress.show(model.get("progress"), stage or f"loading {model.get('stage') or ''}".rstrip())

    def close(self) -> None:
        if self._is_shown:
            self._is_shown = False
            self._progress.close()


def _find_door(client: Client, arguments: Namespace) -> Door:
    """The address that serves the model, with the key for it.

    1. There is a gateway: it serves all models.
    2. Each router serves its own: the one that has the model in memory, else the first that knows it.

    Raises:
        CommandError: there is no such model, or nothing serves it now.
    """
    key = _key(arguments.api_key_file)
    found = client.get("/control/v1/models", name=arguments.model)["models"]
    if not found:
        _refuse(client, arguments.model)
    status = client.get("/control/v1/status")
    if gateway := status.get("gateway"):
        if not gateway["urls"]:
            raise UnreachableError("the gateway does not listen yet", hint="see `llamavisor status`")
        return Door(gateway["urls"][0], key)
    name = _nearest(found).get("router")
    url = next((router["url"] for router in status["routers"] if router["name"] == name), None)
    if url is None:
        problem = _nearest(found).get("problem") or "no router serves it"
        raise CommandError(f"model {arguments.model}: {problem}", hint="see `llamavisor models`")
    return Door(url, key)


def _refuse(client: Client, model: str) -> None:
    """Says that there is no such model, and what would help."""
    try:
        client.get(model_path(model))
    except CommandError as error:
        if "/" in model:
            error.hint = f"`llamavisor pull {model}` brings it, if the Hub has it"
        with suppress(CommandError):
            if any(pull["model"] == model and pull["state"] == UNDER_WAY for pull in client.get(PULLS)["pulls"]):
                error.hint = "it is on its way: `llamavisor pulls` shows how far it is"
        raise error from None


def _nearest(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one model on several routers, the one that will answer first."""
    order = ("loaded", "sleeping", "loading")
    ranked = sorted(found, key=lambda model: order.index(model["state"]) if model["state"] in order else len(order))
    return ranked[0] if ranked else {}


def _key(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(Variable.LLAMAVISOR_API_KEY) or None
    try:
        return read_api_key(file)[0]
    except ValueError as exc:
        raise CommandError(str(exc), exit_code=ExitCode.USAGE) from exc


def _stats(answer: Answer) -> list[str]:
    """How fast it was, as llama.cpp has measured it, and how long the first word took as we have."""
    told = []
    for what, key in (("prompt", "prompt"), ("answer", "predicted")):
        count, took_ms, rate = (answer.timings.get(f"{key}_{unit}") for unit in ("n", "ms", "per_second"))
        if isinstance(count, int) and isinstance(took_ms, int | float) and isinstance(rate, int | float):
            cached = answer.timings.get("cache_n") if what == "prompt" else None
            more = f" and {cached} from the cache" if cached else ""
            told.append(f"{what}: {count} tokens{more} in {format_duration(took_ms / 1000)}, {rate:.1f} tokens/s")
    if answer.first_piece_s is not None:
        told.append(f"first word after {format_duration(answer.first_piece_s)}")
    return told
