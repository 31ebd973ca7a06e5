"""Work in threads on a machine that has none to give."""

from __future__ import annotations

import threading
from functools import partial

import anyio
import anyio.lowlevel
import pytest

from llamavisor.threads import Threads, run_in_thread

pytestmark = pytest.mark.anyio


async def test_a_thread_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """While none can be started the work waits, and is done once when one can."""
    refused = []
    true_start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if len(refused) < 3:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        true_start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done = []
    with anyio.fail_after(5):
        assert await run_in_thread(lambda what: done.append(what) or len(done), "work") == 1
    assert (done, len(refused)) == (["work"], 3)


async def test_an_error_of_the_work_is_its_own() -> None:
    """Work that fails, with whatever error, is not done again."""
    done = []

    def fail() -> None:
        done.append(1)
        raise RuntimeError("can't start new thread")

    with pytest.raises(RuntimeError):
        await run_in_thread(fail)
    assert done == [1]


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_threads_that_hang_are_bounded() -> None:
    """Work that was left to itself takes its thread until it ends; who waits for a free one can leave."""
    threads, begun, released, done = Threads(2), threading.Semaphore(0), threading.Event(), []

    def hang() -> None:
        begun.release()
        released.wait()

    for _ in range(2):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(threads.run, hang, abandon_on_cancel=True))
            with anyio.fail_after(15):
                while not begun.acquire(blocking=False):
                    await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
    with anyio.move_on_after(0.05) as left:
        await threads.run(done.append, "never")
    assert (left.cancelled_caught, done) == (True, [])
    assert threads.at_work == 2
    released.set()
    with anyio.fail_after(5):
        for number in range(9):
            await threads.run(done.append, number)
    assert done == list(range(9))


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_caller_that_is_cancelled_takes_no_thread_along() -> None:
    """However early it is cancelled, the thread is there for the next one."""
    threads = Threads(1)
    for turns in range(6):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(threads.run, str)
            for _ in range(turns):
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
    with anyio.fail_after(5):
        assert await threads.run(str, 7) == "7"
