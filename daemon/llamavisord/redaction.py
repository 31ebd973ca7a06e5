"""What of a configuration is not shown: values whose names sound like a secret."""

from __future__ import annotations

import re
from collections.abc import Sequence

HIDDEN = "(set)"
"""What is shown instead."""

_SECRET = re.compile(r"secret|passw|credential|(?<![a-z])(?:api)?(?:key|token)(?![a-z])")
"""`--hf-token` and `API_KEY` hold one, `--image-max-tokens` and `--keyboard` do not."""


def is_secret(name: str) -> bool:
    """Whether the value of an option or a variable of that name may be a secret."""
    return _SECRET.search(name.lower()) is not None


def without_secrets(args: Sequence[str]) -> tuple[str, ...]:
    """Options as they were written, without the values of those that sound like a secret."""
    names = ("", *args)
    return tuple(
        HIDDEN if name.startswith("-") and is_secret(name) and not word.startswith("--") else word
        for name, word in zip(names, args, strict=False)
    )
