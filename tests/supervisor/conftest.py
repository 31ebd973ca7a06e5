"""What tests of the supervision have: a fake host with a few models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fakes.host import FakeHost
from fakes.machine import fake_models
from llamavisor.settings import RouterSettings


@pytest.fixture
def make_host(tmp_path: Path) -> Callable[..., FakeHost]:
    """Makes fake hosts with three models: `make_host("gpu0", port=8081)`."""

    def make(name: str = "main", *, port: int = 8080, **how: object) -> FakeHost:
        settings = RouterSettings(name=name, port=port, models_dir=tmp_path)
        host = FakeHost(settings, folder=tmp_path, **how)
        host.models = fake_models(["alpha", "beta", "gamma"])
        return host

    return make


@pytest.fixture
def host(make_host: Callable[..., FakeHost]) -> FakeHost:
    """A fake host of one router, "main", with the models alpha, beta and gamma."""
    return make_host()
