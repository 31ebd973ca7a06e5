"""The last step of a pull: what is whole is put where the catalog sees it, all at once, and nothing is replaced."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from llamavisor.files import put_new, sync_folder
from llamavisor.hub.failure import HubError, Why, on_disk
from llamavisor.hub.part import Part, size_of
from llamavisor.hub.record import Record


def target_of(record: Record, models_dir: Path) -> Path:
    """Where a pull ends: a file in the models folder; a folder if there are several."""
    return models_dir / (record.name if len(record.files) > 1 else f"{record.name}.gguf")


def paths_of(record: Record, models_dir: Path) -> list[Path]:
    """Where each of its files ends."""
    target = target_of(record, models_dir)
    return [target / file.name for file in record.files] if len(record.files) > 1 else [target]


def is_placed(record: Record, models_dir: Path) -> bool:
    """Whether all of it is where it belongs, by the sizes. Blocking.

    Raises:
        HubError: something else has that name.
    """
    target = target_of(record, models_dir)
    if not os.path.lexists(target):
        return False
    sizes = [file.size for file in record.files]
    if [size_of(path) for path in paths_of(record, models_dir)] != sizes:
        raise taken(target)
    return True


def taken(target: Path) -> HubError:
    """Something else has that name."""
    hint = "Move it away, or pull under another name (`--name`)."
    return HubError(f"{target} is there already, and is something else", why=Why.EXISTS, hint=hint)


def keep(part: Part, path: Path) -> None:
    """Puts a whole file into the folder of a pull; others may want it, too. Blocking.

    Raises:
        HubError: the disk does not let it be put there.
    """
    with on_disk(path):
        path.parent.mkdir(exist_ok=True)
        if path.parent.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, "it is a link", str(path.parent))
        path.unlink(missing_ok=True)
        try:
            os.link(part.whole, path)
        except OSError:
            part.whole.rename(path)


def place(record: Record, folder: Path, models_dir: Path) -> Path:
    """Puts what is whole where the catalog sees it, all of it in one step; the path of what is new there. Blocking.

    Whoever may look into the models folder may read the model, and its group may tidy it up, whatever the umask is.

    Raises:
        HubError: something else has that name, or the disk does not let it be put there.
    """
    target = target_of(record, models_dir)
    with on_disk(target):
        mode = models_dir.stat().st_mode
        with suppress(OSError):  # some file systems know no such thing
            for file in record.files:
                (folder / file.name).chmod(0o664 & mode)
        if len(record.files) > 1:
            _place_folder(folder, target, 0o2775 & mode)
        else:
            try:
                put_new(folder / record.files[0].name, target)
            except FileExistsError as exc:
                raise taken(target) from exc
            with suppress(OSError):
                folder.rmdir()
        sync_folder(models_dir)
    return target


def _place_folder(folder: Path, target: Path, mode: int) -> None:
    with suppress(OSError):
        folder.chmod(mode)
    sync_folder(folder)
    try:
        folder.rename(target)  # it replaces nothing but an empty folder
    except OSError as exc:
        if exc.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise taken(target) from exc
        raise
