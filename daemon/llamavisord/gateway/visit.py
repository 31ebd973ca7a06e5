"""One request of a client on its way through the gateway, and what is told of it when it has ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from aiohttp import web

from llamavisor.endpoint import Endpoint
from llamavisor.events import RequestEnded, RequestOutcome
from llamavisord.gateway.answer import Answer
from llamavisord.gateway.conversations import Conversation
from llamavisord.gateway.guard import Caller
from llamavisord.gateway.peek import query_model
from llamavisord.gateway.replies import SERVER, Reply, Trouble
from llamavisord.gateway.routes import Route, find
from llamavisord.gateway.tokens import tokens_of
from llamavisord.traffic import Passage

CLIENT_LEFT = 499
"""The status that is told of a request whose client has left before it was sent any; nginx counts such ones so."""
BODY_SHOWN = 64 * 1024
"""So much of a body is logged, where bodies are."""

_OUTLIVING = frozenset({b"x-conversation-id"})
_AT_ONCE = "0.000", "0.000"

# For the hop between the client and us only (RFC 9110, 7.6.1), said anew for the child, or none of its business: who
# asked is known by our own key, and who may read the answer is decided here.
_NOT_PASSED_ON = frozenset(
    {
        b"accept-encoding",
        b"authorization",
        b"connection",
        b"content-length",
        b"expect",
        b"host",
        b"keep-alive",
        b"origin",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-api-key",
        b"x-llamavisor-heartbeat",
    }
)


class Visit:
    """One request.

    Args:
        request: as it came.

    Attributes:
        route: where it goes.
        query: what stands behind the path, as it is passed on.
        query_model: the model that it names, None if it names none.
        autoload: whether it says that the model is to be loaded; None if it says nothing of that.
        answer: what the client gets of a model.
        cors: headers that every answer carries: who may read it.
        caller: who asks, None before that is known.
        model: the name of the model that was asked for.
        is_stream: whether the client has asked for a stream.
        bytes_in: bytes of the body.
        body: the beginning of the body, if that is to be told.
        retries: how often it was sent again because a model's process had ended.
        passage: how it is counted, once it was taken.
        conversation: what it belongs to, None if its end is that of its client.
        task: what attends to it; a scope of its own would take as long as all the rest of a small request.
        ending: why it is ended from here, None if it is not.
    """

    def __init__(self, request: web.BaseRequest) -> None:
        self.request = request
        self._path, _, query = request.raw_path.partition("?")
        self.route: Route = find(request.method, self._path)
        self.query_model, self.autoload, self.query = query_model(query)
        self.answer = Answer(request)
        self.cors: Sequence[tuple[str, str]] = ()
        self.caller: Caller | None = None
        self.model: str | None = None
        self.is_stream = False
        self.bytes_in = 0
        self.body: bytes | None = None
        self.retries = 0
        self.passage: Passage | None = None
        self.conversation: Conversation | None = None
        self.ending: Trouble | None = None
        self.task: asyncio.Task[object] | None = None
        self._began = time.monotonic()
        self._router: str | None = None
        self._queue_s = self._load_s = 0.0
        self._headers: bytes | None = None
        self._reply: Reply | None = None

    def __repr__(self) -> str:
        return f"<Visit {self.request.method} {self.route.name} {self.model} {self.answer!r}>"

    def head_for(self, endpoint: Endpoint, length: int) -> bytes:
        """The head of the request for a process of llama-server.

        Args:
            endpoint: the process.
            length: bytes of the body.
        """
        if self._headers is None:
            dropped = _NOT_PASSED_ON
            if (named := self.request.headers.get("Connection")) is not None:
                dropped = dropped.union(name.strip().lower().encode() for name in named.split(","))
            if not self.answer.outlives_client:  # else the process would finish the answer for nobody
                dropped = dropped.union(_OUTLIVING)
            passed = [b": ".join(field) for field in self.request.raw_headers if field[0].lower() not in dropped]
            self._headers = b"\r\n".join([*passed, b"", b""])
        method = self.request.method
        key = f"Authorization: Bearer {endpoint.api_key}\r\n" if endpoint.api_key is not None else ""
        size = f"Content-Length: {length}\r\n" if length or method not in {"GET", "HEAD"} else ""
        target = f"{self._path}?{self.query}" if self.query else self._path
        line = f"{method} {target} HTTP/1.1\r\nHost: {endpoint.host}:{endpoint.port}\r\n{key}{size}"
        return line.encode("utf-8", "surrogateescape") + self._headers

    def sends_to(self, endpoint: Endpoint) -> None:
        """It has its model, or another router: the client is told where, and what it has waited for."""
        self._router = endpoint.router
        if self.passage is not None and endpoint.model:
            self.passage.run(endpoint.model)
        if self.conversation is not None:
            self.conversation.endpoint = endpoint
        self._load_s += endpoint.load_s
        queue_s, load_s = _AT_ONCE
        if self._queue_s:
            queue_s, load_s = f"{max(0.0, self._queue_s - self._load_s):.3f}", f"{self._load_s:.3f}"
        self.answer.extra_headers = [
            ("X-Llamavisor-Router", endpoint.router),
            ("X-Llamavisor-Queue-Seconds", queue_s),
            ("X-Llamavisor-Load-Seconds", load_s),
            *self.cors,
        ]
        if self.retries:
            self.answer.extra_headers.append(("X-Llamavisor-Retries", str(self.retries)))

    def has_waited(self, wait_s: float) -> None:
        """It has waited for its model for so long, whether or not it has it now."""
        self._queue_s += wait_s

    @property
    def age_s(self) -> float:
        """Seconds since it came."""
        return time.monotonic() - self._began

    def loses_model(self) -> None:
        """Its process did not answer: no other has it yet."""
        if self.conversation is not None:
            self.conversation.endpoint = None

    def waits_again(self) -> None:
        """It has no model any more."""
        if self.passage is not None:
            self.passage.wait()

    def end(self, trouble: Trouble) -> None:
        """End it from here, whatever it waits for: its client is told the trouble."""
        if self.ending is None and self.task is not None:
            self.ending = trouble
            self.task.cancel()

    @property
    def failure(self) -> RequestOutcome:
        """How it has ended if it has failed now."""
        if self.answer.has_data:
            return RequestOutcome.BROKEN
        return RequestOutcome.REFUSED if self._router is None else RequestOutcome.FAILED

    def reply(self, reply: Reply) -> web.StreamResponse:
        """Answer ourselves."""
        self._reply = reply
        headers = {"Server": SERVER, **reply.headers, **dict(self.cors)}
        response = web.Response(status=reply.status, body=reply.body, headers=headers)
        if reply.body or reply.status == 200:
            response.headers["Content-Type"] = reply.content_type
        return response

    def fail(self, trouble: Trouble) -> web.StreamResponse:
        """Tell the client why it does not get what it asked for, however far its answer has come."""
        # There are three cases:
        # 1. Nothing was sent: it gets a whole answer that says so.
        # 2. A stream has begun: it ends with an event that says so.
        # 3. A body of a known length has begun: nothing but its end can say so.
        if not self.answer.has_head:
            response = self.reply(trouble.reply(self.route.api))
            if trouble.closes:
                response.force_close()
            return response
        if self.answer.is_stream:
            self.answer.end_with_event(trouble.event(self.route.api))
        else:
            self.answer.cut_off()
        return self.answer

    def ended(self, outcome: RequestOutcome, *, is_logged: bool) -> RequestEnded:
        """What is told of it when it has ended."""
        answer, reply = self.answer, self._reply
        tokens_in, tokens_out = tokens_of(answer.tail) if answer.has_data else (None, None)
        first = answer.first_data_at
        return RequestEnded(
            route=self.route.name,
            model=self.model,
            router=self._router,
            client=self.request.remote,
            key=self.caller.name if self.caller is not None else None,
            status=reply.status if reply is not None else answer.status if answer.has_head else CLIENT_LEFT,
            outcome=outcome,
            queue_s=self._queue_s,
            load_s=self._load_s,
            first_data_s=None if first is None else first - self._began,
            duration_s=time.monotonic() - self._began,
            retries=self.retries,
            bytes_in=self.bytes_in,
            bytes_out=answer.bytes_sent if reply is None else len(reply.body),
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            is_stream=answer.is_stream,
            body=None if self.body is None else self.body.decode("utf-8", "replace"),
            is_logged=is_logged,
        )
