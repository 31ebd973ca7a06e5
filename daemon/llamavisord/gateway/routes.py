"""What llama-server's router answers, as a table: for each method and path whose it is and in which API's words.

Taken from the routes of tools/server/server.cpp, build b11434. A path that is not in the table is the router's own
business: pages of its web UI, and the error for what there is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Api(Enum):
    """Whose format an answer has; errors that llama-server itself tells have its own in all of them."""

    NATIVE = "native"
    OPENAI = "openai"
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"


class Kind(Enum):
    """Who answers a request."""

    BODY = "body"  # the process of the model that its body names
    QUERY = "query"  # the process of the model that its query names
    STREAM = "stream"  # the process that keeps the conversation that its query names
    OWN = "own"  # we do
    ROUTER = "router"  # a router's own process


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes.

    Attributes:
        name: what it is called in metrics and logs.
        kind: who answers it.
        api: whose format the answer has.
        needs_admin: whether it takes a key that is marked so, once there are keys.
    """

    name: str
    kind: Kind
    api: Api = Api.NATIVE
    needs_admin: bool = False


_BODIES: dict[Api, tuple[str, ...]] = {
    Api.OPENAI: (
        "/v1/completions",
        "/chat/completions",
        "/v1/chat/completions",
        "/v1/chat/completions/control",
        "/chat/completions/input_tokens",
        "/v1/chat/completions/input_tokens",
        "/v1/audio/transcriptions",
        "/audio/transcriptions",
        "/v1/embeddings",
    ),
    Api.RESPONSES: ("/responses", "/v1/responses", "/responses/input_tokens", "/v1/responses/input_tokens"),
    Api.ANTHROPIC: ("/v1/messages", "/v1/messages/count_tokens"),
    Api.NATIVE: (
        "/completion",
        "/completions",
        "/infill",
        "/embedding",
        "/embeddings",
        "/rerank",
        "/reranking",
        "/v1/rerank",
        "/v1/reranking",
        "/v1/systemone",
        "/tokenize",
        "/detokenize",
        "/apply-template",
        "/props",
        "/lora-adapters",
    ),
}
_TOOLS, _ANY = ("/cors-proxy", "/tools"), ("GET", "POST")
_QUERIES = ("/metrics", "/lora-adapters", "/slots")
_SLOT = "/slots/"
"""`POST /slots/ID`: a slot of the model that its body names."""

LIST, PROPS, HEALTH = "models", "props", "health"
LOAD, UNLOAD, NEWS, DOWNLOAD, REMOVE = "models/load", "models/unload", "models/sse", "models/download", "models/remove"
LOOKUP = "v1/streams/lookup"
OTHER = Route("other", Kind.ROUTER)
PREFLIGHT = Route("preflight", Kind.OWN)


def _table() -> dict[tuple[str, str], Route]:
    table = {("POST", path): Route(path[1:], Kind.BODY, api) for api, paths in _BODIES.items() for path in paths}
    table |= {("GET", path): Route(path[1:], Kind.QUERY) for path in _QUERIES}
    table |= {("GET", path): Route(LIST, Kind.OWN) for path in ("/models", "/v1/models")}
    table |= {("GET", path): Route(HEALTH, Kind.OWN) for path in ("/health", "/v1/health")}
    table |= {(method, "/v1/stream"): Route("v1/stream", Kind.STREAM) for method in ("GET", "DELETE")}
    return table | {
        ("GET", "/props"): Route(PROPS, Kind.OWN),
        ("GET", "/models/sse"): Route(NEWS, Kind.OWN),
        ("POST", "/models/load"): Route(LOAD, Kind.OWN, needs_admin=True),
        ("POST", "/models/unload"): Route(UNLOAD, Kind.OWN, needs_admin=True),
        ("POST", "/models"): Route(DOWNLOAD, Kind.OWN, needs_admin=True),
        ("DELETE", "/models"): Route(REMOVE, Kind.OWN, needs_admin=True),
        ("POST", "/v1/streams/lookup"): Route(LOOKUP, Kind.OWN),
        # What a build may have reaches other machines and this one's files: not for every key.
        **{(method, path): Route(path[1:], Kind.ROUTER, needs_admin=True) for method in _ANY for path in _TOOLS},
    }


_TABLE = _table()
_POST_SLOT = Route("slots", Kind.BODY)


def find(method: str, path: str) -> Route:
    """Where a request goes.

    Args:
        method: HTTP's; HEAD goes where GET goes.
        path: without the query, as it was sent.
    """
    route = _TABLE.get(("GET" if method == "HEAD" else method, path))
    if route is not None:
        return route
    if method == "OPTIONS":
        return PREFLIGHT
    return _POST_SLOT if method == "POST" and path.startswith(_SLOT) and "/" not in path[len(_SLOT) :] else OTHER
