"""AMD devices, as the kernel's amdgpu driver tells of them in /sys.

Reading these files asks the driver, which blocks while a GPU is being reset: `llamavisor.gauge.worker` does it in a
process of its own. Only `find_amd` touches nothing but the PCI tree.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from llamavisor.gauge.cgroup import parse_number, parse_stat
from llamavisor.gauge.device import Device, Reading, parse_pci_id, pci_order, unknown

_VENDOR = "0x1002"
_CARD = re.compile(r"card\d+")
_DISCRETE_FILES = ("mem_busy_percent", "pcie_bw")


def read_amd(root: Path, at: float) -> tuple[Reading, ...]:
    """Every AMD GPU; those that fail with numbers that are unknown. Blocks for as long as the driver likes."""
    cards = list(_cards(root))
    nodes = kfd_nodes(root)
    return tuple(_read_card(folder, device, nodes, at) for folder, device in cards)


def find_amd(root: Path) -> tuple[Device, ...]:
    """The AMD GPUs that there are, by their PCI ids; asks no GPU anything."""
    return tuple(device for _, device in _cards(root))


def _cards(root: Path) -> Iterator[tuple[Path, Device]]:
    """Folder and device of each AMD card, in the order of their PCI ids."""
    try:
        names = os.listdir(root / "sys/class/drm")
    except OSError:
        return
    found: dict[str, Path] = {}
    for name in names:
        if not _CARD.fullmatch(name):  # card0-DP-1 is a plug of card0
            continue
        folder = root / "sys/class/drm" / name / "device"
        try:
            vendor = (folder / "vendor").read_text(encoding="ascii", errors="replace").strip()
            pci_id = parse_pci_id(folder.readlink().name)
        except OSError:
            continue
        if vendor == _VENDOR and pci_id is not None:
            found[pci_id] = folder
    for pci_id in sorted(found, key=pci_order):
        yield found[pci_id], Device(pci_id, "amd", "AMD GPU")


def _read_card(folder: Path, card: Device, nodes: Mapping[str, tuple[int, str | None]], at: float) -> Reading:
    rank, uuid = nodes.get(card.id, (None, None))
    device = replace(card, name=_name(folder), rank=rank, uuids=(uuid,) if uuid else ())
    names = "mem_info_vram_total", "mem_info_vram_used", "mem_info_gtt_total", "mem_info_gtt_used"
    numbers = [_number(folder / name) for name in names]
    for number in numbers[:2]:
        if isinstance(number, str):
            return unknown(device, at, number)
    vram_total, vram_used, gtt_total, gtt_used = (None if isinstance(number, str) else number for number in numbers)
    if vram_total is None or vram_used is None:
        return unknown(device, at, "amdgpu does not tell its memory")
    if is_ram_shared(folder, vram_total, gtt_total):
        device = replace(device, is_ram_shared=True)
        if gtt_total is None or gtt_used is None:
            return unknown(device, at, "its memory is RAM")
        total, used = vram_total + gtt_total, vram_used + gtt_used
        return Reading(device, total, used, max(0, total - used), at)
    if not vram_total:
        return unknown(device, at, "amdgpu tells of no memory")
    return Reading(device, vram_total, vram_used, max(0, vram_total - vram_used), at)


def is_ram_shared(folder: Path, vram_total: int, gtt_total: int | None) -> bool:
    """Whether the card is an APU whose models go to RAM.

    Two things must hold:

    1. It is an APU. The driver gives every card of its own at least one of `mem_busy_percent` (all but Vega 10, since
       Linux 5.3) and `pcie_bw` (Vega 10 and others), and an APU neither; and it names the maker of a card's memory in
       `mem_info_vram_vendor`, of an APU's as "unknown". Any of these three signs makes it a card.
    2. What the firmware has carved out of RAM for it (`vram_total`, which MemTotal does not count) is less than what it
       may take of RAM (`gtt_total`). An APU that was given 96 of 128 GiB in the firmware has a memory of its own.
    """
    if any((folder / name).exists() for name in _DISCRETE_FILES):
        return False
    try:
        maker = (folder / "mem_info_vram_vendor").read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        maker = "unknown"
    if maker not in {"", "unknown"}:
        return False
    return gtt_total is None or vram_total < gtt_total


def kfd_nodes(root: Path) -> dict[str, tuple[int, str | None]]:
    """Place and UUID of each GPU that ROCm can use, by PCI id, in the order in which ROCm counts them."""
    found: dict[str, tuple[int, str | None]] = {}
    folder = root / "sys/class/kfd/kfd/topology/nodes"
    try:
        numbers = sorted(int(name) for name in os.listdir(folder) if name.isascii() and name.isdigit())
    except OSError:
        return found
    for number in numbers:
        try:
            text = (folder / str(number) / "properties").read_text(encoding="ascii", errors="replace")
        except OSError:  # of another container
            continue
        known = parse_stat(text)
        location = known.get("location_id", 0)
        if not known.get("simd_count") or location > 0xFFFF:  # a CPU
            continue
        bus, device, function = location >> 8, location >> 3 & 0x1F, location & 0x7
        pci_id = f"{known.get('domain', 0):04x}:{bus:02x}:{device:02x}.{function}"
        unique = known.get("unique_id", 0)
        found.setdefault(pci_id, (len(found), f"GPU-{unique:016x}" if unique else None))
    return found


def _name(folder: Path) -> str:
    for name, form in (("product_name", "{}"), ("device", "AMD GPU {}")):
        try:
            text = (folder / name).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            continue
        if text:
            return form.format(text)
    return "AMD GPU"


def _number(path: Path) -> int | str | None:
    """A number; None if there is no such file; in words, why it cannot be read."""
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as exc:
        return f"{path.name}: {exc.strerror}"
    number = parse_number(text)
    return f"{path.name} is no number" if number is None else number
