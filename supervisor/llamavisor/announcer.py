"""What a router can serve after another offer that it could not before, as events."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice

from llamavisor.catalog import FileId
from llamavisor.events import Event, ModelAdded, ModelChanged, ModelRemoved, ModelsChanged, ModelWithheld, Warned
from llamavisor.shelf import Offer

TOLD_MAX = 20
"""How many models of one offer are told one by one: thousands would bury everything else that happens."""

SEEN_MAX = 10_000
"""Of how many models it is remembered that they were there before."""


class Announcer:
    """Tells of the models of one router as they come and go. Used by the router's owner alone.

    Args:
        router: its name.
    """

    def __init__(self, router: str) -> None:
        self._router = router
        self._began = time.time()
        self._seen: dict[str, tuple[FileId, ...]] = {}  # of which content each name was that could ever be served

    def __repr__(self) -> str:
        return f"<Announcer of {self._router}>"

    def compare(self, before: Offer, after: Offer) -> Iterator[Event]:
        """What is different in `after`."""
        added = [each.spec for name, each in after.models.items() if name not in before.models]
        for spec in added[:TOLD_MAX]:
            since = time.time() - spec.changed_at
            # What was known before, or has been there since before we were, nobody has waited for.
            was_known = spec.name in before.withheld or self._seen.get(spec.name) == spec.files
            is_news = not was_known and 0 <= since <= time.time() - self._began
            wait_s = since if is_news else None
            yield ModelAdded(router=self._router, model=spec.name, path=spec.path, wait_s=wait_s)
        for spec in added:
            self._seen.pop(spec.name, None)
            self._seen[spec.name] = spec.files
        for name in list(islice(self._seen, max(0, len(self._seen) - SEEN_MAX))):  # those that came first
            del self._seen[name]
        for name, each in after.models.items():
            known_model = before.models.get(name)
            if known_model is not None and known_model.spec is not each.spec and known_model.spec != each.spec:
                yield ModelChanged(router=self._router, model=name)
        removed = [name for name in before.models if name not in after.models]
        for name in removed[:TOLD_MAX]:
            yield ModelRemoved(router=self._router, model=name)
        if max(len(added), len(removed)) > TOLD_MAX:
            yield ModelsChanged(router=self._router, added=len(added), removed=len(removed))
        for name, withheld in after.withheld.items():
            known = before.withheld.get(name)
            if known is None or known.reason != withheld.reason:
                yield ModelWithheld(router=self._router, model=name, reason=withheld.reason)
        for name, note in after.notes.items():
            if before.notes.get(name) != note:
                yield Warned(subject=f"model {name}", text=note)
