"""Commands about the disk: rm, which removes models, and du, which says who takes it and cleans up.

The daemon does both, so that who may command it need not be who owns the files.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from llamavisor.units import format_duration, format_size
from llamavisord.cli.client import Client, model_path
from llamavisord.cli.errors import CommandError, UnreachableError, with_hint
from llamavisord.cli.look import client_of
from llamavisord.cli.render import Screen
from llamavisord.exit_codes import ExitCode
from llamavisord.plain import plain

DISK_TIMEOUT_S = 120.0
"""A look at every file of a folder; one on a server takes long."""
LEFTOVERS_SHOWN = 20
"""So many leftovers are listed, the largest; `--json` has a thousand."""
_CLEAN = "/control/v1/disk/clean"


def rm(arguments: Namespace) -> int:
    """Remove models from the disk, one after the other; the exit code is that of the first failure."""
    client, screen = client_of(arguments), Screen()
    asks = not (arguments.yes or arguments.dry_run)
    answers: list[dict[str, Any]] = []
    code = ExitCode.OK
    for name in dict.fromkeys(arguments.models):
        try:
            answer = _remove(client, name, arguments, screen, asks=asks)
        except UnreachableError:
            raise
        except CommandError as exc:  # it keeps the others from nothing
            print(f"llamavisor: {plain(with_hint(str(exc), exc.hint))}", file=sys.stderr)
            code = code or exc.exit_code
            continue
        if answer is None:
            code = code or ExitCode.FAILED
        else:
            answers.append(answer)
    if arguments.json:
        screen.json(answers[0] if len(arguments.models) == 1 and answers else answers)
    return code


def _remove(client: Client, name: str, arguments: Namespace, screen: Screen, *, asks: bool) -> dict[str, Any] | None:
    """The daemon's answer; None if a person has said no."""
    query: dict[str, object] = {"folder": arguments.folder, "wait": arguments.timeout}
    path = model_path(name)
    try:
        plan = client.call("DELETE", path, {**query, "dry_run": "true"})
    except CommandError as exc:
        if exc.exit_code == ExitCode.NOT_FOUND:
            client.get(model_path(name))  # its refusal says what is near
        raise
    if arguments.dry_run:
        if not arguments.json:
            _show_plan(screen, plan)
        return plan
    query |= {"force": str(arguments.force).lower(), "token": plan["token"]}
    if asks and (arguments.force or not plan["obstacles"]):  # else it is refused, and nobody need be asked
        _check_terminal(asks=asks)
        _show_plan(Screen(sys.stderr) if arguments.json else screen, plan)
        if not _confirms(f"Remove {_amount(plan)} for good?"):
            print(f"llamavisor: {plain(plan['model'])}: left as it is", file=sys.stderr)
            return None
    answer = client.call("DELETE", path, query)
    if not arguments.json:
        screen.line(f"{plain(answer['model'])}: removed, {_amount(answer)}")
    return answer


def du(arguments: Namespace) -> int:
    """Show who takes the disk, or clean up."""
    client, screen = client_of(arguments), Screen()
    if arguments.clean:
        return _clean(client, screen, arguments)
    if arguments.keep_revisions or arguments.yes or arguments.dry_run:
        hint = "--keep-revisions, --dry-run and --yes go with it"
        raise CommandError("nothing is cleaned without --clean", hint=hint, exit_code=ExitCode.USAGE)
    answer = client.call("GET", "/control/v1/disk", {}, timeout_s=DISK_TIMEOUT_S)
    if arguments.json:
        screen.json(answer)
    else:
        for number, folder in enumerate(answer["folders"]):
            if number:
                screen.line()
            _show_folder(screen, folder)
    return ExitCode.FAILED if any(folder["problem"] for folder in answer["folders"]) else ExitCode.OK


def _clean(client: Client, screen: Screen, arguments: Namespace) -> int:
    asks = not (arguments.yes or arguments.dry_run)
    _check_terminal(asks=asks)
    query = {"keep_revisions": str(arguments.keep_revisions).lower()}
    plan = client.call("POST", _CLEAN, {**query, "dry_run": "true"}, timeout_s=DISK_TIMEOUT_S)
    gone = [each for folder in plan["folders"] for each in folder["gone"]]
    if not arguments.json:
        _show_leftovers(screen, gone)
        if any(each["pull"] for each in gone):
            screen.line("pulls that were left more than a day ago are given up: to pull the same again begins anew")
    if arguments.dry_run or not gone:
        if arguments.json:
            screen.json(plan)
        elif not gone:
            screen.line(
                "nothing to clean: nothing that nobody wants any more, no pull that was left more than a day ago"
            )
        return _tell_problems(plan)
    size = format_size(sum(each["size_bytes"] for each in gone))
    if asks and not _confirms(f"Remove {len(gone)} leftovers, {size}, for good?"):
        print("llamavisor: left as it is", file=sys.stderr)
        return ExitCode.FAILED
    answer = client.call("POST", _CLEAN, query, timeout_s=DISK_TIMEOUT_S)
    if arguments.json:
        screen.json(answer)
    else:
        freed = format_size(sum(folder["size_bytes"] for folder in answer["folders"]))
        screen.line(f"removed {sum(len(folder['gone']) for folder in answer['folders'])} leftovers, {freed}")
    return _tell_problems(answer)


def _tell_problems(answer: dict[str, Any]) -> int:
    """The exit code of a cleaning, after what went wrong in any folder has been told."""
    problems = [problem for folder in answer["folders"] for problem in folder["problems"]]
    for problem in problems:
        print(f"llamavisor: {plain(problem)}", file=sys.stderr)
    return ExitCode.FAILED if problems else ExitCode.OK


def _check_terminal(*, asks: bool) -> None:
    if asks and not (sys.stdin is not None and sys.stdin.isatty()):
        text = "nobody can be asked: standard input is no terminal"
        raise CommandError(text, hint="--yes does it without asking", exit_code=ExitCode.USAGE)


def _confirms(question: str) -> bool:
    """Whether a person says yes; what is not yes is no, the end of the input too."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        print(file=sys.stderr)
    return answer.strip().lower() in {"y", "yes"}


def _amount(plan: dict[str, Any]) -> str:
    count = len(plan["files"])
    return f"{count} file{'s' * (count != 1)}, {format_size(plan['size_bytes'])}"


def _show_plan(screen: Screen, plan: dict[str, Any]) -> None:
    screen.line(f"{plain(plan['model'])}: {_amount(plan)}")
    for file in plan["files"]:
        size = "link" if file["link"] else format_size(file["size_bytes"])
        screen.line(f"  {plain(file['path'])}  {size}")
    for path in plan["kept"]:
        screen.line(f"  {plain(path)}  stays: other models use it")
    for obstacle in plan["obstacles"]:
        screen.line(f"  it is {plain(obstacle)}; --force removes it all the same")


def _show_folder(screen: Screen, folder: dict[str, Any]) -> None:
    if folder["problem"]:
        screen.line(plain(folder["problem"]))
        return
    told = [f"{format_size(folder['models_bytes'])} in {len(folder['models'])} models"]
    told.append(f"{format_size(folder['leftover_bytes'])} in what is no model")
    if folder["total_bytes"] is not None:
        told.append(f"{format_size(folder['free_bytes'])} of {format_size(folder['total_bytes'])} free")
    screen.line(f"{plain(folder['path'])}: {', '.join(told)}")
    if folder["models"]:
        screen.line()
        rows = [row for model in folder["models"] for row in _model_rows(model, folder["path"])]
        screen.table(("MODEL", "SIZE", "STATE", "FILE"), rows, cuts_last=True)
    if folder["leftovers"]:
        screen.line()
        _show_leftovers(screen, folder["leftovers"], folder["path"])
    left = [each["pull"] for each in folder["leftovers"] if each["pull"] and not each["under_way"]]
    if left:
        which = plain(left[0]) if len(left) == 1 else "ID"
        screen.line(f"a pull that was left goes on when it is wanted again; `pull --cancel {which} --drop` removes it")


def _model_rows(model: dict[str, Any], folder: str) -> list[tuple[object, ...]]:
    """One row for the model, and one for each file if there are several."""
    files = [(_inside(folder, file["path"]), _note(file), file["size_bytes"]) for file in model["files"]]
    size = format_size(model["size_bytes"])
    if len(files) == 1:
        return [(model["name"], size, model["state"], files[0][0] + files[0][1])]
    rows: list[tuple[object, ...]] = [(model["name"], size, model["state"], f"{len(files)} files")]
    return rows + [("", format_size(each), "", path + note) for path, note, each in files]


def _note(file: dict[str, Any]) -> str:
    if file["is_outside"]:
        return " (lies elsewhere)"
    return f" (also of {', '.join(file['shared_with'])})" if file["shared_with"] else ""


def _show_leftovers(screen: Screen, leftovers: Sequence[dict[str, Any]], folder: str = "") -> None:
    now = time.time()
    rows = [
        (
            each["kind"],
            format_size(each["size_bytes"]),
            format_duration(now - each["changed_unix"]) if each["changed_unix"] else None,
            _inside(folder, each["path"]) + _what(each),
        )
        for each in leftovers[:LEFTOVERS_SHOWN]
    ]
    if rows:
        screen.table(("NO MODEL", "SIZE", "UNCHANGED FOR", "PATH"), rows, cuts_last=True)
    if len(leftovers) > LEFTOVERS_SHOWN:
        screen.line(f"and {len(leftovers) - LEFTOVERS_SHOWN} smaller ones; `--json` has them")


def _what(leftover: dict[str, Any]) -> str:
    if leftover["pull"]:
        return f": {leftover['model']}, {'under way' if leftover['under_way'] else 'was left'}"
    return f": {leftover['reason']}" if leftover["reason"] else ""


def _inside(folder: str, path: str) -> str:
    return path.removeprefix(f"{folder.rstrip('/')}/") if folder else path
