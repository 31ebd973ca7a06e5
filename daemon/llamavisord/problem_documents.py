"""Errors of the control socket as problem documents (RFC 9457) with a stable `code`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from http import HTTPStatus

from aiohttp import web
from aiohttp.typedefs import Handler

from llamavisor.errors import DemandRefusedError, LlamavisorError
from llamavisor.hub import HubError, Why
from llamavisord.plain import plain
from llamavisord.problems import ConfigError


class HttpCode(StrEnum):
    """The codes of what no error of ours stands for."""

    NOT_FOUND = "not_found"
    """There is nothing at this address."""
    METHOD_NOT_ALLOWED = "method_not_allowed"
    """This address takes another method."""
    BODY_TOO_LARGE = "body_too_large"
    """The request has a larger body than any command takes."""
    FORBIDDEN = "forbidden"
    """This user may not command the daemon."""
    INTERNAL = "internal"
    """There is a bug in llamavisor; its log holds more."""


STATUS: Mapping[str, HTTPStatus] = {
    HttpCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
    HttpCode.METHOD_NOT_ALLOWED: HTTPStatus.METHOD_NOT_ALLOWED,
    HttpCode.BODY_TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HttpCode.FORBIDDEN: HTTPStatus.FORBIDDEN,
    HttpCode.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
    "model_not_found": HTTPStatus.NOT_FOUND,
    "router_not_found": HTTPStatus.NOT_FOUND,
    "bad_request": HTTPStatus.BAD_REQUEST,
    "request_timeout": HTTPStatus.REQUEST_TIMEOUT,
    "wait_timeout": HTTPStatus.GATEWAY_TIMEOUT,
    "router_not_ready": HTTPStatus.SERVICE_UNAVAILABLE,
    "models_max_reached": HTTPStatus.SERVICE_UNAVAILABLE,
    "device_missing": HTTPStatus.SERVICE_UNAVAILABLE,
    "demand_refused": HTTPStatus.CONFLICT,  # 503 if the same demand may succeed later
    "model_in_use": HTTPStatus.CONFLICT,
    "model_ambiguous": HTTPStatus.CONFLICT,
    "files_changed": HTTPStatus.CONFLICT,
    "not_removable": HTTPStatus.CONFLICT,
    "no_gateway": HTTPStatus.CONFLICT,
    "ending": HTTPStatus.CONFLICT,
    "router_api_failed": HTTPStatus.BAD_GATEWAY,
    "hub_failed": HTTPStatus.BAD_GATEWAY,  # or another, by its `why`
    "config_invalid": HTTPStatus.UNPROCESSABLE_ENTITY,
    "model_load_failed": HTTPStatus.INTERNAL_SERVER_ERROR,
}
"""The codes that people may see on the control socket, and the status of HTTP that goes with each."""
HUB_STATUS: Mapping[Why, HTTPStatus] = {
    Why.SPEC: HTTPStatus.BAD_REQUEST,
    Why.NO_REPOSITORY: HTTPStatus.NOT_FOUND,
    Why.NO_REVISION: HTTPStatus.NOT_FOUND,
    Why.NO_FILE: HTTPStatus.NOT_FOUND,
    Why.NO_PULL: HTTPStatus.NOT_FOUND,
    Why.UNAUTHORIZED: HTTPStatus.FORBIDDEN,
    Why.FORBIDDEN: HTTPStatus.FORBIDDEN,
    Why.BUSY: HTTPStatus.TOO_MANY_REQUESTS,
    Why.TOO_MANY: HTTPStatus.TOO_MANY_REQUESTS,
    Why.EXISTS: HTTPStatus.CONFLICT,
    Why.OFFLINE: HTTPStatus.CONFLICT,
    Why.NO_SPACE: HTTPStatus.INSUFFICIENT_STORAGE,
    Why.DISK: HTTPStatus.INSUFFICIENT_STORAGE,
    Why.WRONG_CONTENT: HTTPStatus.BAD_GATEWAY,
    Why.UNREACHABLE: HTTPStatus.BAD_GATEWAY,
    Why.STALLED: HTTPStatus.BAD_GATEWAY,
    Why.SERVER: HTTPStatus.BAD_GATEWAY,
    Why.NOT_NOW: HTTPStatus.SERVICE_UNAVAILABLE,
    Why.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
}
"""The status of `hub_failed`, by the `why` that stands beside it."""
_HTTP_CODES = {STATUS[code]: code for code in HttpCode}

_log = logging.getLogger(__name__)


def problem(
    status: int,
    detail: str,
    code: str,
    hint: str = "",
    *,
    why: str = "",
    log_tail: Sequence[str] = (),
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    """A problem document.

    Args:
        status: of HTTP.
        detail: what failed, on which object, and why.
        code: in one word, for programs.
        hint: what to do next.
        why: what kind of failure it is, of a code that stands for several.
        log_tail: the end of what the process in question had printed.
        headers: of the answer.
    """
    body: dict[str, object] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": int(status),
        "detail": plain(detail),  # one line, whatever the name in it holds
        "code": code,
    }
    if hint:
        body["hint"] = plain(hint)
    if why:
        body["why"] = why
    if log_tail:
        body["log_tail"] = list(map(plain, log_tail))
    return web.json_response(body, status=status, content_type="application/problem+json", headers=headers)


@web.middleware
async def as_problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every error into a problem document; a bug into one line for the caller and a traceback for the log."""
    try:
        return await handler(request)
    except LlamavisorError as error:
        status = STATUS.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR)
        detail = "; ".join(map(str, error.problems)) if isinstance(error, ConfigError) else str(error)
        headers, why = {}, ""
        if isinstance(error, HubError):
            status, why = HUB_STATUS[error.why], error.why.value
        if isinstance(error, DemandRefusedError | HubError) and error.retry_after_s is not None:
            status = HTTPStatus.SERVICE_UNAVAILABLE if isinstance(error, DemandRefusedError) else status
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        return problem(status, detail, error.code, error.hint, why=why, log_tail=error.log_tail, headers=headers)
    except web.HTTPException as error:
        code = _HTTP_CODES.get(HTTPStatus(error.status), "bad_request")
        return problem(error.status, f"{request.method} {request.path}: {error.reason}", code)
    except (ConnectionError, TimeoutError):
        raise
    except Exception:  # noqa: BLE001 (a request's boundary)
        _log.exception("%s %s failed", request.method, request.path)
        return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "a bug in llamavisor; see its log", HttpCode.INTERNAL)
