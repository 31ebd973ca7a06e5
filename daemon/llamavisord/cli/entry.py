"""The first line of the program: before a command runs, an interrupt ends it at once and without a traceback."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # what is imported here is not guarded yet
    from collections.abc import Sequence

_CODE = 130
"""`ExitCode.INTERRUPTED`, which is not imported yet when it is needed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `llamavisor`; None takes those of this process.

    Returns:
        The exit code, an `ExitCode`.
    """
    try:
        _guard()
        try:
            from llamavisord.cli.program import run  # noqa: PLC0415 (most of the way to a command are these imports)

            return run(sys.argv[1:] if argv is None else argv, begin=_release)
        finally:
            _release()
    except KeyboardInterrupt:
        _tell()
        return _CODE


def _guard() -> None:
    """Have an interrupt end the process as it stands: nothing is begun yet.

    As an exception it would not do: amid an import Python tells of some and goes on, and takes others for bugs.
    """
    import signal  # noqa: PLC0415 (likewise)
    import threading  # noqa: PLC0415 (likewise)

    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, or a host's
        signal.signal(signal.SIGINT, _leave)


def _release() -> None:
    """From here on an interrupt is the command's."""
    import signal  # noqa: PLC0415 (likewise)

    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: object) -> None:
    _tell()
    os._exit(_CODE)


def _tell() -> None:
    """By the file itself: what prints may be what was interrupted."""
    try:
        # The ^C of a terminal stands on the line that we were to begin.
        os.write(2, b"\nllamavisor: interrupted\n" if os.isatty(2) else b"llamavisor: interrupted\n")
    except OSError:
        return
