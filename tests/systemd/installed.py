"""llamavisor as `llamavisor install-service` leaves it, in a systemd of the test's own."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

from fakes.bare_router import free_port
from fakes.waiting import PATIENCE_S, eventually
from llamavisord.tiny_model import write_tiny_model
from systemd.sandbox import Systemd

PROGRAM = Path(sysconfig.get_path("scripts"), "llamavisor")
UNIT = "llamavisor.service"
START_S = 60.0


class Installed:
    """One llamavisor and its systemd.

    Args:
        systemd: it is installed there.
        llama_server: what it is to use.
        name: of its configuration.
        models_dir: folder of its models, inside.
    """

    def __init__(
        self, systemd: Systemd, llama_server: Path, *, name: str = "llamavisor", models_dir: str = "/srv/models"
    ) -> None:
        self.systemd = systemd
        self.unit = UNIT if name == "llamavisor" else f"llamavisor@{name}.service"
        self.config = f"/etc/llamavisor/{name}.toml"
        self.models_dir = models_dir
        self.port, self.metrics_port = free_port(), free_port()
        self._llama_server = llama_server

    def __repr__(self) -> str:
        return f"<Installed {self.unit} on port {self.port}>"

    def configure(self, top: str = "", *, gateway: str = "") -> None:
        """Write its configuration."""
        lines = [
            f'models_dir = "{self.models_dir}"',
            f"port = {self.port}",
            f'llama_server = "{self._llama_server}"',
            top,
        ]
        lines += ["[metrics]", f"port = {self.metrics_port}", "[gateway]", gateway]
        lines += ["[defaults]", 'args = ["--threads", "1"]', ""]
        self.systemd.write(self.config, "\n".join(lines))

    def install(self, *flags: str) -> str:
        """Have it installed, and say what was done."""
        return self.systemd.run(PROGRAM, "install-service", *flags, timeout_s=START_S).stdout

    def put(self, name: str, *, loop: bool = False) -> None:
        """Put a model into its folder that says who it is."""
        made = self.systemd.folder / f"{name}.gguf"
        write_tiny_model(made, ["I", "am", name], loop=loop, n_ctx=100_000 if loop else 4096)
        self.systemd.run("cp", made, f"{self.models_dir}/{name}.gguf")
        made.unlink()
        eventually(lambda: self.models().get(name) == "unloaded", what=name)

    def models(self) -> dict[str, str]:
        """The states of all models."""
        told = json.loads(self.cli("models", "--json").stdout)
        return {model["name"]: model["state"] for model in (told["models"] if isinstance(told, dict) else told)}

    def cli(self, *words: str, user: str = "root", check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command as somebody."""
        be = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"] if user != "root" else []
        command = ["env", "-C", "/", "HOME=/nowhere", *be, PROGRAM, *words]
        return self.systemd.run(*command, check=check)

    def show(self, *names: str) -> dict[str, str]:
        """What systemd knows of it."""
        return self.systemd.show(self.unit, *names)

    @property
    def main_pid(self) -> int:
        """Of its daemon, inside."""
        return int(self.show("MainPID")["MainPID"])

    def is_up(self) -> bool:
        """Whether a client who comes now is served."""
        return self.systemd.run(PROGRAM, "status", check=False).stdout.partition("\n")[0].find(" is ready,") > 0

    def pids(self) -> list[str]:
        """All processes of its cgroup, inside."""
        cgroup = self.show("ControlGroup")["ControlGroup"]
        return (
            self.systemd.run("cat", f"/sys/fs/cgroup{cgroup}/cgroup.procs", check=False).stdout.split()
            if cgroup
            else []
        )

    def ask(self, model: str, *, key: str | None = None, timeout_s: float = PATIENCE_S) -> tuple[int, str]:
        """Status and words of an answer to a chat."""
        with self._asked(model, key=key, timeout_s=timeout_s) as response:
            text = response.read().decode()
            if response.status != 200:
                return response.status, text
            return 200, str(json.loads(text)["choices"][0]["message"]["content"]).strip()

    def stream(self, model: str) -> Iterator[str]:
        """The events of an answer as they come, to its end."""
        with self._asked(model, stream=True, max_tokens=90_000) as response:
            assert response.status == 200, response.read()
            for line in response:
                if line.startswith(b"data:"):
                    yield line[5:].decode().strip()

    @contextmanager
    def _asked(
        self, model: str, *, key: str | None = None, timeout_s: float = PATIENCE_S, **more: object
    ) -> Iterator[HTTPResponse]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)) as connection:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            with connection.getresponse() as response:
                yield response


def open_to_all(systemd: Systemd) -> None:
    """Let every user of it run this Python, which may be in root's home; the machine's own folders stay as they are."""
    for path in {Path(sys.prefix), Path(sys.base_prefix)}:
        for parent in path.parents[:-1]:
            systemd.run("chmod", "a+x", parent, check=False)
