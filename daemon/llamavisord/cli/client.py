"""The control API as a client sees it: HTTP over a Unix socket, with nothing but the standard library."""

from __future__ import annotations

import errno
import grp
import json
import os
import select
import socket
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from llamavisord.cli.errors import CommandError, SilentError, UnreachableError
from llamavisord.exit_codes import ExitCode
from llamavisord.places import SOCKET_BYTES_MAX, Places, has_systemd

ANSWER_TIMEOUT_S = 15.0
"""A daemon that has just begun takes up to 10 s to look at its folders before it says what models there are."""
EVENT_TIMEOUT_S = 60.0
"""The daemon says every 15 s that an event stream is still alive."""
_GRACE_S = 10.0
"""How much longer than it was asked to wait the daemon may take to say that it did."""

EXIT_CODES: Mapping[str, ExitCode] = {
    "model_not_found": ExitCode.NOT_FOUND,
    "router_not_found": ExitCode.NOT_FOUND,
    "not_found": ExitCode.NOT_FOUND,
    "wait_timeout": ExitCode.TIMEOUT,
    "forbidden": ExitCode.NOT_PERMITTED,
    "config_invalid": ExitCode.BAD_CONFIG,
}
"""What a problem document's `code` means to the caller of a command; every other code is FAILED."""
_HUB_EXIT_CODES: Mapping[str, ExitCode] = {
    "spec": ExitCode.USAGE,
    "no_repository": ExitCode.NOT_FOUND,
    "no_revision": ExitCode.NOT_FOUND,
    "no_file": ExitCode.NOT_FOUND,
    "no_pull": ExitCode.NOT_FOUND,
}
"""Likewise the `why` of what has to do with the Hub."""


def find_socket(flag: str | None, environ: Mapping[str, str]) -> Path:
    """The daemon's socket: `--socket`, else LLAMAVISOR_SOCKET, else what the configuration says, else a default.

    Of the default places the first one counts that has a socket: the user's own, then the system's.
    """
    if given := flag or environ.get("LLAMAVISOR_SOCKET"):
        return Path(given)
    places = Places(environ)
    if configured := _configured_socket(places.config_file):
        return configured
    return next((path for path in places.sockets if _may_exist(path)), places.socket)


class Client:
    """A client of one daemon. Every call is one connection.

    Args:
        path: the daemon's control socket.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"<Client {self.path}>"

    def get(self, path: str, **query: object) -> dict[str, Any]:
        """Ask. A query argument that is None is left out.

        Raises:
            UnreachableError: no daemon answers.
            CommandError: it answers with a problem.
        """
        return self.call("GET", path, query)

    def post(self, path: str, **query: object) -> dict[str, Any]:
        """Command; with `wait`, a number of seconds, the answer comes when it is done.

        Raises:
            UnreachableError: no daemon answers.
            CommandError: it answers with a problem.
        """
        return self.call("POST", path, query)

    def call(
        self,
        method: str,
        path: str,
        query: Mapping[str, object],
        *,
        body: Mapping[str, object] | None = None,
        timeout_s: float = ANSWER_TIMEOUT_S,
        tick: Callable[[], None] | None = None,
        tick_s: float = 0.25,
    ) -> dict[str, Any]:
        """The answer to one request, as JSON.

        Args:
            method: "GET", "POST" or "DELETE".
            path: percent-encoded where it must be.
            query: arguments; one that is None is left out. `wait`, in seconds, adds to the time for the answer.
            body: what is sent as JSON; None for nothing, as nearly all commands have it.
            timeout_s: how long the answer may take.
            tick: called every `tick_s` seconds until the answer comes.
            tick_s: seconds between two calls of `tick`.

        Raises:
            UnreachableError: no daemon answers.
            CommandError: it answers with a problem.
        """
        wait = query.get("wait")
        if isinstance(wait, float | int):
            timeout_s = wait + _GRACE_S
        with closing(_UnixConnection(self.path, timeout_s)) as connection:
            self._send(connection, method, path, query, body)
            if tick is not None:
                connection.wait_readable(time.monotonic() + timeout_s, tick, tick_s)
            with connection.translating():
                response = connection.getresponse()
                answer = response.read()
            return _json(response.status, answer, self.path)

    def lines(self, path: str, *, timeout_s: float | None = ANSWER_TIMEOUT_S, **query: object) -> Generator[str]:
        """The lines of a text as they come, without their ends. Close it to hang up.

        Args:
            path: percent-encoded where it must be.
            timeout_s: how long the stream may be silent, None for any time.
            query: arguments; one that is None is left out.

        Raises:
            UnreachableError: no daemon answers, or it left amid the text.
            CommandError: it answers with a problem.
        """
        with closing(_UnixConnection(self.path, ANSWER_TIMEOUT_S)) as connection:
            self._send(connection, "GET", path, query)
            with connection.translating():
                response = connection.getresponse()
                if response.status != 200:
                    _json(response.status, response.read(), self.path)
            connection.channel.settimeout(timeout_s)
            while True:
                with connection.translating():
                    line = response.readline()
                if not line:
                    return
                yield line.decode("utf-8", "replace").rstrip("\r\n")

    def events(self, *, since: int, follow: bool, everything: bool = False) -> Generator[dict[str, Any]]:
        """The events after number `since`: those that happened, and with `follow` those that happen.

        Args:
            since: number of the last event that is known.
            follow: whether to go on for as long as the daemon lives.
            everything: whether those are told, too, that are not kept: probes, and the progress of loads.

        Raises:
            UnreachableError: no daemon answers, or it fell silent.
            CommandError: it answers with a problem.
        """
        arguments = {"since": since, "follow": str(follow).lower(), "all": "true" if everything else None}
        with closing(self.lines("/control/v1/events", timeout_s=EVENT_TIMEOUT_S, **arguments)) as lines:
            # Each event is JSON on one `data:` line; `id:` and `event:` repeat what stands in it.
            for line in lines:
                if line.startswith("data:"):
                    yield json.loads(line[5:])

    @staticmethod
    def _send(
        connection: _UnixConnection,
        method: str,
        path: str,
        query: Mapping[str, object],
        body: Mapping[str, object] | None = None,
    ) -> None:
        arguments = urlencode({key: value for key, value in query.items() if value is not None})
        content = None if body is None else json.dumps(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        with connection.translating():
            connection.request(method, f"{path}?{arguments}" if arguments else path, content, headers)


class _UnixConnection(HTTPConnection):
    """http.client over AF_UNIX; it must be closed."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path
        self._is_connected = False
        # http.client lets go of its `sock` when the answer is the last one on it.
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def connect(self) -> None:
        """Connect to the socket's path instead of a host."""
        self.channel.settimeout(self.timeout)
        self.channel.connect(str(self._path))
        self.sock = self.channel
        self._is_connected = True

    def close(self) -> None:
        """Hang up."""
        super().close()
        self.channel.close()

    def wait_readable(self, deadline: float, tick: Callable[[], None], tick_s: float) -> None:
        """Wait for an answer to begin, calling `tick` meanwhile."""
        while not select.select([self.channel], [], [], tick_s)[0]:
            if time.monotonic() > deadline:
                raise self._silent()
            tick()

    @contextmanager
    def translating(self) -> Iterator[None]:
        """Tell in one line what breaks on the connection. Only calls that touch it belong inside."""
        try:
            yield
        except TimeoutError as exc:
            raise self._silent() from exc
        except (OSError, HTTPException) as exc:
            if isinstance(exc, CommandError):
                raise
            if self._is_connected:
                hint = f"see {_account()}, and `llamavisor config check`"
                raise UnreachableError(f"the daemon at {self._path} closed the connection", hint=hint) from exc
            raise _unreachable(self._path, exc) from exc

    def _silent(self) -> SilentError:
        hint = f"see {_account()}, and `llamavisor doctor`"
        return SilentError(f"the daemon at {self._path} does not answer", hint=hint)


def _account() -> str:
    """Where a daemon that says nothing has told of itself."""
    return "`systemctl status llamavisor`" if has_systemd() else "its log"


def model_path(name: str, command: str = "") -> str:
    """Where a model is, or where a command for it goes; its name may hold anything.

    Raises:
        CommandError: the name is empty.
    """
    if not name:
        raise CommandError("no model has an empty name", hint="see `llamavisor models`", exit_code=ExitCode.USAGE)
    path = f"/control/v1/models/{quote(name, safe='')}"
    return f"{path}/{command}" if command else path


def _json(status: int, body: bytes, path: Path) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise CommandError(f"what answers at {path} is no llamavisor (status {status}, not JSON)")
    if status >= 400:
        detail = answer.get("detail") or answer.get("title") or f"status {status}"
        exit_code = EXIT_CODES.get(str(answer.get("code"))) or hub_exit_code(answer.get("why"))
        tail = answer.get("log_tail")
        log_tail = [str(line) for line in tail] if isinstance(tail, list) else []
        raise CommandError(str(detail), hint=str(answer.get("hint") or ""), exit_code=exit_code, log_tail=log_tail)
    return answer


def hub_exit_code(why: object) -> ExitCode:
    """What it means to the caller of a command that a model does not come from the Hub."""
    return _HUB_EXIT_CODES.get(str(why), ExitCode.FAILED)


def _unreachable(path: Path, exc: Exception) -> UnreachableError:
    """Why nobody could be spoken to, and what to do about it.

    1. The path is longer than the kernel takes: no daemon can be there.
    2. We may not: the hint is the group to join.
    3. Nobody is there.
    """
    if len(os.fsencode(path)) > SOCKET_BYTES_MAX:
        return UnreachableError(
            f"AF_UNIX path too long: {path}",
            hint=f"at most {SOCKET_BYTES_MAX} bytes fit; choose a shorter one with --socket",
            exit_code=ExitCode.BAD_CONFIG,
        )
    if isinstance(exc, PermissionError):
        return UnreachableError(
            f"not permitted to use {path}", hint=_group_hint(path), exit_code=ExitCode.NOT_PERMITTED
        )
    reason = {
        errno.ENOENT: "no such socket",
        errno.ECONNREFUSED: "nobody listens on it",
        errno.ENOTSOCK: "it is not a socket",
    }.get(getattr(exc, "errno", None) or 0, str(exc))
    start = "`systemctl start llamavisor` or `llamavisor serve`" if has_systemd() else "`llamavisor serve`"
    return UnreachableError(f"no daemon at {path}: {reason}", hint=f"start one: {start}")


def _group_hint(path: Path) -> str:
    for place in (path, path.parent):
        try:
            group = grp.getgrgid(place.stat().st_gid).gr_name
        except (OSError, KeyError):
            continue
        if group != "root":
            return f"join its group: `sudo usermod -aG {group} $USER`, then log in again"
    return "ask as root, or as the user who runs the daemon"


def _may_exist(path: Path) -> bool:
    """Whether there is something at `path`, also if we may not look: connecting will tell."""
    try:
        path.lstat()
    except OSError as exc:
        return isinstance(exc, PermissionError)
    return True


def _configured_socket(config_file: Path | None) -> Path | None:
    """The `socket` of the configuration file, if it names one. Whatever is wrong with the file is for others to say."""
    if config_file is None:
        return None
    try:
        raw = config_file.read_bytes()
        if b"socket" not in raw:  # the common case, and tomllib costs milliseconds
            return None
        import tomllib  # noqa: PLC0415 (only where it is needed)

        value = tomllib.loads(raw.decode("utf-8")).get("socket")
    except (OSError, ValueError, RecursionError):
        return None
    return config_file.parent / os.path.expanduser(value) if isinstance(value, str) and value else None  # noqa: PTH111
