"""What the number means that a command ends with; the daemon and the command line share it."""

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of every `llamavisor` command; those from 64 up are the ones of sysexits.h."""

    OK = 0
    """It was done."""
    FAILED = 1
    """It was tried and did not succeed, or the daemon ended for a bug."""
    USAGE = 2
    """The command line makes no sense."""
    NOT_FOUND = 3
    """No such model, router, or address."""
    UNREACHABLE = 4
    """No daemon answers on the socket."""
    TIMEOUT = 5
    """Not done within the time given; it may still be under way."""
    ALREADY_RUNNING = 75
    """Another daemon holds the socket (EX_TEMPFAIL)."""
    NOT_PERMITTED = 77
    """This user may not command the daemon (EX_NOPERM)."""
    BAD_CONFIG = 78
    """The configuration is not valid, or could not be started with (EX_CONFIG)."""
    INTERRUPTED = 130
    """It was interrupted with Ctrl-C; the number is the one that shells give to that."""
