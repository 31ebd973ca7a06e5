"""`llamavisor`: from the words of a command line to an exit code."""

from __future__ import annotations

import importlib
import io
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence

from llamavisord.cli.arguments import parse
from llamavisord.cli.errors import CommandError, with_hint
from llamavisord.exit_codes import ExitCode
from llamavisord.plain import plain

# Which module has which command: a quick command must not pay for the imports of the daemon.
_COMMANDS: Mapping[str, str] = {
    "serve": "serve:run",
    "status": "look:status",
    "models": "models:models",
    "show": "models:show",
    "ps": "memory:ps",
    "events": "look:events",
    "logs": "look:logs",
    "run": "run:run",
    "quantize": "quantize:quantize",
    "load": "act:load",
    "unload": "act:unload",
    "pin": "act:pin",
    "unpin": "act:unpin",
    "evict": "memory:evict",
    "pull": "pull:pull",
    "pulls": "pull:pulls",
    "rm": "tidy:rm",
    "du": "tidy:du",
    "restart": "act:restart",
    "stop": "act:stop",
    "start": "act:start",
    "drain": "act:drain",
    "resume": "act:resume",
    "reload": "act:reload",
    "config": "settings:run",
    "doctor": "doctor:run",
    "install-service": "service:install",
    "demo": "show:demo",
    "version": "show:version",
}
COMPLETE = "__complete"
"""What the completions of shells call for names that only a daemon knows."""


def run(words: Sequence[str], *, begin: Callable[[], None]) -> int:
    """Run one command.

    Args:
        words: those after `llamavisor`.
        begin: called when it is known what is to be done, and nothing is done yet.

    Returns:
        The exit code, an `ExitCode`.
    """
    if sys.platform != "linux":
        return _complain("llamavisor supervises processes by means that only Linux has")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name may hold what the terminal's encoding does not
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(words, begin)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _silence_stdout()  # the reader has seen enough
        return ExitCode.OK
    except OSError as exc:  # mostly a full disk behind `>`
        _silence_stdout()
        return _complain(f"{exc.filename or 'standard output'}: {exc.strerror or exc}")
    return code


def _run(words: Sequence[str], begin: Callable[[], None]) -> int:
    if words[:1] == [COMPLETE]:  # a shell that completes a word: it is no command for people, and must be quick
        from llamavisord.cli.complete import complete  # noqa: PLC0415 (likewise)

        return complete(words[1:])
    try:
        arguments = parse(words)
    except SystemExit as exc:  # argparse has said why
        return exc.code if isinstance(exc.code, int) else ExitCode.USAGE
    module, name = _COMMANDS[arguments.command].split(":")
    try:
        command: Callable[[Namespace], int] = getattr(importlib.import_module(f"llamavisord.cli.{module}"), name)
        begin()
        return command(arguments)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        _leave_line()
        return _complain("interrupted", code=ExitCode.INTERRUPTED)
    except CommandError as exc:
        if exc.exit_code == ExitCode.INTERRUPTED:
            _leave_line()
        return _complain(str(exc), exc.hint, code=exc.exit_code, log_tail=exc.log_tail)
    except Exception as exc:  # the last resort: one line for a person, the rest with --debug
        if getattr(arguments, "debug", False):
            sys.__excepthook__(*sys.exc_info())  # the traceback module costs milliseconds
            return ExitCode.FAILED
        if isinstance(exc, OSError):
            raise
        return _complain(f"{type(exc).__name__}: {exc}", "--debug shows where it comes from")


def _leave_line() -> None:
    """Begin a new line on a terminal: a ^C stands on this one, behind a bar or a question."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(file=sys.stderr)


def _complain(message: str, hint: str = "", *, code: ExitCode = ExitCode.FAILED, log_tail: Sequence[str] = ()) -> int:
    for line in with_hint(message, hint).splitlines():
        print(f"llamavisor: {plain(line)}", file=sys.stderr)
    for line in log_tail:
        print(f"  | {plain(line, keep=chr(9))}", file=sys.stderr)
    return code


def _silence_stdout() -> None:
    """Have the flush at the end of the interpreter fail no more."""
    if sys.stdout is not None:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
