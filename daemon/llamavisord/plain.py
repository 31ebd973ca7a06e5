"""Text from outside, made fit for a terminal and for one line of a log."""

from __future__ import annotations

_COMMANDS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""C0 and C1: all that a terminal can take for a command, or for the beginning of one."""


def plain(text: object, *, keep: str = "") -> str:
    """`text` with every character escaped that is not printable: a name must not command a terminal nor forge lines.

    Args:
        text: anything; None is shown as "-".
        keep: characters that stay as they are.
    """
    if text is None:
        return "-"
    if (whole := str(text)).isprintable():  # nearly always, and each line of the log passes here
        return whole
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape", "surrogatepass").decode("ascii")
        for char in whole
    )


def tame(text: str) -> str:
    """Prose of any language as it is, with only those characters escaped that could command a terminal."""
    return text.translate(_COMMANDS)
