"""Text from outside, made fit for a terminal and for one line of a log."""

from __future__ import annotations


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
