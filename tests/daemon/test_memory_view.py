"""Memory on the control API: who takes it, who is to stay, who would leave, and how a refusal reads."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from daemon.stage import Asked, Stage, entry
from fakes.control_stub import device, memory, occupant
from llamavisor import footprint
from llamavisor.errors import DemandRefusedError, LlamavisorError, ModelNotFoundError, RouterNotFoundError
from llamavisor.occupancy import DeviceUse, Forecast, Occupancy, Occupant, Queue
from llamavisor.settings import MemoryBudget
from llamavisord.control import FORECAST_S, WaitTimeoutError, _Api, control_app
from llamavisord.control_socket import ControlSocket
from llamavisord.memory_view import forecast_view, memory_view, memory_warnings, ps_view
from llamavisord.problem_documents import as_problems

pytestmark = pytest.mark.anyio

GIB = 2**30
NULLABLE = (
    *("expected_from", "growth_bytes", "in_flight", "used_unix", "loaded_unix", "idle_s"),
    *("ttl_s", "ttl_left_s", "expires_unix", "n_ctx", "n_ctx_asked"),
)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """A stage with one model."""
    stage = Stage(tmp_path)
    stage.put(entry("alpha"))
    return stage


def use(name: str = "RAM", **changes: Any) -> DeviceUse:
    """A device of 32 GiB of which models take half; nothing is unknown if nothing else is said."""
    numbers: dict[str, Any] = {
        "total_bytes": 32 * GIB,
        "used_bytes": 18 * GIB,
        "free_bytes": 14 * GIB,
        "budget_bytes": 24 * GIB,
        "is_auto": True,
        "expected_bytes": 17 * GIB,
        "measured_bytes": 16 * GIB,
    }
    return DeviceUse(id=name, name=name, **numbers | changes)


def occupancy(
    *occupants: Occupant, devices: tuple[DeviceUse, ...] = (use(),), queues: tuple[Queue, ...] = (), **changes: Any
) -> Occupancy:
    """A snapshot; budgets are not enforced if nothing else is said."""
    return Occupancy(
        occupants=occupants, devices=devices, queues=queues, **{"is_enforced": False, "strain": "", **changes}
    )


def answer(response: web.StreamResponse) -> dict[str, Any]:
    """What a handler answers."""
    return dict(json.loads(cast("bytes", cast("web.Response", response).body)))


def asked(name: str = "", /, **query: str) -> web.Request:
    """A request as far as the handlers look at it."""
    return cast("web.Request", Asked(name, **query))


# --- who is in memory -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("virtual_time")
async def test_times_are_of_the_wall_clock_and_durations_of_ours() -> None:
    """Seconds since 1970 for what a person compares with a clock, and how long it is or will be."""
    now = 1000.0
    await anyio.sleep(now - anyio.current_time())
    loaded = Occupant(
        router="main",
        model="a",
        state="loaded",
        used_at=now - 30,
        loaded_at=now - 600,
        in_flight=0,
        ttl_s=100.0,
        expires_at=now + 70,
    )
    shown = ps_view(occupancy(loaded, queues=(Queue(model="b", demands=2, since=now - 5, obstacle="why"),)))
    (model,), (queue,) = shown["models"], shown["queues"]
    unix = time.time()
    assert model["used_unix"] == pytest.approx(unix - 30, abs=5)
    assert model["loaded_unix"] == pytest.approx(unix - 600, abs=5)
    assert model["expires_unix"] == pytest.approx(unix + 70, abs=5)
    assert (model["idle_s"], model["ttl_s"], model["ttl_left_s"]) == (30, 100, 70)
    assert queue.pop("since_unix") == pytest.approx(unix - 5, abs=5)
    assert queue == {"model": "b", "demands": 2, "waiting_s": 5, "obstacle": "why"}


@pytest.mark.usefixtures("virtual_time")
async def test_a_load_counts_as_use_and_a_busy_model_is_not_idle() -> None:
    """One that has been loaded after it was last used was loaded for somebody; one that is loading is nothing yet."""
    now = 1000.0
    await anyio.sleep(now - anyio.current_time())
    used_before = Occupant(router="r", model="a", state="loaded", used_at=now - 500, loaded_at=now - 20)
    never_used = Occupant(router="r", model="b", state="loaded", loaded_at=now - 40)
    busy = Occupant(router="r", model="c", state="loaded", used_at=now - 3, loaded_at=now - 40, in_flight=1)
    loading = Occupant(router="r", model="d", state="loading", used_at=now - 3)
    overdue = Occupant(router="r", model="e", state="unloading", loaded_at=now - 9, expires_at=now - 1)
    shown = ps_view(occupancy(used_before, never_used, busy, loading, overdue))["models"]
    assert [model["idle_s"] for model in shown] == [20, 40, 0, None, 9]
    assert [model["ttl_left_s"] for model in shown] == [None, None, None, None, 0]


@pytest.mark.usefixtures("virtual_time")
async def test_what_is_not_known_is_null() -> None:
    """And what the command line is tested with has the same keys as what it is told."""
    bare = Occupant(router="main", model="alpha", state="loading", growth_bytes=None)
    unknown = DeviceUse(
        id="RAM",
        name="RAM",
        total_bytes=None,
        used_bytes=None,
        free_bytes=None,
        budget_bytes=None,
        is_auto=True,
        expected_bytes=0,
        measured_bytes=None,
        reason="it hangs",
    )
    shown = ps_view(occupancy(bare, devices=(unknown,)))
    (model,), (ram,) = shown["models"], shown["devices"]
    assert model == {
        "model": "alpha",
        "router": "main",
        "state": "loading",
        "expected_bytes": {},
        "measured_bytes": {},
        "leases": 0,
        "pinned": False,
        "n_ctx_ours": False,
        **dict.fromkeys(NULLABLE),
    }
    assert ram == {
        "id": "RAM",
        "name": "RAM",
        "budget_auto": True,
        "expected_bytes": 0,
        "reason": "it hangs",
        **dict.fromkeys(ram.keys() - {"id", "name", "budget_auto", "expected_bytes", "reason"}),
    }
    assert (shown["enforced"], shown["strain"]) == (False, None)
    assert model.keys() == occupant().keys()
    assert ram.keys() == device().keys()
    assert shown.keys() == {*memory(), "models", "queues", "quarantined"}


@pytest.mark.parametrize(
    ("changes", "occupants", "models", "others"),
    [
        ({}, [{}], 16, 2),
        # What is expected may not be there yet.
        ({"measured_bytes": None}, [{"expected": {"RAM": 17 * GIB}}], 17, None),
        ({"measured_bytes": None, "expected_bytes": 0}, [], 0, 18),
        ({"measured_bytes": None, "expected_bytes": 0}, [{"expected": {"GPU": 1}}], 0, 18),
        # It may be here as well as there.
        ({"measured_bytes": None, "expected_bytes": 0}, [{"expected": {"GPU": 1}}, {}], None, None),
        ({"used_bytes": None}, [{}], 16, None),
        # The two are not read at the same moment.
        ({"used_bytes": 15 * GIB}, [{}], 16, 0),
    ],
)
def test_what_a_device_holds_is_split_between_models_and_others(
    changes: dict[str, Any], occupants: list[dict[str, Any]], models: int | None, others: int | None
) -> None:
    """As far as it is known; a model of which nothing is known may be anywhere."""
    there = (Occupant(router="r", model=str(each), state="loaded", **each) for each in occupants)
    (shown,) = memory_view(occupancy(*there, devices=(use(**changes),)))["devices"]
    assert shown["models_bytes"] == (None if models is None else models * GIB)
    assert shown["others_bytes"] == (None if others is None else others * GIB)


def test_what_a_person_should_know_is_a_warning() -> None:
    """Memory that is short, and a context that is shorter than it was to be."""
    short = Occupant(router="main", model="a", state="loaded", n_ctx=512, n_ctx_asked=4096)
    rounded_up = Occupant(router="main", model="b", state="loaded", n_ctx=4096, n_ctx_asked=4000)
    loading = Occupant(router="main", model="c", state="loading", n_ctx_asked=4096)
    unasked = Occupant(router="main", model="d", state="loaded", n_ctx=4096)
    assert memory_warnings(occupancy(short, rounded_up, loading, unasked, strain="RAM is short")) == [
        "no model is loaded for now: RAM is short",
        "model a has 512 tokens of context on main and was to have 4096: llama.cpp shortens it when memory is short",
    ]
    assert memory_warnings(occupancy(rounded_up)) == []


@pytest.mark.usefixtures("virtual_time")
async def test_ps_and_status_tell_of_memory(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """One snapshot of the fleet is what all of it shows."""
    snapshot = occupancy(Occupant(router="main", model="alpha", state="loaded"), strain="RAM is short")
    monkeypatch.setattr(stage.fleet.memory, "occupancy", lambda: snapshot)
    async with stage.running(stage.config(("main", "a"))) as daemon:
        api = _Api(daemon)
        told = answer(await api.ps(asked()))
        assert [model["model"] for model in told["models"]] == ["alpha"]
        assert "no model is loaded for now: RAM is short" in daemon.warnings()
        monkeypatch.setattr(daemon, "view", dict)
        status = answer(await api.status(asked()))
    assert status["memory"] == {key: told[key] for key in ("devices", "enforced", "strain", "pinned")}
    assert status["memory"]["devices"][0]["budget_bytes"] == 24 * GIB


@pytest.mark.usefixtures("virtual_time")
async def test_each_router_tells_what_it_sees(stage: Stage) -> None:
    """Two call one GPU differently, and have budgets of their own; one sees none, and of one nobody can say."""
    first, second, alone = (
        footprint.Device(*each) for each in (("CUDA0", "01:00.0"), ("CUDA1", "02:00.0"), ("CUDA0", "02:00.0"))
    )
    stage.sights |= {"both": (first, second), "one": (alone,), "none": (), "silent": None}
    sizes = MemoryBudget(devices=(("CUDA0", 4 * GIB), ("CUDA1", 8 * GIB), ("RAM", GIB)))
    async with stage.running(stage.config(*((name, "a") for name in stage.sights), memory=sizes)) as daemon:
        told = answer(await _Api(daemon).routers(asked()))["routers"]
    ram = {"id": "RAM", "name": "RAM", "budget_bytes": GIB}
    assert {each["name"]: each["devices"] for each in told} == {
        "both": [
            ram,
            {"id": first.id, "name": "CUDA0", "budget_bytes": 4 * GIB},
            {"id": second.id, "name": "CUDA1", "budget_bytes": 8 * GIB},
        ],
        "one": [ram, {"id": second.id, "name": "CUDA0", "budget_bytes": 4 * GIB}],
        "none": [ram],
        "silent": None,
    }


# --- who is to stay ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("virtual_time")
async def test_pins_are_told_with_what_they_changed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with the number of the last event before it, from which on a reader sees what follows."""
    pinned: set[str] = set()

    def pin(name: str) -> bool:
        if name == "nobody":
            raise ModelNotFoundError("no model 'nobody'")
        changed = name not in pinned
        pinned.add(name)
        return changed

    def unpin(name: str) -> bool:
        changed = name in pinned
        pinned.discard(name)
        return changed

    monkeypatch.setattr(stage.fleet.memory, "pin", pin)
    monkeypatch.setattr(stage.fleet.memory, "unpin", unpin)
    async with stage.running(stage.config(("main", "a"))) as daemon:
        api, last = _Api(daemon), stage.bus.last_id
        for handler, changed in ((api.pin, True), (api.pin, False), (api.unpin, True), (api.unpin, False)):
            told = answer(await handler(asked("org/a")))
            is_pinned = handler == api.pin
            assert told == {"model": "org/a", "pinned": is_pinned, "changed": changed, "event_id": last}
        with pytest.raises(ModelNotFoundError):
            await api.pin(asked("nobody"))


# --- who would leave --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("virtual_time")
async def test_a_forecast_tells_of_those_who_would_leave(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, with their bytes; one that has gone meanwhile is named all the same."""
    there = [Occupant(router="main", model=name, state="loaded", measured={"RAM": 7}) for name in ("a", "b", "c")]
    asked_for: list[tuple[str, str | None]] = []

    async def forecast(model: str, *, router: str | None = None) -> Forecast:
        asked_for.append((model, router))
        return Forecast(
            model="big",
            router="main",
            victims=(("main", "c"), ("other", "a"), ("main", "a")),
            waits_for=(("main", "b"),),
            needed={"RAM": 9},
        )

    monkeypatch.setattr(stage.fleet.memory, "forecast", forecast)
    monkeypatch.setattr(stage.fleet.memory, "occupancy", lambda: occupancy(*there, is_enforced=True))
    async with stage.running(stage.config(("main", "a"))) as daemon:
        api = _Api(daemon)
        told = answer(await api.forecast(asked("nick", router="main")))
        with pytest.raises(RouterNotFoundError):
            await api.forecast(asked("nick", router="nope"))
        await api.forecast(asked("nick"))
    assert asked_for == [("nick", "main"), ("nick", None)]
    assert [(each["router"], each["model"], each["state"]) for each in told["victims"]] == [
        ("main", "c", "loaded"),
        ("other", "a", "unloaded"),
        ("main", "a", "loaded"),
    ]
    assert told["victims"][0]["measured_bytes"] == {"RAM": 7}
    assert [each["model"] for each in told["waits_for"]] == ["b"]
    assert (told["model"], told["router"], told["resident"]) == ("big", "main", False)
    assert (told["needed_bytes"], told["refusal"], told["hint"]) == ({"RAM": 9}, None, None)
    assert told["enforced"] is True


@pytest.mark.usefixtures("virtual_time")
async def test_a_forecast_that_cannot_be_loaded_says_why() -> None:
    """And what to do."""
    refused = Forecast(model="big", router=None, refusal="too large", hint="raise the budget")
    told = forecast_view(refused, occupancy())
    assert (told["router"], told["refusal"], told["hint"]) == (None, "too large", "raise the budget")


@pytest.mark.usefixtures("virtual_time")
async def test_a_forecast_that_does_not_come_is_given_up(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool of llama.cpp may hang, and who asks does not wait for ever."""

    async def forecast(_: str, *, router: str | None = None) -> Forecast:
        await anyio.sleep_forever()
        raise AssertionError(router)

    monkeypatch.setattr(stage.fleet.memory, "forecast", forecast)
    async with stage.running(stage.config(("main", "a"))) as daemon:
        before = anyio.current_time()
        with pytest.raises(WaitTimeoutError, match="model big"):
            await _Api(daemon).forecast(asked("big"))
        assert anyio.current_time() - before == FORECAST_S


# --- addresses and refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "handler", "name"),
    [
        ("GET", "/control/v1/ps", "ps", None),
        ("POST", "/control/v1/models/a/pin", "pin", "a"),
        ("POST", "/control/v1/models/org/a:Q4/unpin", "unpin", "org/a:Q4"),
        ("GET", "/control/v1/models/org%2Fa/forecast", "forecast", "org/a"),
        ("GET", "/control/v1/models/a%0Ab/forecast", "forecast", "a\nb"),
        # A model that is called like an address.
        ("GET", "/control/v1/models/org%2Fforecast", "model", "org/forecast"),
        ("GET", "/control/v1/models/forecast", "model", "forecast"),
        ("GET", "/control/v1/models/forecast/forecast", "forecast", "forecast"),
    ],
)
async def test_addresses_lead_to_their_answers(
    stage: Stage, method: str, path: str, handler: str, name: str | None
) -> None:
    """Whatever a model's name holds; one that ends like an address is escaped."""
    async with stage.running(stage.config(("main", "a"))) as daemon:
        app = control_app(daemon, cast("ControlSocket", None))
        found = await app.router.resolve(make_mocked_request(method, path))
    assert (found.handler.__name__, found.get("name")) == (handler, name)


@pytest.mark.parametrize(
    ("retry_after_s", "status", "headers"),
    [
        (None, 409, {}),
        (0.0, 503, {"Retry-After": "1"}),
        (7.2, 503, {"Retry-After": "8"}),
    ],
)
async def test_a_refused_demand_says_when_to_come_again(
    retry_after_s: float | None, status: int, headers: Mapping[str, str]
) -> None:
    """In whole seconds, never at once; without a time it is no use to come again."""

    async def handler(_: web.Request) -> web.StreamResponse:
        raise DemandRefusedError("memory is short", hint="unpin a", reason="stalled", retry_after_s=retry_after_s)

    response = await as_problems(make_mocked_request("POST", "/"), handler)
    told = answer(response)
    assert (response.status, told["status"], told["code"]) == (status, status, "demand_refused")
    assert (told["detail"], told["hint"]) == ("memory is short", "unpin a")
    assert response.headers.get("Retry-After") == headers.get("Retry-After")


async def test_other_errors_say_nothing_of_coming_again() -> None:
    """They are not a matter of time."""

    async def handler(_: web.Request) -> web.StreamResponse:
        raise LlamavisorError("it broke")

    response = await as_problems(make_mocked_request("POST", "/"), handler)
    assert (response.status, "Retry-After" in response.headers) == (500, False)
