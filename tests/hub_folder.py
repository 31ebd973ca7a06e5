"""A models folder, a Hub of our own, and who brings models from the one into the other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import huggingface_hub

from fakes.hub_server import HubFile, HubServer, Repository
from fakes.waiting import PATIENCE_S
from llamavisor.events import Bus, Event
from llamavisor.hub import Hub, Patience, Pulls, parse
from llamavisor.hub.staging import NAME
from llamavisord.tiny_model import write_tiny_model

PATIENCE = Patience(connect_s=15.0, stall_s=30.0, delays_s=(0.01, 0.01, 0.01))
"""A stall lasts until the server is released: nothing depends on how fast the machine is."""
SECRET = "hf_verysecret"
MANY = 3_000_000
MIB = 1_048_576


def noise(name: str, size: int = MANY) -> HubFile:
    """A file of some content that no other has."""
    return HubFile(hashlib.shake_128(name.encode()).digest(size))


@contextmanager
def hub_of_models(tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with a true model, a large one, one in parts with a projector, and a gated one."""
    write_tiny_model(tmp_path / "tiny", ["I", "am", "pulled"])
    tiny = HubFile((tmp_path / "tiny").read_bytes())
    parts = {f"Q8/V-Q8_0-0000{n}-of-00002.gguf": noise(f"part {n}") for n in (1, 2)}
    repositories = {
        "user/tiny": Repository({"Tiny-Q4_K_M.gguf": tiny, "README.md": HubFile(b"# T", is_lfs=False)}),
        "user/big": Repository({"Big-Q4_K_M.gguf": noise("big"), "Big-Q8_0.gguf": noise("bigger")}),
        "user/vision": Repository({**parts, "V-Q4_0.gguf": noise("V"), "mmproj-V-F16.gguf": noise("projector")}),
        "other/big": Repository({"Big-Q4_K_M.gguf": noise("another big")}),
        "user/gated": Repository({"G-Q4_0.gguf": noise("G")}, gated_to=()),
    }
    with HubServer(repositories, tokens=[SECRET]) as hub:
        yield hub
        huggingface_hub.close_session()


class Here:
    """A models folder, and who brings models into it.

    Attributes:
        server: that Hub.
        pulls: they.
        events: what they told.
    """

    def __init__(self, server: HubServer, models_dir: Path, patience: Patience = PATIENCE) -> None:
        self.server = server
        self.events: list[Event] = []
        bus = Bus()
        bus.listen(lambda published: self.events.append(published.event))
        self.pulls = Pulls(Hub({"HF_ENDPOINT": server.url, "HF_TOKEN": SECRET}, patience), models_dir, bus)
        self.models_dir = models_dir

    async def pull(self, text: str, **more: str) -> Path | None:
        """Brings a model."""
        with anyio.fail_after(PATIENCE_S):
            return await (await self.pulls.start(parse(text), **more)).wait()

    def told(self, *kinds: type[Event]) -> list[Event]:
        """The events of these kinds."""
        return [event for event in self.events if isinstance(event, kinds)]

    def visible(self) -> list[str]:
        """What everybody sees in the folder."""
        return sorted(
            str(path.relative_to(self.models_dir))
            for path in self.models_dir.rglob("*")
            if path.is_file() and NAME not in path.parts
        )

    def hidden(self) -> list[str]:
        """What lies in the staging folder, but the folder for files itself."""
        found = (self.models_dir / NAME).rglob("*")
        return sorted(str(path.relative_to(self.models_dir / NAME)) for path in found if path.name != "files")


async def until(look: Callable[[], object]) -> None:
    """Waits for something that another task does."""
    with anyio.fail_after(PATIENCE_S):
        while not look():
            await anyio.sleep(0.005)
