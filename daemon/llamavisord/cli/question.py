"""What a model is asked: a prompt with what is piped in and with images, what was said before, and how to sample."""

from __future__ import annotations

import base64
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from llamavisord.cli.errors import CommandError
from llamavisord.exit_codes import ExitCode

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "max_tokens", "seed")
"""The sampling options, called alike on the command line and in a request."""
_IMAGES = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
)
_Message = dict[str, object]


class Question:
    """What is asked next, and all that was said before. One answer is waited for at a time.

    Args:
        arguments: those of `run`.

    Attributes:
        max_tokens: how long the answer may be, None if nothing is said.
        form: what says the form of the answer, as on the command line; empty if nothing does.

    Raises:
        CommandError: a file that they name holds something else than it should.
        OSError: it cannot be read.
    """

    def __init__(self, arguments: Namespace) -> None:
        self.max_tokens: int | None = arguments.max_tokens
        self.form = ""
        self._options: dict[str, object] = {
            key: value for key in SAMPLING if (value := getattr(arguments, key)) is not None
        }
        if arguments.json_schema is not None:
            schema = {"name": "answer", "schema": _schema(arguments.json_schema)}
            self.form = f"--json-schema {arguments.json_schema}"
            self._options["response_format"] = {"type": "json_schema", "json_schema": schema}
        if arguments.grammar is not None:
            self.form = f"--grammar {arguments.grammar}"
            self._options["grammar"] = _text(arguments.grammar)
        self._model: str = arguments.model
        self._first: list[_Message] = []
        if arguments.system is not None:
            self._first.append({"role": "system", "content": arguments.system})
        self._images = [_data_url(path) for path in arguments.image]
        self._said: list[_Message] = []

    def __repr__(self) -> str:
        return f"<Question to {self._model} after {len(self._said)} messages>"

    def ask(self, text: str) -> dict[str, object]:
        """The body of a request that asks `text`. Images go with the first question."""
        content: object = text
        if self._images and not self._said:
            images = [{"type": "image_url", "image_url": {"url": url}} for url in self._images]
            content = [*([{"type": "text", "text": text}] if text else []), *images]
        self._said.append({"role": "user", "content": content})
        return {"model": self._model, "messages": [*self._first, *self._said], **self._options}

    def answered(self, text: str) -> None:
        """The last question has this answer, whole or as far as it came; with none at all it was not asked."""
        if text:
            self._said.append({"role": "assistant", "content": text})
        else:
            self._said.pop()

    def clear(self) -> None:
        """Forget what was said."""
        self._said.clear()


def prompt_of(words: Sequence[str]) -> str:
    """The words of the command line, and after them what is piped in.

    Raises:
        CommandError: what is piped in is not text.
    """
    prompt = " ".join(words)
    if sys.stdin is None or sys.stdin.isatty():
        return prompt
    try:
        piped = sys.stdin.buffer.read().decode("utf-8").strip()
    except UnicodeDecodeError as exc:
        hint = "an image is given with --image"
        raise CommandError(f"standard input is not UTF-8 text: {exc.reason}", hint=hint) from exc
    return "\n\n".join(filter(None, (prompt, piped)))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise CommandError(f"{path} is not UTF-8 text", exit_code=ExitCode.USAGE) from exc


def _schema(path: Path) -> object:
    try:
        schema: object = json.loads(_text(path))
    except (ValueError, RecursionError) as exc:
        raise CommandError(f"{path} is not JSON: {exc}", exit_code=ExitCode.USAGE) from exc
    if not isinstance(schema, dict):
        raise CommandError(f"{path} is not a JSON schema: it holds no object", exit_code=ExitCode.USAGE)
    return schema


def _data_url(path: Path) -> str:
    """An image as an address that holds all of it; its type is told by its first bytes, whatever it is called."""
    raw = path.read_bytes()
    kind = next((kind for magic, kind in _IMAGES if raw.startswith(magic)), None)
    if kind is None and raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
        kind = "image/webp"
    if kind is None:
        raise CommandError(
            f"{path} is not an image of a kind that is known",
            hint="it must be PNG, JPEG, GIF, BMP or WebP",
            exit_code=ExitCode.USAGE,
        )
    return f"data:{kind};base64,{base64.b64encode(raw).decode('ascii')}"
