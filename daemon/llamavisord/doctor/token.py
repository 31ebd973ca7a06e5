"""The token of the Hub: whether there is one, and whether others can read it. It is never read, let alone told."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from llamavisor.hub.access import CREDENTIAL, Origin, login_file
from llamavisord.cli.client import Client
from llamavisord.cli.errors import CommandError
from llamavisord.doctor.case import Case
from llamavisord.doctor.finding import Finding, Findings, Grade, note, ok, warning
from llamavisord.variables import Variable

STORES = ("etc/credstore", "run/credstore", "usr/lib/credstore")
"""Where systemd looks for what `LoadCredential=` names, the first that has it; systemd.exec(5)."""
ENCRYPTED = tuple(f"{store}.encrypted" for store in STORES)
"""Where it looks for what `LoadCredentialEncrypted=` names, which our unit does not say."""
_NONE = "none: private and gated models of the Hub cannot be had"
_HAS: Mapping[str, str] = {
    Origin.ENVIRONMENT: f"the daemon has it in its environment ({Variable.HF_TOKEN})",
    Origin.CREDENTIAL: f"the daemon has it as a credential of systemd ({CREDENTIAL})",
    Origin.LOGIN: "the daemon has what `hf auth login` has left in the home of its user",
}
_TOLD_S = 5.0
"""How long the daemon may take to say where its token is from."""


def look(case: Case) -> Findings:
    """What the daemon that answers has; else what one would find that was started now."""
    if case.owner is not None:
        yield note(f"whether the daemon, which runs as {case.owner}, has one cannot be asked", "ask as root")
        return
    found = _find(case)
    if case.status is None:
        yield found
        return
    try:
        told = Client(case.socket).call("GET", "/control/v1/hub/token", {}, timeout_s=_TOLD_S)
    except CommandError:  # it does not know, or is of an earlier version
        yield found
        return
    yield judge(told["origin"], found)


def judge(origin: str | None, found: Finding) -> Finding:
    """What is to be said of a token that the daemon has from `origin`. Pure.

    Args:
        origin: None for a daemon without one.
        found: what there is to be found by one that is started now.
    """
    if origin is None:
        if found.grade is not Grade.OK:
            return found
        return note(f"{_NONE}; there is one now, which the daemon does not have: {found.text}", "restart the daemon")
    is_of_file = origin != Origin.ENVIRONMENT and found.grade is Grade.WARNING
    return found if is_of_file else ok(_HAS.get(origin, f"the daemon has one ({origin})"))


def _find(case: Case) -> Finding:
    """As the daemon looks for one: a variable, else a credential of systemd, else what `hf auth login` has left."""
    if _is_unit(case):
        return _of_service(case)
    environ = _environ(case)
    if environ.get(Variable.HF_TOKEN):
        return ok(f"in the environment ({Variable.HF_TOKEN})")
    path = login_file(environ)
    places = [path]
    if (folder := environ.get(Variable.CREDENTIALS_DIRECTORY, "")).startswith("/"):
        places.insert(0, Path(folder, CREDENTIAL))
    return _first(case, places) or note(_NONE, f"`hf auth login`, or put one into {path}")


def _is_unit(case: Case) -> bool:
    """Whether systemd starts it: a container has the same places, and whoever asks in it has its environment."""
    return case.is_service and case.has_systemd


def _of_service(case: Case) -> Finding:
    """What who asks has in the environment, or at home, is nothing to the service."""
    for store in STORES:
        path = case.root / store / CREDENTIAL
        try:
            mode, folder_mode = path.stat().st_mode, path.parent.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return note(f"{path} cannot be seen: {error.strerror}", "ask as root")
        if mode & 0o077 and folder_mode & 0o011:
            return _open_to_others(path, mode)
        return ok(f"{path}, a credential of the service")
    if (found := _first(case, [login_file(_environ(case))])) is not None:
        return found
    wanted = case.root / STORES[0] / CREDENTIAL
    hint = f"put one into {wanted}, readable for root alone, and `systemctl restart llamavisor`"
    for store in ENCRYPTED:
        path = case.root / store / CREDENTIAL
        if os.path.lexists(path):
            return note(
                f"{path} is there, which the unit as it comes does not load",
                f"`systemctl edit llamavisor`: [Service], LoadCredentialEncrypted={CREDENTIAL}",
            )
    return note(_NONE, hint)


def _environ(case: Case) -> Mapping[str, str]:
    """What is known of the environment of the daemon: that of who asks is another one, if that is another user."""
    if _is_unit(case) or case.account.uid != os.geteuid():
        return {Variable.HOME: str(case.account.home)}
    return case.environ


def _first(case: Case, places: list[Path]) -> Finding | None:
    """What is to be said of the first of these files that is there."""
    for path in places:
        try:
            mode = path.stat().st_mode
            is_barred = bool(case.account.barred(path, os.R_OK))
        except FileNotFoundError:
            continue
        except OSError as error:
            return note(f"{path} cannot be seen: {error.strerror}")
        if mode & 0o077:
            return _open_to_others(path, mode)
        if is_barred:
            return note(f"{path} is readable for its owner alone, and the daemon runs as {case.account.name}")
        return ok(f"{path}, readable for its owner alone")
    return None


def _open_to_others(path: Path, mode: int) -> Finding:
    return warning(f"{path} is {stat.filemode(mode)}: others can read it", f"chmod 600 {path}")
