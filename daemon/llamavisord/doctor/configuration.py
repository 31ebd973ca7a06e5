"""Whether the configuration can be used, and whether it is the one in force."""

from __future__ import annotations

import os
from pathlib import Path

from llamavisord.doctor.account import Account
from llamavisord.doctor.case import Case
from llamavisord.doctor.finding import Findings, note, ok, problem, warning


def look(case: Case) -> Findings:
    """The file, its warnings, and what the daemon makes of it."""
    if case.config_file is not None and case.mistakes and _is_closed(case.config_file):
        yield note(f"{case.config_file} may not be read", "ask as root, or as the user that the daemon runs as")
        return
    for mistake in case.mistakes:
        yield problem(str(mistake), "`llamavisor config check` says it again when it is mended")
    config = case.config
    if config is None:
        return
    routers = ", ".join(router.name for router in config.routers)
    yield ok(f"{config.path or 'no file, all by default'}: routers {routers}, serve = {config.serve}")
    if config.path is not None and (bar := case.account.barred(config.path, os.R_OK)):
        name = case.account.name
        yield problem(f"{config.path} cannot be read by {name}: {bar}", f"chgrp {name} and chmod g+r")
    for text in config.warnings:
        yield warning(text)
    if case.other is not None:
        theirs = case.other["config_path"] or "no file"
        text = f"the daemon that runs (pid {case.pid}) has another configuration: {theirs}"
        yield note(text, "this is about a daemon yet to be started; leave out --config to have that one examined")
    if case.status is None:
        return
    if case.status["config_error"]:
        for line in case.status["config_error"].splitlines():
            yield problem(f"the daemon has refused a reload, and goes on with what it had: {line}", "mend that")
    if config.path is not None and config.path.stat().st_mtime > case.status["config_loaded_unix"]:
        yield note(f"{config.path} has been changed since the daemon has read it", "`llamavisor reload` reads it")
    for text in case.status["warnings"]:
        yield warning(f"the daemon says: {text}")


def _is_closed(file: Path) -> bool:
    """Whether there is such a file, and who asks may not read it."""
    try:
        return bool(Account.mine().barred(file, os.R_OK))
    except OSError as error:
        return isinstance(error, PermissionError)
