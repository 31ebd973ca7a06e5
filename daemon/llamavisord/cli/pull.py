"""`llamavisor pull` and `llamavisor pulls`: models from the Hugging Face Hub, which the daemon brings.

What is asked for here only begins there: whoever leaves loses nothing.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from typing import Any
from urllib.parse import quote

from llamavisor.units import format_duration, format_size
from llamavisord.cli.bars import Bars
from llamavisord.cli.client import Client, hub_exit_code
from llamavisord.cli.errors import CommandError, UnreachableError
from llamavisord.cli.look import client_of
from llamavisord.cli.render import Screen
from llamavisord.exit_codes import ExitCode
from llamavisord.plain import plain

LOOK_TIMEOUT_S = 300.0
"""The daemon asks the Hub again when it is busy, and has a timeout of its own for every attempt."""
TICK_S = 0.2
"""Between two looks at how far it is."""
BACK_S = 30.0
"""How long whoever watches waits for a daemon that is being restarted: it goes on with the pull."""
SEEN_S = 10.0
"""How long the daemon may take to see what it has put into its folder."""
PULLS = "/control/v1/pulls"
"""Where the daemon tells of pulls."""
UNDER_WAY = "under_way"
"""The state of a pull that goes on."""


def pull(arguments: Namespace) -> int:
    """Bring a model, or show what there is, or end a pull."""
    _check(arguments)
    client = client_of(arguments)
    if arguments.cancel is not None:
        return _cancel(client, arguments)
    if arguments.list:
        return _list(client, arguments)
    begun: dict[str, Any] | None = None
    try:
        answer = client.call("POST", PULLS, {}, body=_order(arguments), timeout_s=LOOK_TIMEOUT_S)
        begun = answer["pull"]
        told = Screen(sys.stderr) if arguments.json else Screen()
        if answer["usual"] and begun["quantization"]:
            told.line(
                f"{plain(arguments.spec)}: {plain(begun['quantization'])} is taken, which is usual; --list has all"
            )
        if answer["fits"] is False:
            size = format_size(begun["size_bytes"])
            told.line(f"{plain(begun['model'])}: {size} do not go into {_room(answer)}; --list shows what does")
        if arguments.detach:
            return _tell_detached(answer, arguments)
        ended = _watch(client, begun)
    except KeyboardInterrupt:
        which = f"`llamavisor pull --cancel {begun['id']}`" if begun else "`llamavisor pulls` has its ID, and --cancel"
        raise CommandError(
            f"interrupted; {begun['model'] if begun else arguments.spec} goes on coming",
            hint=f"{which} ends it",
            exit_code=ExitCode.INTERRUPTED,
        ) from None
    return _tell_end(client, ended, answer, arguments)


def pulls(arguments: Namespace) -> int:
    """Show all pulls."""
    answer, screen = client_of(arguments).get(PULLS), Screen()
    if arguments.json:
        screen.json(answer)
        return ExitCode.OK
    if not answer["pulls"] and not answer["problems"]:
        screen.line("no pulls: `llamavisor pull USER/REPO` begins one")
        return ExitCode.OK
    found = sorted(answer["pulls"], key=lambda each: each["state"] != UNDER_WAY)
    if found:
        screen.table(("MODEL", "STATE", "DONE", "SIZE", "SPEED", "LEFT", "ID"), [_row(each) for each in found])
    for each in answer["pulls"]:
        if each["error"]:
            screen.line(f"{plain(each['model'])}: {_reason(each['error'])}")
    for text in answer["problems"]:
        screen.line(f"there may be more: {plain(text)}")
    return ExitCode.OK


def _check(arguments: Namespace) -> None:
    """What cannot be meant together."""
    if (arguments.spec is None) is (arguments.cancel is None):
        text = "name either what to pull or, with --cancel, the ID of a pull"
        raise CommandError(text, hint="as in `llamavisor pull USER/REPO:QUANT`", exit_code=ExitCode.USAGE)
    if arguments.name == "":
        raise CommandError("--name names nothing", exit_code=ExitCode.USAGE)
    if arguments.drop and arguments.cancel is None:
        raise CommandError("--drop goes with --cancel", exit_code=ExitCode.USAGE)


def _order(arguments: Namespace) -> dict[str, object]:
    names = ("spec", "file", "revision", "mmproj", "draft", "name", "router")
    said = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in said.items() if value is not None}


def _watch(client: Client, begun: dict[str, Any]) -> dict[str, Any]:
    """Show how far it is until it has ended.

    Raises:
        CommandError: that will not be known.
    """
    bars, seen, heard_at = Bars(Screen(sys.stderr)), begun, time.monotonic()
    try:
        while seen["state"] == UNDER_WAY:
            bars.show(seen)
            time.sleep(TICK_S)
            try:
                found = client.get(PULLS, id=begun["id"])["pulls"]
            except UnreachableError as exc:
                if time.monotonic() - heard_at > BACK_S:
                    text = f"the daemon does not answer any more; {begun['model']} goes on when it is back"
                    raise CommandError(text, hint=exc.hint, exit_code=exc.exit_code) from exc
                seen = _unheard(seen)
                continue
            if not found:
                text = f"the daemon was restarted, and knows nothing of {begun['model']} any more"
                raise CommandError(text, hint="the same command says whether it is there")
            seen, heard_at = found[0], time.monotonic()
        bars.show(seen)
    finally:
        bars.close()
    return seen


def _unheard(seen: dict[str, Any]) -> dict[str, Any]:
    """The same pull while nobody tells how far it is."""
    lost = {"speed_bytes_per_s": 0.0, "left_s": None, "trouble": "the daemon does not answer"}
    files = [file if file["stage"] == "done" else {**file, **lost} for file in seen["files"]]
    return {**seen, **lost, "files": files}


def _find(client: Client, path: str) -> dict[str, Any] | None:
    """The model at this path as the daemon sees it, once it does: who pulls a model uses it next."""
    deadline = time.monotonic() + SEEN_S
    while time.monotonic() < deadline:
        for model in client.get("/control/v1/models")["models"]:
            if model["path"] is None or not f"{model['path']}/".startswith(f"{path}/"):
                continue
            found: dict[str, Any] = model
            is_usable = found["file_state"] in {"ready", "settling"}
            if found["router"] is not None or not is_usable or not _runs_a_router(client):
                return found
        time.sleep(TICK_S)
    return None


def _runs_a_router(client: Client) -> bool:
    """Whether one may be told of a model soon."""
    return any(router["state"] not in {"stopped", "failed"} for router in client.get("/control/v1/routers")["routers"])


def _tell_end(client: Client, pull: dict[str, Any], answer: dict[str, Any], arguments: Namespace) -> int:
    model = _find(client, pull["path"]) if pull["state"] == "done" else None
    if arguments.json:
        Screen().json({**answer, "pull": pull, "model": model})
    if error := pull["error"]:
        raise CommandError(
            f"{pull['model']}: {error['detail']}", hint=error["hint"] or "", exit_code=hub_exit_code(error["why"])
        )
    if pull["state"] != "done":
        raise CommandError(
            f"{pull['model']} was cancelled", hint="the same pull goes on with what came, if it was kept"
        )
    if not arguments.json:
        told = "is there already" if pull["was_there"] else f"pulled, {format_size(pull['size_bytes'])}"
        Screen().line(f"{plain(model['name'] if model else pull['model'])}: {told}: {plain(pull['path'])}")
    if model is not None and model["file_state"] != "ready":
        raise CommandError(f"{model['name']} cannot be served: it is {model['file_state']}: {model['problem']}")
    return ExitCode.OK


def _tell_detached(answer: dict[str, Any], arguments: Namespace) -> int:
    if arguments.json:
        Screen().json(answer)
        return ExitCode.OK
    begun = answer["pull"]
    told = f"{format_size(begun['size_bytes'])} under way as {plain(begun['id'])}; `llamavisor pulls` shows it"
    Screen().line(f"{plain(begun['model'])}: {told}")
    return ExitCode.OK


def _cancel(client: Client, arguments: Namespace) -> int:
    query = {"drop": str(arguments.drop).lower()}
    answer = client.call("DELETE", f"{PULLS}/{quote(arguments.cancel, safe='')}", query)
    if arguments.json:
        Screen().json(answer)
        return ExitCode.OK
    if answer["pull"] and answer["pull"]["state"] == "done":
        told = "had ended already"
    else:
        told = f"cancelled, and what came is {'removed' if answer['dropped'] else 'kept'}"
    Screen().line(f"{plain(arguments.cancel)}: {told}")
    return ExitCode.OK


def _list(client: Client, arguments: Namespace) -> int:
    query = {
        "repo": arguments.spec,
        "file": arguments.file or None,
        "revision": arguments.revision or None,
        "mmproj": str(arguments.mmproj).lower(),
        "draft": str(arguments.draft).lower(),
        "router": arguments.router,
    }
    answer = client.call("GET", "/control/v1/hub", query, timeout_s=LOOK_TIMEOUT_S)
    screen = Screen()
    if arguments.json:
        screen.json(answer)
        return ExitCode.OK
    screen.line(f"{plain(answer['repository'])} at {plain(answer['revision'])}, {plain(answer['commit'][:10])}")
    rows = [_choice_row(each) for each in sorted(answer["models"], key=lambda each: int(each["size_bytes"]))]
    screen.table(("", "QUANT", "SIZE", "WITH", "CONTEXT", "NEEDS", "FITS", "FILE"), rows, cuts_last=True)
    screen.line()
    chosen = next((each for each in answer["models"] if each["chosen"]), None)
    if chosen is not None:
        screen.line(f"* is what is pulled: {plain(chosen['quantization'] or chosen['name'])}")
    if answer["router"] is not None:
        screen.line("needs: about so much memory, with the context and the caches that it would get here")
        screen.line(f"fits: whether that goes into {_room(answer)}")
    return ExitCode.OK


def _room(answer: dict[str, Any]) -> str:
    """What models may take on a router: "the 3.0 GiB of RAM and 24.0 GiB of 0000:01:00.0 of router main"."""
    known = [f"{format_size(size)} of {plain(device)}" for device, size in answer["budget_bytes"].items() if size]
    return f"the {' and '.join(known) or 'memory'} of router {plain(answer['router'])}"


def _choice_row(choice: dict[str, Any]) -> tuple[object, ...]:
    beside = [word for word, key in (("mmproj", "projector"), ("draft", "draft")) if choice[key]]
    more = len(choice["files"]) - 1
    path = choice["files"][0]["path"] + (f" and {more} more" if more else "")
    fits = None if choice["fits"] is None else "yes" if choice["fits"] else "no"
    return (
        "*" if choice["chosen"] else "",
        choice["quantization"] or choice["name"],
        format_size(choice["size_bytes"]),
        ", ".join(beside) or None,
        choice["n_ctx_train"],
        format_size(sum(choice["needed_bytes"].values())) if choice["needed_bytes"] else None,
        fits,
        f"{path}: {why}" if (why := choice["problem"] or choice["reason"]) else path,
    )


def _row(pull: dict[str, Any]) -> tuple[object, ...]:
    done, size = pull["done_bytes"], pull["size_bytes"]
    is_moving = pull["state"] == UNDER_WAY
    return (
        pull["model"],
        "under way" if is_moving else pull["state"],
        f"{done / size:.0%}" if done is not None and size else None,
        format_size(size),
        f"{format_size(int(pull['speed_bytes_per_s']))}/s" if is_moving else None,
        format_duration(pull["left_s"]) if is_moving and pull["left_s"] is not None else None,
        pull["id"],
    )


def _reason(error: dict[str, Any]) -> str:
    return plain(" ".join(filter(None, (f"{error['detail']}.", error["hint"]))))
