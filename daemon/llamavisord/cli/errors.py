"""How a command ends that cannot do what it was asked."""

from __future__ import annotations

from collections.abc import Sequence

from llamavisord.exit_codes import ExitCode


class CommandError(Exception):
    """Raised when a command ends without success.

    Args:
        message: what failed, on which object, and why.
        hint: what to do next.
        exit_code: the exit code of the command.
        log_tail: the end of what the process in question had printed.
    """

    def __init__(
        self, message: str, *, hint: str = "", exit_code: ExitCode = ExitCode.FAILED, log_tail: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.hint = hint
        self.log_tail = tuple(log_tail)
        self.exit_code = exit_code


class UnreachableError(CommandError, OSError):
    """Raised when no daemon answers on the socket. An OSError for those who wait until one does."""

    def __init__(self, message: str, *, hint: str = "", exit_code: ExitCode = ExitCode.UNREACHABLE) -> None:
        super().__init__(message, hint=hint, exit_code=exit_code)


class SilentError(UnreachableError):
    """Raised when there is a daemon on the socket, and it does not answer."""


def with_hint(message: str, hint: str) -> str:
    """Both on one line; a hint is either a sentence of its own or the end of one."""
    if not hint:
        return message
    return f"{message}. {hint}" if hint[0].isupper() else f"{message}; {hint}"
