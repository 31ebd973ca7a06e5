"""Which files of the hub's cache are used, where several revisions of a repository hold them.

While an update is downloaded the new revision is there and lacks files. A model must not be gone meanwhile: what the
revision that counts does not have is taken from the best one that has it.
"""

from __future__ import annotations

from collections.abc import Iterable

from llamavisor.catalog.hub import Snapshot
from llamavisor.catalog.naming import PART


def superseded(files: Iterable[tuple[str, str, Snapshot]]) -> list[str]:
    """The paths of what another revision has as well, a better one.

    The parts of a split file are one thing: llama-server looks for them in one folder. A revision that has all of them
    is better than one that has some.

    Args:
        files: path, path relative to the models folder, and revision.
    """
    things: dict[tuple[str, int], dict[int, list[str]]] = {}
    for path, rel, snapshot in files:
        where = snapshot.where(rel)
        match = PART.fullmatch(where)
        thing = (match[1], int(match[3])) if match is not None else (where, 1)
        things.setdefault(thing, {}).setdefault(snapshot.rank, []).append(path)
    lost: list[str] = []
    for (_, count), revisions in things.items():
        best = min(revisions, key=lambda rank: (len(revisions[rank]) < count, rank))
        lost += [path for rank, paths in revisions.items() if rank != best for path in paths]
    return lost
