"""Models that clients have the server download, told of as llama-server tells of its own downloads.

A client knows such a model by the word that it asked with until it is there: then it is in the list under its own name.
The next daemon goes on with what was on its way, but as with a person's pull: it remembers no client and no word, and
who asked for it can ask again, but ends it no more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.abc

from llamavisor.downloads import Downloads
from llamavisor.events import Bus, Warned
from llamavisor.hub import HubError, Pull, Spec
from llamavisord.gateway.notices import Notices

MOST = 16
"""So many are on their way at once."""
TELL_EVERY_S = 1.0
"""Between two words on how far a download is."""

_log = logging.getLogger(__name__)


class Deliveries:
    """What clients wait for. Used from one event loop.

    Args:
        downloads: brings it.
        folder: says into which models folder.
        notices: tells clients.
        bus: hears what did not even begin.
        tasks: where it is followed; cancelled at the end, when the pull itself is kept for the next daemon.
    """

    def __init__(
        self,
        downloads: Downloads,
        folder: Callable[[], Path],
        *,
        notices: Notices,
        bus: Bus,
        tasks: anyio.abc.TaskGroup,
    ) -> None:
        self._downloads = downloads
        self._folder = folder
        self._notices = notices
        self._bus = bus
        self._tasks = tasks
        self._scopes: dict[str, anyio.CancelScope] = {}  # Invariant: those that were begun and have not ended

    def __repr__(self) -> str:
        return f"<Deliveries of {sorted(self._scopes)}>"

    def __contains__(self, word: str) -> bool:
        """Whether it is on its way."""
        return word in self._scopes

    @property
    def is_full(self) -> bool:
        """Whether nothing more is taken now."""
        return len(self._scopes) >= MOST

    def words(self) -> list[str]:
        """What is on its way."""
        return sorted(self._scopes)

    def begin(self, word: str, spec: Spec) -> None:
        """Have it brought."""
        self._scopes[word] = anyio.CancelScope()
        self._notices.tell(word, "model_status", {"status": "downloading"})
        self._tasks.start_soon(self._follow, word, spec, self._scopes[word])

    def end(self, word: str) -> None:
        """Give it up; what came is kept. A pull that somebody else wants goes on."""
        self._scopes[word].cancel()

    async def _follow(self, word: str, spec: Spec, scope: anyio.CancelScope) -> None:
        is_there, who = False, f"the gateway's {word}"
        try:
            with scope:
                pulls = await self._downloads.into(self._folder())
                is_there = await self._watch(word, await pulls.start(spec, who=who))
            if scope.cancelled_caught:
                await (await self._downloads.into(self._folder())).leave(who)
        except HubError as error:
            self._bus.publish(Warned(subject=f"pull {word}", text=str(error)))
        except Exception:  # noqa: BLE001 (what one client wants must end nothing for the others)
            _log.exception("pull %s failed", word)
        finally:
            del self._scopes[word]
        self._notices.tell(word, "download_finished" if is_there else "download_failed")

    async def _watch(self, word: str, pull: Pull) -> bool:
        """Tells how far it is until it has ended; whether it is there. Of one that fails there is an event."""
        while not pull.ended.is_set():
            self._notices.tell(word, "download_progress", {"progress": _progress(pull)})
            with anyio.move_on_after(TELL_EVERY_S):
                await pull.ended.wait()
        return pull.path is not None


def _progress(pull: Pull) -> dict[str, object]:
    """By file; llama-server has the addresses of the files here."""
    where = f"{pull.record.repository}/resolve/{pull.record.commit}"
    return {f"{where}/{file.name}": {"done": file.done, "total": file.size} for file in pull.files}
