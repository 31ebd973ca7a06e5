"""Commands that only look: status, events, logs."""

from __future__ import annotations

import os
import re
import time
from argparse import Namespace
from collections import deque
from contextlib import closing
from typing import Any

from llamavisor.units import format_duration, format_size
from llamavisord.cli.budgets import show_budgets
from llamavisord.cli.client import Client, find_socket
from llamavisord.cli.errors import CommandError, UnreachableError
from llamavisord.cli.render import Screen
from llamavisord.exit_codes import ExitCode
from llamavisord.plain import plain

RETRY_S = 1.0
"""Between two tries to get an event stream back."""
_TAIL_LINES = 5
"""How many of the last lines of a router that is down `status` shows; `logs` has them all."""
_ROUTER_PREFIX = re.compile(r"\[([A-Za-z0-9_-]+)\] (.*)", re.DOTALL)


def client_of(arguments: Namespace) -> Client:
    """A client of the daemon that is meant."""
    return Client(find_socket(arguments.socket, os.environ))


def status(arguments: Namespace) -> int:
    """Show how everything is. The exit code says only whether the daemon answers."""
    answer = client_of(arguments).get("/control/v1/status")
    screen = Screen()
    if arguments.json:
        screen.json(answer)
        return ExitCode.OK
    ready = screen.paint("ready", "green") if answer["ready"] else screen.paint("not ready", "red")
    screen.line(
        f"llamavisor {plain(answer['version'])} is {ready}, pid {answer['pid']},"
        f" up {format_duration(answer['uptime_s'])}"
    )
    screen.line(f"config   {plain(answer['config_path'] or 'none')}")
    screen.line(f"socket   {plain(answer['socket'])}")
    screen.line(f"metrics  {plain(answer['metrics_url'] or 'off')}")
    if gateway := answer.get("gateway"):  # none with serve = "router", and not yet, if an older daemon still runs
        _show_gateway(screen, gateway)
    screen.line()
    _show_routers(screen, answer["routers"])
    for router in answer["routers"]:
        _explain(screen, router)
    if "memory" in answer:  # not yet, if an older daemon still runs
        show_budgets(screen, answer["memory"])
    if answer["config_error"]:
        screen.line()
        screen.line(screen.paint("the configuration was not reloaded, the old one stays in force:", "red"))
        for line in answer["config_error"].splitlines():
            screen.line(f"  {plain(line)}")
    if answer["warnings"]:
        screen.line()
    for warning in answer["warnings"]:
        screen.line(f"{screen.paint('warning:', 'yellow')} {plain(warning)}")
    return ExitCode.OK


def events(arguments: Namespace) -> int:
    """Show what happened, and with --follow what happens, for as long as the daemon lives."""
    client = client_of(arguments)
    screen = Screen()
    last: int = arguments.since
    if arguments.lines is not None or not arguments.follow:
        with closing(client.events(since=last, follow=False)) as past:
            kept = deque(past, arguments.lines)
        for event in kept:
            last = _show_event(screen, event, as_json=arguments.json)
        if not arguments.follow:
            return ExitCode.OK
        if not kept:
            last = client.get("/control/v1/status")["event_id"]
    while True:
        # The daemon hangs up on a reader who is too slow: come back for what was missed.
        with closing(client.events(since=last, follow=True, everything=arguments.all)) as stream:
            for event in stream:
                last = _show_event(screen, event, as_json=arguments.json)
        time.sleep(RETRY_S)


def logs(arguments: Namespace) -> int:
    """Show what llama-server printed."""
    client = client_of(arguments)
    screen = Screen()
    only = arguments.router
    if arguments.json and only is None:
        routers = client.get("/control/v1/routers")["routers"]
        only = routers[0]["name"] if len(routers) == 1 else None
    lines = client.lines(
        "/control/v1/logs",
        timeout_s=None,
        router=arguments.router,
        lines=arguments.lines,
        follow=str(arguments.follow).lower(),
    )
    with closing(lines):
        for line in lines:
            if arguments.json:
                screen.json(_log_line(line, only), on_one_line=True)
            else:
                screen.line(plain(line, keep="\t"))
            if arguments.follow:
                screen.flush()
    if arguments.follow:
        raise UnreachableError("the daemon has ended the log")
    return ExitCode.OK


def in_gateway(gateway: dict[str, Any]) -> str:
    """How many requests are in the gateway."""
    return f"{sum(gateway['in_flight'].values())} in flight, {gateway['waiting']} waiting"


def _show_gateway(screen: Screen, gateway: dict[str, Any]) -> None:
    state = "draining" if gateway["draining"] else "open" if gateway["urls"] else "closed"
    keys = gateway.get("keys", 0)
    told = [in_gateway(gateway), f"{gateway['connections']} connections", f"{keys or 'no'} API key{'s' * (keys != 1)}"]
    if gateway["held_bytes"]:
        told.append(f"{format_size(gateway['held_bytes'])} held")
    painted = screen.paint(state, {"open": "green", "draining": "yellow", "closed": "red"}[state])
    where = [", ".join(map(plain, gateway["urls"])), painted] if gateway["urls"] else [painted]
    screen.line(f"gateway  {' '.join(where)}: {', '.join(told)}")


def _show_routers(screen: Screen, routers: list[dict[str, Any]]) -> None:
    rows = []
    for router in routers:
        cap = f" (at most {router['models_max']})" if router["models_max"] else ""
        rows.append(
            (
                router["name"],
                router["state"],
                router["url"],
                router["pid"],
                f"{router['loaded_count']} of {router['model_count']} loaded{cap}",
                router["restarts"],
                _since(router["since_unix"]),
            )
        )
    screen.table(("ROUTER", "STATE", "URL", "PID", "MODELS", "RESTARTS", "FOR"), rows)


def _explain(screen: Screen, router: dict[str, Any]) -> None:
    """Why a router is not as it should be, and what to do."""
    if not router["reason"]:
        return
    screen.line()
    loop = (
        f" (crash loop, {router['failures']} failures in a row)"
        if router["crash_loop"] and router["state"] in {"backoff", "starting"}
        else ""
    )
    screen.line(f"{plain(router['name'])}: {plain(router['reason'])}{loop}")
    if router["hint"]:
        screen.line(f"  {plain(router['hint'])}")
    if router["retry_in_s"] is not None:
        screen.line(f"  next try in {format_duration(router['retry_in_s'])}")
    for line in router["log_tail"][-_TAIL_LINES:]:
        screen.line(screen.paint(f"  | {plain(line, keep=chr(9))}", "dim"))


def _show_event(screen: Screen, event: dict[str, Any], *, as_json: bool) -> int:
    if as_json:
        screen.json(event, on_one_line=True)
    else:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        screen.line(f"{screen.paint(when, 'dim')}  {event['event']:<22} {plain(event['message'])}")
    screen.flush()
    number = event["id"]
    if not isinstance(number, int):
        raise CommandError("an event without a number")
    return number


def _log_line(line: str, only: str | None) -> dict[str, str | None]:
    """Where several routers are shown, each line begins with the name of one."""
    found = None if only else _ROUTER_PREFIX.fullmatch(line)
    return {"router": found[1], "line": found[2]} if found else {"router": only, "line": line}


def _since(unix: float | None) -> str:
    return "-" if unix is None else format_duration(time.time() - unix)
