"""The systemd for tests: it is a real one, it is alone, and nothing of it stays."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fakes.waiting import eventually
from systemd.sandbox import Systemd

HELLO = """
[Service]
Environment=SAID={said}
ExecStart={python} -c "import os, time; print('hello', os.environ['SAID'], flush=True); time.sleep(600)"
"""


def hello(said: str) -> str:
    """A unit that says so and stays."""
    return HELLO.format(said=said, python=sys.executable)


def test_units_are_started_for_real(tmp_path: Path) -> None:
    """A unit runs with our Python, is seen by systemctl, and what it says is in the journal; systemd is process 1."""
    with Systemd(tmp_path) as systemd:
        assert systemd.run("cat", "/proc/1/comm").stdout.strip() == "systemd"
        systemd.write_unit("hello.service", hello("you"))
        systemd.run("systemctl", "start", "hello.service")
        assert systemd.show("hello.service", "ActiveState", "SubState") == {
            "ActiveState": "active",
            "SubState": "running",
        }
        eventually(lambda: "hello you" in systemd.journal("hello.service"))
        systemd.run("systemctl", "kill", "--signal=KILL", "hello.service")
        eventually(lambda: systemd.show("hello.service", "Result")["Result"] == "signal")


def test_two_are_strangers_and_leave_nothing(tmp_path: Path) -> None:
    """A unit of one is unknown to the other, and ends only with its own; no process, file, mount or cgroup stays."""
    mounts = Path("/proc/self/mountinfo").read_text()
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    with Systemd(folders[0]) as one:
        with Systemd(folders[1]) as two:
            for systemd, said in ((one, "from one"), (two, "from two")):
                systemd.write_unit("hello.service", hello(f"'{said}'"))
                systemd.run("systemctl", "start", "hello.service")
            two.run("systemctl", "stop", "hello.service")
            assert two.show("hello.service", "ActiveState") == {"ActiveState": "inactive"}
            cgroups = [one._cgroup, two._cgroup]
        assert one.show("hello.service", "ActiveState") == {"ActiveState": "active"}
        one.write("/etc/llamavisor/of-one", "text")
        assert one.run("cat", "/etc/llamavisor/of-one").stdout == "text"
        assert any(map(_says_hello, os.listdir("/proc")))
    assert not Path("/etc/llamavisor/of-one").exists()
    assert not [cgroup for cgroup in cgroups if cgroup is not None and cgroup.exists()]
    assert [list(folder.iterdir()) for folder in folders] == [[], []]
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert not any(map(_says_hello, os.listdir("/proc")))


def _says_hello(pid: str) -> bool:
    try:
        return b"print('hello'" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
