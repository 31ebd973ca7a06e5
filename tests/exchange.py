"""One HTTP request as bytes over a plain socket, its answer, and where two answers differ that should be the same."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse, IncompleteRead

from fakes.waiting import PATIENCE_S

HEADERS = (
    "content-type",
    "content-encoding",
    "cache-control",
    "etag",
    "location",
    "retry-after",
    "www-authenticate",
    "cross-origin-embedder-policy",
    "cross-origin-opener-policy",
)
"""Headers that mean something to a client, whoever sends them."""
_CORS = "access-control-"
_OF_THE_MOMENT = frozenset(
    (
        *("id", "item_id", "response_id", "call_id", "id_task", "id_slot"),
        *("created", "created_at", "completed_at", "started_at", "timings", "time_ms", "t_last"),
        *("media_marker", "total_bytes"),
        *("prompt_ms", "predicted_ms", "cache", "cache_n", "cached_tokens", "tokens_cached", "cache_read_input_tokens"),
        *("tokens_evaluated", "processed", "port", "signature", "input_tokens_details", "model_path"),
    )
)
"""Keys whose values are different every time, or depend on what the slot has answered before: only that they are there
is compared. The counts of prompt tokens stand beside them and are compared."""
_ID = re.compile(r"(chatcmpl|cmpl|msg|resp|rs|fc|call|toolu)[-_][A-Za-z0-9]{8,}")


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back.

    Attributes:
        status: of the answer.
        headers: by their names in small letters.
        body: all of it.
        fault: what is wrong with its form, "" for nothing.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    fault: str = ""

    @property
    def is_stream(self) -> bool:
        """Whether it is a stream of events."""
        return self.headers.get("content-type", "").startswith("text/event-stream")


def exchange(port: int, wire: bytes, method: str, *, timeout_s: float = PATIENCE_S) -> Reply:
    """Send a request, and read its answer to the end that its own framing gives it.

    Raises:
        OSError: nobody listens, or the connection broke before a whole head has come.
        http.client.HTTPException: what came is no head.
    """
    with closing(socket.create_connection(("127.0.0.1", port), timeout_s)) as line:
        with suppress(BrokenPipeError, ConnectionResetError):  # a server may answer before it has read all, and close
            line.sendall(wire)
        with closing(HTTPResponse(line, method=method)) as response:
            response.begin()
            fault, body = "", b""
            try:
                body = response.read()
            except IncompleteRead as cut:
                body, fault = cut.partial, "cut off"
            except (OSError, HTTPException) as error:
                fault = repr(error)
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, headers, body, fault)


def differences(one: Reply, other: Reply, *, loosely: bool = False) -> Iterator[str]:
    """Where two answers to the same request differ in what a client could notice, one line for each place.

    Args:
        one: an answer.
        other: the other one.
        loosely: compare only the status, the headers, and of JSON the top of its form.
    """
    if (one.status, one.fault) != (other.status, other.fault):
        told = (f"{reply.status} {reply.fault}{reply.body[:300]!r}" for reply in (one, other))
        yield f"status: {' | '.join(told)}"
        return
    for name in HEADERS if one.status != 204 else ():  # they would speak of a body that there is not
        yield from _unlike(name, one.headers.get(name), other.headers.get(name))
    if one.is_stream:
        name = "x-accel-buffering"
        yield from _unlike(name, one.headers.get(name), other.headers.get(name))
    if one.status != 204 and not one.is_stream:
        one_form, other_form = _document(one), _document(other)
        if loosely:
            one_form, other_form = _form(one_form), _form(other_form)
        yield from _places("body", one_form, other_form)
    elif not loosely:
        yield from _places("stream", _events(one.body), _events(other.body))


def cors_differences(one: Reply, other: Reply) -> Iterator[str]:
    """Where two answers tell a browser different things.

    A header without a value tells it nothing. Which headers a page may send is left out: a router says all of them,
    which a browser does not believe where credentials are allowed too.
    """
    names = {name for reply in (one, other) for name in reply.headers if name.startswith(_CORS)}
    for name in sorted(names - {"access-control-allow-headers"}):
        yield from _unlike(name, one.headers.get(name) or None, other.headers.get(name) or None)


def _unlike(what: str, one: object, other: object) -> Iterator[str]:
    if one != other:
        yield f"{what}: {_short(one)} | {_short(other)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}…"


def _places(where: str, one: object, other: object) -> Iterator[str]:
    """The innermost places where two documents differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            yield from _places(f"{where}.{key}", one.get(key, "(not there)"), other.get(key, "(not there)"))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for at, (mine, yours) in enumerate(zip(one, other, strict=True)):
            yield from _places(f"{where}[{at}]", mine, yours)
    else:
        yield from _unlike(where, one, other)


def _document(reply: Reply) -> object:
    """The body without what is of the moment: JSON as a document, anything else as it is."""
    if "json" not in reply.headers.get("content-type", "") or not reply.body:
        return reply.body
    try:
        return _lasting(json.loads(reply.body))
    except ValueError:
        return reply.body


def _lasting(value: object) -> object:
    """A document with every value of the moment replaced by the name of its type."""
    if isinstance(value, dict):
        return {key: type(inner).__name__ if key in _OF_THE_MOMENT else _lasting(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_lasting(inner) for inner in value]
    if isinstance(value, str):
        return _ID.sub(r"\1-…", value)
    return value


def _form(value: object) -> object:
    """The keys of a document, or the first of a list of documents; of other things only that there are some."""
    if isinstance(value, list) and value:
        return [_form(value[0])]
    if isinstance(value, dict):
        return dict.fromkeys(value, "…")
    return bool(value)


def _events(body: bytes) -> list[object]:
    """The events of a stream, each as its lines; comments carry nothing and are left out."""
    events: list[object] = []
    for event in body.decode("utf-8", "surrogateescape").split("\n\n"):
        lines = [line for line in event.split("\n") if line and not line.startswith(":")]
        if lines:
            events.append([_line(line) for line in lines])
    return events


def _line(line: str) -> object:
    name, _, value = line.partition(":")
    try:
        return {name: _lasting(json.loads(value))}
    except ValueError:
        return line
