"""A bare router and the gateway are sent the same requests, and no client could tell their answers apart."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

from e2e.gateway_case import COLD, Case, get, post
from e2e.gateway_corpus import GROUPS
from exchange import Reply, cors_differences, differences, exchange
from fakes.bare_router import BareRouter, free_port
from fakes.waiting import PATIENCE_S, eventually
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon

pytestmark = pytest.mark.real

PRESET = """
[*]
threads = 1
stop-timeout = 3
metrics = 1
[alpha]
alias = uno
[emb]
embeddings = 1
ubatch-size = 512
[rank]
reranking = 1
"""
CONFIG = """
serve = "gateway"
port = {port}
models_dir = "{models_dir}"
models_max = 0
[defaults]
threads = 1
[metrics]
enabled = false
[model.alpha]
aliases = ["uno"]
[model.emb]
embeddings = true
ubatch_size = 512
[model.rank]
reranking = true
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Sides:
    """Two ports that are to answer alike."""

    router: int
    gateway: int

    def ask(self, case: Case) -> tuple[Reply, Reply]:
        """What each of them says."""
        return self._ask(self.router, case), self._ask(self.gateway, case)

    def _ask(self, port: int, case: Case) -> Reply:
        until = time.monotonic() + PATIENCE_S
        while (reply := exchange(port, case.wire, case.method)).body == case.late and time.monotonic() < until:
            time.sleep(0.05)
        return reply


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory, llama_server: Path) -> Iterator[Sides]:
    """A bare router and a daemon over the same models, with room for all of them."""
    folder = tmp_path_factory.mktemp("sides")
    models = folder / "models"
    models.mkdir()
    for name in ("alpha", *COLD):
        write_tiny_model(models / f"{name}.gguf", ["I", "am", name])
    write_tiny_model(models / "loop.gguf", ["on", "and"], loop=True)
    write_tiny_model(models / "small.gguf", ["I", "am", "small"], n_ctx=256)
    write_tiny_model(models / "emb.gguf", ["I", "am", "emb"], pooling=1)
    write_tiny_model(models / "rank.gguf", ["I", "am", "rank"], pooling=4)
    port = free_port()
    config = CONFIG.format(port=port, models_dir=models)
    unlimited = ("--models-max", "0")
    with (
        BareRouter(llama_server, folder / "bare", models, preset=PRESET, arguments=unlimited) as router,
        RunningDaemon(folder, models, llama_server, config=config) as daemon,
    ):
        daemon.wait_for_router("ready")
        yield Sides(router.port, port)


@pytest.mark.parametrize("group", GROUPS)
def test_answers_are_the_same(sides: Sides, group: str) -> None:
    """Status, headers and bodies of every answer are a router's, but where the corpus says otherwise, and why."""
    found = []
    for case in GROUPS[group]:
        router, gateway = sides.ask(case)
        if case.instead is None:
            told = [*differences(router, gateway, loosely=bool(case.loosely)), *cors_differences(router, gateway)]
        else:
            told = list(_not_said(case, gateway))
        found += [f"{case.name}: {line}" for line in told]
    assert not found, f"router | gateway, {len(found)} differences:\n" + "\n".join(found)


def _not_said(case: Case, gateway: Reply) -> Iterator[str]:
    assert case.instead is not None
    if gateway.status != case.instead.status or case.instead.says not in gateway.body.decode("utf-8"):
        yield f"not {case.instead.status} with {case.instead.says!r}, but {gateway.status} {gateway.body[:300]!r}"


def test_names_in_the_corpus_tell_cases_apart() -> None:
    """A difference names its case: no two of a group are called the same."""
    for group, cases in GROUPS.items():
        names = [case.name for case in cases]
        assert len(names) == len(set(names)), (group, sorted({name for name in names if names.count(name) > 1}))


def test_list_of_models_is_that_of_the_router(sides: Sides) -> None:
    """Each model is there once, in the same state, under the same names and with what is known of it loaded."""
    case = get("/v1/models")
    for model in ("alpha", "emb", "cold1"):  # on both sides, so that there is something to be told of
        sides.ask(dataclasses.replace(case, target=f"/props?model={model}"))
    router, gateway = (json.loads(reply.body)["data"] for reply in sides.ask(case))
    assert sorted(model["id"] for model in gateway) == sorted(model["id"] for model in router)
    by_name = {model["id"]: model for model in gateway}
    for wanted in router:
        found = by_name[wanted["id"]]
        for key in ("object", "owned_by", "aliases", "tags", "architecture", "can_remove"):
            assert found[key] == wanted[key], (wanted["id"], key)
        assert found["status"]["value"] == wanted["status"]["value"], wanted["id"]
        if wanted["status"]["value"] == "loaded":
            assert found["meta"] == wanted["meta"], wanted["id"]


def test_events_of_models_are_those_of_the_router(sides: Sides) -> None:
    """Who follows `/models/sse` is told the same of a load and an unload."""
    told = [_events_of_a_load(port, "cold6") for port in (sides.router, sides.gateway)]
    assert told[1] == told[0]
    assert ("status_change", "loaded") in told[0]


def _events_of_a_load(port: int, model: str) -> list[tuple[str, str]]:
    """The kind of each event and the status that it tells, of one load and one unload, each once."""
    _manage(port, "unload", model)
    eventually(lambda: _state(port, model) == "unloaded", what=f"{model} unloaded")
    told: list[tuple[str, str]] = []
    with closing(HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as line:
        line.request("GET", "/models/sse")
        with line.getresponse() as response:
            assert (response.status, response.getheader("Content-Type")) == (200, "text/event-stream")
            assert _manage(port, "load", model) == 200
            for raw in response:
                event = json.loads(raw[6:]) if raw.startswith(b"data: ") else {}
                if event.get("model") != model:
                    continue
                told.append((event["event"], event["data"]["status"]))
                if told[-1] == ("status_change", "loaded"):
                    assert _manage(port, "unload", model) == 200
                if told[-1] == ("status_change", "unloaded") and len(told) > 1:
                    break
    return list(dict.fromkeys(told[told.index(("model_status", "loading")) :]))


def _manage(port: int, action: str, model: str) -> int:
    """Ask for a load or an unload."""
    case = post(action, f"/models/{action}", {"model": model})
    return exchange(port, case.wire, case.method).status


def _state(port: int, model: str) -> object:
    models = json.loads(exchange(port, get("/models").wire, "GET").body)["data"]
    return next(each["status"]["value"] for each in models if each["id"] == model)


def _reply(body: bytes, kind: str = "application/json", status: int = 200, **headers: str) -> Reply:
    return Reply(
        status, {"content-type": kind, **{name.replace("_", "-"): text for name, text in headers.items()}}, body
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (_reply(b"{}"), _reply(b"{}", status=400)),
        (_reply(b"{}"), _reply(b"{}", kind="text/plain")),
        (_reply(b"{}"), _reply(b"{}", retry_after="1")),
        (_reply(b'{"a":1}'), _reply(b'{"a":2}')),
        (_reply(b'{"a":[{"id":"x"}]}'), _reply(b'{"a":[{}]}')),
        (_reply(b"no JSON"), _reply(b"JSON no")),
        (_reply(b"data: [DONE]\n\n", "text/event-stream"), _reply(b"", "text/event-stream")),
        (_reply(b'data: {"a":1}\n\n', "text/event-stream"), _reply(b'data: {"a":2}\n\n', "text/event-stream")),
        (_reply(b"", "text/event-stream", x_accel_buffering="no"), _reply(b"", "text/event-stream")),
        (_reply(b"{}"), dataclasses.replace(_reply(b"{}"), fault="cut off")),
    ],
)
def test_difference_is_seen(one: Reply, other: Reply) -> None:
    """The comparison sees what a client could, and only that: ids and times of the moment are no difference."""
    assert list(differences(one, other))
    assert list(differences(other, one))
    assert not list(differences(one, one))
    assert not list(differences(_reply(b'{"id":"chatcmpl-x","created":1}'), _reply(b'{"id":"chatcmpl-y","created":2}')))
