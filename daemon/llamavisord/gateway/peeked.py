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
    """`text` if it can be written as UTF-8, which half a surrogate pair cannot, and no longer than a name can be."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return no_longer(text)


def no_longer(name: str) -> str:
    """`name` if it is no longer than a name can be, else cut and with an ellipsis, so that it is no model's name."""
    raw = name.encode()
    return name if len(raw) <= NAME_BYTES_MAX else raw[:NAME_BYTES_MAX].decode("utf-8", "ignore") + "…"
