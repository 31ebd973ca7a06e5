"""Whether RAM is so short that something has to be done, and what: first who is idle leaves, then nothing is loaded.

Budgets see to it that models fit; this is for when others take the memory, or a model grows. There are two signs, and
one is enough. Little is free: the kernel is about to kill somebody. Or work stands still for want of memory although
some is free by the kernel's reckoning, which counts mapped weights that are in use among what could be dropped.

RAM only. A GPU slows nobody down and kills nobody when it is full: an allocation that does not fit there fails, in the
process that asks for it, and llama-server asks for all of its own while it loads. That is a load that fails for memory,
which admission deals with.

Times are monotonic seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from llamavisor.gauge.device import Pressure, Reading

_MIB = 1024 * 1024
FLOOR_FRACTION = 0.02
FLOOR_BYTES = 256 * _MIB
"""Less than the larger of the two is little: 2 % is some times what the kernel itself keeps free (its high watermark,
about 0.3 % on a large machine), and 256 MiB is what a daemon or a login needs to come up."""
CALM_FLOORS = 2
"""So many floors have to be free again before memory is not short any more."""
FULL_PERCENT = 20.0
"""Work that stands still for more than this share of ten seconds is thrashing, as the kernel's documentation calls it.
systemd-oomd kills at 60 % for 30 s by default, Fedora has it kill at 50 % for 20 s: idle models leave long before."""
CALM_PERCENT = 5.0
"""Below this nobody notices."""
READINGS = 3
"""So many readings in a row make memory short: a load that has just ended may look like it once."""
RELIEF_S = 10.0
"""How long those who were told to leave have to make a difference, which the averages of pressure need to show it."""
CALM_AFTER_S = 30.0
"""How long all has to be well again. Memory is short at most once in that time."""
FORGOTTEN_AFTER_S = 300.0
"""So long after the last thing that was known, nothing is: a gauge that has failed does not refuse loads for ever."""


class Level(Enum):
    """How short memory is."""

    CALM = "calm"
    """It is not."""
    RELIEVE = "relieve"
    """Idle models are to leave."""
    REFUSE = "refuse"
    """Nothing is to be loaded: it is short although idle models have left, or because none can."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What is to be done.

    Attributes:
        level: how short memory is.
        lacking_bytes: how much of RAM idle models are to give back now; 0 if nobody is to leave, or until those who
            have been told to leave have made a difference.
        text: what is short, for people; "" if nothing is.
        retry_after_s: when to come again, for who is refused; None unless `level` is REFUSE.
    """

    level: Level = Level.CALM
    lacking_bytes: int = 0
    text: str = ""
    retry_after_s: float | None = None


class Strain:
    """Looks at one reading of RAM after the other.

    What is not known is no sign of anything: an unknown reading neither makes memory short nor has anybody leave, and
    the level stays as it is. It also is no sign that all is well, so it interrupts nothing and ends nothing; only when
    nothing has been known for `FORGOTTEN_AFTER_S` is memory taken not to be short. A kernel that has never told of
    pressure is judged by what is free alone.
    """

    def __init__(self) -> None:
        self._level = Level.CALM
        self._text = ""
        self._read_at: float | None = None  # when the last reading was made
        self._short = 0  # readings in a row that show it, while the level is CALM
        self._known_at = 0.0  # when all was known last
        self._well_since: float | None = None
        self._relieved_at: float | None = None
        self._tells_pressure = False

    def __repr__(self) -> str:
        return f"<Strain {self._level.value}>"

    def step(self, reading: Reading | None, pressure: Pressure | None, now: float, *, can_relieve: bool) -> Advice:
        """What is to be done now.

        Args:
            reading: of RAM, the last one; one that has been looked at before is not looked at again.
            pressure: of memory, as of that reading; None if it is not known.
            now: monotonic time in seconds.
            can_relieve: whether a model could leave: one that is idle and not pinned.
        """
        lacking = 0
        if reading is not None and reading.at != self._read_at:
            self._read_at = reading.at
            lacking = self._look(reading, pressure, now, can_relieve=can_relieve)
        if self._level is not Level.CALM and now - self._known_at >= FORGOTTEN_AFTER_S:
            self._end()
            lacking = 0
        retry_after_s = None
        if self._level is Level.REFUSE:
            well_s = 0.0 if self._well_since is None else now - self._well_since
            retry_after_s = max(1.0, CALM_AFTER_S - well_s)
        return Advice(self._level, lacking, self._text, retry_after_s)

    def _look(self, reading: Reading, pressure: Pressure | None, now: float, *, can_relieve: bool) -> int:
        """Take a new reading in; returns how much is to be given back."""
        self._tells_pressure |= pressure is not None
        total, free = reading.total_bytes, reading.free_bytes
        floor = None if total is None else floor_bytes(total)
        reasons: list[str] = []
        if floor is not None and free is not None and free < floor:
            reasons.append(f"{free // _MIB} MiB of RAM are free, and {floor // _MIB} MiB should be")
        if pressure is not None and pressure.full_avg10 > FULL_PERCENT:
            reasons.append(f"work stood still for want of memory for {pressure.full_avg10:.0f} % of the last 10 s")
        is_known = floor is not None and free is not None and (pressure is not None or not self._tells_pressure)
        lacks = 0 if floor is None or free is None else max(0, CALM_FLOORS * floor - free)
        is_well = is_known and not lacks and (pressure is None or pressure.full_avg10 < CALM_PERCENT)
        if is_known or reasons:
            self._known_at = now
        if self._level is Level.CALM:
            self._short = self._short + 1 if reasons else 0 if is_known else self._short
            if self._short < READINGS:
                return 0
            self._level = Level.RELIEVE
        if reasons:
            self._text = "; ".join(reasons)
        if is_well:
            self._well_since = now if self._well_since is None else self._well_since
            if now - self._well_since >= CALM_AFTER_S:
                self._end()
            return 0
        if not is_known and not reasons:
            return 0
        self._well_since = None
        is_due = self._relieved_at is None or now - self._relieved_at >= RELIEF_S
        if reasons and is_due and (self._relieved_at is not None or not can_relieve):
            self._level = Level.REFUSE
        if not (can_relieve and is_due):
            return 0
        self._relieved_at = now
        return max(1, lacks)

    def _end(self) -> None:
        self._level, self._text, self._short = Level.CALM, "", 0
        self._well_since = self._relieved_at = None


def floor_bytes(total_bytes: int) -> int:
    """How much of RAM should be free."""
    return max(int(total_bytes * FLOOR_FRACTION), FLOOR_BYTES)
