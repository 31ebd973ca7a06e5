"""Too few file descriptors or processes, too little memory: told apart from what lasts, because it passes by itself."""

from __future__ import annotations

import errno
from typing import TypeGuard

SHORTAGE_HINT = "the daemon is short of files, processes or memory; the next try follows by itself"


def is_shortage(error: BaseException | None) -> TypeGuard[OSError]:
    """Whether something failed for want of something that may come back, which says nothing of what was looked at."""
    return isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM}
