"""What a client is told of an error of the library."""

from __future__ import annotations

from llamavisor.errors import ModelNotFoundError
from llamavisord.gateway.replies import trouble_of


def test_a_model_that_cannot_be_served_is_not_called_missing() -> None:
    """It was found: what is wrong with it is told; one that is not there has llama-server's words."""
    error = ModelNotFoundError("no model")
    there = trouble_of(error, "alpha", lambda name: f"is invalid: {name}.gguf is empty")
    gone = trouble_of(error, "alpha", lambda _: "")
    assert (there.status, there.message) == (400, "model 'alpha' is invalid: alpha.gguf is empty")
    assert (gone.status, gone.message) == (400, "model 'alpha' not found")
