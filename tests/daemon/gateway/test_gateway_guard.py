"""Who may do what from where."""

from __future__ import annotations

import anyio
import pytest
from aiohttp import HttpVersion10, web
from anyio.abc import SocketAttribute, SocketStream
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from fakes.waiting import PATIENCE_S
from llamavisord.config import GatewaySettings
from llamavisord.gateway.guard import NOBODY, Caller, Guard
from llamavisord.gateway.keys import Key, Keys, _digest
from llamavisord.gateway.replies import Trouble, TroubleError

KEYS = Keys(
    (
        Key("root", _digest("sk-root"), is_admin=True),
        Key("alice", _digest("sk-alice"), models=("qwen*", "alpha")),
    )
)
OPEN = Guard(GatewaySettings())
LOCKED = Guard(GatewaySettings(keys=KEYS))
EVIL = "https://evil.example"


def headers(host: str | None = "localhost:8080", **more: str) -> CIMultiDictProxy[str]:
    """The headers of a request; an underscore stands for a hyphen."""
    found = CIMultiDict({name.replace("_", "-"): value for name, value in more.items()})
    if host is not None:
        found["Host"] = host
    return CIMultiDictProxy(found)


def trouble_of(
    guard: Guard, sent: CIMultiDictProxy[str], *, method: str = "POST", target: str = "/v1/chat/completions"
) -> Trouble:
    """Why a request is refused."""
    with pytest.raises(TroubleError) as caught:
        guard.admit(method, target, sent)
    return caught.value.trouble


def is_admitted(
    guard: Guard, sent: CIMultiDictProxy[str], *, method: str = "POST", target: str = "/v1/chat/completions"
) -> bool:
    """Whether a request is answered."""
    try:
        guard.admit(method, target, sent)
    except TroubleError:
        return False
    return True


# Keys


@pytest.mark.parametrize(
    "sent",
    [
        headers(Authorization="Bearer sk-root"),
        headers(Authorization="sk-root"),
        headers(x_api_key="sk-root"),
        headers(X_API_KEY="Bearer sk-root"),
        headers(Authorization="", x_api_key="sk-root"),
        headers(Authorization="Bearer sk-root", x_api_key="wrong"),
    ],
)
def test_a_key_is_taken_wherever_llama_server_takes_it(sent: CIMultiDictProxy[str]) -> None:
    """With and without Bearer, in Authorization or, if there is none, in x-api-key."""
    caller = LOCKED.admit("POST", "/v1/chat/completions", sent)
    assert (caller.name, caller.is_admin) == ("root", True)
    assert caller.may_use("anything")
    caller.check_admin()
    caller.check_model("anything")


@pytest.mark.parametrize(
    "sent",
    [
        headers(),
        headers(Authorization="Bearer wrong"),
        headers(Authorization="bearer sk-root"),
        headers(Authorization="Bearer  sk-root"),
        headers(Authorization="Bearer"),
        headers(Authorization="Basic sk-root"),
        headers(Authorization="wrong", x_api_key="sk-root"),
        headers(Authorization="Bearer \udcff"),
        headers(x_api_key=""),
        headers(Cookie="key=sk-root"),
    ],
)
def test_without_a_right_key_it_is_as_llama_server_says(sent: CIMultiDictProxy[str]) -> None:
    """In its own words and format, on every path and method."""
    for method, target in (("POST", "/v1/messages"), ("GET", "/models"), ("GET", "/"), ("GET", "/v1/models?x=/health")):
        trouble = trouble_of(LOCKED, sent, method=method, target=target)
        assert trouble == Trouble(401, "Invalid API Key", is_native=True)


def test_health_is_open_and_gives_no_rights() -> None:
    """From anywhere, also for a client that calls us by some name: it tells nothing."""
    for target in ("/health", "/v1/health", "/health?x=1"):
        assert LOCKED.admit("GET", target, headers("llm.example.org", Origin=EVIL)) is NOBODY
        assert OPEN.admit("GET", target, headers("llm.example.org", Origin=EVIL)) == Caller()
    for target in ("/healthy", "/v1/health/", "/Health", "//health", "/%68ealth"):
        assert not is_admitted(LOCKED, headers(), method="GET", target=target)


def test_nobody_may_do_nothing_and_anybody_everything() -> None:
    """The one has shown no key where one is needed, the other needs none."""
    assert not NOBODY.may_use("m")
    with pytest.raises(TroubleError, match="no API key may load"):
        NOBODY.check_admin()
    anybody = OPEN.admit("POST", "/models/load", headers())
    assert anybody == Caller()
    assert anybody.may_use("m")
    anybody.check_admin()


def test_a_key_may_use_the_models_on_its_list_and_load_none_for_others() -> None:
    """It is told which key that is, and never the key itself."""
    alice = LOCKED.admit("POST", "/v1/messages", headers(x_api_key="sk-alice"))
    assert [name for name in ("qwen3-8b", "alpha", "alphabet", "Qwen", "beta") if alice.may_use(name)] == [
        "qwen3-8b",
        "alpha",
    ]
    alice.check_model("qwen3-8b")
    with pytest.raises(TroubleError) as caught:
        alice.check_model("be\nta")
    assert caught.value.trouble == Trouble(403, "the API key alice may not use the model be\\nta")
    with pytest.raises(TroubleError) as caught:
        alice.check_admin()
    assert caught.value.trouble.status == 403
    assert "the API key alice may load, unload, reload, download or delete models only if" in str(caught.value)
    assert "sk-alice" not in str(caught.value)


def test_with_keys_a_key_is_all_that_counts() -> None:
    """Names of a reverse proxy, and programs with an origin of their own, need not be written down."""
    for sent in (
        headers("llm.example.org", Authorization="sk-root"),
        headers(Origin="app://obsidian.md", Authorization="sk-root"),
        headers(Sec_Fetch_Site="cross-site", Authorization="sk-root"),
    ):
        assert LOCKED.admit("POST", "/v1/chat/completions", sent).name == "root"


# Host


@pytest.mark.parametrize(
    "host",
    [
        *(
            "localhost",
            "localhost:8080",
            "LOCALHOST",
            "localhost.",
            "127.0.0.1:8080",
            "127.9.9.9",
            "[::1]:8080",
            "[::1]",
        ),
        *("192.168.0.7:8080", "8.8.8.8", "[fe80::1]", "gpu-box", "llamavisor:8080", "gpu_box"),
        *("box.local", "host.docker.internal:8080", "api.localhost", "nas.home.arpa"),
    ],
)
def test_hosts_that_no_stranger_can_own_are_fine(host: str) -> None:
    """Addresses, and names that no public name server has."""
    assert is_admitted(OPEN, headers(host))


@pytest.mark.parametrize(
    "host",
    [
        *(
            "evil.example",
            "evil.example:8080",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "notlocal.evil",
            "evil.notlocal",
        ),
        *("[::1", "localhost:", "localhost:x", "localhost:8080:1", "a b", "user@localhost", "localhost/x"),
        *("[evil.example]", "127.0.0.1,evil.example", "é.local", "x" * 300, ".", "127.1", "[]"),
    ],
)
def test_a_page_that_has_its_own_name_turned_to_us_is_refused(host: str) -> None:
    """So is what is no host at all; the message says what to do."""
    trouble = trouble_of(OPEN, headers(host))
    assert trouble.status == 403
    assert "allow_hosts" in trouble.message
    assert len(trouble.message) < 500


def test_names_that_are_written_and_those_of_the_machine_are_fine() -> None:
    """With any port, upper and lower case alike; others still are not."""
    settings = GatewaySettings(host="llm.example.org", allow_hosts=("chat.example.org",))
    guard = Guard(settings, own_names=("Box.Example.net",))
    for host in ("llm.example.org:8080", "CHAT.example.org", "box.example.net.", "localhost"):
        assert is_admitted(guard, headers(host))
    assert not is_admitted(guard, headers("example.org"))
    assert not is_admitted(guard, headers("x.chat.example.org"))
    assert is_admitted(Guard(GatewaySettings(allow_hosts=("*",))), headers("evil.example"))


@pytest.mark.parametrize("guard", [OPEN, LOCKED])
def test_a_request_says_whom_it_is_for(guard: Guard) -> None:
    """HTTP/1.1 demands it; HTTP/1.0 does not know it."""
    for sent in (headers(None, x_api_key="sk-root"), headers("", x_api_key="sk-root")):
        assert trouble_of(guard, sent).status == 400
        assert guard.admit("GET", "/models", sent, version=HttpVersion10).is_admin


# Origin


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://localhost:3000", "localhost:8080"),
        ("https://localhost", "127.0.0.1:8080"),
        ("http://127.0.0.1:5173", "localhost:8080"),
        ("http://[::1]:1", "192.168.0.7:8080"),
        ("http://192.168.0.7:8080", "192.168.0.7:8080"),
        ("http://gpu-box:8080", "GPU-box:8080"),
    ],
)
def test_pages_of_this_machine_and_our_own_may_use_it_and_read_answers(origin: str, host: str) -> None:
    """Any port of localhost, and the place that the request itself was sent to."""
    sent = headers(host, Origin=origin, Sec_Fetch_Site="cross-site")
    assert is_admitted(OPEN, sent)
    assert OPEN.cors_headers(sent) == (("Access-Control-Allow-Origin", origin), ("Vary", "Origin"))


@pytest.mark.parametrize(
    "origin",
    [
        *(
            EVIL,
            "null",
            "",
            "http://localhost.evil.example",
            "http://localhost:3000.evil.example",
            "http://localhost@evil",
        ),
        *("chrome-extension://abc", "file://", "http://", "localhost", "http://127.0.0.1:x", "http://localhost:8080/"),
        *("http://192.168.0.8:8080", "http://192.168.0.7", "app://192.168.0.7:8080", "http://" + "x" * 300, "\n"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
def test_pages_of_others_may_not(origin: str, method: str) -> None:
    """Also with a POST that browsers send without asking first; the message says what to do."""
    sent = headers("192.168.0.7:8080", Origin=origin)
    trouble = trouble_of(OPEN, sent, method=method)
    assert trouble.status == 403
    assert "allow_origins" in trouble.message
    assert trouble.message.isprintable()
    assert OPEN.cors_headers(sent) == (("Vary", "Origin"),)


def test_origins_that_are_written_are_allowed() -> None:
    """Exactly those; a star stands for all, `null` included."""
    guard = Guard(GatewaySettings(allow_origins=("https://chat.example.org", "app://obsidian.md")))
    for origin in ("https://chat.example.org", "app://obsidian.md"):
        assert is_admitted(guard, headers(Origin=origin))
        assert guard.cors_headers(headers(Origin=origin))[0] == ("Access-Control-Allow-Origin", origin)
    for origin in ("http://chat.example.org", "https://chat.example.org:8443", EVIL):
        assert not is_admitted(guard, headers(Origin=origin))
    everybody = Guard(GatewaySettings(allow_origins=("*",)))
    for origin in (EVIL, "null"):
        assert is_admitted(everybody, headers(Origin=origin))
        assert everybody.cors_headers(headers(Origin=origin))[0] == ("Access-Control-Allow-Origin", origin)


def test_with_keys_a_foreign_page_gets_an_answer_that_it_cannot_read() -> None:
    """Whoever sends the key may ask, but only allowed pages are let read."""
    sent = headers(Origin=EVIL, Authorization="sk-root")
    assert is_admitted(LOCKED, sent)
    assert LOCKED.cors_headers(sent) == (("Vary", "Origin"),)


def test_who_is_no_browser_is_told_nothing_of_origins() -> None:
    """Nothing is added to answers that no web page asked for."""
    assert OPEN.cors_headers(headers()) == ()
    assert LOCKED.cors_headers(headers()) == ()


@pytest.mark.parametrize(
    ("target", "sent", "is_fine"),
    [
        ("/props?model=a", {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Dest": "image"}, False),
        ("/props?model=a", {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Dest": "document"}, False),
        ("/", {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Dest": "document"}, True),
        ("/?q=hello", {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Dest": "document"}, True),
        ("/", {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Dest": "iframe"}, False),
        ("/props?model=a", {"Sec_Fetch_Site": "same-origin"}, True),
        ("/props?model=a", {"Sec_Fetch_Site": "same-site"}, True),
        ("/props?model=a", {"Sec_Fetch_Site": "none"}, True),
        ("/props?model=a", {}, True),
    ],
)
def test_what_a_foreign_page_embeds_is_refused(target: str, sent: dict[str, str], is_fine: bool) -> None:
    """A picture whose address loads a model; but a link to the web UI works, and so does what people type."""
    assert is_admitted(OPEN, headers(**sent), method="GET", target=target) is is_fine
    assert is_admitted(Guard(GatewaySettings(allow_origins=("*",))), headers(**sent), method="GET", target=target)


# Preflights


def test_a_preflight_is_answered_as_by_llama_server_without_a_key() -> None:
    """Browsers send none with it; the headers that the page wants are allowed by name, Authorization among them."""
    sent = headers(
        Origin="http://localhost:3000",
        Access_Control_Request_Method="POST",
        Access_Control_Request_Headers="authorization, content-type",
    )
    for guard in (OPEN, LOCKED):
        assert is_admitted(guard, sent, method="OPTIONS")
        assert guard.preflight(sent) == (
            ("Access-Control-Allow-Origin", "http://localhost:3000"),
            ("Vary", "Origin"),
            ("Access-Control-Allow-Credentials", "true"),
            ("Access-Control-Allow-Methods", "GET, POST, DELETE, OPTIONS"),
            ("Access-Control-Allow-Headers", "authorization, content-type"),
        )


@pytest.mark.parametrize("wanted", ["", "a b", "a,\r\nSet-Cookie: x", "x" * 3000, "é", ","])
def test_a_preflight_does_not_repeat_what_are_no_names_of_headers(wanted: str) -> None:
    """Then everything is allowed that a star stands for."""
    answer = dict(OPEN.preflight(headers(Access_Control_Request_Headers=wanted)))
    assert answer["Access-Control-Allow-Headers"] == "*"
    assert "Access-Control-Allow-Origin" not in answer


def test_a_preflight_of_a_foreign_page_is_refused_with_keys_too() -> None:
    """Its reader sees the reason among the network requests; a browser would stop it anyway."""
    for guard in (OPEN, LOCKED):
        assert trouble_of(guard, headers(Origin=EVIL), method="OPTIONS").status == 403
        assert trouble_of(guard, headers(Origin=EVIL), method="OPTIONS", target="/health").status == 403


# Targets


@pytest.mark.parametrize("guard", [OPEN, LOCKED])
@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "http://localhost:8080/health"),
        ("GET", "http://evil.example/"),
        ("OPTIONS", "*"),
        ("CONNECT", "evil.example:443"),
        ("CONNECT", "/"),
        ("GET", ""),
        ("GET", "?x"),
        ("GET", "/models/%u006coad"),
        ("GET", "/models/%6coad"),
        ("GET", "/models/%6Coad"),
        ("GET", "/models%2fload"),
        ("GET", "/v1/chat%2Fcompletions"),
        ("GET", "/slots/%30"),
        ("GET", "/%2e/models"),
        ("GET", "/models/load#x"),
        ("GET", "/models?x#y"),
        ("GET", "/models/loa%6"),
        ("GET", "/%"),
    ],
)
def test_what_is_no_path_on_this_server_is_refused(guard: Guard, method: str, target: str) -> None:
    """It is no proxy; and what it would read otherwise than llama-server, it does not read."""
    trouble = trouble_of(guard, headers(x_api_key="sk-root"), method=method, target=target)
    assert trouble.status == 400


@pytest.mark.parametrize(
    "target", ["/models/%20load", "/%C3%a9", "//evil.example/", "/a?%u006c=%", "/http://evil.example/"]
)
def test_odd_paths_are_paths(target: str) -> None:
    """What is behind them is for others to say."""
    assert is_admitted(OPEN, headers(), method="GET", target=target)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ("GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        ("GET http://localhost/health HTTP/1.1\r\nHost: evil.example\r\n\r\n", 400),
        ("CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        ("OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost:\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
        ("GET / HTTP/1.0\r\n\r\n", 200),
        ("GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
        ("GET / HTTP/1.1\r\nhost: localhost\r\n\r\n", 200),
        ("GET / HTTP/1.1\r\nHost: localhost\r\norigin: null\r\n\r\n", 403),
        ("POST / HTTP/1.1\r\nHost: localhost\r\nORIGIN: https://evil.example\r\nContent-Length: 0\r\n\r\n", 403),
    ],
)
async def test_requests_as_they_come_over_the_wire(request_: str, status: int) -> None:
    """What aiohttp makes of them is what is judged, and what it does not take is 400 as well."""

    async def answer(request: web.BaseRequest) -> web.Response:
        try:
            OPEN.admit(request.method, request.raw_path, request.headers, version=request.version)
        except TroubleError as error:
            return web.Response(status=error.trouble.status)
        return web.Response()

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = int(runner.addresses[0][1])
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            assert isinstance(stream, SocketStream)
            assert stream.extra(SocketAttribute.remote_port) == port
            await stream.send(request_.encode())
            with anyio.fail_after(PATIENCE_S):
                assert (await stream.receive()).split(b" ", 2)[1] == str(status).encode()
    finally:
        await runner.cleanup()


# Anything at all


@given(st.text("/-._~aZ09", min_size=1, max_size=8), st.data())
def test_a_known_path_has_one_spelling(path: str, data: st.DataObject) -> None:
    """Whatever character is escaped, in upper or lower case: nothing is checked by one name and done by another."""
    at = data.draw(st.integers(0, len(path) - 1))
    spelled = data.draw(st.sampled_from([f"%{ord(path[at]):02x}", f"%{ord(path[at]):02X}", f"%u{ord(path[at]):04x}"]))
    assert is_admitted(OPEN, headers(), target=f"/{path}")
    assert not is_admitted(OPEN, headers(), target=f"/{path[:at]}{spelled}{path[at + 1 :]}")


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_no_header_makes_more_than_a_refusal(target: str, host: str, origin: str, wanted: str) -> None:
    """One printable line, and never a page that is allowed although it is not of this machine."""
    sent = headers(host, Origin=origin, Access_Control_Request_Headers=wanted, Authorization=wanted)
    for guard in (OPEN, LOCKED):
        try:
            guard.admit("GET", f"/{target.replace('#', '')}", sent)
        except TroubleError as error:
            told = str(error)
        else:
            told = ""
        assert told.isprintable()
        allowed = dict(guard.cors_headers(sent)).get("Access-Control-Allow-Origin")
        assert allowed is None or "localhost" in origin or origin.endswith(f"://{host}") or "127.0.0.1" in origin
        assert all("\n" not in value for name, value in guard.preflight(sent) if name.endswith("-Headers"))
