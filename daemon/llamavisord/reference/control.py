"""The addresses of the control socket and of the metrics port, and the codes of what goes wrong there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import anyio

from llamavisor.errors import LlamavisorError
from llamavisor.hub import Why
from llamavisord.cli.client import EXIT_CODES, hub_exit_code
from llamavisord.control import control_routes
from llamavisord.exit_codes import ExitCode
from llamavisord.problem_documents import HUB_STATUS, STATUS, HttpCode
from llamavisord.reference.docstrings import members, told
from llamavisord.reference.markdown import code, prose, table
from llamavisord.reference.specimen import exposition

_ADDRESSES = "HTTP and JSON over the control socket. In the address of a model its name is escaped as URLs are."
_PROBLEMS = """\
An error on the control socket is a problem document (RFC 9457): `type`, `title`, `status`, `detail`, `code`, and with
some `hint` and `log_tail`. The `code` is stable. A command that meets it ends with the exit code beside it."""
_PARAMETER = re.compile(r"\{(\w+)(?::[^{}]*)?\}")


def addresses() -> Iterator[str]:
    """What can be asked for."""
    control, metrics = anyio.run(_routes)
    yield _ADDRESSES
    yield ""
    yield from _table(control)
    yield "The metrics port has these:"
    yield ""
    yield from _table(metrics)


def problems() -> Iterator[str]:
    """The codes of problem documents."""
    yield _PROBLEMS
    yield ""
    meanings = {error.code: told(error) for error in _errors(LlamavisorError) if "code" in vars(error)}
    meanings |= members(HttpCode)
    rows = []
    for name, status in sorted(STATUS.items()):
        exit_code = EXIT_CODES.get(name, ExitCode.FAILED)
        meaning = meanings[name].partition("\n\n")[0].removeprefix("Raised when ")
        rows.append((code(str(name)), str(int(status)), str(int(exit_code)), prose(meaning[0].upper() + meaning[1:])))
    yield from table(("code", "status", "exit code", "when"), rows)
    yield "The status of `hub_failed`, and its exit code, go by its `why`:"
    yield ""
    kinds = members(Why)
    hub = [
        (code(why.value), str(int(status)), str(int(hub_exit_code(why))), prose(kinds[why.value]))
        for why, status in HUB_STATUS.items()
    ]
    yield from table(("why", "status", "exit code", "when"), hub)


async def _routes() -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """Method, path and meaning of what the control socket and the metrics port take."""
    shown, daemon = exposition()
    control = [(route.method, route.path, told(route.handler)) for route in control_routes(daemon)]
    resources = [(route, route.resource) for route in shown.app().router.routes() if route.method != "HEAD"]
    metrics = [
        (route.method, resource.canonical, told(route.handler)) for route, resource in resources if resource is not None
    ]
    return control, metrics


def _table(routes: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    rows = [(code(f"{method} {_shown(path)}"), prose(meaning)) for method, path, meaning in routes]
    yield from table(("request", "what it does"), rows)


def _shown(path: str) -> str:
    """A path with its parameters as people read them: `{name:[^/]+}` is NAME."""
    return _PARAMETER.sub(lambda found: found[1].upper(), path)


def _errors(base: type[LlamavisorError]) -> Iterator[type[LlamavisorError]]:
    """An error and all that are more special."""
    yield base
    for each in base.__subclasses__():
        yield from _errors(each)
