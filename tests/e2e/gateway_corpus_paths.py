"""Every path and method, what is asked about models, and what manages them; part of `gateway_corpus`."""

from __future__ import annotations

from collections.abc import Iterator

from e2e.gateway_case import COLD, HI, JSON, Case, Instead, get, post

_ALWAYS = "answered by the gateway itself, for all routers: only their place and form are compared"


def about_models() -> Iterator[Case]:
    """What is asked about a model, with a query."""
    moment = "numbers of the moment"
    for path, loosely in {"/props": "", "/slots": moment, "/metrics": moment, "/lora-adapters": ""}.items():
        yield get(f"{path}?model=alpha", loosely=loosely)
        yield get(f"{path}?model=uno", loosely=loosely)
        yield get(f"{path}?model=nobody")
        yield get(f"{path}?model=alpha&autoload=false", loosely=loosely)
        yield get(f"{path}?model=%61lpha", loosely=loosely)
        yield get(f"{path}?model=nobody&model=alpha", loosely=loosely)
        yield get(f"{path}?model=alpha&x=%20%2B%26+y", loosely=loosely)
        yield Case(f"HEAD {path}", "HEAD", f"{path}?model=alpha", loosely=loosely)
        if path != "/props":
            yield get(path)
            yield get(f"{path}?model=")
            yield get(f"{path}?autoload=false")
    yield get("/slots?model=alpha&fail_on_no_slot=1", loosely=moment)
    yield get("/props?model=al%ff")
    yield get("/props?model=al%zz")
    yield get("/props?MODEL=alpha&nothing", name="props with a query that names none", loosely=_ALWAYS)
    yield post("POST /props", "/props", {"model": "alpha"})
    yield post("POST /props of nobody", "/props", {"model": "nobody"})
    yield post("POST /slots", "/slots", {"model": "alpha"})
    for slot in ("0", "99", "x", "-1"):
        for action in ("erase", "save", "nonsense"):
            yield post(f"{action} slot {slot}", f"/slots/{slot}?action={action}", {"model": "alpha", "filename": "a"})
    yield post("a slot without an action", "/slots/0", {"model": "alpha"})
    yield post("lora-adapters are a list", "/lora-adapters", [{"id": 0, "scale": 0.5}])
    yield post("lora-adapters of a model", "/lora-adapters", {"model": "alpha"})
    # Whether a model may be loaded for a request, on either side the last one said.
    not_loaded = {name: {"model": name, "prompt": "hi"} for name in COLD}
    for value in ("0", "false", "no", "TRUE"):
        yield get(f"/props?model=cold1&autoload={value}")
        yield post(f"autoload={value}", f"/completion?autoload={value}", not_loaded["cold1"])
        yield post(
            f"autoload={value} of a loaded one", f"/completion?autoload={value}", {"model": "alpha", "prompt": "hi"}
        )
        yield post(f"autoload={value} of nobody", f"/completion?autoload={value}", {"model": "nobody"})
    yield post("autoload=1", "/completion?autoload=1", not_loaded["cold2"])
    yield post("autoload=true", "/completion?autoload=true", not_loaded["cold3"])
    yield post("autoload= ", "/completion?autoload=", not_loaded["cold4"])
    yield get("/props?model=cold5")
    yield post("cold, streamed", "/v1/chat/completions", {"model": "cold6", "messages": HI, "stream": True})


def management() -> Iterator[Case]:
    """The list of models and what loads and unloads them; `alpha` is loaded, `cold1` is not."""
    for path in ("/models", "/v1/models"):
        yield get(path, loosely=_ALWAYS)
        yield get(f"{path}?reload=1", loosely=_ALWAYS)
        yield Case(f"HEAD {path}", "HEAD", path, loosely=_ALWAYS)
    yield get("/props", loosely=_ALWAYS)
    for action in ("load", "unload"):
        path = f"/models/{action}"
        yield post(f"{action} nobody", path, {"model": "nobody"})
        yield post(f"{action} without a name", path, {})
        yield post(f"{action} a number", path, {"model": 7})
        yield post(f"{action}: a list", path, [1])
        yield post(f"{action}: no JSON", path, b"{")
        yield post(f"{action}: nothing", path, b"")
        yield get(path)
    yield post("load a loaded one", "/models/load", {"model": "alpha"})
    yield post("load a loaded one by its alias", "/models/load", {"model": "uno"})
    yield post("unload one that is not loaded", "/models/unload", {"model": "cold1"})
    yield post("unload", "/models/unload", {"model": "cold2"})
    yield post("load", "/models/load", {"model": "cold1"})
    yield post("POST /models of nothing", "/models", {})
    yield post("POST /models of no word", "/models", {"model": 7})
    yield post("POST /models of no repository", "/models", {"model": "nothing"})
    yield post("POST /models: no JSON", "/models", b"{")
    yield Case("DELETE /models of nothing", "DELETE", "/models")
    yield Case("DELETE /models of nobody", "DELETE", "/models?model=nobody")
    yield Case("DELETE /models of an empty name", "DELETE", "/models?model=")


def paths() -> Iterator[Case]:
    """Paths and methods that exist and that do not."""
    for path in ("/health", "/v1/health"):
        yield get(path)
        yield Case(f"HEAD {path}", "HEAD", path)
        yield post(f"POST {path}", path, {})
        yield get(f"{path}?model=nobody")
    for path in (
        "/nope",
        "/v1",
        "/v1/",
        "/v1/nope",
        "/V1/models",
        "/v1/models/",
        "/v1/models/alpha",
        "//v1/models",
        "/models/status",
        "/health/",
        "/version",
        "/.git/config",
        "/v1/chat/../models",
        "/sw.js",
        "/favicon.ico",
        "/control/v1/status",
        "/x" * 1000,
    ):
        yield get(path, name=f"GET {path[:40]}")
    for path in ("/", "/index.html"):
        yield get(path)
        yield get(path, ("Accept-Encoding", "gzip"), name=f"GET {path} with gzip")
        yield Case(f"HEAD {path}", "HEAD", path)
    encoded = Instead(400, "%", "one path has one spelling: another would lead past who may use which model")
    chat = {"model": "alpha", "messages": HI}
    yield post("an encoded path", "/v1/%63hat/completions", chat, instead=encoded)
    yield post("encoded management", "/models/unl%6fad", {"model": "alpha"}, instead=encoded)
    yield post("encoded management: a download", "/model%73", {"model": "x"}, instead=encoded)
    yield get("/v1/%6dodels/nope", instead=encoded)
    yield get("/..%2f..%2fetc/passwd", instead=encoded)
    fragment = Instead(400, "proxy", "likewise")
    yield post("a path with a fragment", "/v1/chat/completions#x", chat, instead=fragment)
    yield post("a path of another server", "http://localhost/v1/chat/completions", chat, instead=fragment)
    for path in ("/v1/chat/completions", "/v1/messages", "/completion", "/v1/embeddings", "/tokenize", "/v1/responses"):
        yield get(path)
        yield Case(f"HEAD {path}", "HEAD", path)
        for method in ("PUT", "PATCH", "DELETE"):
            yield Case(f"{method} {path}", method, path, b"{}", (JSON,))
    for path in ("/v1/models", "/props", "/health", "/nope", "/"):
        for method in ("PUT", "PATCH", "DELETE"):
            yield Case(f"{method} {path}", method, path, b"{}", (JSON,))
    yield post("POST /v1/models", "/v1/models", {"model": "alpha"})
    yield post("POST to nowhere", "/nope", {"model": "alpha"})
    yield post("a body that is no JSON to nowhere", "/nope", b"{")
    for path in ("/tools", "/cors-proxy"):
        yield get(path)
        yield post(f"POST {path}", path, {})
    localhost = ("Origin", "http://localhost:3000")
    for path in ("/v1/chat/completions", "/v1/models", "/health", "/nope"):
        asks = (("Access-Control-Request-Method", "POST"), ("Access-Control-Request-Headers", "content-type"))
        yield Case(f"preflight of {path}", "OPTIONS", path, None, (localhost, *asks))
        yield Case(f"OPTIONS {path}", "OPTIONS", path)
    yield get("/health", localhost, name="from a page of this host")
    yield get("/nope", localhost, name="a 404 from a page of this host")
    yield post(
        "a chat from a page of this host", "/v1/chat/completions", {"model": "alpha", "messages": HI}, JSON, localhost
    )
    yield post(
        "a stream from a page of this host",
        "/v1/chat/completions",
        {"model": "alpha", "messages": HI, "stream": True},
        JSON,
        localhost,
    )
