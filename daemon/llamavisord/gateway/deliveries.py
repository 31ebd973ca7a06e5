"""Models that clients have the server download, told of as llama-server tells of its own downloads.

A client knows such a model by the word that it asked with until it is there: then it is in the list under its own name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.abc

from llamavisor.events import Bus, Warned
from llamavisor.hub import HubError, Pull, Spec
from llamavisord.downloads import Downloads
from llamavisord.gateway.notices import Notices

TELL_EVERY_S = 1.0
"""Between two words on how far a download is."""


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

    def words(self) -> list[str]:
        """What is on its way."""
        return sorted(self._scopes)

    def begin(self, word: str, spec: Spec) -> None:
        """Have it brought."""
        self._scopes[word] = anyio.CancelScope()
        self._notices.tell(word, "model_status", {"status": "downloading"})
        self._tasks.start_soon(self._follow, word, spec, self._scopes[word])

    def end(self, word: str) -> None:
        """Give it up; what came is kept."""
        self._scopes[word].cancel()

    async def _follow(self, word: str, spec: Spec, scope: anyio.CancelScope) -> None:
        pull: Pull | None = None
        is_there = False
        try:
            with scope:
                pulls = await self._downloads.into(self._folder())
                pull = await pulls.start(spec)
                while not pull.ended.is_set():
                    self._notices.tell(word, "download_progress", {"progress": _progress(pull)})
                    with anyio.move_on_after(TELL_EVERY_S):
                        await pull.ended.wait()
                is_there = await pull.wait() is not None
            if scope.cancelled_caught and pull is not None:
                await pulls.cancel(pull.id)
        except HubError as error:
            if pull is None:  # of one that had begun there is an event
                self._bus.publish(Warned(subject=f"pull {word}", text=str(error)))
        finally:
            del self._scopes[word]
        self._notices.tell(word, "download_finished" if is_there else "download_failed")


def _progress(pull: Pull) -> dict[str, object]:
    """By file; llama-server has the addresses of the files here."""
    where = f"{pull.record.repository}/resolve/{pull.record.commit}"
    return {f"{where}/{file.name}": {"done": file.done, "total": file.size} for file in pull.files}
