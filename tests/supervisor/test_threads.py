"""Work in threads on a machine that has none to give."""

from __future__ import annotations

import threading

import anyio
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
async def test_a_thread_that_was_left_to_itself_counts_until_it_ends() -> None:
    """Of two that hang each takes a place, the third caller waits in vain, and gets one when the first has ended."""
    threads, end = Threads(2), threading.Event()
    for _ in range(3):
        with anyio.move_on_after(0.05):
            await threads.run(end.wait, abandon_on_cancel=True)
    assert repr(threads) == "<Threads 2 of 2>"
    end.set()
    with anyio.fail_after(5):
        assert await threads.run(lambda: "done") == "done"
        while threads.at_work:
            await anyio.sleep(0)


async def test_who_leaves_before_a_thread_has_begun_leaves_its_place() -> None:
    """Work that nobody waits for any more is not begun, and takes no place."""
    threads, done = Threads(1), []
    with anyio.CancelScope() as scope:
        scope.cancel()
        await threads.run(lambda: done.append(1), abandon_on_cancel=True)
    assert (threads.at_work, done) == (0, [])
