"""Where the owner of some state finds what others tell it."""

from __future__ import annotations

import anyio
import pytest

from llamavisor.inbox import Inbox

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("virtual_time")]


async def test_messages_keep_their_order() -> None:
    """What was posted first is taken first, whether the reader waits already or comes later."""
    inbox = Inbox[int]()
    taken: list[int] = []

    async def read() -> None:
        while len(taken) < 6:
            taken.append(await inbox.take())

    inbox.post(0)
    inbox.post(1)
    assert (len(inbox), repr(inbox)) == (2, "<Inbox of 2>")
    async with anyio.create_task_group() as group:
        group.start_soon(read)
        for number in range(2, 6):
            await anyio.sleep(1.0)
            inbox.post(number)
    assert taken == [0, 1, 2, 3, 4, 5]
    assert not inbox


async def test_a_cancelled_reader_loses_nothing() -> None:
    """A message that arrives while its reader is being cancelled is had by that one, or is there for the next."""
    inbox = Inbox[str]()
    taken: list[str] = []

    async def read() -> None:
        taken.append(await inbox.take())

    for cancels_first in (True, False):
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await anyio.sleep(1.0)
            if cancels_first:
                group.cancel_scope.cancel()
            inbox.post("news")
            group.cancel_scope.cancel()
        with anyio.fail_after(1.0):
            assert len(taken) + len(inbox) == 1
            assert (taken or [await inbox.take()]) == ["news"]


async def test_a_full_inbox_does_not_keep_others_from_working() -> None:
    """A reader with many messages lets others run between two of them, and can be cancelled there."""
    inbox = Inbox[int]()
    for number in range(1000):
        inbox.post(number)
    with anyio.CancelScope() as scope:
        await inbox.take()
        scope.cancel()
        await inbox.take()
    assert scope.cancelled_caught
    assert len(inbox) == 999


def test_it_needs_no_event_loop_to_be_filled() -> None:
    """An inbox can be made and filled before anything runs."""
    inbox = Inbox[int]()
    inbox.post(1)
    assert len(inbox) == 1
