"""Ended processes that nobody waits for, real ones."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fakes.waiting import eventually
from llamavisor import procfs
from llamavisor.orphans import reap
from llamavisor.process import become_subreaper

LEAVES_ONE = "import os\nif os.fork() == 0:\n    print(os.getpid(), flush=True)\n    os._exit(3)\nos._exit(0)"


@pytest.fixture
def orphan() -> int:
    """The pid of an ended process whose parent has ended before it was waited for."""
    become_subreaper()
    left = subprocess.run([sys.executable, "-c", LEAVES_ONE], stdout=subprocess.PIPE, check=True)
    pid = int(left.stdout)
    eventually(lambda: _is_zombie(pid), what="an ended orphan")
    return pid


def _is_zombie(pid: int) -> bool:
    stat = procfs.stat(pid)
    return stat is not None and stat.is_zombie


def test_an_orphan_is_reaped_at_the_second_look(orphan: int) -> None:
    """At the first one it may still be somebody's whose exit status is wanted."""
    seen = reap(frozenset())
    assert orphan in {one.pid for one in seen}
    assert _is_zombie(orphan)
    assert reap(seen) == frozenset()
    assert procfs.stat(orphan) is None


def test_who_lives_is_left_alone(orphan: int) -> None:
    """A child that runs goes on, and its exit status is there for whoever waits for it when it has just ended."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as cat:
        seen = reap(reap(frozenset()))
        assert cat.pid not in {one.pid for one in seen}
        assert cat.stdin is not None
        cat.stdin.close()
        eventually(lambda: _is_zombie(cat.pid), what="an ended child")
        assert cat.pid in {one.pid for one in reap(seen)}
        assert cat.wait() == 0
    assert procfs.stat(orphan) is None
