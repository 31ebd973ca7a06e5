"""Finds out what model a request is for: in its body as it arrives, or in its query.

Bodies are JSON, whatever their Content-Type says, or multipart forms: as llama-server takes them.
"""

from __future__ import annotations

from typing import Protocol
from urllib.parse import unquote_to_bytes

from llamavisord.gateway.form_peek import FormPeek, parameters_of
from llamavisord.gateway.json_peek import JsonPeek
from llamavisord.gateway.peeked import NAME_BYTES_MAX, NOT_AN_OBJECT, Peeked

__all__ = ["NAME_BYTES_MAX", "NOT_AN_OBJECT", "FormPeek", "JsonPeek", "Peek", "Peeked", "peek_for", "query_model"]


class Peek(Protocol):
    """Reads a body as it arrives."""

    def feed(self, data: bytes) -> None:
        """Take the next piece of the body."""

    def finish(self) -> Peeked:
        """What the body says, which is whole now."""


def peek_for(content_type: str | None) -> JsonPeek | FormPeek:
    """The reader of a body with this Content-Type, None = it has none.

    llama-server takes for a form what says so in exactly these letters, and for JSON all the rest.
    """
    kind, _, rest = (content_type or "").partition(";")
    if kind.strip(" \t") != "multipart/form-data":
        return JsonPeek()
    return FormPeek(parameters_of(rest.encode("utf-8", "surrogateescape")).get(b"boundary", b""))


def query_model(query_string: str) -> tuple[str | None, bool | None, str]:
    """What a query says of the model, as llama-server reads it.

    Of several values of one name the last counts, where a pair that is repeated as it is stands in its first place.

    Args:
        query_string: as it was sent, with its percent signs.

    Returns:
        The value of `model`; the value of `autoload`, None = not said; the query without `autoload`.
    """
    query_string = query_string.partition("#")[0]
    if not query_string:
        return None, None, ""
    model = autoload = None
    rest = []
    pairs = [(pair, *_query_pair(pair)) for pair in query_string.split("&")]
    for _, key, value in dict.fromkeys(pairs):
        if key == "model":
            model = value
        elif key == "autoload":
            autoload = value
    rest = [pair for pair, key, _ in pairs if key != "autoload"]
    return model, (autoload in {"true", "1"}) if autoload else None, "&".join(rest)


def _query_pair(pair: str) -> tuple[str, str]:
    key, _, value = pair.partition("=")
    return _query_text(key), _query_text(value)


def _query_text(text: str) -> str:
    raw = text.replace("+", " ").encode("utf-8", "surrogateescape")
    return unquote_to_bytes(raw).decode("utf-8", "replace")
