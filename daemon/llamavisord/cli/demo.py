"""`llamavisor demo`: the whole story in a few seconds, on a real llama-server, with nothing faked."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from llamavisord.cli.client import Client
from llamavisord.cli.errors import CommandError, with_hint
from llamavisord.exit_codes import ExitCode
from llamavisord.plain import plain
from llamavisord.tiny_model import write_tiny_model

STEP_TIMEOUT_S = 30.0
MODELS: Mapping[str, str] = {
    "alpha": "I am alpha",
    "beta": "beta at your service",
    "gamma": "greetings from gamma",
}


def run(llama_server: str | None = None) -> int:
    """Make three models, serve them, chat, kill the router, and see it come back.

    Args:
        llama_server: path or name of the llama-server to use, None = search for one.

    Returns:
        0 if everything went as shown.
    """
    with tempfile.TemporaryDirectory(prefix="llamavisor-demo-") as folder:
        return _run(Path(folder), llama_server)


def _run(folder: Path, llama_server: str | None) -> int:
    models_dir = folder / "models"
    models_dir.mkdir()
    for name, sentence in MODELS.items():
        write_tiny_model(models_dir / f"{name}.gguf", sentence.split())
    _say(f"made {len(MODELS)} tiny GGUF models in {models_dir}")

    port = _free_port()
    command = [sys.executable, "-m", "llamavisord", "serve", "--models-dir", str(models_dir)]
    command += ["--port", str(port), "--no-metrics", "--state-dir", str(folder / "state")]
    command += ["--socket", str(folder / "control.sock"), "--log-level", "warning"]
    # The user's own file and variables are for another daemon: their routers must not appear here.
    config = folder / "llamavisor.toml"
    config.touch()
    command += ["--config", str(config)]
    kept = {name: value for name, value in os.environ.items() if _is_kept(name)}
    if llama_server:
        command += ["--llama-server", llama_server]
    with (folder / "daemon.log").open("w+", encoding="utf-8") as log:
        # --threads 1: on a small busy machine llama.cpp's spinning threads stand in each other's way.
        daemon = subprocess.Popen([*command, "--", "--threads", "1"], stdout=log, stderr=log, env=kept)
        try:
            return _story(Client(folder / "control.sock"), daemon, port, models_dir)
        except (CommandError, OSError, RuntimeError, LookupError) as error:
            log.seek(0)
            why = with_hint(str(error), getattr(error, "hint", ""))
            sys.stderr.write(f"llamavisor demo: {plain(why)}\n{log.read()}")
            return ExitCode.FAILED
        finally:
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(STEP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _is_kept(name: str) -> bool:
    return not name.startswith("LLAMAVISOR_") or name == "LLAMAVISOR_LLAMA_SERVER"


def _story(client: Client, daemon: subprocess.Popen[bytes], port: int, models_dir: Path) -> int:
    began = time.monotonic()
    router = _wait_for("the router to be ready", daemon, lambda: _ready_router(client))
    _say(f"llamavisor serves them at {router['url']} with {router['llama_server']}")
    _say(f"the router is ready after {time.monotonic() - began:.1f} s, pid {router['pid']}")

    client.post("/control/v1/models/alpha/load", wait=STEP_TIMEOUT_S)
    _show_models(client)
    _say(f"alpha says: {_chat(port, 'alpha')!r}")

    write_tiny_model(models_dir / "delta.gguf", ["I", "am", "new"])
    dropped = time.monotonic()
    _say("delta.gguf is put into the folder")
    _wait_for("delta to be servable", daemon, lambda: _state(client, "delta") == "unloaded")
    _say(f"it can be used after {time.monotonic() - dropped:.1f} s; delta says: {_chat(port, 'delta')!r}")

    _say(f"now the router is killed: kill -9 {router['pid']}")
    killed = time.monotonic()
    os.kill(router["pid"], signal.SIGKILL)
    _wait_for("the router to be another process", daemon, lambda: _another(client, router["pid"]))
    _wait_for("alpha to be loaded again", daemon, lambda: _state(client, "alpha") == "loaded")
    router = _ready_router(client) or router
    _say(f"it is back after {time.monotonic() - killed:.1f} s with pid {router['pid']} and alpha loaded again")
    _say(f"alpha says: {_chat(port, 'alpha')!r}")
    _show_models(client)
    sys.stdout.write(_NEXT)
    return ExitCode.OK


_NEXT = """
What to do next:
  llamavisor serve --models-dir DIR     serve a folder of your own GGUF files
  llamavisor status                     see how it is
  llamavisor load NAME                  load a model now; any request for it does the same
  curl http://127.0.0.1:8080/v1/models  or point any OpenAI client at http://127.0.0.1:8080/v1
The README tells how to write it into /etc/llamavisor/llamavisor.toml, and what happens when things break.
"""


def _say(line: str) -> None:
    sys.stdout.write(f"==> {line}\n")
    sys.stdout.flush()


def _show_models(client: Client) -> None:
    for model in client.get("/control/v1/models")["models"]:
        pid = f"pid {model['pid']}" if model["pid"] else ""
        sys.stdout.write(f"    {model['name']:<8} {model['state']:<10} {pid}\n")


def _wait_for(what: str, daemon: subprocess.Popen[bytes], look: Callable[[], Any]) -> Any:
    """What `look` returns as soon as it is true; the daemon is asked every 50 ms, and may not be up yet."""
    deadline = time.monotonic() + STEP_TIMEOUT_S
    while time.monotonic() < deadline:
        if daemon.poll() is not None:
            raise RuntimeError(f"the daemon ended with exit code {daemon.returncode}")
        if found := look():
            return found
        time.sleep(0.05)
    raise RuntimeError(f"waited {STEP_TIMEOUT_S:.0f} s for {what}")


def _ready_router(client: Client) -> dict[str, Any] | None:
    with suppress(OSError):
        router: dict[str, Any] = client.get("/control/v1/routers")["routers"][0]
        if router["state"] == "failed":
            raise RuntimeError(f"{router['reason']}; {router['hint']}")
        return router if router["state"] == "ready" else None
    return None


def _another(client: Client, pid: int) -> bool:
    router = _ready_router(client)
    return router is not None and router["pid"] != pid


def _state(client: Client, name: str) -> str | None:
    models = client.get("/control/v1/models")["models"]
    return next((model["state"] for model in models if model["name"] == name), None)


def _chat(port: int, model: str) -> str:
    """What the model answers, asked as any OpenAI client asks."""
    connection = HTTPConnection("127.0.0.1", port, timeout=STEP_TIMEOUT_S)
    try:
        body = {"model": model, "messages": [{"role": "user", "content": "Who are you?"}]}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"chat with {model} failed with {answer.status}: {text[:200]!r}")
        return str(json.loads(text)["choices"][0]["message"]["content"]).strip()
    finally:
        connection.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
