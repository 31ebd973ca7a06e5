"""Why a router that serves keeps less than it promised."""

from __future__ import annotations

from collections.abc import Callable

from llamavisor.errors import LlamavisorError
from llamavisor.events import Event, RouterDegraded
from llamavisor.health import Pulse
from llamavisor.states import RouterInput
from llamavisor.vitals import Vitals

PROBES_TO_DEGRADE = 2
"""So many failures in a row are a trouble."""


class Troubles:
    """The reasons for which a router is DEGRADED, one for each subject. Written by its owner alone.

    Args:
        router: name of the router, for the events.
        publish: where events go.
        signal: told of every trouble, and when the last one has gone.

    Attributes:
        pulse: the health of its process.
    """

    def __init__(self, router: str, *, publish: Callable[[Event], None], signal: Callable[[RouterInput], None]) -> None:
        self._router = router
        self._publish = publish
        self._signal = signal
        self._reasons: dict[str, str] = {}
        self._refusals: dict[str, LlamavisorError] = {}  # of those that let no model be loaded
        self.pulse = Pulse.begin(0.0)
        self._failed_probes = 0  # in a row

    def __repr__(self) -> str:
        return f"<Troubles {list(self._reasons)}>"

    def __contains__(self, subject: str) -> bool:
        return subject in self._reasons

    @property
    def text(self) -> str:
        """All of them in one line."""
        return "; ".join(self._reasons.values())

    @property
    def refusal(self) -> LlamavisorError | None:
        """Why no model may be loaded now; None if one may."""
        return next(iter(self._refusals.values()), None)

    def closes(self, subject: str) -> bool:
        """Whether there is this trouble, and no model may be loaded for it."""
        return subject in self._refusals

    def note(self, subject: str, reason: str, *, refusal: LlamavisorError | None = None) -> None:
        """There is this trouble.

        Args:
            subject: what it is about; a later one of the same subject takes its place.
            reason: for a person.
            refusal: what is told to who wants a model loaded meanwhile; None if one may be.
        """
        if subject not in self._reasons:
            self._publish(RouterDegraded(router=self._router, reason=reason))
        self._reasons[subject] = reason
        self._refusals.pop(subject, None)
        if refusal is not None:
            self._refusals[subject] = refusal
        self._signal(RouterInput.TROUBLE)

    def end(self, subject: str) -> None:
        """This trouble has gone, if it was there."""
        self._refusals.pop(subject, None)
        if self._reasons.pop(subject, None) is not None and not self._reasons:
            self._signal(RouterInput.CLEARED)

    def forget(self) -> None:
        """A fresh process has none of them; that is no news."""
        self._reasons.clear()
        self._refusals.clear()
        self._failed_probes = 0

    def came_up(self, now: float) -> None:
        """The process answers for the first time."""
        self.pulse = Pulse.begin(now)

    def probed(self, error: str | None, vitals: Vitals | None, *, counts: bool, now: float) -> None:
        """The router was asked whether it answers; `error` says how it failed to.

        Args:
            error: None if it answers.
            vitals: what its process has done so far, as far as that can be told.
            counts: whether a failure says something of the router: after a time in which we did not run it does not.
            now: monotonic seconds.
        """
        if error is None:
            self._failed_probes = 0
            self.pulse = self.pulse.answered(now)
            self.end("probe")
        elif counts:
            self._failed_probes += 1
            self.pulse = self.pulse.failed(vitals, now)
        if self._failed_probes >= PROBES_TO_DEGRADE:
            self.note("probe", f"it does not answer: {error}")

    def was_away(self, gap_s: float) -> None:
        """We did not run for so long: the next failure is the first one again."""
        self._failed_probes = 0
        self.pulse = self.pulse.later(gap_s)
