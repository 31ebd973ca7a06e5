"""What was found in the body of a request: the model that it is for, and how it wants its answer."""

from __future__ import annotations

from dataclasses import dataclass

NAME_BYTES_MAX = 1024
"""No model's name is longer: it is a file's name, which has 255 bytes at most."""


@dataclass(frozen=True, slots=True)
class Peeked:
    """What a body says.

    Attributes:
        model: the name of the model, as it was given; None = there is none, or it is not a string.
        stream: whether the answer is wanted as a stream.
        is_object: it is a whole, plausible JSON object or form. If not, llama-server says best what is wrong with it.
    """

    model: str | None = None
    stream: bool = False
    is_object: bool = True


NOT_AN_OBJECT = Peeked(is_object=False)


def name_of(text: str) -> str | None:
    """The name that a text is; None if UTF-8 cannot write it, which is so with half of a surrogate pair."""
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        return None
    return text if len(raw) <= NAME_BYTES_MAX else no_longer(raw)


def no_longer(raw: bytes) -> str:
    """The name that these bytes are; if it is longer than any is, cut and with an ellipsis, so that it is no model's.

    Raises:
        UnicodeDecodeError: they are no UTF-8.
    """
    if len(raw) <= NAME_BYTES_MAX:
        return raw.decode()
    return raw[:NAME_BYTES_MAX].decode("utf-8", "ignore") + "…"
