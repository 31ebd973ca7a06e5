"""Makes fake llama-servers that behave as a test wants."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from fakes.server.behaviour import Behaviour, ModelBehaviour

_SCRIPT = Path(__file__).with_name("llama_server.py")

OLD_BUILD: dict[str, object] = {
    "version": "version: 10034 (0123abcd)",
    "help": "help-b10034.txt",
    "sse": False,
}
"""Keys of an old build, as in `make(tmp_path, **OLD_BUILD)`: other options, and no event stream as before b9650."""


class FakeLlamaServer:
    """An executable that passes for llama-server; `str()` of it is its path, and so is it wherever one is wanted.

    Args:
        path: where the executable is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._behaviour = path.with_name(f"{path.name}.json")

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"<FakeLlamaServer {self.path}>"

    @classmethod
    def make(cls, folder: Path, name: str = "llama-server", **behaviour: object) -> FakeLlamaServer:
        """Write the executable `name` into `folder`, which is created when missing.

        Args:
            folder: where it goes.
            name: its file name.
            **behaviour: what it does other than llama-server; `fakes.server.behaviour` lists the keys.

        Raises:
            TypeError: there is no such behaviour.
        """
        folder.mkdir(parents=True, exist_ok=True)
        fake = cls(folder.resolve() / name)
        fake.change(**behaviour)
        command = shlex.join([sys.executable, "-I", "-S", str(_SCRIPT), str(fake._behaviour)])
        fake.path.write_text(f'#!/bin/sh\nexec {command} "$0" "$@"\n', encoding="utf-8")
        fake.path.chmod(0o755)
        return fake

    def change(self, **behaviour: object) -> None:
        """Behave like this from the next start of a router or a model on; what is not said is normal again.

        Raises:
            TypeError: there is no such behaviour.
        """
        script = Behaviour(**behaviour)
        for keys in (script.model, *script.models.values()):
            ModelBehaviour(**keys)
        fresh = self._behaviour.with_suffix(".new")
        fresh.write_text(json.dumps(behaviour), encoding="utf-8")
        fresh.replace(self._behaviour)

    def starts(self) -> list[dict[str, object]]:
        """How it was started as a router so far: `argv`, `env`, `cwd` and `pid` of each start."""
        return self._recorded("starts")

    def model_starts(self) -> list[dict[str, object]]:
        """How it was started as a model's process so far."""
        return self._recorded("models")

    def _recorded(self, what: str) -> list[dict[str, object]]:
        path = Path(f"{self._behaviour}.record") / f"{what}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]
