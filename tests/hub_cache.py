"""A cache of the Hugging Face hub on the disk, as huggingface_hub and llama-server's `-hf` write one."""

from __future__ import annotations

from pathlib import Path

from llamavisord.tiny_model import write_tiny_model


class HubCache:
    """One repository in a cache.

    Args:
        root: the models folder.
        repository: as USER/REPO.
    """

    def __init__(self, root: Path, repository: str = "user/repo") -> None:
        self.folder = root / f"models--{repository.replace('/', '--')}"
        for name in ("blobs", "refs", "snapshots"):
            (self.folder / name).mkdir(parents=True)

    def blob(self, name: str, *words: str) -> Path:
        """Write a blob that is a model which says these words."""
        path = self.folder / "blobs" / name
        write_tiny_model(path, list(words) or ["I", "am", name])
        return path

    def link(self, revision: str, inside: str, blob: str) -> Path:
        """Have a revision hold a blob under this path."""
        path = self.folder / "snapshots" / revision / inside
        path.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (2 + inside.count("/"))
        path.symlink_to(f"{up}blobs/{blob}")
        return path

    def ref(self, name: str, revision: str) -> Path:
        """Name a revision."""
        path = self.folder / "refs" / name
        path.write_text(revision, encoding="ascii")
        return path
