"""What a multipart form says of the model, however it is cut; llama-server itself is asked where it is here."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from http.client import HTTPConnection
from pathlib import Path

import aiohttp
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.bare_router import BareRouter
from fakes.waiting import PATIENCE_S
from llamavisord.gateway.form_peek import PARTS_MAX, FormPeek
from llamavisord.gateway.peek import NAME_BYTES_MAX, NOT_AN_OBJECT, Peeked, peek_for

X = Peeked("x")
NONE = Peeked(None)
END = b"--B--\r\n"


def part(name: bytes, value: bytes, more: bytes = b"", kind: bytes = b"form-data; ") -> bytes:
    """One part of a form."""
    return b"--B\r\nContent-Disposition: " + kind + b"name=" + name + more + b"\r\n\r\n" + value + b"\r\n"


MODEL = part(b'"model"', b"x")
FORMS: dict[str, tuple[bytes, Peeked]] = {
    "field": (MODEL + END, X),
    "name without quotes": (part(b"model", b"x") + END, X),
    "stream": (MODEL + part(b'"stream"', b"true") + END, Peeked("x", stream=True)),
    "stream is something else": (MODEL + part(b'"stream"', b"1") + END, X),
    "stream twice": (MODEL + part(b'"stream"', b"true") * 2 + END, X),
    "twice": (MODEL + part(b'"model"', b"y") + END, NONE),
    "twice the same": (MODEL + MODEL + END, NONE),
    "file": (part(b'"model"', b"x", b'; filename="f"') + END, NONE),
    "file and field": (part(b'"model"', b"y", b'; filename="f"') + MODEL + END, X),
    "no filename": (part(b'"model"', b"x", b'; filename=""') + END, X),
    "extended filename": (part(b'"model"', b"x", b"; filename*=utf-8''f") + END, NONE),
    "bad extended filename": (part(b'"model"', b"x", b"; filename*=f") + END, NOT_AN_OBJECT),
    "empty extended filename": (part(b'"model"', b"x", b"; filename*=UTF-8''") + END, NOT_AN_OBJECT),
    "not closed": (MODEL, NOT_AN_OBJECT),
    "not quite closed": (MODEL + b"--B-", NOT_AN_OBJECT),
    "closed and no line": (MODEL + b"--B--", X),
    "text before": (b"text --B\r\r\n" + MODEL + END, X),
    "text before without a line": (b"text" + MODEL + END, X),
    "text after": (MODEL + END + MODEL + b"text", X),
    "space after the boundary": (MODEL.replace(b"--B\r", b"--B \r") + END, NOT_AN_OBJECT),
    "space after a later boundary": (MODEL + part(b"a", b"").replace(b"--B\r", b"--B \r") + END, NOT_AN_OBJECT),
    "no part": (END, NOT_AN_OBJECT),
    "empty": (b"", NOT_AN_OBJECT),
    "part without a name": (b"--B\r\nContent-Type: text/plain\r\n\r\nx\r\n" + END, NONE),
    "part without headers": (b"--B\r\n\r\ny\r\n" + MODEL + END, X),
    "attachment": (part(b'"model"', b"x", kind=b"attachment; ") + END, NONE),
    "disposition without a name": (b"--B\r\nContent-Disposition: form-data; a=b\r\n\r\nx\r\n" + END, NOT_AN_OBJECT),
    "capitals": (MODEL.replace(b"Content-Disposition: form-data; ", b"CONTENT-DISPOSITION:FORM-DATA;") + END, X),
    "capital name": (part(b'"model"', b"x").replace(b"; name", b"; Name") + END, NOT_AN_OBJECT),
    "first name": (part(b'"model"', b"x", b'; name="y"') + END, X),
    "no header": (b"--B\r\nheader\r\n" + MODEL[5:] + END, NOT_AN_OBJECT),
    "space in a header": (b"--B\r\na : b\r\n" + MODEL[5:] + END, NOT_AN_OBJECT),
    "folded": (MODEL.replace(b"; name", b";\r\n name") + END, NOT_AN_OBJECT),
    "no escapes": (part(b'"mod\\el"', b"x") + END, NONE),
    "semicolon in a name": (part(b'"a;b"', b"y") + MODEL + END, X),
    "name in a name": (part(b'"a; name=model"', b"y") + END, NONE),
    "one quote": (part(b'"model', b"x") + END, NONE),
    "bad UTF-8": (part(b'"model"', b"x\xff") + END, NOT_AN_OBJECT),
    "bad UTF-8 in a file": (MODEL + part(b'"f"', b"\xff", b'; filename="f"') + END, X),
    "lines in a value": (part(b'"model"', b"a\r\n-\r\n--C\r\n") + END, Peeked("a\r\n-\r\n--C\r\n")),
    "spaces in a value": (part(b'"model"', b" x ") + END, Peeked(" x ")),
    "empty value": (part(b'"model"', b"") + END, Peeked("")),
    "boundary in a value": (part(b'"model"', b"x\r\n--Bx\r\ny") + END, NOT_AN_OBJECT),
    "boundary within a line": (part(b'"model"', b"x--B") + END, Peeked("x--B")),
    "lines without CR": ((MODEL + END).replace(b"\r\n", b"\n"), NOT_AN_OBJECT),
    "a type": (MODEL.replace(b"\r\n\r\n", b"\r\nContent-Type: text/plain\r\n\r\n") + END, X),
    "empty name": (part(b'""', b"y") + MODEL + END, X),
    "spaces in a parameter": (b'--B\r\nContent-Disposition: form-data; name = "model" \r\n\r\nx\r\n' + END, X),
    "two dispositions": (b"--B\r\nContent-Disposition: form-data; name=a\r\n" + MODEL[5:] + END, X),
    "file by its first": (b"--B\r\nContent-Disposition: form-data; name=a; filename=f\r\n" + MODEL[5:] + END, NONE),
    "many headers": (b"--B\r\n" + b"a: b\r\n" * 99 + MODEL[5:] + END, X),
    "too many headers": (b"--B\r\n" + b"a: b\r\n" * 100 + MODEL[5:] + END, NOT_AN_OBJECT),
    "too long a header": (b"--B\r\na: " + b"b" * 9000 + b"\r\n" + MODEL[5:] + END, NOT_AN_OBJECT),
    "many parts": (part(b"a", b"b") * (PARTS_MAX - 1) + MODEL + END, X),
    "too many parts": (part(b"a", b"b") * PARTS_MAX + MODEL + END, NOT_AN_OBJECT),
}
"""Forms, and what llama-server makes of them."""


def peek_at(body: bytes, cuts: Sequence[int], boundary: bytes = b"B") -> Peeked:
    """What is found in a form that comes in pieces."""
    peek = FormPeek(boundary)
    for begin, end in itertools.pairwise([0, *sorted(cuts), len(body)]):
        peek.feed(body[begin:end])
    return peek.finish()


@pytest.mark.parametrize("label", FORMS)
def test_a_form_says_the_same_however_it_is_cut(label: str) -> None:
    """A form is read as llama-server reads it: in one piece, in two of any length, and byte by byte."""
    body, found = FORMS[label]
    assert peek_at(body, []) == found
    assert peek_at(body, range(0, len(body), 1 if len(body) < 1000 else 7)) == found
    for cut in range(0, min(len(body), 300), 1 if len(body) < 1000 else 30):
        assert peek_at(body, [cut]) == found, body[:cut]


@pytest.mark.real
def test_llama_server_reads_these_so(llama_server: Path, models_dir: Path, tmp_path: Path) -> None:
    """What is known here of how llama-server reads forms is true of it."""
    with BareRouter(llama_server, tmp_path / "router", models_dir, arguments=["--no-models-autoload"]) as router:
        for label, (body, found) in FORMS.items():
            connection = HTTPConnection("127.0.0.1", router.port, timeout=PATIENCE_S)
            headers = {"Content-Type": "multipart/form-data; boundary=B"}
            try:
                connection.request("POST", "/v1/audio/transcriptions", body, headers)
                answer = connection.getresponse()
                text = answer.read()
            finally:
                connection.close()
            if found == NOT_AN_OBJECT:
                assert answer.status in {400, 500}, label
                assert not text.startswith(b"{"), label
            else:
                missing = "model name is missing from the request"
                message = f"model '{found.model}' not found" if found.model else missing
                assert json.loads(text)["error"]["message"] == message, label


FIELDS = st.lists(
    st.tuples(st.sampled_from(["model", "stream", "prompt"]), st.just("true") | st.text("ab-\n\räB", max_size=12)),
    max_size=5,
)


def said_by(fields: list[tuple[str, str]]) -> Peeked:
    """What a form of these fields says."""
    models = [value for name, value in fields if name == "model"]
    return Peeked(
        models[0] if len(models) == 1 else None, [value for name, value in fields if name == "stream"] == ["true"]
    )


@settings(max_examples=150, deadline=None)
@given(FIELDS, st.binary(max_size=60), st.lists(st.integers(0, 1500), max_size=6))
def test_forms_as_the_openai_client_sends_them(fields: list[tuple[str, str]], file: bytes, cuts: list[int]) -> None:
    """A form that httpx writes, a file among its fields, is understood wherever it is cut."""
    data: dict[str, list[str]] = {}
    for name, value in fields:
        data.setdefault(name, []).append(value)
    form = httpx.Request("POST", "http://host", data=data, files=[("file", ("a;b.wav", file, "audio/wav"))])
    body = form.read()
    peek = peek_for(form.headers["Content-Type"])
    assert isinstance(peek, FormPeek)
    for begin, end in itertools.pairwise([0, *sorted(cut for cut in cuts if cut < len(body)), len(body)]):
        peek.feed(body[begin:end])
    assert peek.finish() == said_by(fields)


@pytest.mark.anyio
async def test_forms_as_aiohttp_sends_them() -> None:
    """A form that aiohttp writes is understood byte by byte."""
    form = aiohttp.FormData()
    form.add_field("file", b"--\r\n" * 9, filename="model", content_type="audio/wav")
    form.add_field("model", "grün")
    form.add_field("stream", "true")
    payload = form()
    body = await payload.as_bytes()
    peek = peek_for(payload.content_type + f"; boundary={payload.boundary}")
    for begin in range(len(body)):
        peek.feed(body[begin : begin + 1])
    assert peek.finish() == Peeked("grün", stream=True)


def test_a_name_that_is_too_long_is_cut() -> None:
    """A name that no model can have stays bounded, and becomes no name that a model could have."""
    body = part(b'"model"', "ä".encode() * 500_000) + part(b'"stream"', b"true" * 100_000) + END
    for cuts in ([], range(0, len(body), 4097)):
        assert peek_at(body, cuts) == Peeked("ä" * (NAME_BYTES_MAX // 2) + "…")


@pytest.mark.parametrize("filler", [b"x", b"\r\n--", b"\r\n--B\r", b"--B\r\n"[:4]])
@pytest.mark.parametrize(
    "begin", [b"", b"--B\r\n", part(b'"f"', b"", b'; filename="f"')[:-2], part(b'"model"', b"")[:-2]]
)
def test_what_is_kept_is_bounded(begin: bytes, filler: bytes) -> None:
    """However long a file, a field or a line is, little of it is kept."""
    peek = FormPeek(b"B")
    peek.feed(begin)
    for _ in range(50):
        peek.feed(filler * 10_000)
        assert len(peek._data) + sum(map(len, peek._values[b"model"])) <= 12_000


def test_boundaries_that_cannot_be() -> None:
    """A boundary is neither empty nor longer than seventy bytes."""
    for boundary, found in ((b"", NOT_AN_OBJECT), (b"b" * 70, X), (b"b" * 71, NOT_AN_OBJECT), (b"'()+_,-./:=? x", X)):
        assert peek_at((MODEL + END).replace(b"--B", b"--" + boundary), [], boundary) == found
