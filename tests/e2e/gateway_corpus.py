"""Requests that any llama-server is sent, good and bad ones, for a bare router and for the gateway alike.

Each is data: what goes over the wire, and where the gateway differs from a router by design, what it says instead and
why. They are sent one after the other on each side, so that a model on either side has seen the same when it answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from e2e.gateway_case import HI, JSON, WEATHER, WEATHER_FUNCTION, Case, chat, complete, get, post
from e2e.gateway_corpus_bad import bad_bodies, bad_chats, content_types
from e2e.gateway_corpus_paths import about_models, management, paths

_CHAT_FIELDS: Mapping[str, Mapping[str, object]] = {
    "plain": {},
    "temperature 0": {"temperature": 0},
    "seed": {"seed": 42},
    "max_tokens": {"max_tokens": 2},
    "max_tokens 0": {"max_tokens": 0},
    "max_completion_tokens": {"max_completion_tokens": 2},
    "n_predict": {"n_predict": 1},
    "n is 2": {"n": 2},
    "n is 0": {"n": 0},
    "stop": {"stop": ["am"]},
    "stop is a string": {"stop": " alpha"},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "top_logprobs without logprobs": {"top_logprobs": 3},
    "logit_bias": {"logit_bias": {"5": -100}},
    "logit_bias of words": {"logit_bias": [["am", False]]},
    "sampling": {"top_k": 5, "top_p": 0.5, "min_p": 0.1, "repeat_penalty": 1.1, "presence_penalty": 0.5},
    "samplers": {"samplers": ["top_k", "temperature"]},
    "reasoning_format": {"reasoning_format": "deepseek"},
    "no such reasoning_format": {"reasoning_format": "nonsense"},
    "cache_prompt": {"cache_prompt": False},
    "return_progress": {"return_progress": True},
    "timings_per_token": {"timings_per_token": True},
    "include_usage": {"stream_options": {"include_usage": True}},
    "no usage": {"stream_options": {"include_usage": False}},
    "verbose": {"verbose": True, "max_tokens": 1},
    "json_object": {"response_format": {"type": "json_object"}, "max_tokens": 8},
    "json_schema": {
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["yes"]}}},
        "max_tokens": 8,
    },
    "bad json_schema": {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
    "no such response_format": {"response_format": {"type": "nonsense"}},
    "grammar": {"grammar": 'root ::= " I" " am"'},
    "bad grammar": {"grammar": "root ::= ("},
    "tools": {"tools": [WEATHER], "max_tokens": 4},
    "tool_choice none": {"tools": [WEATHER], "tool_choice": "none"},
    "tool_choice required": {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 4},
    "tools are no list": {"tools": "weather"},
    "a tool without a function": {"tools": [{"type": "function"}]},
    "parallel_tool_calls": {"tools": [WEATHER], "parallel_tool_calls": True, "max_tokens": 4},
    "user and metadata": {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
    "an unknown field": {"nonsense": [1, {"deep": None}]},
    "chat_template_kwargs": {"chat_template_kwargs": {"enable_thinking": False}},
    "id_slot": {"id_slot": 1},
    "an unknown slot": {"id_slot": 99},
}


def chats() -> Iterator[Case]:
    """Every option of a chat, as one answer and as a stream."""
    for what, fields in _CHAT_FIELDS.items():
        yield chat(what, **fields)
        yield chat(f"{what}, streamed", stream=True, **fields)
    yield post("without /v1", "/chat/completions", {"model": "alpha", "messages": HI})
    yield post("by its alias", "/v1/chat/completions", {"model": "uno", "messages": HI})
    yield post("by its alias, streamed", "/v1/chat/completions", {"model": "uno", "messages": HI, "stream": True})
    yield chat("a system message", messages=[{"role": "system", "content": "be brief"}, *HI])
    yield chat("text parts", messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}])
    yield chat("text that is not ASCII", messages=[{"role": "user", "content": "grüß dich \U0001f999\u2028"}])
    yield chat("a lone surrogate", messages=[{"role": "user", "content": "\ud800"}])
    yield chat("a NUL in the text", messages=[{"role": "user", "content": "a\0b"}])
    yield chat("what an assistant has said", messages=[*HI, {"role": "assistant", "content": "I"}])
    calls = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bern"}'}}]
    told = [{"role": "assistant", "content": None, "tool_calls": calls}]
    yield chat("a tool's answer", messages=[*HI, *told, {"role": "tool", "tool_call_id": "1", "content": "rain"}])
    yield post("control", "/v1/chat/completions/control", {"model": "alpha", "id": "nobody", "action": "stop"})
    yield post("control without an id", "/v1/chat/completions/control", {"model": "alpha"})


def completions() -> Iterator[Case]:
    """Completions, by OpenAI's API and by llama.cpp's own."""
    for path in ("/completion", "/completions", "/v1/completions"):
        for is_streamed in (False, True):
            what = f"{path}, streamed" if is_streamed else path
            fields = {"model": "alpha", "prompt": "hi", "stream": is_streamed}
            yield post(what, path, fields)
            yield post(f"{what}, several prompts", path, {**fields, "prompt": ["one", "two"]})
            yield post(f"{what}, tokens", path, {**fields, "prompt": [5, 6, 7]})
            yield post(f"{what}, mixed prompt", path, {**fields, "prompt": [5, "six", 7]})
            yield post(f"{what}, n_probs", path, {**fields, "n_probs": 2})
            yield post(f"{what}, no prompt", path, {"model": "alpha", "stream": is_streamed})
            yield post(f"{what}, empty prompt", path, {**fields, "prompt": ""})
            yield post(f"{what}, n", path, {**fields, "n": 2, "logprobs": 1})
    yield complete("n_predict 0", n_predict=0)
    yield complete("return_tokens", return_tokens=True)
    yield complete("post_sampling_probs", n_probs=2, post_sampling_probs=True)
    yield complete("response_fields", response_fields=["content", "generation_settings/n_predict"])
    yield complete("t_max_predict_ms", t_max_predict_ms=1000)
    yield complete("json_schema", json_schema={"enum": ["yes"]}, n_predict=8)
    yield complete("a prompt that is a number", prompt=7)
    yield complete("a token that is none", prompt=[99999999])
    yield complete("a negative token", prompt=[-1])
    infill = {"model": "alpha", "input_prefix": "a", "input_suffix": "b", "n_predict": 2}
    yield post("infill", "/infill", infill)
    yield post("infill without a suffix", "/infill", {"model": "alpha", "input_prefix": "a"})


def other_apis() -> Iterator[Case]:
    """OpenAI's responses, Anthropic's messages, and what counts tokens."""
    for path in ("/v1/responses", "/responses"):
        for is_streamed in (False, True):
            what = f"{path}, streamed" if is_streamed else path
            yield post(what, path, {"model": "alpha", "input": "hi", "stream": is_streamed})
    answers: Mapping[str, Mapping[str, object]] = {
        "items": {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]},
        "instructions": {"input": "hi", "instructions": "be brief"},
        "no input": {},
        "input is a number": {"input": 7},
        "previous_response_id": {"input": "hi", "previous_response_id": "resp_1"},
        "a file": {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
        "tools": {"input": "hi", "tools": [{"type": "function", **WEATHER_FUNCTION}], "max_output_tokens": 4},
        "a tool that is not known": {"input": "hi", "tools": [{"type": "web_search"}]},
    }
    for what, fields in answers.items():
        yield post(f"responses: {what}", "/v1/responses", {"model": "alpha", **fields})
        yield post(f"responses: {what}, streamed", "/v1/responses", {"model": "alpha", "stream": True, **fields})
        yield post(f"responses: {what}, counted", "/v1/responses/input_tokens", {"model": "alpha", **fields})
    version = ("anthropic-version", "2023-06-01")
    messages: Mapping[str, Mapping[str, object]] = {
        "plain": {},
        "a system prompt": {"system": "be brief"},
        "system blocks": {"system": [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}]},
        "blocks": {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        "stop_sequences": {"stop_sequences": ["am"]},
        "tools": {"tools": [{"name": "weather", "input_schema": {"type": "object"}}], "max_tokens": 4},
        "tool_choice": {"tools": [{"name": "w", "input_schema": {"type": "object"}}], "tool_choice": {"type": "none"}},
        "thinking": {"thinking": {"type": "enabled", "budget_tokens": 16}},
        "no messages": {"messages": None},
        "empty messages": {"messages": []},
        "messages are text": {"messages": "hi"},
        "an image": {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64"}}]}]},
        "a small limit": {"max_tokens": 1},
    }
    for what, fields in messages.items():
        body = {"model": "alpha", "max_tokens": 16, "messages": HI, **fields}
        yield post(f"messages: {what}", "/v1/messages", body, JSON, version)
        yield post(f"messages: {what}, streamed", "/v1/messages", {**body, "stream": True}, JSON, version)
        yield post(f"messages: {what}, counted", "/v1/messages/count_tokens", body, JSON, version)
    yield post("messages: no max_tokens", "/v1/messages", {"model": "alpha", "messages": HI}, JSON, version)
    for path in ("/v1/chat/completions/input_tokens", "/chat/completions/input_tokens", "/responses/input_tokens"):
        yield post(path, path, {"model": "alpha", "messages": HI, "input": "hi"})
    yield post("input_tokens of nothing", "/v1/chat/completions/input_tokens", {"model": "alpha"})


def vectors_and_tokens() -> Iterator[Case]:
    """Embeddings, ranks, tokens, templates."""
    for model in ("emb", "alpha"):
        for path in ("/v1/embeddings", "/embeddings", "/embedding"):
            yield post(f"{path} of {model}", path, {"model": model, "input": "hi"})
        for what, text in {"list": ["a", "b"], "tokens": [5, 6], "empty": "", "null": None, "empty list": []}.items():
            yield post(f"embeddings of {model}, input {what}", "/v1/embeddings", {"model": model, "input": text})
        yield post(f"embeddings of {model}, none", "/v1/embeddings", {"model": model})
        base64 = {"model": model, "input": "hi", "encoding_format": "base64"}
        yield post(f"embeddings of {model}, base64", "/v1/embeddings", base64)
        other = {"model": model, "input": "hi", "encoding_format": "nonsense"}
        yield post(f"embeddings of {model}, no such format", "/v1/embeddings", other)
        yield post(f"embeddings of {model}, dimensions", "/v1/embeddings", {**base64, "dimensions": 4})
        for path in ("/v1/rerank", "/rerank", "/reranking", "/v1/reranking"):
            yield post(f"{path} of {model}", path, {"model": model, "query": "a", "documents": ["b", "c"]})
    ranks: Mapping[str, Mapping[str, object]] = {
        "top_n": {"query": "a", "documents": ["b", "c"], "top_n": 1},
        "texts": {"query": "a", "texts": ["b"]},
        "no query": {"documents": ["b"]},
        "query 7": {"query": 7, "documents": ["b"]},
        "no documents": {"query": "a"},
        "empty documents": {"query": "a", "documents": []},
    }
    for model in ("rank", "emb"):
        for what, fields in ranks.items():
            yield post(f"rerank of {model}: {what}", "/v1/rerank", {"model": model, **fields})
    yield post("chat with an embedding model", "/v1/chat/completions", {"model": "emb", "messages": HI})
    yield post("completion of an embedding model", "/completion", {"model": "emb", "prompt": "hi", "stream": True})
    texts: Mapping[str, Mapping[str, object]] = {
        "text": {"content": "hi there"},
        "pieces": {"content": "hi", "with_pieces": True},
        "bos": {"content": "hi", "add_special": True},
        "nothing": {},
        "not ASCII": {"content": "\U0001f999", "with_pieces": True},
    }
    for what, fields in texts.items():
        yield post(f"tokenize {what}", "/tokenize", {"model": "alpha", **fields})
    for what, tokens in {
        "tokens": [259, 260],
        "none": [],
        "text": "no",
        "unknown": [9999999],
        "bytes": [3, 200],
    }.items():
        yield post(f"detokenize {what}", "/detokenize", {"model": "alpha", "tokens": tokens})
    yield post("apply-template", "/apply-template", {"model": "alpha", "messages": HI})
    yield post("apply-template of nothing", "/apply-template", {"model": "alpha"})
    yield post("apply-template with tools", "/apply-template", {"model": "alpha", "messages": HI, "tools": [WEATHER]})
    yield post("systemone", "/v1/systemone", {"model": "alpha", "question": "a", "options": ["b", "c"]})


def conversations() -> Iterator[Case]:
    """Streams that outlive their clients, and what is asked about them."""
    yield get("/v1/stream")
    yield get("/v1/stream?conv_id=nobody")
    yield get("/v1/stream?conv_id=")
    yield Case("DELETE a stream of nobody", "DELETE", "/v1/stream?conv_id=nobody")
    yield Case("DELETE no stream", "DELETE", "/v1/stream")
    yield post("look up nobody", "/v1/streams/lookup", {"conversation_ids": ["nobody"]})
    yield post("look up nothing", "/v1/streams/lookup", {})
    yield post("look up numbers", "/v1/streams/lookup", {"conversation_ids": [1, None, ""]})
    yield post("look up: no JSON", "/v1/streams/lookup", b"{")
    yield post("look up: a list", "/v1/streams/lookup", [1])
    yield get("/v1/streams/lookup")
    talk = ("X-Conversation-Id", "talk::alpha")
    body = {"model": "alpha", "messages": HI, "stream": True}
    yield post("a conversation", "/v1/chat/completions", body, JSON, talk)
    yield get("/v1/stream?conv_id=talk%3A%3Aalpha", name="what was streamed")
    yield get(
        "/v1/stream?conv_id=talk%3A%3Aalpha&from=10", name="a part of what was streamed", loosely="a part of a line"
    )
    yield get("/v1/stream?conv_id=talk%3A%3Aalpha&from=x", name="from nowhere")
    yield get("/v1/stream?conv_id=talk%3A%3Aalpha&from=99999999", name="from beyond the end")
    both = {"conversation_ids": ["talk::alpha", "nobody"]}
    yield post("look up a conversation", "/v1/streams/lookup", both, late=b"[]")  # a router waits for 250 ms
    yield post("look up by the first part", "/v1/streams/lookup", {"conversation_ids": ["talk"]})
    yield Case("end the conversation", "DELETE", "/v1/stream?conv_id=talk%3A%3Aalpha")
    yield get("/v1/stream?conv_id=talk%3A%3Aalpha", name="what is not there any more")
    yield post("a conversation without a stream", "/v1/chat/completions", {**body, "stream": False}, JSON, talk)
    yield post(
        "a bad conversation",
        "/v1/chat/completions",
        {"model": "alpha", "stream": True},
        JSON,
        ("X-Conversation-Id", "bad"),
    )
    yield get("/v1/stream?conv_id=bad", name="a bad conversation, streamed again")


GROUPS: Mapping[str, tuple[Case, ...]] = {
    "chats": tuple(chats()),
    "completions": tuple(completions()),
    "other APIs": tuple(other_apis()),
    "vectors and tokens": tuple(vectors_and_tokens()),
    "bad bodies": tuple(bad_bodies()),
    "bad chats": tuple(bad_chats()),
    "content types": tuple(content_types()),
    "conversations": tuple(conversations()),
    "about models": tuple(about_models()),
    "management": tuple(management()),
    "paths": tuple(paths()),
}
