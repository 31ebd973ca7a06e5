"""compose.yaml and what is laid over it, as docker-compose understands them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.proxy import rewritten
from llamavisord.app import END_S, REQUEST_END_S, STOP_S
from llamavisord.config import GatewaySettings
from llamavisord.leaving import LAST_S

DEPLOY = Path(__file__).parents[2] / "deploy"
THREADS_OF_A_MODEL = 262
"""With the 256 for HTTP that every llama-server gets from us."""


def composed(folder: Path, *more: str, **variables: str) -> dict[str, Any]:
    """What compose.yaml with these files over it comes to."""
    if shutil.which("docker-compose") is None:
        pytest.skip("no docker-compose is installed here")
    copy = folder / "deploy"
    shutil.copytree(DEPLOY, copy, dirs_exist_ok=True)
    # Debian's docker-compose is older than this one line.
    (copy / "compose.yaml").write_text(rewritten(DEPLOY / "compose.yaml", {"name: llamavisor\n": ""}), encoding="utf-8")
    files = [f"--file={copy / file}" for file in ("compose.yaml", *more)]
    argv = ["docker-compose", *files, "--profile", "monitoring", "config"]
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(folder), "MODELS": "/srv/models", **variables}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return dict(yaml.safe_load(done.stdout))


def seconds(text: str) -> float:
    """A duration as docker-compose prints it."""
    minutes, _, rest = text.rpartition("m")
    return 60 * float(minutes or 0) + float(rest.removesuffix("s") or 0)


def test_it_has_time_to_end(tmp_path: Path) -> None:
    """The engine waits for answers to end, for routers to be gone, and for the daemon after them."""
    service = composed(tmp_path)["services"]["llamavisor"]
    ends_s = GatewaySettings().drain_s + STOP_S + 2 * REQUEST_END_S + END_S + LAST_S
    assert seconds(service["stop_grace_period"]) > ends_s


def test_it_has_room(tmp_path: Path) -> None:
    """Dozens of models with all their threads fit, as do connections; memory may be locked."""
    service = composed(tmp_path)["services"]["llamavisor"]
    assert service["pids_limit"] > 48 * THREADS_OF_A_MODEL
    assert service["ulimits"]["memlock"] == -1
    assert service["ulimits"]["nofile"] >= 65536


def test_it_may_do_nothing_else(tmp_path: Path) -> None:
    """No capabilities, no more than it starts with, nothing written but its state; models are only read."""
    service = composed(tmp_path)["services"]["llamavisor"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert "privileged" not in service
    for volume in service["volumes"]:
        name, options = volume.split(":")[0], volume.split(":")[-1].split(",")
        assert name == "state" or {"ro", "z"} <= set(options), volume


def test_only_this_machine_reaches_it(tmp_path: Path) -> None:
    """Nothing is published beyond loopback, whatever port it is, and the metrics not even there; keys are a secret."""
    plain = composed(tmp_path)
    other = composed(tmp_path, PORT="9000")
    assert other["services"]["llamavisor"]["ports"] == ["127.0.0.1:9000:8080/tcp"]
    published = [port for service in plain["services"].values() for port in service["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in published), published
    assert plain["services"]["llamavisor"]["ports"] == ["127.0.0.1:8080:8080/tcp"]
    keys = tmp_path / "keys"
    opened = composed(tmp_path, "compose.keys.yaml", KEYS=str(keys))
    assert opened["services"]["llamavisor"]["ports"] == plain["services"]["llamavisor"]["ports"]
    (secret,) = opened["services"]["llamavisor"]["secrets"]
    assert secret["source"] == "llamavisor.keys"  # the name of the file in /run/secrets
    assert opened["secrets"]["llamavisor.keys"]["file"] == str(keys)


def test_gpus_are_one_file_away(tmp_path: Path) -> None:
    """compose.cuda.yaml builds upon llama.cpp's image with CUDA and asks for all GPUs; the rest stays."""
    plain = composed(tmp_path)["services"]["llamavisor"]
    cuda = composed(tmp_path, "compose.cuda.yaml")["services"]["llamavisor"]
    assert "args" not in plain["build"]
    assert cuda["build"]["args"] == {"LLAMA_CPP_TAG": "server-cuda"}
    (device,) = cuda["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["count"] in {"all", -1}  # which is the same
    assert device["capabilities"] == ["gpu"]
    for changed in ("build", "image", "deploy"):
        plain.pop(changed, None)
        cuda.pop(changed)
    for service in (plain, cuda):
        service["volumes"].sort()
    assert cuda == plain


def test_what_it_mounts_is_there(tmp_path: Path) -> None:
    """Every file of this folder that a service mounts exists: an engine would make an empty folder in its place."""
    for name, service in composed(tmp_path)["services"].items():
        for volume in service["volumes"]:
            source = Path(volume.split(":")[0])
            if source.is_absolute() and source.name != "models":
                assert source.is_file(), f"{name}: {volume}"


def test_prometheus_reads_the_same_by_another_name() -> None:
    """Within compose, Prometheus is told what it is told elsewhere; only the daemon has the name of its service."""
    elsewhere = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    (static,) = elsewhere["scrape_configs"][0]["static_configs"]
    assert static["targets"] == ["127.0.0.1:9155"]
    static["targets"] = ["llamavisor:9155"]
    assert yaml.safe_load((DEPLOY / "compose/prometheus.yml").read_text()) == elsewhere
