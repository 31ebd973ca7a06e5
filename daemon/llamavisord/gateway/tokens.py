"""How many tokens an answer says that it took."""

from __future__ import annotations

import re

# The names of the APIs of OpenAI (chat, responses) and Anthropic, and llama.cpp's own. What a model says of such names
# stands in a string, where each quote has a backslash before it: it is not found.
_PROMPT = (b'"prompt_tokens":', b'"input_tokens":', b'"tokens_evaluated":')
_COMPLETION = (b'"completion_tokens":', b'"output_tokens":', b'"tokens_predicted":')
# Streams carry a usage only when they were asked to, and llama.cpp's timings always.
_TIMED_PROMPT = (b'"prompt_n":', b'"cache_n":')
_TIMED_COMPLETION = (b'"predicted_n":',)
_NUMBER = re.compile(rb"\s*(\d{1,15})")


def tokens_of(tail: bytes) -> tuple[int | None, int | None]:
    """Tokens of the prompt and of the completion, each None if the end of an answer does not say.

    Args:
        tail: the last bytes of its body.
    """
    prompt, completion = _last(_PROMPT, tail), _last(_COMPLETION, tail)
    if prompt is None:
        timed = [count for name in _TIMED_PROMPT if (count := _last((name,), tail)) is not None]
        prompt = sum(timed) if timed else None
    if completion is None:
        completion = _last(_TIMED_COMPLETION, tail)
    return prompt, completion


def _last(names: tuple[bytes, ...], tail: bytes) -> int | None:
    """The number behind the last of the first of these names that is there."""
    for name in names:
        at = tail.rfind(name)
        if at >= 0 and (found := _NUMBER.match(tail, at + len(name))):
            return int(found[1])
    return None
