"""Chats with a model through the library alone, without a daemon: `chat.py MODELS_DIR STATE_DIR [MODEL]`.

A MODEL that is written `USER/REPO` or `USER/REPO:QUANT` is pulled from the Hugging Face Hub first.
"""

from __future__ import annotations

import sys
from pathlib import Path

import anyio
import httpx

from llamavisor.errors import LlamavisorError, ModelNotFoundError
from llamavisor.fleet import Fleet
from llamavisor.options import ModelOptions, OptionLayer
from llamavisor.settings import FleetSettings, RouterSettings

ANSWER_S = 120.0
LOOK_S = 10.0


async def main(models_dir: Path, state_dir: Path, model: str | None) -> None:
    """Pull a model if it is on the Hub, list what there is, load one, and print what it says."""
    defaults = OptionLayer("defaults", ModelOptions(threads=1, ctx_size=2048))
    settings = FleetSettings(routers=(RouterSettings(models_dir=models_dir, layers=(defaults,)),))
    async with Fleet.open(settings, state_dir=state_dir) as fleet:
        if model is not None and "/" in model:
            pull = await fleet.pull(model)
            print(f"{pull.name} is at {await pull.wait()}")
            await fleet.look(within_s=LOOK_S)  # so that it is served at once
            model = pull.name
        for entry in fleet.storage.models():
            quantization = entry.header.quantization if entry.header else "?"
            print(f"{entry.name}: {entry.state.value}, {entry.size_bytes} bytes, {quantization}")
        name = model or next((entry.name for entry in fleet.storage.models()), None)
        if name is None:
            raise ModelNotFoundError(f"{models_dir} holds no model", hint="name one of the Hub, as USER/REPO")
        async with fleet.lease(name) as endpoint, httpx.AsyncClient(timeout=ANSWER_S, trust_env=False) as client:
            answer = await client.post(
                f"{endpoint.url}/v1/chat/completions",
                headers={"Authorization": f"Bearer {endpoint.api_key}"},
                json={"model": name, "messages": [{"role": "user", "content": "Who are you?"}]},
            )
            answer.raise_for_status()
            print(f"{name} says: {answer.json()['choices'][0]['message']['content'].strip()}")


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    try:
        anyio.run(main, Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) == 4 else None)
    except LlamavisorError as error:
        sys.exit(f"{error}; {error.hint}" if error.hint else str(error))
