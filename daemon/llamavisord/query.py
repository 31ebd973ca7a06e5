"""The arguments of a request to the control socket: what stands behind the `?` of its address."""

from __future__ import annotations

from aiohttp import web

from llamavisor.errors import LlamavisorError

WAIT_MAX_S = 3600.0


class BadRequestError(LlamavisorError):
    """Raised when a request to the control API cannot be understood."""

    code = "bad_request"


class WaitTimeoutError(LlamavisorError):
    """Raised when a command was not done within the time that its caller was ready to wait; it goes on."""

    code = "wait_timeout"


def number(name: str, text: str, most: int) -> int:
    """An argument that is a whole number from 0 up."""
    # "²".isdigit() is true, and int() fails on it.
    if not (text.isascii() and text.isdecimal()) or len(text) > len(str(most)) or int(text) > most:
        raise BadRequestError(f"{name}: not a number from 0 to {most}: {text[:40]!r}")
    return int(text)


def flag(request: web.Request, name: str, *, default: bool = False) -> bool:
    """An argument that is `true` or `false`, or not there."""
    text = request.query.get(name, str(default).lower())
    if text not in {"true", "", "false"}:
        raise BadRequestError(f"{name}: neither true nor false: {text[:40]!r}")
    return text != "false"


def wait_s(request: web.Request) -> float:
    """Seconds that the caller is ready to wait: `wait=true` (as long as it takes), a number, or nothing."""
    text = request.query.get("wait", "false")
    if text in {"true", ""}:
        return WAIT_MAX_S
    if text == "false":
        return 0.0
    try:
        seconds = float(text)
    except ValueError:
        raise BadRequestError(f"wait: neither true, false nor a number of seconds: {text[:40]!r}") from None
    if not 0 <= seconds <= WAIT_MAX_S:  # also refuses nan
        raise BadRequestError(f"wait: not between 0 and {WAIT_MAX_S:g} seconds: {text[:40]!r}")
    return seconds
