"""The models folders: who may read them, what they lie on, how changes are noticed, and which files are broken."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamavisor.catalog import EntryState, Scanner
from llamavisor.catalog.disk import disk_of
from llamavisor.catalog.mounts import is_network_type
from llamavisor.units import format_size
from llamavisor.watch.hints import MAX_FOLDERS, find_folders
from llamavisord.doctor.case import Case
from llamavisord.doctor.finding import Findings, note, ok, problem, warning

SHOWN_MAX = 10
"""Of more broken files only their number is told."""
LEAST_BYTES = 5 * 1024**3
"""Less, and hardly a model can be added."""
WATCHES_WANTED = 524_288
_BROKEN = (EntryState.INVALID.value, EntryState.INCOMPLETE.value)
_HINTS = {
    EntryState.INVALID.value: "copy or download it again, or take it away",
    EntryState.INCOMPLETE.value: "add what is missing",
}
_READ = os.R_OK | os.X_OK


@dataclass(frozen=True, slots=True)
class Mount:
    """A file system: what kind it is, where from, and how it is mounted."""

    kind: str
    source: str
    options: frozenset[str]


@dataclass(frozen=True, slots=True)
class Model:
    """A model as far as its files are of interest: `problem` says why it is not ready, or what is odd about it."""

    name: str
    state: str
    problem: str = ""


def look(case: Case) -> Findings:
    """Every folder once."""
    assert case.config is not None  # noqa: S101 (the check needs one)
    for folder in dict.fromkeys(router.models_dir for router in case.config.routers):
        yield from _look_into(case, folder)


def _look_into(case: Case, folder: Path) -> Findings:
    yield from judge_mount(folder, mount_of(folder, _read(case.root / "proc/self/mountinfo")))
    try:
        is_folder = folder.stat() is not None and folder.is_dir()
        bar = case.account.barred(folder, _READ)
    except FileNotFoundError:
        yield problem(f"{folder} is not there", f"make it, or say models_dir = … in {case.config and case.config.path}")
        return
    except OSError as error:
        yield note(f"{folder} cannot be seen: {error.strerror}", "ask as root, or as the user that the daemon runs as")
        return
    if not is_folder:
        yield problem(f"{folder} is no folder", "name the folder that the GGUF files are in")
        return
    if bar and case.owner is not None:
        yield note(f"{folder} is not yours to read: the daemon runs as {case.owner}", "ask as root")
        return
    if bar:
        name = case.account.name
        hint = f"let {name} read it: chgrp {name} and chmod g+rx, or install-service, which does that"
        yield problem(f"{folder} cannot be read by {name}: {bar}", hint)
        return
    yield ok(f"{folder} can be read by the user {case.account.name}")
    yield from judge_disk(folder, *_space(folder))
    told = _told(case, folder)
    if told is not None and told["mode"] not in (None, "inotify"):
        yield warning(f"{folder} is looked at every few seconds: {told['mode_reason']}", _WATCHES_HINT)
    elif told is None:
        yield from judge_watches(folder, len(find_folders(str(folder))), _limit(case, "max_user_watches"))
    yield from judge_models(folder, _models(case, folder))


_WATCHES_HINT = f"sysctl fs.inotify.max_user_watches={WATCHES_WANTED}, and the same in /etc/sysctl.d for good"


def judge_mount(folder: Path, mount: Mount | None) -> Findings:
    """What is to be said of the file system that a folder lies on. Pure."""
    if mount is None:
        return
    if is_network_type(mount.kind):
        text = (
            f"{folder} is on {mount.kind} ({mount.source}): what other machines change is seen within 30 s, not at once"
        )
        yield note(text, "files that are copied there count when they have been still for 10 s")
    if "ro" in mount.options:
        yield note(f"{folder} is mounted read-only: nothing can be pulled into it or removed")


def judge_disk(folder: Path, free_bytes: int | None, total_bytes: int | None) -> Findings:
    """What is to be said of the room in a folder. Pure."""
    if free_bytes is None or total_bytes is None:
        yield note(f"{folder}: its file system does not tell how much room there is")
    elif free_bytes < LEAST_BYTES:
        text = f"{folder} has {format_size(free_bytes)} free: hardly a model can be added"
        yield warning(text, "remove models that nobody uses, or take a larger disk")
    else:
        yield ok(f"{format_size(free_bytes)} of {format_size(total_bytes)} free in {folder}")


def judge_watches(folder: Path, folders: int, limit: int | None) -> Findings:
    """What is to be said of the kernel's limit for a folder with so many folders in it. Pure."""
    if folders >= MAX_FOLDERS:
        text = (
            f"{folder} has more than {MAX_FOLDERS} folders: in those beyond, changes are seen within 30 s, not at once"
        )
        yield note(text, "fewer folders, or `llamavisor reload` after a change")
    if limit is None:
        yield note("how many folders the kernel lets a user watch cannot be seen")
    elif folders > limit:
        yield warning(f"{folder} has {folders} folders, and the kernel lets a user watch {limit}", _WATCHES_HINT)
    else:
        yield ok(f"{folders} folders to watch, of {limit} that a user may")


def judge_models(folder: Path, models: Sequence[Model]) -> Findings:
    """What is to be said of the files. Pure."""
    counts = Counter(model.state for model in models if model.state)
    if not models:
        text = "`llamavisor pull USER/REPO` brings one, or put a GGUF file into it; it can be used a moment later"
        yield note(f"no model in {folder}", text)
        return
    yield ok(f"models in {folder}: {', '.join(f'{count} {state}' for state, count in counts.items())}")
    broken = [model for model in models if model.state in _BROKEN]
    for model in broken[:SHOWN_MAX]:
        yield warning(f"{model.name} is {model.state}: {model.problem}", _HINTS[model.state])
    if len(broken) > SHOWN_MAX:
        yield warning(f"and {len(broken) - SHOWN_MAX} more that cannot be used", "`llamavisor models` shows all")


def mount_of(folder: Path, mountinfo: str) -> Mount | None:
    """The mount that a folder lies on, by its path alone: whoever asked a dead mount itself would wait for ever.

    Args:
        folder: absolute.
        mountinfo: the text of /proc/self/mountinfo, see proc(5).
    """
    best: tuple[int, Mount] | None = None
    for line in mountinfo.splitlines():
        head, _, tail = line.partition(" - ")
        fields, rest = head.split(" "), tail.split(" ")
        if len(fields) < 6 or len(rest) < 2:
            continue
        point = Path(_unescaped(fields[4]))
        depth = len(point.parts)
        if folder.is_relative_to(point) and (best is None or depth >= best[0]):  # a later one hides an earlier
            best = depth, Mount(rest[0], _unescaped(rest[1]), frozenset(fields[5].split(",")))
    return best[1] if best is not None else None


def _unescaped(text: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


def _told(case: Case, folder: Path) -> dict[str, str] | None:
    """A folder as the daemon tells of it, None if it does not."""
    folders = case.status["folders"] if case.status is not None else ()
    return next((dict(each) for each in folders if each["path"] == str(folder)), None)


def _models(case: Case, folder: Path) -> list[Model]:
    """As the daemon knows them, who has looked for longer; else as one look finds them."""
    if case.status is not None and _told(case, folder) is not None and not case.status["models_left_out"]:
        inside = f"{folder}/"
        items = [each for each in case.status["models"] if str(each["path"] or "").startswith(inside)]
        return [Model(each["name"], each["file_state"] or "", each["problem"] or "") for each in items]
    links = case.config.link_dirs if case.config is not None else ()
    scanner = Scanner(str(folder), link_dirs=tuple(map(str, links)))
    scanner.scan()
    return [Model(entry.name, entry.state.value, entry.reason) for entry in scanner.entries]


def _space(folder: Path) -> tuple[int | None, int | None]:
    disk = disk_of(str(folder))
    return (disk.free_bytes, disk.total_bytes) if disk is not None else (None, None)


def _limit(case: Case, name: str) -> int | None:
    text = _read(case.root / "proc/sys/fs/inotify" / name).strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
