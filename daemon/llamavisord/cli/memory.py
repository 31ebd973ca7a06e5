"""Commands about memory: who is in it, and who would leave it for another."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from llamavisor.units import format_duration, format_size
from llamavisord.cli.budgets import short_names
from llamavisord.cli.client import model_path
from llamavisord.cli.errors import CommandError
from llamavisord.cli.look import client_of
from llamavisord.cli.render import NAME_WIDTH, Screen, shortened
from llamavisord.exit_codes import ExitCode
from llamavisord.plain import plain

FORECAST_TIMEOUT_S = 40.0
"""The daemon gives up after 30 s."""
_OURS = " (ours)"


def ps(arguments: Namespace) -> int:
    """List the models in memory, who waits for others, and which are not loaded for now because they have failed."""
    answer = client_of(arguments).get("/control/v1/ps")
    screen = Screen()
    if arguments.json:
        screen.json(answer)
        return ExitCode.OK
    models, queues = answer["models"], answer["queues"]
    if models:
        _show_models(screen, models, _Devices(answer["devices"]))
    else:
        screen.line("no model is in memory")
    if queues:
        screen.line()
        screen.table(
            ("MODEL", "WAITING", "FOR", "OBSTACLE"),
            [
                (_name(screen, queue["model"]), queue["demands"], _duration(queue["waiting_s"]), queue["obstacle"])
                for queue in queues
            ],
            cuts_last=True,
        )
    if answer["quarantined"]:
        screen.line()
        screen.table(
            ("NOT LOADED", "ROUTER", "FAILURES", "FOR", "BECAUSE"),
            [
                (_name(screen, bad["model"]), bad["router"], bad["failures"], _duration(bad["left_s"]), bad["reason"])
                for bad in answer["quarantined"]
            ],
            cuts_last=True,
        )
    if any(_is_short(model) for model in models):
        _say("a context is shorter than it was to be: llama.cpp shortens it when memory is short")
    if any(model["n_ctx_ours"] for model in models):
        _say(f"a context with{_OURS} is llamavisor's choice: no ctx_size is configured for the model")
    if answer["strain"]:
        _say(f"no model is loaded for now: {answer['strain']}")
    return ExitCode.OK


def evict(arguments: Namespace) -> int:
    """Show whom a model would drive out of memory; nothing is done.

    Raises:
        CommandError: it is asked to be done, or the model cannot be loaded.
    """
    name = arguments.model
    if not arguments.dry_run:
        raise CommandError(
            "models are evicted by themselves when another needs their room",
            hint=f"`llamavisor evict --dry-run {plain(name)}` shows which, `llamavisor unload` takes one away",
            exit_code=ExitCode.USAGE,
        )
    answer = client_of(arguments).call(
        "GET", model_path(name, "forecast"), {"router": arguments.router}, timeout_s=FORECAST_TIMEOUT_S
    )
    screen = Screen()
    if arguments.json:
        screen.json(answer)
        return ExitCode.FAILED if answer["refusal"] else ExitCode.OK
    if answer["refusal"]:
        refusal = answer["refusal"].removeprefix(f"model {answer['model']}: ")
        if not answer["enforced"]:
            _say('with serve = "router" budgets and pins are not enforced: llama-server may load it all the same')
        raise CommandError(f"model {answer['model']} cannot be loaded now: {refusal}", hint=answer["hint"] or "")
    _show_forecast(screen, answer)
    return ExitCode.OK


class _Devices:
    """The devices as people call them.

    Args:
        devices: as the daemon tells of them.
    """

    def __init__(self, devices: Sequence[Mapping[str, Any]]) -> None:
        self._names = short_names(devices)

    def names(self, *sizes: Mapping[str, int]) -> str | None:
        """Where these bytes are: "RAM+CUDA0"; None if nobody knows."""
        taken = {key for each in sizes for key, size in each.items() if size}
        known = [name for key, name in self._names.items() if key in taken]
        return "+".join([*known, *sorted(taken - self._names.keys())]) or None

    def sizes(self, sizes: Mapping[str, int]) -> str:
        """How many bytes are where: "RAM 1.0 GiB, CUDA0 4.0 GiB"."""
        return ", ".join(f"{self.names({key: size})} {format_size(size)}" for key, size in sizes.items() if size)


def _show_models(screen: Screen, models: Sequence[Mapping[str, Any]], devices: _Devices) -> None:
    headers = (
        *("MODEL", "ROUTER", "STATE", "DEVICES", "EXPECTED", "MEASURED"),
        *("CONTEXT", "IN-FLIGHT", "IDLE", "TTL", "PINNED"),
    )
    screen.table(
        headers,
        [
            (
                _name(screen, model["model"]),
                model["router"],
                model["state"],
                devices.names(model["expected_bytes"], model["measured_bytes"]),
                _expected(model),
                _measured(model),
                _context(model),
                model["in_flight"],
                _duration(model["idle_s"]),
                _duration(model["ttl_left_s"]),
                "yes" if model["pinned"] else "no",
            )
            for model in models
        ],
    )


def _show_forecast(screen: Screen, answer: Mapping[str, Any]) -> None:
    """What would happen if the model were asked for; there are four cases.

    1. It is there, or on its way.
    2. There is room.
    3. There will be, when those have gone who are leaving.
    4. Others would leave for it.
    """
    devices = _Devices(answer["devices"])
    model, router = plain(answer["model"]), plain(answer["router"])
    if answer["resident"]:
        screen.line(f"{model}: in memory already, or on its way there (router {router})")
        return
    needed = devices.sizes(answer["needed_bytes"])
    needs = f"needs {plain(needed)} on router {router}" if needed else f"what it needs on router {router} is not known"
    victims, waits_for = answer["victims"], answer["waits_for"]
    outcome = "these would be unloaded for it, in this order:" if victims else "no model would be unloaded for it"
    screen.line(f"{model}: {needs}; {outcome}")
    if victims:
        screen.table(
            ("MODEL", "ROUTER", "DEVICES", "BYTES", "IDLE"),
            [
                (
                    _name(screen, victim["model"]),
                    victim["router"],
                    devices.names(victim["measured_bytes"] or victim["expected_bytes"]),
                    _measured(victim) or _expected(victim),
                    _duration(victim["idle_s"]),
                )
                for victim in victims
            ],
        )
    if waits_for:
        screen.line(
            f"it would wait for those that are leaving: {plain(', '.join(each['model'] for each in waits_for))}"
        )
    if not answer["enforced"]:
        _say('with serve = "router" budgets are not enforced: llama-server itself decides who leaves')


def _name(screen: Screen, name: str) -> str:
    return shortened(plain(name), NAME_WIDTH) if screen.is_terminal else name


def _expected(model: Mapping[str, Any]) -> str | None:
    # Without a bound, it may grow beyond what can be told.
    return _sum(model["expected_bytes"], is_least=model["growth_bytes"] is None)


def _measured(model: Mapping[str, Any]) -> str | None:
    measured = model["measured_bytes"]
    unseen = [key for key, size in model["expected_bytes"].items() if size and key not in measured]
    return _sum(measured, is_least=bool(unseen))


def _sum(sizes: Mapping[str, int], *, is_least: bool) -> str | None:
    """All devices together; ">" before what is not all of it."""
    return f"{'>' if is_least else ''}{format_size(sum(sizes.values()))}" if sizes else None


def _context(model: Mapping[str, Any]) -> str | None:
    """The tokens that it got, of those that it was to get if these are more."""
    if model["n_ctx"] is None:
        return None
    asked = f" of {model['n_ctx_asked']}" if _is_short(model) else ""
    return f"{model['n_ctx']}{asked}{_OURS if model['n_ctx_ours'] else ''}"


def _is_short(model: Mapping[str, Any]) -> bool:
    got, asked = model["n_ctx"], model["n_ctx_asked"]
    return got is not None and asked is not None and bool(got < asked)


def _duration(seconds: float | None) -> str | None:
    return None if seconds is None else format_duration(seconds)


def _say(text: str) -> None:
    print(f"llamavisor: {plain(text)}", file=sys.stderr)
