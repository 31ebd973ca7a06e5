"""The end of a model's process, seen by a process that is not its parent."""

from __future__ import annotations

import os
import resource
import subprocess

import anyio
import pytest

from llamavisor import procfs
from llamavisor.child import Child

pytestmark = pytest.mark.anyio


async def test_an_end_is_not_seen_where_nothing_can_be_seen() -> None:
    """R2: with one descriptor left a model that lives is not taken for one that has ended, and its end is seen."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with subprocess.Popen(["/bin/sleep", "60"]) as process:
        identity = procfs.identify(process.pid)
        assert identity is not None
        lowest_free = os.open(os.devnull, os.O_RDONLY)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, hard))
        try:
            with anyio.move_on_after(0.2) as scope:
                await Child(identity, None).wait()
            assert scope.cancelled_caught
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            process.kill()
        with anyio.fail_after(10):
            await Child(identity, None).wait()
