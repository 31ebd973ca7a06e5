"""Commands that change something: load, unload, pin, unpin, restart, stop, start, drain, resume, reload.

What is begun goes on when its command is interrupted or runs out of time: the daemon works for the fleet, not for
one terminal.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from llamavisord.cli.client import Client, model_path
from llamavisord.cli.errors import CommandError, UnreachableError, with_hint
from llamavisord.cli.look import client_of, in_gateway
from llamavisord.cli.render import Progress, Screen
from llamavisord.exit_codes import ExitCode
from llamavisord.plain import plain

RELOAD_TIMEOUT_S = 180.0
"""A reload opens the header of every GGUF, and may end a router first."""
DRAIN_TICK_S = 1.0
"""Between two looks at what is still in the gateway."""
NAMED_MAX = 10
"""How many routers and models one line names."""
_GOALS: Mapping[str, frozenset[str]] = {
    "loaded": frozenset({"loaded", "sleeping"}),
    "unloaded": frozenset({"unloaded", "failed"}),
}
_SERVING = frozenset({"ready", "degraded"})


def load(arguments: Namespace) -> int:
    """Load a model; show on standard error how far it has come."""
    client = client_of(arguments)
    progress = Progress(f"loading {arguments.model}", Screen(sys.stderr))

    def tick() -> None:
        try:
            model = _find_model(client, arguments)
        except CommandError:  # the answer to the load itself will say what is wrong
            return
        is_coming = model.get("state") == "settling"
        progress.show(model.get("progress"), "waiting for its file" if is_coming else model.get("stage") or "")

    try:
        answer = client.call("POST", model_path(arguments.model, "load"), _model_query(arguments), tick=tick)
    except KeyboardInterrupt:
        raise CommandError(
            f"interrupted; {arguments.model} goes on loading",
            hint=f"`llamavisor unload {arguments.model}` ends it",
            exit_code=ExitCode.INTERRUPTED,
        ) from None
    finally:
        progress.close()
    return _tell_model(arguments, answer, goal="loaded")


def unload(arguments: Namespace) -> int:
    """Unload a model."""
    path = model_path(arguments.model, "unload")
    answer = client_of(arguments).post(path, **_model_query(arguments))
    return _tell_model(arguments, answer, goal="unloaded")


def pin(arguments: Namespace) -> int:
    """Keep models in memory once they are there."""
    return _keep(arguments, "pin", changed="pinned", same="already pinned")


def unpin(arguments: Namespace) -> int:
    """Let models leave memory again."""
    return _keep(arguments, "unpin", changed="not pinned any more", same="was not pinned")


def _keep(arguments: Namespace, command: str, *, changed: str, same: str) -> int:
    """One after the other; a name that nobody has keeps the others from nothing."""
    client, screen = client_of(arguments), Screen()
    names = list(dict.fromkeys(arguments.models))
    answers: list[dict[str, Any]] = []
    failures: list[CommandError] = []
    for name in names:
        try:
            answer = client.post(model_path(name, command))
        except UnreachableError:
            raise
        except CommandError as exc:
            failures.append(exc)
            continue
        answers.append(answer)
        if not arguments.json:
            screen.line(f"{plain(name)}: {changed if answer['changed'] else same}")
    if arguments.json and len(names) > 1:
        screen.json(answers)
    elif arguments.json and answers:
        screen.json(answers[0])
    for failure in failures:
        print(f"llamavisor: {plain(with_hint(str(failure), failure.hint))}", file=sys.stderr)
    return failures[0].exit_code if failures else ExitCode.OK


def restart(arguments: Namespace) -> int:
    """End routers and start them again."""
    return _move_routers(arguments, "restart")


def stop(arguments: Namespace) -> int:
    """End routers."""
    try:
        return _move_routers(arguments, "stop")
    except CommandError as error:
        if error.exit_code == ExitCode.NOT_FOUND:
            error.hint += "; models are unloaded by `llamavisor unload`"
        raise


def start(arguments: Namespace) -> int:
    """Start routers."""
    return _move_routers(arguments, "start")


def drain(arguments: Namespace) -> int:
    """Have the gateway take no new requests; show on standard error what is still in it."""
    client = client_of(arguments)
    progress = Progress("draining", Screen(sys.stderr))

    def tick() -> None:
        try:
            gateway = client.get("/control/v1/status")["gateway"]
        except CommandError:  # the answer to the drain itself will say what is wrong
            return
        progress.show(None, in_gateway(gateway) if gateway else "")

    query = {"wait": arguments.timeout if arguments.wait else None}
    try:
        answer = client.call("POST", "/control/v1/drain", query, tick=tick, tick_s=DRAIN_TICK_S)
    except KeyboardInterrupt:
        raise CommandError(
            "interrupted; the gateway takes no new requests all the same",
            hint="`llamavisor resume` ends that",
            exit_code=ExitCode.INTERRUPTED,
        ) from None
    finally:
        progress.close()
    gateway = answer["gateway"]
    if arguments.json:
        Screen().json(answer)
    elif gateway["draining"]:
        Screen().line(f"gateway: takes no new requests; {in_gateway(gateway)}")
    if gateway["draining"]:
        return ExitCode.OK
    raise CommandError("the gateway was told meanwhile to take requests again")


def resume(arguments: Namespace) -> int:
    """Have the gateway take requests again."""
    answer = client_of(arguments).post("/control/v1/resume")
    if arguments.json:
        Screen().json(answer)
    else:
        Screen().line(f"gateway: {'takes requests again' if answer['changed'] else 'was taking requests'}")
    return ExitCode.OK


def reload(arguments: Namespace) -> int:
    """Have the daemon read its configuration again."""
    answer = client_of(arguments).call("POST", "/control/v1/reload", {}, timeout_s=RELOAD_TIMEOUT_S)
    screen = Screen()
    if arguments.json:
        screen.json(answer)
    else:
        changed = [f"gateway {what}" for what in answer.get("gateway", ())]
        changed += [*(f"router {name}" for name in answer["changed"]), *(f"model {name}" for name in answer["models"])]
        more = f" and {len(changed) - NAMED_MAX} more" if len(changed) > NAMED_MAX else ""
        named = ", ".join(map(plain, changed[:NAMED_MAX]))
        screen.line(f"configuration reloaded, changed: {named or 'nothing'}{more}")
        for problem in answer["problems"]:
            print(f"llamavisor: {plain(problem)}", file=sys.stderr)
    return ExitCode.FAILED if answer["problems"] else ExitCode.OK


def _model_query(arguments: Namespace) -> dict[str, object]:
    return {"router": arguments.router, "wait": arguments.timeout if arguments.wait else None}


def _find_model(client: Client, arguments: Namespace) -> dict[str, Any]:
    for model in client.get("/control/v1/models", name=arguments.model)["models"]:
        if model["name"] == arguments.model and arguments.router in (None, model["router"]):
            found: dict[str, Any] = model
            return found
    return {}


def _tell_model(arguments: Namespace, answer: dict[str, Any], *, goal: str) -> int:
    screen = Screen()
    if arguments.json:
        screen.json(answer)
        return ExitCode.OK
    model = answer["model"] or {"router": arguments.router, "state": "unloaded"}
    if model["state"] in _GOALS[goal]:
        outcome = goal if answer["changed"] else f"already {goal}"
    else:
        outcome = f"{plain(model['state'])}, and goes on"
    screen.line(f"{plain(arguments.model)}: {outcome} (router {plain(model['router'])})")
    return ExitCode.OK


def _move_routers(arguments: Namespace, command: str) -> int:
    """One after the other; the exit code is that of the first failure."""
    client = client_of(arguments)
    code = ExitCode.OK
    answers = []
    for name in _routers_meant(client, arguments):
        wait = arguments.timeout if arguments.wait else None
        answer = client.post(f"/control/v1/routers/{name}/{command}", wait=wait)
        answers.append(answer)
        code = code or _tell_router(arguments, answer["router"], command)
    if arguments.json:
        Screen().json(answers[0] if len(answers) == 1 else answers)
    return code


def _routers_meant(client: Client, arguments: Namespace) -> list[str]:
    if arguments.router:
        return list(dict.fromkeys(arguments.router))
    names = [router["name"] for router in client.get("/control/v1/routers")["routers"]]
    if len(names) == 1 or arguments.all:
        return names
    hint = f"name some of {', '.join(names)}, or use --all"
    raise CommandError("there are several routers", hint=hint, exit_code=ExitCode.USAGE)


def _tell_router(arguments: Namespace, router: dict[str, Any], command: str) -> ExitCode:
    """Say what became of a router; waiting for a start that ends elsewhere is a failure."""
    if not arguments.json:
        pid = f", pid {router['pid']}" if router["pid"] else ""
        Screen().line(f"{plain(router['name'])}: {plain(router['state'])}{pid}")
    if not arguments.wait or command == "stop" or router["state"] in _SERVING:
        return ExitCode.OK
    why = "; ".join(plain(router[key]) for key in ("reason", "hint") if router[key])
    print(f"llamavisor: router {plain(router['name'])} is {router['state']}: {why}", file=sys.stderr)
    return ExitCode.FAILED
