"""One request as data: what goes over the wire, and what is special about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

JSON = ("Content-Type", "application/json")
HI = [{"role": "user", "content": "hi"}]
WEATHER_FUNCTION = {
    "name": "weather",
    "description": "what it is like outside",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
WEATHER = {"type": "function", "function": WEATHER_FUNCTION}
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ"
    "AAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
HUGE = 4 << 20
"""Bytes of a body that is large and in order."""

COLD = ("cold1", "cold2", "cold3", "cold4", "cold5", "cold6")
"""Models that nobody has asked for before the one request that is about their being loaded, or not."""


@dataclass(frozen=True, slots=True)
class Instead:
    """What the gateway answers where it differs from a router by design.

    Attributes:
        status: of its answer.
        says: what stands in the body.
        why: the reason, for who reads the corpus.
    """

    status: int
    says: str
    why: str


@dataclass(frozen=True, slots=True)
class Case:
    """One request.

    Attributes:
        name: what is special about it.
        method: of the request.
        target: path and query.
        body: the bytes, None for a request without a body.
        headers: more headers.
        raw: the whole request as it goes over the wire, in place of all of that.
        instead: what the gateway answers, where that is not what a router answers.
        loosely: why only the status and the type of the answer are compared, "" to compare all of it.
        late: the body that comes where a process was too slow to tell; who is answered that asks again.
    """

    name: str
    method: str
    target: str
    body: bytes | None = field(default=None, repr=False)
    headers: Sequence[tuple[str, str]] = ()
    raw: bytes | None = field(default=None, repr=False)
    instead: Instead | None = None
    loosely: str = ""
    late: bytes | None = None

    @property
    def wire(self) -> bytes:
        """What is sent."""
        if self.raw is not None:
            return self.raw
        lines = [f"{self.method} {self.target} HTTP/1.1", "Host: localhost", "User-Agent: corpus"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        if self.body is not None and not any(name == "Transfer-Encoding" for name, _ in self.headers):
            lines.append(f"Content-Length: {len(self.body)}")
        return "\r\n".join([*lines, "", ""]).encode("utf-8") + (self.body or b"")


def post(name: str, target: str, body: object, *headers: tuple[str, str], **more: object) -> Case:
    """A POST of a JSON document, or of bytes as they are."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8")
    return Case(name, "POST", target, raw, headers or (JSON,), **more)  # type: ignore[arg-type]


def chat(name: str, **fields: object) -> Case:
    """A chat with the model that says its name."""
    return post(name, "/v1/chat/completions", {"model": "alpha", "messages": HI, **fields})


def complete(name: str, **fields: object) -> Case:
    """A completion by llama.cpp's own API."""
    return post(name, "/completion", {"model": "alpha", "prompt": "hi", **fields})


def get(target: str, *headers: tuple[str, str], name: str = "", **more: object) -> Case:
    """A GET."""
    return Case(name or f"GET {target}", "GET", target, None, headers, **more)  # type: ignore[arg-type]


def form(*parts: tuple[str, str | None, bytes]) -> bytes:
    """A multipart body with the boundary `BOUNDARY`: of each part its name, its file's name, and its content."""
    pieces = []
    for name, filename, content in parts:
        file = "" if filename is None else f'; filename="{filename}"\r\nContent-Type: application/octet-stream'
        head = f'--BOUNDARY\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        pieces.append(head.encode() + content + b"\r\n")
    return b"".join(pieces) + b"--BOUNDARY--\r\n"


FORM = ("Content-Type", "multipart/form-data; boundary=BOUNDARY")
