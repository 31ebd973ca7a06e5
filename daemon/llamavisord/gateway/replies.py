"""Answers of our own: what a client is told in the format of the API that it speaks.

What llama-server would say itself is said in its words and its format (ROUTER.md, 1.4), whatever the API. What it never
says, such as that a queue is full, has the format of the API.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus

from llamavisor.demands import Why
from llamavisor.errors import DemandRefusedError, LlamavisorError, ModelNotFoundError, RouterNotReadyError
from llamavisord.gateway.routes import Api

JSON = "application/json; charset=utf-8"
SERVER = "llamavisor"
"""How answers of our own name their server; those of llama-server name it."""
RETRY_S = 5.0
"""When to come again if nobody knows better."""

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "invalid_request_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    417: "invalid_request_error",
    431: "invalid_request_error",
    500: "server_error",
    501: "not_supported_error",
    503: "unavailable_error",
}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer.

    Attributes:
        status: HTTP's.
        body: likewise; empty for none.
        content_type: of the body.
        headers: more of them.
    """

    status: int
    body: bytes = b""
    content_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a client does not get what it asked for.

    Attributes:
        status: HTTP's.
        message: for a person, in one line.
        type: llama-server's word for it.
        retry_after_s: when the same request may succeed; None if nobody knows, or never.
        is_native: whether llama-server would say so itself: then it has its format in every API.
        is_defect: whether it is of no use to come again by itself: official clients would, and keep a person waiting.
        closes: whether the connection cannot be used any more, because the rest of a request is on it.
    """

    status: int
    message: str
    type: str = ""
    retry_after_s: float | None = None
    is_native: bool = False
    is_defect: bool = False
    closes: bool = False

    def reply(self, api: Api) -> Reply:
        """The answer to a request that nothing was answered to yet."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.is_defect:
            headers["x-should-retry"] = "false"
        document = self._own() if self.is_native else self._document(api)
        return Reply(self.status, dump(document), headers=headers)

    def event(self, api: Api) -> bytes:
        """The end of a stream that had begun; clients of the API know it for an error."""
        if api is Api.ANTHROPIC:
            return b"event: error\ndata: " + dump(self._document(api)) + b"\n\n"
        if api is Api.RESPONSES:
            document = {"type": "error", "code": self._type, "message": self.message, "param": None}
            return b"event: error\ndata: " + dump(document) + b"\n\n"
        return b"data: " + dump(self._document(api)) + b"\n\n"

    @property
    def _type(self) -> str:
        return self.type or _TYPES.get(self.status, "server_error")

    def _own(self) -> dict[str, object]:
        return {"error": {"code": self.status, "message": self.message, "type": self._type}}

    def _document(self, api: Api) -> dict[str, object]:
        if api is Api.ANTHROPIC:
            kind = _ANTHROPIC_TYPES.get(self.status, "api_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        return self._own()


class TroubleError(Exception):
    """Raised when a client does not get what it asked for; it is told the trouble."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.message)
        self.trouble = trouble


MISSING = Trouble(400, "model name is missing from the request", is_native=True)
NOT_LOADED = Trouble(400, "model is not loaded", is_native=True)
LOADING = Trouble(503, "Loading model", is_native=True)


GONE = Reply(404, b'{"error":{"message":"File Not Found","type":"not_found_error","code":404}}')
"""What llama-server answers whenever something is not there."""


def not_found(model: str) -> Trouble:
    """There is no model of that name."""
    return Trouble(400, f"model '{model}' not found", is_native=True)


def trouble_of(error: LlamavisorError, model: str, why_missing: Callable[[str], str]) -> Trouble:
    """What a client is told of an error of the library.

    Args:
        error: why there is no lease.
        model: the name that the client gave.
        why_missing: says why nobody serves a model whose files are there; "" if there are none.
    """
    text = f"{error} ({error.hint})" if error.hint else str(error)
    if isinstance(error, ModelNotFoundError):
        why = why_missing(model)
        return replace(not_found(model), message=f"model '{model}' {why}") if why else not_found(model)
    if isinstance(error, DemandRefusedError):
        status = HTTPStatus.SERVICE_UNAVAILABLE if error.retry_after_s is not None else HTTPStatus.INTERNAL_SERVER_ERROR
        is_defect = error.reason == Why.QUARANTINED.value
        return Trouble(status, text, retry_after_s=error.retry_after_s, is_defect=is_defect)
    if isinstance(error, RouterNotReadyError):
        return Trouble(503, text, retry_after_s=RETRY_S)
    return Trouble(503, text, retry_after_s=1.0)


def ok(document: object) -> Reply:
    """What was asked for."""
    return Reply(200, dump(document))


def dump(document: object) -> bytes:
    """JSON as llama-server writes it: no spaces, and text as it is."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
