"""The last step of a pull: what is whole is put where the catalog sees it, all at once, and nothing is replaced."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from llamavisor.hub.failure import HubError, Why, on_disk
from llamavisor.hub.part import Part, size_of
from llamavisor.hub.record import Record

_NO_LINKS = frozenset({errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


def target_of(record: Record, models_dir: Path) -> Path:
    """Where a pull ends: a file in the models folder; a folder if there are several."""
    return models_dir / (record.name if len(record.files) > 1 else f"{record.name}.gguf")


def paths_of(record: Record, models_dir: Path) -> list[Path]:
    """Where each of its files ends."""
    target = target_of(record, models_dir)
    return [target / file.name for file in record.remote_files] if len(record.files) > 1 else [target]


def is_placed(record: Record, models_dir: Path) -> bool:
    """Whether all of it is where it belongs, by the sizes. Blocking.

    Raises:
        HubError: something else has that name.
    """
    target = target_of(record, models_dir)
    if not os.path.lexists(target):
        return False
    sizes = [file.size for file in record.remote_files]
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
            for file in record.remote_files:
                (folder / file.name).chmod(0o664 & mode)
        if len(record.files) > 1:
            _place_folder(folder, target, 0o2775 & mode)
        else:
            _place_file(folder / record.remote_files[0].name, target)
            with suppress(OSError):
                folder.rmdir()
        _sync(models_dir)
    return target


def _place_folder(folder: Path, target: Path, mode: int) -> None:
    with suppress(OSError):
        folder.chmod(mode)
    _sync(folder)
    try:
        folder.rename(target)  # it replaces nothing but an empty folder
    except OSError as exc:
        if exc.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise taken(target) from exc
        raise


def _place_file(source: Path, target: Path) -> None:
    try:
        os.link(source, target)  # a rename would replace what is there
    except FileExistsError as exc:
        raise taken(target) from exc
    except OSError as exc:
        if exc.errno not in _NO_LINKS:
            raise
        try:
            target.touch(exist_ok=False)  # a rename would not find out that the name is ours
        except FileExistsError:
            raise taken(target) from None
        source.rename(target)
    else:
        source.unlink()


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(fd)
