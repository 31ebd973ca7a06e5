"""When a router that goes on has to make way for a fresh process all the same, and when it does."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from llamavisor.arbiter import Arbiter
from llamavisor.cause import Cause, Verdict
from llamavisor.errors import DeviceMissingError, RouterNotReadyError
from llamavisor.events import Event, RouterHung
from llamavisor.health import ROUTER_MAX_S, describe
from llamavisor.options import hang_after_s
from llamavisor.residency import Residency
from llamavisor.states import HAS_CHILD
from llamavisor.troubles import Troubles

SICK_GRACE_S = 5.0
"""How long a router that hangs, or waits for a dead process, may take to end after SIGTERM: it hardly ever does, and
its healthy models need their stop-timeout of 3 s."""
DRAIN_S = 30.0
"""How long a router that hangs is left alone for those whom its models answer: they do without it."""


class Renewal:
    """Has a router restarted that cannot go on as it is, at a moment when that costs nobody an answer.

    There are seven reasons: llama-server was replaced on disk, the router's settings have changed, it cannot be brought
    up to date, it has lost sight of a model's process, a device has come late or has vanished, or it hangs. Until then
    nothing is loaded. Used by the router's owner alone.

    Args:
        name: of the router.
        residency: its models.
        troubles: where a reason is noted.
        arbiter: who sees all routers, if anybody does.
        publish: where events go.
        restart: has it restarted, for this cause.
        end: has it ended, and started again after a backoff.
        begin: begins a task that ends with the process; False if there is none.
    """

    def __init__(
        self,
        name: str,
        residency: Residency,
        troubles: Troubles,
        arbiter: Arbiter | None,
        *,
        publish: Callable[[Event], None],
        restart: Callable[[Cause], None],
        end: Callable[[Verdict], None],
        begin: Callable[[Callable[[], Coroutine[Any, Any, None]]], bool],
    ) -> None:
        self._name = name
        self._residency = residency
        self._troubles = troubles
        self._arbiter = arbiter
        self._publish = publish
        self._restart = restart
        self._end = end
        self._begin = begin
        self._hung_at = 0.0

    def __repr__(self) -> str:
        return f"<Renewal of {self._name}{', due' if self._is_unsound else ''}>"

    @property
    def is_due(self) -> bool:
        """Whether it is to be restarted as soon as that costs nobody an answer."""
        return self._is_unsound or "binary" in self._troubles or self._troubles.closes("lost")

    @property
    def is_sick(self) -> bool:
        """Whether it is not to be expected that it ends when it is asked to."""
        return "hung" in self._troubles or "corpse" in self._troubles

    @property
    def _is_unsound(self) -> bool:
        return any(subject in self._troubles for subject in ("unsound", "corpse", "settings", "back"))

    def reconfigured(self, *, can_wait: bool) -> None:
        """It is to run with other settings, which takes another process: at once where nobody knows who is answered."""
        if can_wait and self._arbiter is not None and self._arbiter.decides:
            self.unsound("its settings have changed", subject="settings")
        else:
            self._restart(Cause.REQUESTED)

    def replaced(self) -> None:
        """Llama-server was replaced on disk: what is loaded serves on, and its successor starts when nothing is."""
        reason = "llama-server was replaced on disk; it loads nothing more, and is restarted when nothing is loaded"
        self._close("binary", reason, hint=f"unload its models, or `llamavisor restart {self._name}`")

    def unsound(self, reason: str, *, subject: str = "unsound") -> None:
        """The router cannot be brought up to date while it runs."""
        reason = f"{reason}; it is restarted as soon as nobody is being answered"
        self._close(subject, reason, hint=f"`llamavisor restart {self._name}` does it at once")

    def devices_missing(self, devices: tuple[str, ...]) -> None:
        """Devices that the options name are not visible; none once they are."""
        if devices:
            reason = f"llama-server does not see {', '.join(devices)}; models are not loaded meanwhile"
            hint = "see that its driver is loaded, or correct `devices` and `gpu_layers`"
            refusal = DeviceMissingError(f"router {self._name}: {reason}", hint=hint)
            self._troubles.note("devices", reason, refusal=refusal)
        elif "devices" in self._troubles:
            # It was started without autoload, so that no request could load a model onto the CPU.
            self._restart(Cause.DEVICE)

    def devices_lost(self, devices: tuple[str, ...], *, is_news: bool) -> None:
        """Devices have vanished that it had; none when they are back.

        What runs on them may go on, as it does while a driver is being replaced: it is tried, and if nothing is left of
        it the router is restarted.

        Args:
            devices: all that are missing.
            is_news: whether the process that runs has had one of them. A fresh one goes on without.
        """
        names = ", ".join(devices)
        if devices and is_news:
            reason = f"{names} has vanished; nothing more is loaded, and it is restarted when nothing is loaded"
            self._close("lost", reason, hint=f"look for the driver's words, or `llamavisor restart {self._name}`")
        elif devices:
            self._troubles.note("lost", f"{names} has vanished, and models may run on the processor")
        elif "lost" in self._troubles:
            self._troubles.end("lost")
            self.unsound("what had vanished is there again", subject="back")

    def _ends_hung(self, now: float) -> bool:
        """End a router that does not answer, at the latest when those have had their time whom its models answer.

        One that answers again before that goes on.
        """
        pulse = self._troubles.pulse
        after_s = hang_after_s(self._residency.settings.layers)
        if not pulse.is_hung(now, after_s=after_s, max_s=ROUTER_MAX_S):
            self._troubles.end("hung")
            return False
        reason = describe(pulse, now)
        if "hung" not in self._troubles:
            self._hung_at = now
            self._publish(RouterHung(router=self._name, silent_s=pulse.silent_s(now), reason=reason))
            self._close("hung", f"it hangs, {reason}", hint=f"`llamavisor restart {self._name}` ends it at once")
        is_used = self._arbiter is not None and self._arbiter.is_used(self._name)
        if is_used and now - self._hung_at < DRAIN_S:
            return False
        self._end(Verdict(Cause.HUNG, reason, "see `llamavisor logs`"))
        return True

    def advance(self, *, now: float) -> None:
        """Restart the router if the moment has come; called every second while it serves."""
        if self._ends_hung(now):
            return
        if self._troubles.closes("lost"):
            self._residency.try_all()
        table = self._residency.table
        corpse = table.corpse(now=now)
        if corpse is not None and "corpse" not in self._troubles:
            # Nothing that needs a stop may be sent to it now: it would wait for the dead process for ever.
            reason = f"the process of {corpse} has ended, and the router goes on calling it loaded"
            self.unsound(reason, subject="corpse")
        decides = self._arbiter is not None and self._arbiter.decides
        # There are four cases:
        # 1. Nothing is loaded: it is restarted.
        # 2. Nobody is being answered: so it is if that turns out to be true, and what was loaded is loaded again. One
        #    whose clients we do not see keeps what it has for as long as it works.
        # 3. Somebody waits for what it may not load any more: its models leave, each when it is idle.
        # 4. It goes on.
        is_empty = not any(model.state in HAS_CHILD for model in table)
        if is_empty and "binary" in self._troubles:
            self._restart(Cause.UPGRADE)
        elif is_empty and self._troubles.closes("lost"):
            self._end(Verdict(Cause.DEVICE, "a device has vanished", "look for its driver's words"))
        elif (self._is_unsound or ("binary" in self._troubles and decides)) and table.is_all_idle(now=now):
            self._begin(self._residency.confirm_all_idle)
        elif self._arbiter is not None and decides and self.is_due:
            self._arbiter.make_way(self._name)

    def confirmed(self) -> None:
        """A moment ago nobody was being answered."""
        if "settings" in self._troubles:
            self._restart(Cause.REQUESTED)
        elif "back" in self._troubles:
            self._restart(Cause.DEVICE)
        elif self._is_unsound:
            self._restart(Cause.UNSOUND)
        elif "binary" in self._troubles:
            self._restart(Cause.UPGRADE)

    def _close(self, subject: str, reason: str, *, hint: str) -> None:
        refusal = RouterNotReadyError(f"router {self._name}: {reason}", hint=hint)
        self._troubles.note(subject, reason, refusal=refusal)
