"""The image of deploy/Containerfile is built and run as deploy/compose.yaml says.

One test: building an image takes a minute, and workers of pytest share nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.container import Builder, Container, Image
from fakes.waiting import eventually
from llamavisord.exit_codes import ExitCode
from llamavisord.tiny_model import write_tiny_model

DEPLOY = Path(__file__).parents[2] / "deploy"
CONFIG = "/etc/llamavisor/llamavisor.toml"
KEYS = "/run/secrets/llamavisor.keys"
KEY = "sk-0123456789"
USER = 10001
ASK = {"model": "alpha", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.real
@pytest.mark.timeout(600)
def test_the_image_serves(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """It serves as its container's process 1, tells its health, ends in order, and lets no stranger in by itself."""
    write_tiny_model(models_dir / "alpha.gguf", ["I", "am", "alpha"])
    for folder in (tmp_path, models_dir):
        folder.chmod(0o755)  # the models have to be readable for the image's user
    (tmp_path / "image").mkdir()
    with Builder(tmp_path / "image") as builder:
        base = builder.make_base(llama_server)
        image = builder.build(LLAMA_CPP_IMAGE=base, LLAMA_CPP_TAG="latest")
        stage = _Stage(tmp_path, image, models_dir)
        _refuses_strangers(stage)
        _serves_this_machine(stage)
        _serves_who_has_a_key(stage)


class _Stage:
    """Makes containers as compose.yaml has them, but with files of the test in the places of its volumes."""

    def __init__(self, folder: Path, image: Image, models: Path) -> None:
        self.folder = folder
        self.image = image
        self.models = models
        self.service: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["llamavisor"]
        places = [volume.rsplit(":", 2)[-2 if volume.count(":") > 1 else -1] for volume in self.service["volumes"]]
        assert set(places) >= {"/models", CONFIG, *image.config["Volumes"]}

    def __repr__(self) -> str:
        return f"<_Stage {self.folder}>"

    def container(self, name: str, files: Mapping[Path, str]) -> Container:
        """One with a state of its own and these files."""
        assert self.service["read_only"], "the root of a container here is read-only"
        state = self.folder / f"{name}-state"
        state.mkdir(mode=0o700)
        os.chown(state, USER, USER)
        binds = {self.models: "/models", state: "/var/lib/llamavisor", **files}
        return Container(self.image, self.folder / name, self.service["tmpfs"], binds)


def _refuses_strangers(stage: _Stage) -> None:
    """Without a configuration and without keys it says what is missing, and ends."""
    with stage.container("bare", {}) as container:
        assert container.wait() == ExitCode.BAD_CONFIG, container.log
    assert "api_key_file" in container.log
    assert "public_without_key" in container.log


def _serves_this_machine(stage: _Stage) -> None:
    """With the configuration of compose.yaml it works at once, and outlives its router."""
    with stage.container("compose", {DEPLOY / "compose/llamavisor.toml": CONFIG}) as container:
        container.wait_until_healthy()
        assert _status(container)["pid"] == 1
        _wait_for_the_model(container)
        assert _chat(container) == (200, "I am alpha")
        assert "llamavisor_" in container.run("curl", "-s", "http://127.0.0.1:9155/metrics").stdout
        assert container.run("sh", "-c", "sleep 0.1 & exit 0").returncode == 0  # as `docker exec` leaves things behind
        eventually(lambda: "(sleep)" not in container.run("sh", "-c", "cat /proc/[0-9]*/stat").stdout, what="a reaper")
        rights = container.run("grep", "-h", "-E", "^(Uid|CapBnd|NoNewPrivs):", "/proc/1/status").stdout
        assert rights.split() == ["Uid:", *[str(USER)] * 4, "CapBnd:", "0" * 16, "NoNewPrivs:", "1"]
        router = _status(container)["routers"][0]["pid"]
        assert container.run("sh", "-c", f"kill -STOP {router}").returncode == 0
        assert container.is_healthy()
        assert container.run("sh", "-c", f"kill -KILL {router}").returncode == 0
        eventually(lambda: _is_back(container, router), what="another router")
        assert container.is_healthy()
        assert _chat(container) == (200, "I am alpha")
        assert container.stop() == 0, container.log


def _serves_who_has_a_key(stage: _Stage) -> None:
    """With the secret of compose.keys.yaml it needs no configuration, and asks everybody for a key."""
    keys = stage.folder / "llamavisor.keys"
    keys.write_text(f"{KEY}\n", encoding="ascii")
    keys.chmod(0o400)
    os.chown(keys, USER, USER)
    with stage.container("keys", {keys: KEYS}) as container:
        container.wait_until_healthy()
        _wait_for_the_model(container)
        assert _chat(container)[0] == 401
        assert _chat(container, f"Authorization: Bearer {KEY}") == (200, "I am alpha")
        assert container.stop() == 0, container.log


def _wait_for_the_model(container: Container) -> None:
    eventually(lambda: "alpha" in container.run("llamavisor", "models").stdout, what="a model in the list")


def _is_back(container: Container, dead: int) -> bool:
    router = _status(container)["routers"][0]
    return router["state"] == "ready" and router["pid"] != dead


def _status(container: Container) -> dict[str, Any]:
    done = container.run("llamavisor", "status", "--json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def _chat(container: Container, *headers: str) -> tuple[int, str]:
    """Status of an answer, and what the model says in it."""
    words = ["curl", "--silent", "--write-out", "\n%{http_code}", "--json", json.dumps(ASK)]
    words += [word for header in headers for word in ("--header", header)]
    done = container.run(*words, "http://127.0.0.1:8080/v1/chat/completions")
    body, status = done.stdout.rsplit("\n", 1)
    answer = json.loads(body)
    return int(status), answer["choices"][0]["message"]["content"].strip() if "choices" in answer else body
