"""Which known family a chat template belongs to, told by the tokens that it writes."""

from __future__ import annotations

_FAMILIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gpt-oss", ("<|start|>", "<|channel|>", "<|message|>")),
    ("phi4", ("<|im_start|>", "<|im_sep|>")),
    ("smolvlm", ("<|im_start|>", "<end_of_utterance>")),
    ("kimi-k2", ("<|im_assistant|>", "<|im_middle|>")),
    ("qwen", ("<|im_start|>", "<|vision_start|>")),
    ("qwen", ("<|im_start|>", "<tool_response>", "multi_step_tool")),
    ("qwen", ("<|im_start|>", "You are Qwen")),
    ("chatml", ("<|im_start|>",)),
    ("mistral-v7", ("[INST]", "[SYSTEM_PROMPT]")),
    ("mistral-v3-tekken", ('"[INST]"', "[AVAILABLE_TOOLS]")),
    ("mistral-v1", (" [INST]", "[AVAILABLE_TOOLS]")),
    ("mistral-v3", ("[INST]", "[AVAILABLE_TOOLS]")),
    ("mistral-v1", ("' [INST] ' + system_message",)),
    ("llama2", ("[INST]",)),
    ("phi3", ("<|assistant|>", "<|end|>")),
    ("glm4", ("[gMASK]<sop>",)),
    ("falcon3", ("<|assistant|>", "<|user|>", "</s>")),
    ("zephyr", ("<|user|>", "<|endoftext|>")),
    ("gemma", ("<start_of_turn>",)),
    ("gemma4", ("<|turn>", "<turn|>")),
    ("command-r", ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>")),
    ("llama3", ("<|start_header_id|>", "<|end_header_id|>")),
    ("llama4", ("<|header_start|>", "<|header_end|>")),
    ("deepseek3", ("<｜Assistant｜>", "<｜User｜>")),  # noqa: RUF001 (the tokens are written so)
    ("deepseek2", ("'Assistant: ' + message['content'] + eos_token",)),
    ("deepseek", ("### Instruction:", "<|EOT|>")),
    ("exaone4", ("[|assistant|]", "[|endofturn|]", "[|tool|]")),
    ("exaone3", ("[|assistant|]", "[|endofturn|]")),
    ("granite", ("<|start_of_role|>",)),
    ("seed-oss", ("<seed:bos>",)),
    ("minimax", ("]~b]",)),
    ("vicuna", ("USER: ", "ASSISTANT: ")),
)
"""A family and the texts that all its templates hold; the first that fits counts.

Most names, texts and their order are those of `llm_chat_detect_template` in llama.cpp's src/llama-chat.cpp. Qwen's
templates are ChatML and are told by what else they write. The family is shown to people; llama-server runs the template
itself and asks no table.
"""


def find_family(template: str) -> str | None:
    """The family of a chat template, None when it is no known one."""
    for family, marks in _FAMILIES:
        if all(mark in template for mark in marks):
            return family
    return None
