"""Requests that are not in order: bodies, names, types and forms; part of `gateway_corpus`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from e2e.gateway_case import FORM, HI, HUGE, JSON, PIXEL, Case, Instead, chat, complete, form, post

_BAD_JSON: Mapping[str, bytes] = {
    "empty": b"",
    "white space": b"  \r\n",
    "text": b"hello",
    "cut off": b'{"model":"alpha","messages":[',
    "cut off in a string": b'{"model":"alp',
    "an extra comma": b'{"model":"alpha",}',
    "single quotes": b"{'model':'alpha'}",
    "no quotes": b"{model:alpha}",
    "two documents": b'{"model":"alpha"}{"model":"alpha"}',
    "trailing text": b'{"model":"alpha"} x',
    "a comment": b'{"model":"alpha" /* a */}',
    "NaN": b'{"model":"alpha","temperature":NaN}',
    "a control character": b'{"model":"alpha","prompt":"a\nb"}',
    "a bad escape": b'{"model":"alpha","prompt":"\\x41"}',
    "a bad surrogate": b'{"model":"alpha","prompt":"\\ud800\\u0041"}',
    "a leading zero": b'{"model":"alpha","n_predict":01}',
    "bad UTF-8 in a value": b'{"model":"alpha","prompt":"\xff\xfe"}',
    "bad UTF-8 in the name": b'{"model":"al\xc3\x28pha","prompt":"hi"}',
    "overlong UTF-8": b'{"model":"alpha","prompt":"\xc0\xaf"}',
    "UTF-16": '{"model":"alpha","prompt":"hi"}'.encode("utf-16"),
    "a list": b'[{"model":"alpha"}]',
    "a string": b'"alpha"',
    "a number": b"7",
    "null": b"null",
    "true": b"true",
    "fifty thousand brackets": b"[" * 50_000,
    "a number out of range": b'{"model":"alpha","prompt":"hi","seed":1e999}',
}

_ODD_JSON: Mapping[str, bytes] = {
    "a byte order mark": b'\xef\xbb\xbf{"model":"alpha","prompt":"hi"}',
    "model twice, the last is known": b'{"model":"nobody","prompt":"hi","model":"alpha"}',
    "model twice, the last is unknown": b'{"model":"alpha","prompt":"hi","model":"nobody"}',
    "model twice, the last is no string": b'{"model":"alpha","prompt":"hi","model":7}',
    "model twice, spelt with an escape": b'{"model":"nobody","prompt":"hi","\\u006dodel":"alpha"}',
    "the name with escapes": b'{"model":"\\u0061l\\u0070ha","prompt":"hi"}',
    "the name with a NUL": b'{"model":"alpha\\u0000","prompt":"hi"}',
    "the name at the end": b'{"prompt":"hi","x":{"model":"nobody","y":[{"model":"emb"}]},"model":"alpha"}',
    "the name only further down": b'{"prompt":"hi","x":{"model":"alpha"}}',
    "a key that looks like it": b'{"Model":"alpha","model ":"alpha","prompt":"hi"}',
    "the name inside a string": b'{"prompt":"\\"model\\":\\"alpha\\""}',
    "white space everywhere": b' {\t"model"\r\n:\n "alpha" , "prompt" : "hi" } ',
    "much nesting": b'{"prompt":"hi","x":' + b"[" * 500 + b"]" * 500 + b',"model":"alpha"}',
    "much before the name": b'{"x":"' + b"x" * HUGE + b'","prompt":"hi","model":"alpha"}',
    "much after the name": b'{"model":"alpha","prompt":"hi","x":"' + b"\\u0041" * (HUGE // 6) + b'"}',
    "many keys": b"{" + b"".join(b'"k%d":%d,' % (n, n) for n in range(20_000)) + b'"model":"alpha","prompt":"hi"}',
    "stream is text": b'{"model":"alpha","prompt":"hi","stream":"true"}',
    "stream is null": b'{"model":"alpha","prompt":"hi","stream":null}',
    "stream is 1": b'{"model":"alpha","prompt":"hi","stream":1}',
    "stream twice": b'{"model":"alpha","prompt":"hi","stream":true,"stream":false}',
}

_NAMES: Mapping[str, object] = {
    "unknown": "nobody",
    "empty": "",
    "null": None,
    "a number": 7,
    "a list": ["alpha"],
    "an object": {"name": "alpha"},
    "in capitals": "ALPHA",
    "with white space": " alpha",
    "with .gguf": "alpha.gguf",
    "a path": "../alpha",
    "with a quote": 'al"pha\\',
    "with control characters": "alpha\r\nX-Evil: 1",
    "with format characters": "%s%n%d",
    "not ASCII": "ältere \U0001f999",
    "very long": "x" * 100_000,
}


_CUT = Instead(400, "x\u2026' not found", "nobody reads a name of 100,000 letters, and every log would have it")
_WITH_NUL = Instead(400, "\\u0000' not found", "the name as it was sent; llama-server takes the NUL for its end")


def bad_bodies() -> Iterator[Case]:
    """Bodies that are no JSON, or odd JSON, and names that are none."""
    for what, body in _BAD_JSON.items():
        yield post(f"chat: {what}", "/v1/chat/completions", body)
        yield post(f"completion: {what}", "/completion", body)
        yield post(f"messages: {what}", "/v1/messages", body)
    for what, odd in _ODD_JSON.items():
        yield post(what, "/completion", odd, instead=_WITH_NUL if what == "the name with a NUL" else None)
    for what, name in _NAMES.items():
        instead = _CUT if what == "very long" else None
        named = {"model": name, "messages": HI}
        yield post(f"a name that is {what}", "/v1/chat/completions", named, instead=instead)
        yield post(f"messages: a name that is {what}", "/v1/messages", named, instead=instead)
    yield chat("unknown, streamed", model="nobody", stream=True)
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/completion", "/tokenize", "/v1/rerank"):
        yield post(f"{path} without a name", path, {"messages": HI})
        yield post(f"{path} of an empty object", path, {})


def bad_chats() -> Iterator[Case]:
    """Bodies that are JSON but no chat, and chats that do not fit."""
    chats: Mapping[str, Mapping[str, object]] = {
        "no messages": {"messages": None},
        "empty messages": {"messages": []},
        "messages are text": {"messages": "hi"},
        "a message is text": {"messages": ["hi"]},
        "no role": {"messages": [{"content": "hi"}]},
        "no content": {"messages": [{"role": "user"}]},
        "an unknown part": {"messages": [{"role": "user", "content": [{"type": "smell", "smell": "x"}]}]},
        "an image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}]},
        "sound": {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}]},
        "temperature is text": {"temperature": "hot"},
        "temperature is negative": {"temperature": -1},
        "max_tokens is text": {"max_tokens": "many"},
        "stop is a number": {"stop": 7},
        "top_k is text": {"top_k": "x"},
        "n is too much": {"n": 99},
        "seed is negative": {"seed": -1},
        "too long a prompt": {"messages": [{"role": "user", "content": "x " * 4000}]},
        "two assistants": {
            "messages": [*HI, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]
        },
        "json_schema and grammar": {"grammar": 'root ::= "a"', "response_format": {"type": "json_object"}},
    }
    for what, fields in chats.items():
        yield chat(what, **fields)
        yield chat(f"{what}, streamed", stream=True, **fields)
    long = "x " * 4000
    yield complete("completion: too long", prompt=long)
    yield post(
        "messages: too long",
        "/v1/messages",
        {"model": "alpha", "max_tokens": 4, "messages": [{"role": "user", "content": long}]},
    )
    yield post("responses: too long", "/v1/responses", {"model": "alpha", "input": long})
    yield post("embeddings: too long", "/v1/embeddings", {"model": "emb", "input": long})
    small = {"model": "small", "messages": [{"role": "user", "content": "x" * 500}]}
    yield post("longer than a small context", "/v1/chat/completions", small)
    yield post("longer than a small context, streamed", "/v1/chat/completions", {**small, "stream": True})
    yield post(
        "up to the end of a small context", "/v1/completions", {"model": "loop", "prompt": "hi", "max_tokens": 40}
    )
    streamed = {"model": "loop", "prompt": "hi", "max_tokens": 200, "stream": True}
    yield post("a longer stream", "/v1/completions", streamed)
    yield post(
        "a longer stream of a chat",
        "/v1/chat/completions",
        {"model": "loop", "messages": HI, "max_tokens": 200, "stream": True},
    )


def content_types() -> Iterator[Case]:
    """Bodies under all kinds of names, in pieces, and in forms."""
    body = json.dumps({"model": "alpha", "prompt": "hi"}).encode()
    for kind in (
        "application/json; charset=utf-8",
        "application/JSON",
        "text/plain",
        "text/html",
        "application/x-www-form-urlencoded",
        "application/octet-stream",
        "nonsense",
        "",
    ):
        yield post(f"type {kind!r}", "/completion", body, ("Content-Type", kind))
    yield Case("no type", "POST", "/completion", body)
    yield post(
        "as curl -d sends it",
        "/v1/chat/completions",
        {"model": "alpha", "messages": HI},
        ("Content-Type", "application/x-www-form-urlencoded"),
    )
    chunked = (JSON, ("Transfer-Encoding", "chunked"))
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (body[:1], body[1:9], body[9:]))
    yield Case("in chunks", "POST", "/completion", pieces + b"0\r\n\r\n", chunked)
    yield Case("in chunks with trailers", "POST", "/completion", pieces + b"0\r\nX-Sum: 1\r\n\r\n", chunked)
    yield Case(
        "in chunks with extensions", "POST", "/completion", b"%x;a=b\r\n%s\r\n0\r\n\r\n" % (len(body), body), chunked
    )
    yield Case("nothing in chunks", "POST", "/completion", b"0\r\n\r\n", chunked)
    yield post("expects a word first", "/completion", body, JSON, ("Expect", "100-continue"))
    yield post("accepts gzip", "/completion", body, JSON, ("Accept-Encoding", "gzip, deflate, br"))
    yield post("accepts HTML only", "/completion", body, JSON, ("Accept", "text/html"))
    yield post("closes", "/completion", body, JSON, ("Connection", "close"))
    yield post("with a key that nobody wants", "/completion", body, JSON, ("Authorization", "Bearer nonsense"))
    yield post(
        "with x-api-key",
        "/v1/messages",
        {"model": "alpha", "max_tokens": 4, "messages": HI},
        JSON,
        ("x-api-key", "nonsense"),
    )
    head = b"POST /completion HTTP/1.0\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    yield Case("HTTP/1.0", "POST", "/completion", raw=head + body)
    streamed = json.dumps({"model": "alpha", "prompt": "hi", "stream": True}).encode()
    head = b"POST /completion HTTP/1.0\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(streamed)
    yield Case("HTTP/1.0, streamed", "POST", "/completion", raw=head + streamed)

    audio, completion = "/v1/audio/transcriptions", "/completion"
    sound = ("file", "a.wav", b"RIFF\0\0\0\0WAVE" + bytes(range(256)))
    forms: Mapping[str, tuple[str, bytes]] = {
        "a transcription": (audio, form(("model", None, b"alpha"), sound)),
        "a transcription, the name last": (audio, form(sound, ("model", None, b"alpha"))),
        "a transcription, streamed": (audio, form(("stream", None, b"true"), ("model", None, b"alpha"), sound)),
        "a transcription by an alias": ("/audio/transcriptions", form(("model", None, b"uno"), sound)),
        "a transcription without a file": (audio, form(("model", None, b"alpha"))),
        "a transcription without a name": (audio, form(sound)),
        "a transcription with an unknown name": (audio, form(("model", None, b"nobody"), sound)),
        "a name that is a file": (audio, form(("model", "model.txt", b"alpha"), sound)),
        "two names": (audio, form(("model", None, b"alpha"), ("model", None, b"emb"), sound)),
        "a form without a file": (completion, form(("model", None, b"alpha"), ("prompt", None, b"hi"))),
        "an empty form": (completion, b"--BOUNDARY--\r\n"),
        "a form that is JSON": (completion, body),
        "a form that is cut off": (audio, form(("model", None, b"alpha"), sound)[:-20]),
        "an empty body as a form": (audio, b""),
    }
    for what, (path, content) in forms.items():
        yield post(what, path, content, FORM)
    yield post("a form without a boundary", audio, form(sound), ("Content-Type", "multipart/form-data"))
    quoted = ("Content-Type", 'multipart/form-data; charset=utf-8; boundary="BOUNDARY"')
    yield post("a boundary in quotes", audio, forms["a transcription"][1], quoted)
    yield post("a transcription that is JSON", audio, {"model": "alpha"})
    yield post(
        "a large form", audio, form(("file", "a.wav", b"\r\n--BOUND" * (HUGE // 9)), ("model", None, b"alpha")), FORM
    )
