"""Tables of single models that speak for no model: most likely a name was misspelt, or a file is yet to come."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from llamavisor.rules import ModelRule
from llamavisor.settings import RouterSettings
from llamavisord.document import nearest

NAMES_MAX = 1000
"""Of more names than these none is proposed: comparing ten thousand takes a quarter of a second."""


def unmatched(
    rules: Sequence[ModelRule],
    routers: Sequence[RouterSettings],
    names_in: Callable[[Path], Collection[str] | None],
) -> Iterator[tuple[ModelRule, str]]:
    """The tables that match no model, each with what to say of it.

    Quick, for `status` asks every time: a name is looked up, and a glob is tried until it matches once.

    Args:
        rules: the tables.
        routers: all routers.
        names_in: the names of the models in a folder, None while they are not known; of what such a folder may hold
            nothing is said.
    """
    known = {path: names_in(path) for path in dict.fromkeys(router.models_dir for router in routers)}
    for rule in rules:
        allowed = rule.settings.router or [router.name for router in routers]
        places = dict.fromkeys(router.models_dir for router in routers if router.name in allowed)
        held = [known[path] for path in places]
        if any(names is None or _matches(rule, names) for names in held):
            continue
        text = f"{rule.source} matches no model in {' or '.join(map(str, places))}"
        names = [name for each in held for name in each or ()]
        yield rule, text + (nearest(rule.pattern, names) if rule.name and len(names) <= NAMES_MAX else "")


def _matches(rule: ModelRule, names: Collection[str]) -> bool:
    if rule.name is not None:
        return rule.name in names
    glob = re.compile(fnmatch.translate(rule.pattern))
    return any(glob.match(name) for name in names)
