"""Whether work stands still for want of memory: the kernel's pressure stall information (PSI)."""

from __future__ import annotations

import re
from pathlib import Path

from llamavisor.gauge.cgroup import find_cgroup
from llamavisor.gauge.device import Pressure

_LINE = re.compile(r"^(some|full) (?:.* )?avg10=(\d{1,3}(?:\.\d{1,6})?)(?: |$)", re.MULTILINE)


def machine_pressure(root: Path = Path("/")) -> Pressure | None:
    """The pressure on the whole machine; None where the kernel does not tell (built without PSI, or psi=0)."""
    return _read(root / "proc/pressure/memory")


def cgroup_pressure(root: Path = Path("/")) -> Pressure | None:
    """The pressure within our cgroup, which its own limit may cause on a machine that has plenty.

    None where the kernel does not tell: version 1 never does, and the uppermost cgroup is the machine.
    """
    ours = find_cgroup(root)
    return None if ours is None else _read(ours.folder / "memory.pressure")


def worst_pressure(root: Path = Path("/")) -> Pressure | None:
    """The higher of the two, None where neither is known."""
    known = [pressure for pressure in (machine_pressure(root), cgroup_pressure(root)) if pressure is not None]
    if not known:
        return None
    return Pressure(max(each.some_avg10 for each in known), max(each.full_avg10 for each in known))


def parse_pressure(text: str) -> Pressure | None:
    """Reads what a pressure file says; None if it does not say both numbers."""
    found = {name: float(value) for name, value in _LINE.findall(text)}
    return Pressure(found["some"], found["full"]) if found.keys() == {"some", "full"} else None


def _read(path: Path) -> Pressure | None:
    try:
        return parse_pressure(path.read_text(encoding="ascii", errors="replace"))
    except OSError:  # EOPNOTSUPP with psi=0
        return None
