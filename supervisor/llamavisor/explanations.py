"""Why a model was lost: what the router's log, the kernel and the folder add to the news that it was."""

from __future__ import annotations

from dataclasses import replace

from llamavisor import events as ev
from llamavisor.arbiter import Arbiter
from llamavisor.cause import (
    Cause,
    Subject,
    Traces,
    classify_model,
    last_errors,
    last_words,
    load_failure,
    was_told_to_stop,
)
from llamavisor.models import ModelTable
from llamavisor.output import OutputFile
from llamavisor.shelf import Shelf

_LOG_LINES = 1000
_TAIL_LINES = 5
"""So many lines of a process that has failed are shown."""
_LOG_BEFORE_NEWS_BYTES = 8192
_REASONS = {
    Cause.FILE_CHANGED: ev.UnloadReason.FILE_CHANGED,
    Cause.OOM: ev.UnloadReason.OOM,
    Cause.NO_MEMORY: ev.UnloadReason.OOM,
}
_GIVEN_UP = {ev.UnloadReason.UNRESPONSIVE: Cause.HUNG, ev.UnloadReason.STALLED: Cause.STALLED}


class Explanations:
    """Adds to events of one router's models what only the log, the kernel and the folder know.

    Used by the router's owner alone.

    Args:
        log: what the router prints.
        table: what is known of its models; reasons are noted there.
        shelf: what they should be.
        arbiter: who knows of kills by the kernel, None without one.
    """

    def __init__(self, log: OutputFile, table: ModelTable, shelf: Shelf, arbiter: Arbiter | None) -> None:
        self._log = log
        self._table = table
        self._shelf = shelf
        self._arbiter = arbiter

    def __repr__(self) -> str:
        return f"<Explanations from {self._log!r}>"

    def add_to(self, event: ev.Event) -> ev.Event:
        """The event with its reason, or as it is."""
        match event:
            case ev.ModelLoading():
                size = self._log.size()
                # Of a load that a client began we hear after the router has logged the beginning of it.
                mark = size if event.is_requested else max(0, size - _LOG_BEFORE_NEWS_BYTES)
                self._table.mark_log(event.model, mark)
            case ev.ModelLoadFailed():
                return self._failed_load(event)
            case ev.ModelUnloaded(reason=ev.UnloadReason.CRASHED):
                return self._crash(event)
            case ev.ModelUnloaded(reason=reason) if reason in _GIVEN_UP:
                return replace(event, cause=_GIVEN_UP[reason])
        return event

    def _failed_load(self, event: ev.ModelLoadFailed) -> ev.Event:
        model = self._table.get(event.model)
        lines = self._log.tail(_LOG_LINES, since=model.log_mark if model else 0)
        words = load_failure(event.model, lines)
        if not words and event.cause is not Cause.UNKNOWN:
            return event
        cause, reason = classify_model(self._traces(event.model, words), Subject.LOADING)
        self._table.explain(event.model, reason, last_words(event.model, lines, _TAIL_LINES))
        return replace(event, cause=cause, reason=reason)

    def _crash(self, event: ev.ModelUnloaded) -> ev.Event:
        lines = self._log.tail(_LOG_LINES)
        # A busy model that does not end in time is killed by its router, which looks like a crash from here.
        if was_told_to_stop(event.model, lines):
            self._table.forgive(event.model)
            return replace(event, reason=ev.UnloadReason.EVICTED)
        cause, detail = classify_model(self._traces(event.model, last_errors(event.model, lines)), Subject.SERVING)
        self._table.explain(event.model, detail, last_words(event.model, lines, _TAIL_LINES))
        return replace(event, reason=_REASONS.get(cause, event.reason), cause=cause, detail=detail)

    def _traces(self, name: str, words: tuple[str, ...]) -> Traces:
        model = self._table.get(name)
        was_oom = self._arbiter is not None and self._arbiter.was_killed_for_memory()
        return Traces(model.ended if model else None, words, self._shelf.was_overwritten(name), was_oom)
