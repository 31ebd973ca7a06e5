"""How many tokens an answer says that it took."""

from __future__ import annotations

import re

# The names of the APIs of OpenAI (chat, responses) and Anthropic, and llama.cpp's own. What a model says of such names
# stands in a string, where each quote has a backslash before it.
_PROMPT = re.compile(rb'(?<!\\)"(?:prompt_tokens|input_tokens|tokens_evaluated)"\s*:\s*(\d{1,15})')
_COMPLETION = re.compile(rb'(?<!\\)"(?:completion_tokens|output_tokens|tokens_predicted)"\s*:\s*(\d{1,15})')
# Streams carry a usage only when they were asked to, and llama.cpp's timings always.
_TIMED_PROMPT = re.compile(rb'(?<!\\)"(?:prompt_n|cache_n)"\s*:\s*(\d{1,15})')
_TIMED_COMPLETION = re.compile(rb'(?<!\\)"predicted_n"\s*:\s*(\d{1,15})')


def tokens_of(tail: bytes) -> tuple[int | None, int | None]:
    """Tokens of the prompt and of the completion, each None if the end of an answer does not say.

    Args:
        tail: the last bytes of its body.
    """
    prompt = _last(_PROMPT, tail)
    completion = _last(_COMPLETION, tail)
    if prompt is None and (timed := _TIMED_PROMPT.findall(tail)):
        prompt = sum(map(int, timed[-2:]))
    if completion is None:
        completion = _last(_TIMED_COMPLETION, tail)
    return prompt, completion


def _last(pattern: re.Pattern[bytes], tail: bytes) -> int | None:
    found = pattern.findall(tail)
    return int(found[-1]) if found else None
