"""Work in threads on a machine that has none to give."""

from __future__ import annotations

import threading

import anyio
import pytest

from llamavisor.threads import run_in_thread

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
