"""The daemon's own log: one line for each event, as grave as what happened."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

from fakes.request import ended
from llamavisor.events import ModelUnloaded, Published, RequestEnded, UnloadReason
from llamavisord.log import log_event


@pytest.mark.parametrize(
    ("reason", "level", "text"),
    [
        (UnloadReason.CRASHED, logging.WARNING, "model a: crashed on main"),
        (UnloadReason.FILE_CHANGED, logging.WARNING, "model a: crashed on main"),
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
        log_event(Published(1, 0.0, ModelUnloaded(router="main", model="a", reason=reason)))
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [(level, text)]


def request(**more: Any) -> Published:
    """A request without a model that has ended."""
    asked = ended(route="props", model=None, router=None, first_data_s=None, duration_s=0.5, bytes_in=0, bytes_out=9)
    return Published(1, 0.0, replace(asked, **more))


def test_no_line_is_made_that_nobody_reads(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be made for every request."""

    def message(event: RequestEnded) -> str:
        raise AssertionError(event)

    monkeypatch.setattr(RequestEnded, "message", message)
    with caplog.at_level(logging.INFO, logger="llamavisor"):
        log_event(request())
    assert caplog.records == []


def test_requests_are_logged_when_the_configuration_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """And what was asked, when it says that too."""
    with caplog.at_level(logging.INFO, logger="llamavisor"):
        log_event(request(is_logged=True))
        log_event(request(is_logged=True, body='{"prompt": "%s"}'))
    line = "props, 200 after 0.500 s, 0 bytes in, 9 out"
    assert [record.getMessage() for record in caplog.records] == [line, f'{line}, asked: {{"prompt": "%s"}}']
