"""What the number means that a command ends with; the daemon and the command line share it."""

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of every `llamavisor` command; those from 64 up are the ones of sysexits.h."""

    OK = 0
    FAILED = 1  # it was tried, and did not succeed
    USAGE = 2  # the command line makes no sense
    NOT_FOUND = 3  # no such model, router, or address
    UNREACHABLE = 4  # no daemon answers on the socket
    TIMEOUT = 5  # not done within the time given; it may still be under way
    ALREADY_RUNNING = 75  # another daemon holds the socket (EX_TEMPFAIL)
    NOT_PERMITTED = 77  # EX_NOPERM
    BAD_CONFIG = 78  # EX_CONFIG
    INTERRUPTED = 130  # Ctrl-C, as shells count it
