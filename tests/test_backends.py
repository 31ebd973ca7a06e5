"""Tests choose their clock."""

from __future__ import annotations

import time

import anyio
import pytest
import sniffio
from trio.testing import MockClock

pytestmark = pytest.mark.anyio


async def test_virtual_time(virtual_time: MockClock) -> None:
    """With `virtual_time` an hour of sleep takes no time at all."""
    begin = time.monotonic()
    await anyio.sleep(3600)
    assert virtual_time.current_time() == 3600
    assert time.monotonic() - begin < 10


@pytest.mark.usefixtures("virtual_time")
async def test_virtual_time_by_mark() -> None:
    """A mark does the same for a whole class or module."""
    with anyio.move_on_after(3600):
        await anyio.sleep_forever()
    assert anyio.current_time() == 3600


async def test_true_time() -> None:
    """All others run on asyncio, as the daemon does."""
    assert sniffio.current_async_library() == "asyncio"
    await anyio.to_thread.run_sync(time.monotonic)


@pytest.mark.usefixtures("virtual_time")
async def test_threads_of_trio_are_no_leak() -> None:
    """The worker threads that trio keeps do not count as left behind."""
    assert await anyio.to_thread.run_sync(sniffio.current_async_library_cvar.get) is None
