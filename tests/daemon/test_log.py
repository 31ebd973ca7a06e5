"""The daemon's own log: one line for each event, as grave as what happened."""

from __future__ import annotations

import logging

import pytest

from llamavisor.events import ModelUnloaded, Published, UnloadReason
from llamavisord.app import _log_event


@pytest.mark.parametrize(
    ("reason", "level", "text"),
    [
        (UnloadReason.CRASHED, logging.WARNING, "model a: crashed on main"),
        (
            UnloadReason.FILE_CHANGED,
            logging.WARNING,
            "model a: crashed on main because its file was overwritten or cut off",
        ),
        (UnloadReason.REQUESTED, logging.INFO, "model a: unloaded from main (requested)"),
        (UnloadReason.EVICTED, logging.INFO, "model a: unloaded from main (evicted)"),
        (UnloadReason.ROUTER, logging.INFO, "model a: unloaded from main (router)"),
    ],
)
def test_a_model_that_crashed_is_a_warning(
    caplog: pytest.LogCaptureFixture, reason: UnloadReason, level: int, text: str
) -> None:
    """And says so; one that left memory for any other reason is none."""
    with caplog.at_level(logging.INFO, logger="llamavisor"):
        _log_event(Published(1, 0.0, ModelUnloaded(router="main", model="a", reason=reason)))
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [(level, text)]
