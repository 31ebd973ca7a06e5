"""The same router twice: the fake one, and the true one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fakes import FakeLlamaServer
from fakes.bare_router import BareRouter


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.real)])
def program(request: pytest.FixtureRequest, fake_llama_server: Callable[..., FakeLlamaServer]) -> str:
    """A llama-server: first the fake, then the true one."""
    if request.param == "real":
        return str(request.getfixturevalue("llama_server"))
    return str(fake_llama_server(models={"slow": {"load_s": 3.0}}))


@pytest.fixture
def start(program: str, tmp_path: Path, models_dir: Path) -> Callable[..., BareRouter]:
    """Makes routers over `models_dir`, not yet started."""

    def make(folder: str = "router", **how: object) -> BareRouter:
        return BareRouter(program, tmp_path / folder, models_dir, **how)

    return make


@pytest.fixture
def router(start: Callable[..., BareRouter]) -> Iterator[BareRouter]:
    """A router that answers."""
    with start() as router:
        yield router
