"""AMD devices in fake trees of /sys."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamavisor.gauge.amd import find_amd, kfd_nodes, read_amd

MIB = 1024 * 1024
GIB = 1024 * MIB


def card(root: Path, name: str, pci_id: str, vendor: str = "0x1002", **files: object) -> Path:
    """Put a card into /sys, with these files; None leaves one out."""
    said = {"vendor": vendor, "device": "0x744c", "mem_busy_percent": 0}
    said |= {"mem_info_vram_total": 24 * GIB, "mem_info_vram_used": 4 * GIB}
    said |= {"mem_info_gtt_total": 32 * GIB, "mem_info_gtt_used": 16 * MIB} | files
    device = root / "sys/devices/pci0000:00" / pci_id
    device.mkdir(parents=True)
    for file, text in said.items():
        if text is not None:
            (device / file).write_text(f"{text}\n")
    folder = root / "sys/class/drm" / name
    folder.mkdir(parents=True)
    (folder / "device").symlink_to(device)
    return device


def node(root: Path, number: int, **properties: int) -> None:
    """Put a node of ROCm's topology into /sys."""
    folder = root / "sys/class/kfd/kfd/topology/nodes" / str(number)
    folder.mkdir(parents=True)
    (folder / "properties").write_text("".join(f"{name} {value}\n" for name, value in properties.items()))


def test_a_card_tells_its_memory(tmp_path: Path) -> None:
    """Of its own memory; what it may take of RAM does not count."""
    card(tmp_path, "card1", "0000:03:00.0", product_name="AMD Radeon PRO W7900")
    (tmp_path / "sys/class/drm/card1-DP-1").mkdir()
    (tmp_path / "sys/class/drm/renderD128").mkdir()
    (reading,) = read_amd(tmp_path, 2.0)
    assert (reading.device.id, reading.device.kind, reading.device.name) == (
        "0000:03:00.0",
        "amd",
        "AMD Radeon PRO W7900",
    )
    assert not reading.device.is_ram_shared
    assert (reading.total_bytes, reading.used_bytes, reading.free_bytes) == (24 * GIB, 4 * GIB, 20 * GIB)
    assert (reading.at, reading.reason) == (2.0, "")


def test_cards_of_other_makers_are_left_out(tmp_path: Path) -> None:
    """They have other files, or none; cards come in the order of their PCI ids."""
    card(tmp_path, "card0", "0000:00:02.0", vendor="0x8086")
    card(tmp_path, "card2", "0000:83:00.0")
    card(tmp_path, "card10", "0000:03:00.0")
    assert [device.id for device in find_amd(tmp_path)] == ["0000:03:00.0", "0000:83:00.0"]
    assert [reading.device.id for reading in read_amd(tmp_path, 0.0)] == ["0000:03:00.0", "0000:83:00.0"]


def test_a_machine_without_cards_has_none(tmp_path: Path) -> None:
    """Without /sys/class/drm too."""
    assert find_amd(tmp_path) == ()
    assert read_amd(tmp_path, 0.0) == ()


@pytest.mark.parametrize(
    ("files", "shared"),
    [
        ({"mem_busy_percent": None, "mem_info_vram_total": 512 * MIB}, True),
        ({"mem_busy_percent": None, "mem_info_vram_total": 512 * MIB, "mem_info_vram_vendor": "unknown"}, True),
        ({"mem_busy_percent": None, "mem_info_vram_total": 0, "mem_info_vram_used": 0}, True),
        ({"mem_busy_percent": None, "mem_info_vram_total": 96 * GIB, "mem_info_gtt_total": 16 * GIB}, False),
        ({"mem_info_vram_total": 8 * GIB}, False),
        ({"mem_busy_percent": None, "mem_info_vram_total": 8 * GIB, "pcie_bw": "1 2 256"}, False),
        ({"mem_busy_percent": None, "mem_info_vram_total": 8 * GIB, "mem_info_vram_vendor": "samsung"}, False),
    ],
)
def test_an_apu_shares_ram(tmp_path: Path, files: dict[str, object], shared: bool) -> None:
    """If little was carved out for it. A card with less memory than it may take of RAM does not."""
    card(tmp_path, "card0", "0000:04:00.0", **files)
    (reading,) = read_amd(tmp_path, 0.0)
    assert reading.device.is_ram_shared is shared
    assert (reading.device.memory_id == "RAM") is shared


def test_what_an_apu_may_take_is_both_its_parts(tmp_path: Path) -> None:
    """The part that was carved out, and what it may take of RAM."""
    sizes = {"mem_info_vram_total": 512 * MIB, "mem_info_vram_used": 500 * MIB}
    card(tmp_path, "card0", "0000:04:00.0", mem_busy_percent=None, **sizes)
    (reading,) = read_amd(tmp_path, 0.0)
    assert (reading.total_bytes, reading.used_bytes) == (32 * GIB + 512 * MIB, 516 * MIB)


@pytest.mark.parametrize(
    "files",
    [
        {"mem_info_vram_total": None},
        {"mem_info_vram_used": None},
        {"mem_info_vram_used": "what"},
        {"mem_info_vram_total": ""},
        {"mem_info_vram_total": 0},
        {"mem_info_vram_total": -1},
    ],
)
def test_a_card_that_fails_is_unknown_and_the_other_is_not(tmp_path: Path, files: dict[str, object]) -> None:
    """Its numbers are None, never zero, and it says why."""
    card(tmp_path, "card0", "0000:03:00.0", **files)
    card(tmp_path, "card1", "0000:83:00.0")
    broken, fine = read_amd(tmp_path, 0.0)
    assert (broken.total_bytes, broken.used_bytes, broken.free_bytes) == (None, None, None)
    assert broken.reason
    assert fine.is_known


def test_a_card_whose_driver_gives_an_error_is_unknown(tmp_path: Path) -> None:
    """As during a reset; a folder in the place of a file is such an error."""
    device = card(tmp_path, "card0", "0000:03:00.0", mem_info_vram_used=None)
    (device / "mem_info_vram_used").mkdir()
    (reading,) = read_amd(tmp_path, 0.0)
    assert reading.total_bytes is None
    assert "mem_info_vram_used" in reading.reason


def test_places_and_uuids_are_those_of_rocm(tmp_path: Path) -> None:
    """In the order of its nodes, of which CPUs are none; a card that ROCm cannot use has no place."""
    for name, pci_id in (("card0", "0000:03:00.0"), ("card1", "0000:83:00.0"), ("card2", "0000:c3:00.0")):
        card(tmp_path, name, pci_id)
    node(tmp_path, 0, cpu_cores_count=16, simd_count=0)
    node(tmp_path, 10, simd_count=192, domain=0, location_id=0x0300)
    node(tmp_path, 2, simd_count=192, domain=0, location_id=0x8300, unique_id=0xDEADBEEF)
    devices = [reading.device for reading in read_amd(tmp_path, 0.0)]
    assert [(device.rank, device.uuids) for device in devices] == [
        (1, ()),
        (0, ("GPU-00000000deadbeef",)),
        (None, ()),
    ]


@given(text=st.text() | st.lists(st.sampled_from(["simd_count 4", "location_id 768", "location_id x"])).map("\n".join))
def test_any_topology_is_read(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Whatever a node says, nothing raises."""
    root = tmp_path_factory.mktemp("kfd")
    folder = root / "sys/class/kfd/kfd/topology/nodes/1"
    folder.mkdir(parents=True)
    (folder / "properties").write_text(text, encoding="utf-8", errors="replace")
    for rank, _ in kfd_nodes(root).values():
        assert rank == 0


@given(text=st.text())
def test_any_number_is_read_or_unknown(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """A file that does not say a number makes its card unknown, never empty."""
    root = tmp_path_factory.mktemp("drm")
    device = card(root, "card0", "0000:03:00.0")
    (device / "mem_info_vram_total").write_text(text, encoding="utf-8", errors="replace")
    (reading,) = read_amd(root, 0.0)
    assert reading.total_bytes is None or reading.total_bytes == int(text.strip()) > 0
