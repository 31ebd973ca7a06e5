"""What the doctor makes of machines that are not at hand: other mounts, services, clocks, devices."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest

from llamavisor import footprint
from llamavisor.gauge import RAM_ID
from llamavisor.settings import MemoryBudget, RouterSettings
from llamavisord.doctor import Finding, Grade, clock, memory, models, options, pins, service
from llamavisord.doctor.account import Account
from llamavisord.doctor.clock import Kept
from llamavisord.doctor.finding import Findings
from llamavisord.doctor.machine import Machine, Memory, told
from llamavisord.doctor.models import Model, Mount
from llamavisord.loading import load

GIB = 1024**3
FOLDER = Path("/srv/models")
MOUNTINFO = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:45 / /srv rw,relatime - xfs /dev/sdb1 rw
31 30 0:46 / /srv/models ro,relatime - nfs4 nas:/export/my\\040models ro,vers=4.2
32 22 0:47 / /srv/models-too rw - tmpfs tmpfs rw
a line that is none
"""
RAM = Memory(RAM_ID, "RAM", 32 * GIB, 16 * GIB, 28 * GIB)
CUDA0 = Memory("0000:01:00.0", "CUDA0 (NVIDIA GeForce RTX 3090)", 24 * GIB, 23 * GIB, 22 * GIB)
OTHER = "0000:02:00.0"
SERVICE = {
    "LoadState": "loaded",
    "ActiveState": "active",
    "SubState": "running",
    "UnitFileState": "enabled",
    "DropInPaths": "/etc/systemd/system/llamavisor.service.d/10-install.conf",
    "MainPID": "42",
    "NeedDaemonReload": "no",
}
SOCKET = {
    "LoadState": "loaded",
    "ActiveState": "active",
    "Listen": "/run/llamavisor/control.sock (Stream)\n127.0.0.1:8080 (Stream)\n[::1]:8080 (Stream)",
}


def worst(findings: Findings) -> Finding:
    """The one that matters most."""
    return max(findings, key=lambda finding: list(Grade).index(finding.grade))


def test_a_mount_is_known_by_its_path_alone() -> None:
    """The deepest one that a folder is in, with its kind; a name with blanks, a neighbour, and nonsense are no trap."""
    assert models.mount_of(FOLDER / "qwen", MOUNTINFO) == Mount(
        "nfs4", "nas:/export/my models", frozenset({"ro", "relatime"})
    )
    assert models.mount_of(Path("/srv/models-too"), MOUNTINFO) == Mount("tmpfs", "tmpfs", frozenset({"rw"}))
    assert models.mount_of(Path("/home"), MOUNTINFO) == Mount("ext4", "/dev/sda1", frozenset({"rw", "relatime"}))
    assert models.mount_of(FOLDER, "") is None


def test_mounts() -> None:
    """A network and a read-only mount are told of; a plain disk is not."""
    findings = list(models.judge_mount(FOLDER, models.mount_of(FOLDER, MOUNTINFO)))
    assert [finding.grade for finding in findings] == [Grade.NOTE, Grade.NOTE]
    assert "nfs4 (nas:/export/my models)" in findings[0].text
    assert "read-only" in findings[1].text
    assert not list(models.judge_mount(Path("/home"), models.mount_of(Path("/home"), MOUNTINFO)))


@pytest.mark.parametrize(
    ("folders", "limit", "grade"),
    [(10, 8192, Grade.OK), (9000, 8192, Grade.WARNING), (5000, 65536, Grade.OK), (10, None, Grade.NOTE)],
)
def test_watches(folders: int, limit: int | None, grade: Grade) -> None:
    """More folders than the kernel lets a user watch are a warning with the setting to change."""
    findings = list(models.judge_watches(FOLDER, folders, limit))
    assert findings[-1].grade is grade
    assert ("sysctl fs.inotify.max_user_watches=" in findings[-1].hint) == (grade is Grade.WARNING)
    assert any("4096" in finding.text for finding in findings) == (folders > 4096)


def test_disks() -> None:
    """One that is nearly full is a warning; one that does not tell is not called empty."""
    assert worst(models.judge_disk(FOLDER, 1 * GIB, 900 * GIB)).grade is Grade.WARNING
    assert worst(models.judge_disk(FOLDER, 100 * GIB, 900 * GIB)).grade is Grade.OK
    assert worst(models.judge_disk(FOLDER, None, None)).grade is Grade.NOTE


def test_many_broken_files() -> None:
    """Ten are named with what to do, of the others the number is."""
    broken = [Model(f"m{number}", "incomplete", "part 2 is missing") for number in range(13)]
    findings = list(models.judge_models(FOLDER, [*broken, Model("good", "ready")]))
    assert findings[0].text == "models in /srv/models: 13 incomplete, 1 ready"
    assert findings[1] == Finding(Grade.WARNING, "m0 is incomplete: part 2 is missing", "add what is missing")
    assert len(findings) == 12
    assert findings[-1].text == "and 3 more that cannot be used"


def test_modes_of_files(tmp_path: Path) -> None:
    """The owner's, the group's and everybody's bits count for whom they are about, and root needs none."""
    tmp_path.chmod(0o750)
    status = tmp_path.stat()
    owner = Account(status.st_uid or 7, frozenset(), "owner")
    is_root = status.st_uid == 0
    assert owner.may(status, os.W_OK) or is_root
    member = Account(54321, frozenset({status.st_gid}), "member")
    assert member.may(status, os.R_OK | os.X_OK)
    assert not member.may(status, os.W_OK)
    assert not Account(54321, frozenset(), "stranger").may(status, os.R_OK)
    assert Account(0, frozenset(), "root").may(status, os.W_OK)


# Devices


def test_memories() -> None:
    """What is free and what models may take is told; what is not known, and RAM that is nearly gone, is a warning."""
    findings = list(memory.judge([RAM, CUDA0]))
    assert [finding.grade for finding in findings] == [Grade.OK, Grade.OK]
    assert findings[0].text == "RAM: 16.0 GiB of 32.0 GiB free, models may take 28.0 GiB"
    assert worst(memory.judge([Memory(RAM_ID, "RAM", 32 * GIB, GIB)])).grade is Grade.WARNING
    silent = worst(memory.judge([Memory("x", "CUDA0", reason="its driver does not answer")]))
    assert silent.grade is Grade.WARNING
    assert "its driver does not answer" in silent.text


def test_a_gpu_that_llama_server_does_not_see() -> None:
    """A warning with its name, or with the driver where no gauge can tell; without any GPU all is well."""
    blind = worst(memory.judge_sight("main", Machine((RAM, CUDA0), ()), ()))
    assert blind.grade is Grade.WARNING
    assert "RTX 3090" in blind.text
    assert "an NVIDIA driver" in worst(memory.judge_sight("main", Machine((RAM,), ()), ["an NVIDIA driver"])).text
    assert worst(memory.judge_sight("main", Machine((RAM,), ()), ())).grade is Grade.OK
    assert worst(memory.judge_sight("main", Machine((RAM,), None), ())).grade is Grade.NOTE


def test_an_nvidia_driver_without_bindings(tmp_path: Path) -> None:
    """How to have it asked is told, where its device node is."""
    assert memory.drivers(tmp_path) == ()
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidiactl").touch()
    assert memory.drivers(tmp_path) == ("an NVIDIA driver",)
    assert list(memory.judge_bindings(memory.drivers(tmp_path), has_bindings=False))
    assert not list(memory.judge_bindings(memory.drivers(tmp_path), has_bindings=True))
    assert not list(memory.judge_bindings((), has_bindings=False))


def test_a_daemon_tells_what_each_router_sees() -> None:
    """Two call one GPU differently, and have budgets of their own; one sees none; of one nobody can say."""
    devices = [{**asdict(each), "reason": None} for each in (RAM, CUDA0, replace(CUDA0, id=OTHER))]

    def seen(**names: str) -> Machine:
        own = [{"id": place, "name": name, "budget_bytes": GIB} for name, place in {"RAM": RAM_ID, **names}.items()]
        return told(devices, own)

    both, one = seen(CUDA0=CUDA0.id, CUDA1=OTHER), seen(CUDA0=OTHER)
    assert both.gpus == (footprint.Device("CUDA0", CUDA0.id, 23 * GIB), footprint.Device("CUDA1", OTHER, 23 * GIB))
    assert one.gpus == (footprint.Device("CUDA0", OTHER, 23 * GIB),)
    assert [each.budget_bytes for each in both.memories] == [GIB, GIB, GIB]
    assert [each.budget_bytes for each in one.memories] == [GIB, 22 * GIB, GIB]
    blind = seen()
    assert blind.gpus == ()
    assert worst(memory.judge_sight("main", blind, ())).grade is Grade.WARNING
    silent = told(devices, None)
    assert silent == Machine((RAM, CUDA0, replace(CUDA0, id=OTHER)), None)
    assert worst(memory.judge_sight("main", silent, ())).grade is Grade.NOTE


def test_pins_that_cannot_fit() -> None:
    """What they want together is held against each budget; a device of which nothing is known is left out."""
    machine = Machine((RAM, CUDA0), (footprint.Device("CUDA0", CUDA0.id),))
    both = {"qwen": {CUDA0.id: 15 * GIB, RAM_ID: GIB}, "llama": {CUDA0.id: 9 * GIB, RAM_ID: GIB, "unknown": 1}}
    (found,) = pins.judge("main", machine, both)
    assert found.grade is Grade.PROBLEM
    assert "(qwen, llama) want 24.0 GiB of CUDA0" in found.text
    assert "may take 22.0 GiB" in found.text
    assert not list(pins.judge("main", machine, {"qwen": both["qwen"]}))


def test_budgets_of_devices_that_are_not_there() -> None:
    """A name that no device has is a warning, and so is more than a device has."""
    machine = Machine((RAM, CUDA0), (footprint.Device("CUDA0", CUDA0.id),))

    def judged(budget: MemoryBudget) -> list[str]:
        router = RouterSettings(name="main", models_dir=FOLDER, memory=budget)
        return [finding.text for finding in options.judge_budget(router, machine)]

    assert judged(MemoryBudget(20 * GIB, (("RAM", GIB),))) == []
    (unseen,) = judged(MemoryBudget(None, (("CUDA3", GIB),)))
    assert "memory names CUDA3" in unseen
    (large,) = judged(MemoryBudget(48 * GIB))
    assert "memory of CUDA0 is 48.0 GiB, and there is 24.0 GiB" in large


# The service


@pytest.mark.parametrize(
    ("changes", "grade", "says"),
    [
        ({}, Grade.OK, "is active (running), enabled"),
        ({"LoadState": "not-found"}, Grade.NOTE, "is not installed"),
        ({"LoadState": "bad-setting", "LoadError": "no ExecStart"}, Grade.PROBLEM, "cannot be used: no ExecStart"),
        ({"ActiveState": "failed", "Result": "exit-code"}, Grade.PROBLEM, "exit-code"),
        ({"ActiveState": "inactive", "SubState": "dead"}, Grade.NOTE, "is inactive (dead)"),
        ({"UnitFileState": "disabled"}, Grade.NOTE, "not started at boot"),
        ({"NeedDaemonReload": "yes"}, Grade.WARNING, "has been changed"),
        ({"DropInPaths": "/etc/x/override.conf /etc/x/10-install.conf"}, Grade.NOTE, "of yours: override.conf"),
        ({"MainPID": "43"}, Grade.WARNING, "(pid 42) is not the one of llamavisor.service (pid 43)"),
    ],
)
def test_a_service(changes: dict[str, str], grade: Grade, says: str) -> None:
    """What systemd says of the unit, and what to do."""
    found = worst(service.judge({**SERVICE, **changes}, "systemctl", daemon_pid=42))
    assert found.grade is grade
    assert says in found.text
    assert bool(found.hint) == (grade is not Grade.OK)


def test_a_socket_unit_that_says_another_address(tmp_path: Path) -> None:
    """Systemd listens where the unit says, whatever the configuration says: that is a problem, both are told."""

    def judged(port: int, **changes: str) -> Finding:
        file = tmp_path / "llamavisor.toml"
        file.write_text(f'models_dir = "/srv/models"\nport = {port}\n', encoding="utf-8")
        return worst(service.judge_socket({**SOCKET, **changes}, load(file, {"HOME": str(tmp_path)})))

    assert judged(8080).grade is Grade.OK
    other = judged(8081)
    assert other.grade is Grade.PROBLEM
    assert "listens on 127.0.0.1:8080, [::1]:8080, and the configuration says 127.0.0.1:8081, [::1]:8081" in other.text
    assert judged(8080, ActiveState="inactive").grade is Grade.NOTE
    assert judged(8080, LoadState="not-found").grade is Grade.NOTE


# The clock


def test_clocks() -> None:
    """One that nobody keeps is a warning, one of another decade a problem; one that does not tell is not called bad."""
    judge = partial(clock.judge, now=1_800_000_000.0, has_systemd=True)
    assert worst(judge(Kept(is_synchronised=True, error_s=0.02))).grade is Grade.OK
    assert worst(judge(Kept(is_synchronised=False, error_s=16.0))).grade is Grade.WARNING
    assert worst(judge(PermissionError(1, "Operation not permitted"))).grade is Grade.NOTE
    assert worst(judge(Kept(is_synchronised=True, error_s=0.0), now=0.0)).grade is Grade.PROBLEM


@pytest.mark.parametrize("has_systemd", [True, False])
@pytest.mark.parametrize("now", [0.0, 1_800_000_000.0])
def test_the_clock_is_set_by_what_is_there(has_systemd: bool, now: float) -> None:
    """Nobody is told to call systemd where it does not run."""
    found = worst(clock.judge(Kept(is_synchronised=False, error_s=16.0), now=now, has_systemd=has_systemd))
    assert ("timedatectl" in found.hint) == has_systemd
    assert found.hint


def test_this_clock_can_be_asked() -> None:
    """The kernel answers, and knows by how much it may be off."""
    try:
        told = clock.kept()
    except OSError as error:
        assert error.strerror  # noqa: PT017 (a container may forbid it, and says so)
    else:
        assert told.error_s >= 0


def test_clocks_that_were_set() -> None:
    """A jump is told with its way; a machine that slept, and a daemon that answers slowly, are none."""
    assert "was set back by 1h 0m" in worst(clock.judge_jump(-3600.0, 0.0)).text
    assert "was set forth" in worst(clock.judge_jump(7200.0, 3600.0)).text
    assert not list(clock.judge_jump(3600.0, 3600.0))
    assert not list(clock.judge_jump(0.8, 0.0))
