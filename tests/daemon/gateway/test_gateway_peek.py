"""What a JSON body or a query says of the model, however it is cut; llama-server itself is asked where it is here."""

from __future__ import annotations

import itertools
import json
import random
from http.client import HTTPConnection
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.bare_router import BareRouter
from fakes.waiting import PATIENCE_S
from llamavisord.gateway.json_peek import BLOCK_BYTES, SMALL_BYTES, JsonPeek
from llamavisord.gateway.peek import NAME_BYTES_MAX, NOT_AN_OBJECT, FormPeek, Peeked, peek_for, query_model

SHORTEST = 3
"""The least that is read at once: nearly every cut falls between two reads."""

X = Peeked("x")
NONE = Peeked(None)

READ_ALIKE: dict[str, tuple[bytes, Peeked]] = {
    "last of two": (b'{"model":"first","model":"x"}', X),
    "number last": (b'{"model":"first","model":3}', NONE),
    "null last": (b'{"model":"first","model":null}', NONE),
    "object last": (b'{"model":"first","model":{"model":"no"}}', NONE),
    "list last": (b'{"model":"first","model":["no"]}', NONE),
    "name last": (b'{"model":3,"model":{},"model":"x"}', X),
    "spelled key": (b'{"mod\\u0065l":"x"}', X),
    "spelled key, capitals": (b'{"\\u006D\\u006Fd\\u0065\\u006c":"x"}', X),
    "spelled key last": (b'{"model":"first","mod\\u0065l":"x"}', X),
    "key with more": (b'{"model\\u0000":"no","model ":"no","a\\"model":"no"}', NONE),
    "other case": (b'{"Model":"no"}', NONE),
    "true": (b'{"model":true}', NONE),
    "nothing": (b"{}", NONE),
    "empty name": (b'{"model":""}', Peeked("")),
    "nested": (b'{"a":{"model":"no"},"b":[{"model":"no"}],"model":"x"}', X),
    "nested alone": (b'{"a":{"model":"no","stream":true}}', NONE),
    "nested after": (b'{"model":"x","a":[[{"model":"no","stream":true}]]}', X),
    "value like a key": (b'{"a":"model","b":["model","stream"],"model":"x"}', X),
    "brackets in strings": (b'{"a":"]}","b":"{[\\"{","model":"x"}', X),
    "backslashes": (b'{"a":"\\\\","b":"\\\\\\"","c":"\\\\\\\\","model":"x"}', X),
    "space around": (b' \r\n\t{ "model" : "x" , "stream" : true } \r\n\t', Peeked("x", stream=True)),
    "byte order mark": (b'\xef\xbb\xbf{"model":"x"}', X),
    "NUL at the end": (b'{"model":"x"}\0', X),
    "NULs at the end": (b'{"model":"x"}\n\0\0\0', X),
    "escapes in the name": (b'{"model":"C:\\\\m\\/a\\"b\\u00e4"}', Peeked('C:\\m/a"bä')),
    "surrogate pair": (b'{"model":"\\ud83d\\ude00"}', Peeked("😀")),
    "UTF-8": ('{"model":"grün😀"}'.encode(), Peeked("grün😀")),
    "DEL": (b'{"model":"x\x7f"}', Peeked("x\x7f")),
    "stream": (b'{"stream":true,"model":"x"}', Peeked("x", stream=True)),
    "last stream": (b'{"model":"x","stream":true,"stream":false}', X),
    "stream is text": (b'{"model":"x","stream":"true"}', X),
    "stream is null": (b'{"model":"x","stream":true,"stream":null}', X),
    "stream is a list": (b'{"model":"x","stream":[true]}', X),
    "garbage after": (b'{"model":"x"} x', NOT_AN_OBJECT),
    "another after": (b'{"model":"x"}{"model":"y"}', NOT_AN_OBJECT),
    "brace after": (b'{"model":"x"}}', NOT_AN_OBJECT),
    "string after": (b'{"model":"x"}"', NOT_AN_OBJECT),
    "vertical tab after": (b'{"model":"x"}\x0b', NOT_AN_OBJECT),
    "comment before": (b'/**/{"model":"x"}', NOT_AN_OBJECT),
    "ends early": (b'{"model":"x"', NOT_AN_OBJECT),
    "ends in a string": (b'{"model":"x","a":"}', NOT_AN_OBJECT),
    "ends in an escape": (b'{"model":"x","a":"\\', NOT_AN_OBJECT),
    "ends within": (b'{"model":"x","a":[{}', NOT_AN_OBJECT),
    "list": (b'[{"model":"x"}]', NOT_AN_OBJECT),
    "string": (b'"x"', NOT_AN_OBJECT),
    "null": (b"null", NOT_AN_OBJECT),
    "empty": (b"", NOT_AN_OBJECT),
    "white": (b" \n", NOT_AN_OBJECT),
    "UTF-16": ('{"model":"x"}'.encode("utf-16"), NOT_AN_OBJECT),
    "bad UTF-8 in the name": (b'{"model":"x\xff"}', NOT_AN_OBJECT),
    "UTF-8 cut in the name": (b'{"model":"\xc3"}', NOT_AN_OBJECT),
    "raw surrogate": (b'{"model":"\xed\xa0\x80"}', NOT_AN_OBJECT),
    "half a pair": (b'{"model":"x\\ud800"}', NOT_AN_OBJECT),
    "the other half": (b'{"model":"x\\udc00"}', NOT_AN_OBJECT),
    "bad escape": (b'{"model":"\\x"}', NOT_AN_OBJECT),
    "line in the name": (b'{"model":"x\ny"}', NOT_AN_OBJECT),
}
"""Bodies, and what llama-server makes of them; the short ones."""

NOT_OURS_TO_SAY: dict[str, tuple[bytes, Peeked]] = {
    "comma at the end": (b'{"model":"x",}', X),
    "single quotes": (b"{'model':'x'}", NONE),
    "NaN": (b'{"model":"x","a":NaN}', X),
    "bad number": (b'{"model":"x","a":01}', X),
    "bad UTF-8 elsewhere": (b'{"model":"x","a":"\xff"}', X),
    "wrong bracket within": (b'{"model":"x","a":[1}', NOT_AN_OBJECT),
}
"""What llama-server finds wrong and we do not, or for another reason: it has the last word, in the model's process."""

QUERIES: dict[str, tuple[str | None, bool | None, str]] = {
    query: (model, None, query)
    for query, model in {
        "model=x": "x",
        "model=a&model=x": "x",
        "model=a&model=x&model=a": "x",
        "model=%61%62%2fc%2Bd": "ab/c+d",
        "model=a+b": "a b",
        "model=%": "%",
        "model=%4": "%4",
        "model=%zz1": "%zz1",
        "mod%65l=x": "x",
        "model=a=b": "a=b",
        "model=a;b": "a;b",
        "model=%F0%9F%98%80": "😀",
        "&&model=x&&": "x",
        "a=1&model=x&b": "x",
        "model=x%26y": "x&y",
        "model=": "",
        "model": "",
        "=x": None,
        "MODEL=x": None,
        "": None,
        "id_slot=1&action=save": None,
    }.items()
}
"""Queries without `autoload`."""
AUTOLOADS: dict[str, tuple[str | None, bool | None, str]] = {
    "autoload=1": (None, True, ""),
    "autoload=true": (None, True, ""),
    "autoload=0": (None, False, ""),
    "autoload=True": (None, False, ""),
    "autoload=yes&b=2": (None, False, "b=2"),
    "a=1&autoload=false&b=2&": (None, False, "a=1&b=2&"),
    "autoload=": (None, None, ""),
    "autoload": (None, None, ""),
    "autoload=1&autoload=0": (None, False, ""),
    "autoload=0&autoload=1": (None, True, ""),
    "autoload=0&autoload=": (None, None, ""),
    "%61utoload=0&a": (None, False, "a"),
    "autoload=%31": (None, True, ""),
}
KEYS = st.sampled_from(["model", "stream", "a", "", 'mod"el', "model\\", "ä"]) | st.text(max_size=4)


def peek_at(body: bytes, *cuts: int, block_bytes: int = SHORTEST) -> Peeked:
    """What is found in a body that comes in pieces."""
    peek = JsonPeek(block_bytes=block_bytes)
    edges = [0, *sorted(cuts), len(body)]
    for begin, end in itertools.pairwise(edges):
        peek.feed(body[begin:end])
    return peek.finish()


@pytest.mark.parametrize("label", [*READ_ALIKE, *NOT_OURS_TO_SAY])
def test_a_body_says_the_same_however_it_is_cut(label: str) -> None:
    """A body is read as llama-server reads it, in one piece, in two of any length, and byte by byte."""
    body, found = {**READ_ALIKE, **NOT_OURS_TO_SAY}[label]
    whole = JsonPeek()
    whole.feed(body)
    assert whole.finish() == found
    assert peek_at(body) == found
    assert peek_at(body, *range(len(body))) == found
    for cut in range(len(body)):
        assert peek_at(body, cut, block_bytes=max(SHORTEST, cut)) == found, body[:cut]


def ask(port: int, path: str, body: bytes | None = None) -> str:
    """What llama-server finds wrong with a request."""
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request("GET" if body is None else "POST", path, body, {"Content-Type": "application/json"})
        return str(json.loads(connection.getresponse().read())["error"]["message"])
    finally:
        connection.close()


@pytest.mark.real
def test_llama_server_reads_these_so(llama_server: Path, models_dir: Path, tmp_path: Path) -> None:
    """What is known here of how llama-server reads bodies and queries is true of it."""
    with BareRouter(llama_server, tmp_path / "router", models_dir, arguments=["--no-models-autoload"]) as router:
        for label, (body, found) in READ_ALIKE.items():
            message = ask(router.port, "/v1/chat/completions", body)
            if found.model:
                assert message == f"model '{found.model}' not found", label
            else:
                assert "not found" not in message, label
                assert found == NOT_AN_OBJECT or message.startswith("model name is missing"), label
        for query, (model, _, _) in QUERIES.items():
            if model:
                assert ask(router.port, f"/slots?{query}") == f"model '{model}' not found", query
        for query, (_, autoload, _) in AUTOLOADS.items():
            if not autoload:
                assert ask(router.port, f"/slots?model=alpha&{query}") == "model is not loaded", query


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=10,
)


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """A JSON object, written in any of the ways that there are, some of its keys twice."""
    is_ascii, separators = draw(st.booleans()), draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t:\r ")]))
    members = [
        f"{json.dumps(key, ensure_ascii=is_ascii)}{separators[1]}"
        f"{json.dumps(value, ensure_ascii=is_ascii, separators=separators, indent=draw(st.sampled_from([None, 1])))}"
        for key, value in draw(st.lists(st.tuples(KEYS, VALUES), max_size=6))
    ]
    return ("{" + separators[0].join(members) + "}").encode()


@settings(max_examples=120, deadline=None)
@given(body=documents(), block_bytes=st.integers(SHORTEST, 40), data=st.data())
def test_a_document_says_what_its_parser_says(body: bytes, block_bytes: int, data: st.DataObject) -> None:
    """Any object is understood as the JSON parser understands it, however it is cut."""
    document = json.loads(body)
    model = document.get("model")
    found = Peeked(model if isinstance(model, str) else None, document.get("stream") is True)
    assert peek_at(body, block_bytes=BLOCK_BYTES) == found
    cuts = data.draw(st.lists(st.integers(0, len(body)), max_size=5))
    assert peek_at(body, *cuts, block_bytes=block_bytes) == found
    cut = data.draw(st.integers(0, len(body) - 1))
    assert peek_at(body[:cut], *(each for each in cuts if each <= cut), block_bytes=block_bytes) == NOT_AN_OBJECT
    assert peek_at(body + b"1", *cuts, block_bytes=block_bytes) == NOT_AN_OBJECT


PIECES = (b'"', b"\\", b"{", b"}", b"[", b"]", b":", b",", b'"model"', b'"stream"', b"true", b" ", b"\xff", b"\0", b"x")


@settings(max_examples=120, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=30), st.integers(SHORTEST, 12))
def test_nothing_that_is_sent_breaks_it(pieces: list[bytes], block_bytes: int) -> None:
    """Whatever is sent, something is found in it; and what is an object for the parser is never called none."""
    body = b'{"model":"x"' + b"".join(pieces)
    found = peek_at(body, *range(0, len(body), 2), block_bytes=block_bytes)
    try:
        json.loads(body)
    except ValueError:
        return
    assert found.is_object


def test_a_member_across_two_blocks() -> None:
    """The members that matter are found wherever the end of what is read at once falls on them."""
    members = b',"mod\\u0065l" : "a\\\\b\\"", "stream" :true'
    for before in range(len(members) + 2):
        body = b'{"a":1'.ljust(BLOCK_BYTES - before) + members + b"}"
        assert peek_at(body, block_bytes=BLOCK_BYTES) == Peeked('a\\b"', stream=True), before


def test_a_name_may_be_far_from_its_key() -> None:
    """White space between a key and its value may be longer than what is read at once."""
    white = " " * (2 * BLOCK_BYTES)
    body = (
        f'{white}{{{white}"model"{white}:{white}"x"{white},{white}"stream"{white}:{white}true{white}}}{white}'.encode()
    )
    assert peek_at(body, block_bytes=BLOCK_BYTES) == Peeked("x", stream=True)
    assert peek_at(body[:-1] + b"x", block_bytes=BLOCK_BYTES) == NOT_AN_OBJECT


@pytest.mark.parametrize("backslashes", range(5))
@pytest.mark.parametrize("length", [BLOCK_BYTES - 20, BLOCK_BYTES - 12, BLOCK_BYTES - 11, 3 * BLOCK_BYTES])
def test_a_long_string_ends_where_it_ends(backslashes: int, length: int) -> None:
    """Backslashes at the end of a block, or of a string that is longer than one, hide what they hide."""
    text = "A" * length + "\\" * backslashes + '"'
    for depth in (0, 2):
        body = json.dumps({"a": [[text]] if depth else text, "model": "x"}, separators=(",", ":")).encode()
        for extra in range(12):
            assert peek_at(b"{" + b" " * extra + body[1:], block_bytes=BLOCK_BYTES) == X


@pytest.mark.parametrize("block_bytes", [BLOCK_BYTES, 1000])
@pytest.mark.parametrize("length", [NAME_BYTES_MAX + 1, 8000, SMALL_BYTES, 200_000])
def test_a_name_that_is_too_long_is_cut(length: int, block_bytes: int) -> None:
    """A name that no model can have stays bounded, and becomes no name that a model could have."""
    body = json.dumps({"model": "ä" * (length // 2) + "x", "stream": True}, ensure_ascii=False).encode()
    found = peek_at(body, block_bytes=block_bytes)
    assert found == Peeked("ä" * (NAME_BYTES_MAX // 2) + "…", stream=True)


def test_a_stream_that_is_a_long_text() -> None:
    """However long the text is that stands for `stream`, it is no yes."""
    body = json.dumps({"stream": True, "model": "x"})[:-1] + ',"stream":"' + "true" * 5000 + '"}'
    assert peek_at(body.encode(), 5000, 9000) == X


def test_the_longest_name() -> None:
    """The longest name that may be is found even if all of it is written as escapes."""
    name = "x" * NAME_BYTES_MAX
    body = ('{"model":"' + "\\u0078" * NAME_BYTES_MAX + '"}').encode()
    assert peek_at(body) == Peeked(name)
    assert peek_at(b" " * (BLOCK_BYTES - 3000) + body, block_bytes=BLOCK_BYTES) == Peeked(name)


def test_what_is_kept_is_bounded() -> None:
    """However long a string, a key, a number or a nesting is, little of it is kept."""
    for long in ('"k', '"model":"', '"stream":"', '"stream":1', '"a":' + "[", '"a":"\\'):
        peek = JsonPeek()
        peek.feed(b'{"model":"m",')
        peek.feed(long.encode() + long[-1:].encode() * 20 * BLOCK_BYTES)
        kept = len(peek._carry) + len(peek._model or "") + sum(map(len, peek._gathered))
        assert kept <= 10_000, long


def test_nesting_has_no_limit() -> None:
    """A body may be nested as deep as it is long."""
    depth = 4 * BLOCK_BYTES
    for begin, end in ((b"[", b"]"), (b'{"model":', b"}")):
        body = b'{"a":' + begin * depth + b"0" + end * depth + b',"model":"x"}'
        assert peek_at(body, block_bytes=BLOCK_BYTES) == X


def test_large_bodies() -> None:
    """Bodies as they are sent are read across many blocks."""
    dice = random.Random(5)
    chat = [{"role": "user", "content": f'line {number}\n"quoted" {{[\\'} for number in range(5000)]
    picture = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "QUJD" * 100_000}}]
    for more in ({"messages": chat}, {"messages": picture}, {"prompt": list(range(50_000))}):
        for document in ({"model": "x", "stream": True, **more}, {**more, "stream": True, "model": "x"}):
            body = json.dumps(document).encode()
            cuts = [dice.randrange(len(body)) for _ in range(20)]
            assert peek_at(body, *cuts, block_bytes=BLOCK_BYTES) == Peeked("x", stream=True)


@pytest.mark.parametrize("query", QUERIES)
def test_the_model_of_a_query(query: str) -> None:
    """A query names its model as llama-server reads it."""
    assert query_model(query) == QUERIES[query]


@pytest.mark.parametrize("query", AUTOLOADS)
def test_whether_a_query_wants_the_model_loaded(query: str) -> None:
    """`autoload` is read as llama-server reads it, and is not passed on."""
    assert query_model(query) == AUTOLOADS[query]


def test_a_fragment_is_no_part_of_a_query() -> None:
    """What follows a number sign is not looked at, nor passed on."""
    assert query_model("a&model=x#y&autoload=1") == ("x", None, "a&model=x")


def test_bytes_that_are_no_text_in_a_query() -> None:
    """A query with bytes that are no UTF-8, as they are or escaped, is one for a model that does not exist."""
    assert query_model("model=%ff&a=1") == ("\ufffd", None, "model=%ff&a=1")
    assert query_model(b"model=\xff".decode("utf-8", "surrogateescape"))[0] == "\ufffd"


@pytest.mark.parametrize("kind", [None, "", "application/json", "application/x-www-form-urlencoded", "text/plain"])
def test_most_bodies_are_taken_for_json(kind: str | None) -> None:
    """The Content-Type of a body does not matter: curl sends JSON as a form."""
    assert isinstance(peek_for(kind), JsonPeek)


@pytest.mark.parametrize(
    ("kind", "is_form"),
    [
        ("multipart/form-data; boundary=B", True),
        (' multipart/form-data ;charset=x; boundary="B"; a=b', True),
        ("Multipart/Form-Data; boundary=B", False),
        ("multipart/mixed; boundary=B", False),
    ],
)
def test_forms_are_what_llama_server_takes_for_one(kind: str, is_form: bool) -> None:
    """Only multipart/form-data in small letters is read as a form, with the boundary that it names."""
    peek = peek_for(kind)
    assert isinstance(peek, FormPeek if is_form else JsonPeek)
    peek.feed(b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nx\r\n--B--' if is_form else b'{"model":"x"}')
    assert peek.finish() == X


@pytest.mark.parametrize("parameters", ["", "; BOUNDARY=B", "; boundary=", "; boundary=" + "B" * 71, "; a=boundary"])
def test_a_form_without_a_boundary_is_none(parameters: str) -> None:
    """A form that does not say where its parts end is for llama-server to refuse."""
    peek = peek_for(f"multipart/form-data{parameters}")
    peek.feed(b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nx\r\n--B--')
    assert peek.finish() == NOT_AN_OBJECT
