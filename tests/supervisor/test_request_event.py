"""The entry of the access log: what stands in it, and how loud it is."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from fakes.request import ended
from llamavisor.events import Bus, RequestOutcome


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "chat/completions, model alpha on main, 200 after 1.500 s, 10 bytes in, 20 out"),
        (
            {
                "outcome": RequestOutcome.BROKEN,
                "queue_s": 1.0,
                "load_s": 0.75,
                "is_stream": True,
                "tokens_in": 7,
                "tokens_out": 8,
                "retries": 2,
                "key": "ci",
                "client": "10.0.0.9",
            },
            (
                "chat/completions, model alpha on main, 200 broken after 1.500 s, queued 1.000 s, load 0.750 s, "
                "first data after 0.250 s, 7 + 8 tokens, 10 bytes in, 20 out, sent again 2x, key ci, from 10.0.0.9"
            ),
        ),
        (
            {"router": None, "status": 404, "outcome": RequestOutcome.REFUSED, "first_data_s": None, "tokens_in": 7},
            "chat/completions, model alpha, 404 refused after 1.500 s, 7 + ? tokens, 10 bytes in, 20 out",
        ),
        (
            {"status": 499, "outcome": RequestOutcome.LEFT},
            "chat/completions, model alpha on main, 499, the client left after 1.500 s, 10 bytes in, 20 out",
        ),
        (
            {"route": "models", "model": None, "router": None},
            "models, 200 after 1.500 s, 10 bytes in, 20 out",
        ),
    ],
)
def test_the_line_has_what_is_so(changes: dict[str, Any], line: str) -> None:
    """What is nothing or not known is left out."""
    assert ended(**changes).message() == line


def test_what_was_asked_has_a_place_of_its_own() -> None:
    """It is neither in the line nor in the representation, which end up everywhere."""
    event = ended(body="my secret")
    assert event.as_dict()["body"] == "my secret"
    assert "secret" not in event.message() + repr(event)


def test_requests_do_not_bury_what_happens() -> None:
    """They are logged when somebody debugs, or asks for it; and none is replayed."""
    assert ended().log_level == logging.DEBUG
    assert ended(is_logged=True).log_level == logging.INFO
    bus = Bus()
    bus.publish(ended(is_logged=True))
    assert bus.replay(0) == []
