"""The process of one model: listens at once, answers when it has loaded, obeys the router through its pipes.

It tells the router of its state in lines on standard output and prints its log on standard error. Orders come as
lines on standard input; the end of that means that the router has died.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from .behaviour import Behaviour, Record, end, start_grandchild
from .gguf import ModelFile
from .http import (
    AnswerError,
    HttpServer,
    Request,
    Response,
    body_object,
    check_key,
    dumps,
    json_response,
    not_found,
    not_ready,
)
from .log import Log

STATE = "cmd_child_to_router:state:"
EXIT = "cmd_router_to_child:exit"
CHAT_PATHS = frozenset({"/v1/chat/completions", "/chat/completions"})
TEXT_PATHS = frozenset({"/v1/completions", "/completions", "/completion"})
_PROGRESS_EVERY_S = 0.2
_SLOTS = 4

_PROMPT_TOKENS = 8

_METRICS = (
    ("prompt_tokens_total", "Number of prompt tokens processed, excluding cached tokens", "counter"),
    ("prompt_tokens_cached_total", "Number of prompt tokens reused from the cache", "counter"),
    ("prompt_seconds_total", "Total time spent processing prompts", "counter"),
    ("tokens_predicted_total", "Number of generation tokens processed", "counter"),
    ("tokens_predicted_seconds_total", "Total time spent generating tokens", "counter"),
    (
        "n_decode_total",
        "Total number of llama_decode() calls, excluding speculative decoding and multimodal decoding",
        "counter",
    ),
    ("n_tokens_max", "Largest observed sequence length (prompt + generation)", "counter"),
    ("spec_decode_num_draft_tokens_total", "Speculative: Total draft tokens generated", "counter"),
    (
        "spec_decode_num_accepted_tokens_total",
        "Speculative: Total draft tokens accepted by the target model",
        "counter",
    ),
    ("spec_decode_num_drafts_total", "Speculative: Total speculative decoding verification steps", "counter"),
    ("prompt_tokens_seconds", "Average prompt throughput in tokens/s", "gauge"),
    ("predicted_tokens_seconds", "Average generation throughput in tokens/s", "gauge"),
    ("requests_processing", "Number of requests processing", "gauge"),
    ("requests_deferred", "Number of requests deferred", "gauge"),
    ("n_busy_slots_per_decode", "Average number of busy slots per llama_decode() call", "gauge"),
)
_RATES = {"prompt_tokens_seconds": "prompt_tokens_total", "predicted_tokens_seconds": "tokens_predicted_total"}
"""Gauges that tell how a counter has grown since somebody last asked."""


class Child:
    """One model, from the start of its process to its end.

    Args:
        options: its options by environment variable, as `LLAMA_ARG_PORT`.
        script: how it misbehaves.
        record: what the stand-in remembers between starts.
        keys: API keys that it asks for, none = no question.
        is_alone: whether it serves without a router.
    """

    def __init__(
        self, options: dict[str, str], script: Behaviour, record: Record, keys: list[str], *, is_alone: bool
    ) -> None:
        self._record = record
        self._keys = keys
        self._is_alone = is_alone
        self._path = options["LLAMA_ARG_MODEL"]
        self.alias = options.get("LLAMA_ARG_ALIAS") or self._path.rpartition("/")[2]
        self._script = script.of_model(self.alias)
        self._has_metrics = options.get("LLAMA_ARG_ENDPOINT_METRICS") == "1"
        self._idle_s = float(options.get("sleep-idle-seconds", "-1"))
        self._n_ctx = int(options.get("LLAMA_ARG_CTX_SIZE", "0"))
        self._host = options.get("LLAMA_ARG_HOST", "127.0.0.1")
        self._port = int(options.get("LLAMA_ARG_PORT", "8080"))
        self._log = Log(2)
        self._lock = threading.Lock()
        self._is_ready = False
        self._is_ending = False
        self._is_asleep = False
        self._busy = 0
        self._last_used = time.monotonic()
        self._requests = 0
        self._grown: list[bytes] = []
        self._counts = dict.fromkeys((name for name, _, _ in _METRICS), 0)
        self._told = dict(self._counts)
        self._told_at = time.monotonic()
        self._started = int(time.time())
        self._loaded_at = float("inf")

    def run(self) -> None:
        """Live until told to end; returns never."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        server = HttpServer(self._host, self._port, self.answer)
        if self._script.grandchild:
            holds_output = self._script.grandchild_holds_output
            start_grandchild(self._script.grandchild, holds_output=holds_output)
        self._load()
        self._loaded_at = time.monotonic()
        self._is_ready = True
        self._log("llama_server", "model loaded")
        self._log("llama_server", f"listening on {server.url}")
        if not self._is_alone:
            threading.Thread(target=self._obey, args=(server,), daemon=True).start()
            self._tell("ready", self.info())
        for task in (self._end_in_time, self._fall_asleep):
            threading.Thread(target=task, daemon=True).start()
        while True:
            signal.sigwait({signal.SIGTERM, signal.SIGINT})
            server.close()
            if self._is_alone:
                end(0)
            # A true child stops serving and then waits for its standard input: "loaded" until it is unloaded.

    def info(self) -> dict[str, object]:
        """What the router is told of a loaded model."""
        meta = dict(self._file.meta)
        n_ctx = self._n_ctx or self._file.n_ctx
        meta = {"vocab_type": meta.pop("vocab_type"), "n_vocab": meta.pop("n_vocab"), "n_ctx": n_ctx, **meta}
        return {
            "id": self.alias,
            "aliases": [self.alias],
            "tags": [],
            "object": "model",
            "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
            "created": int(time.time()),
            "owned_by": "llamacpp",
            "meta": meta,
        }

    def answer(self, request: Request) -> Response:
        """Answer one request."""
        try:
            if not self._is_ready:
                raise not_ready()
            check_key(request, self._keys)
            self._hang_if_told()
            return self._answer(request)
        except AnswerError as error:
            return error.response

    def _answer(self, request: Request) -> Response:
        if request.method == "GET" and request.path in {"/health", "/v1/health"}:
            return json_response({"status": "ok"})
        if request.method == "GET" and request.path in {"/models", "/v1/models"}:
            return json_response({"object": "list", "data": [self.info()]})
        if request.method == "GET" and request.path == "/metrics":
            return self._metrics()
        if request.method == "GET" and request.path == "/props":
            return json_response(self._props())
        if request.method == "GET" and request.path == "/slots":
            self._wake()
            return json_response([{"id": at, "is_processing": at < self._busy} for at in range(_SLOTS)])
        if request.method == "POST" and request.path in CHAT_PATHS | TEXT_PATHS:
            return self._generate(request)
        raise not_found()

    def _generate(self, request: Request) -> Response:
        body = body_object(request)
        is_chat = request.path in CHAT_PATHS
        needed = "messages" if is_chat else "prompt"
        if needed not in body:
            raise AnswerError(400, f"'{needed}' is required")
        with self._lock:
            self._requests += 1
        if self._requests == self._script.exit_after_requests:
            end(self._script.exit_with)
        if self._script.grow_mib:
            self._grown.append(b"x" * (self._script.grow_mib << 20))
        self._wake()
        limit = body.get("max_tokens", body.get("n_predict", -1))
        words = self._words(limit if isinstance(limit, int) else -1)
        if body.get("stream"):
            return Response(200, content_type="text/event-stream", chunks=self._stream(words))
        said = list(words)
        text = "".join(said)
        choice = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        choice |= {"finish_reason": "length" if limit == len(said) else "stop", "index": 0}
        usage = {"completion_tokens": len(said) + 1, "prompt_tokens": _PROMPT_TOKENS}
        usage["total_tokens"] = usage["completion_tokens"] + usage["prompt_tokens"]
        return json_response({"choices": [choice], **self._envelope("chat.completion"), "usage": usage})

    def _stream(self, words: Iterator[str]) -> Iterator[bytes]:
        envelope = self._envelope("chat.completion.chunk")

        def event(reason: str | None, delta: dict[str, object]) -> bytes:
            choice = {"finish_reason": reason, "index": 0, "delta": delta}
            return f"data: {dumps({'choices': [choice], **envelope})}\n\n".encode()

        yield event(None, {"role": "assistant", "content": None})
        for word in words:
            yield event(None, {"content": word})
        yield event("stop", {})
        yield b"data: [DONE]\n\n"

    def _words(self, limit: int) -> Iterator[str]:
        """The words of an answer, one per token; none come any more once the process has been told to end."""
        at = 0
        with self._lock:
            self._busy += 1
            self._counts["prompt_tokens_total"] += _PROMPT_TOKENS
        try:
            while at != limit and (self._file.is_endless or at < len(self._file.words)):
                time.sleep(self._script.token_s)
                if self._is_ending:
                    threading.Event().wait()
                yield self._file.words[at % len(self._file.words)]
                at += 1
                self._counts["n_decode_total"] += 1
        finally:
            with self._lock:
                self._busy -= 1
                self._counts["tokens_predicted_total"] += at  # a true one counts them when the answer is whole, too
            self._last_used = time.monotonic()

    def _envelope(self, kind: str) -> dict[str, object]:
        serial = {"id": f"chatcmpl-{os.getpid()}-{self._requests}", "created": int(time.time())}
        return {**serial, "model": self.alias, "system_fingerprint": "b0-unknown", "object": kind}

    def _metrics(self) -> Response:
        if not self._has_metrics:
            reason = "This server does not support metrics endpoint. Start it with `--metrics`"
            raise AnswerError(501, reason, "not_supported_error")
        with self._lock:
            values = {**self._counts, "requests_processing": self._busy}
            if not self._is_asleep:  # a true one repeats its last answer then
                now = time.monotonic()
                passed_s = max(now - self._told_at, 1e-6)
                for rate, counter in _RATES.items():
                    self._counts[rate] = values[rate] = (values[counter] - self._told[counter]) / passed_s
                self._told, self._told_at = values, now
        lines = [
            f"# HELP llamacpp:{name} {what}\n# TYPE llamacpp:{name} {kind}\nllamacpp:{name} {values[name]:.6g}\n"
            for name, what, kind in _METRICS
        ]
        headers = {"Process-Start-Time-Unix": str(self._started)}
        return Response(200, "".join(lines).encode(), content_type="text/plain; version=0.0.4", headers=headers)

    def _props(self) -> dict[str, object]:
        return {
            "default_generation_settings": {"params": {}, "n_ctx": self._n_ctx or self._file.n_ctx},
            "total_slots": _SLOTS,
            "model_alias": self.alias,
            "model_path": self._path,
            "endpoint_metrics": self._has_metrics,
            "build_info": "b0-unknown",
            "is_sleeping": self._is_asleep,
        }

    def _load(self) -> None:
        """Read the file, as slowly and as badly as told."""
        self._log("load_model", f"loading model '{self._path}'")
        self._progress(0.0)
        if self._record.is_among_first(self._script.load_failures, f"loads-{self.alias.replace('/', '_')}"):
            self._log("load_model", f"failed to load model, '{self._path}'", "E")
            end(self._script.load_exit)
        try:
            self._file = ModelFile(self._path)
        except (OSError, ValueError) as exc:
            self._log.raw(f"0.00.000.001 E {exc}\n".encode())
            self._log("load_model", f"failed to load model, '{self._path}'", "E")
            self._log("llama_server", "exiting due to model loading error", "E")
            end(1)
        steps = int(self._script.load_s / _PROGRESS_EVERY_S)
        for step in range(steps):
            time.sleep(self._script.load_s / steps)
            self._progress((step + 1) / (steps + 1))
        if not steps:
            time.sleep(self._script.load_s)
        if self._script.load_stalls:
            self._progress(0.5)
            threading.Event().wait()
        self._progress(1.0)

    def _progress(self, value: float) -> None:
        if not self._is_alone:
            self._tell("loading", {"stages": ["text_model"], "current": "text_model", "value": value})

    def _tell(self, state: str, payload: dict[str, object]) -> None:
        line = f"{STATE}{dumps({'state': state, 'payload': payload})}\n"
        with self._lock:
            Log(1).raw(line.encode())

    def _obey(self, server: HttpServer) -> None:
        """Wait for the order to end, or for the router's death."""
        self._log("operator()", "child server monitoring thread started, waiting for EOF on stdin...")
        for line in sys.stdin.buffer:
            if EXIT.encode() in line and not self._script.ignore_exit:
                self._log("operator()", "exit command received, exiting...")
                self._is_ending = True
                server.close()
                while self._busy:  # an answer under way never ends, and keeps the process until it is killed
                    time.sleep(0.01)
                end(0)
        if not self._script.ignore_exit:
            self._log("operator()", "EOF on stdin detected, forcing shutdown...")
            end(1)

    def _hang_if_told(self) -> None:
        script = self._script
        late = script.hang_after_s is not None and time.monotonic() >= self._loaded_at + script.hang_after_s
        if late or (script.hang_after_requests is not None and self._requests >= script.hang_after_requests):
            threading.Event().wait()

    def _end_in_time(self) -> None:
        if self._script.exit_after_s is not None:
            time.sleep(self._script.exit_after_s)
            end(self._script.exit_with)

    def _fall_asleep(self) -> None:
        """Free the model when nobody has used it for a while; the next use loads it again."""
        while self._idle_s >= 0:
            time.sleep(0.05)
            with self._lock:
                falls = not self._is_asleep and not self._busy
                falls = falls and time.monotonic() >= self._last_used + self._idle_s
                self._is_asleep = self._is_asleep or falls
            if falls:
                self._tell("sleeping", {})

    def _wake(self) -> None:
        with self._lock:
            was_asleep, self._is_asleep = self._is_asleep, False
            self._last_used = time.monotonic()
        if was_asleep:
            self._load()
            self._tell("ready", {})
