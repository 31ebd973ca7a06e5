"""The API keys of the gateway: a file with one on each line, what each may do, and which one a client has sent.

A key itself is forgotten as soon as it is read; only its SHA-256 is kept. A key that a client sends is looked up by its
own digest: how long that takes says something of the digest alone, which nobody can steer towards that of a key byte by
byte as one could with the key itself. So it is as safe as a comparison in constant time, and takes as long with a
thousand keys as with one.
"""

from __future__ import annotations

import fnmatch
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path

FILE_BYTES = 64 * 1024
"""A longer file is no file of keys."""
KEYS_MAX = 1000
_KEY_CHARS_MIN = 8
"""Of a key with a name: a shorter one can be guessed, or stands where the name should."""
_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,32}")
_ADMIN = "admin"
_MODELS = "models="
_FORM = f"NAME KEY [{_ADMIN}] [{_MODELS}GLOB,…]"


@dataclass(frozen=True, slots=True)
class Key:
    """One key.

    Attributes:
        name: what it is called in logs and metrics.
        digest: its SHA-256.
        is_admin: whether it may load, unload and reload models, download and delete them.
        models: globs of the models that it may use, upper and lower case told apart; None for all.
    """

    name: str
    digest: bytes = field(repr=False)
    is_admin: bool = False
    models: tuple[str, ...] | None = None

    def __str__(self) -> str:
        """What a person may see of it."""
        models = () if self.models is None else (f"{_MODELS}{','.join(self.models)}",)
        return " ".join((self.name, *((_ADMIN,) if self.is_admin else ()), *models))


@dataclass(frozen=True)
class Keys:
    """All keys of a file; empty if clients need none. Two readings of one file are equal."""

    keys: tuple[Key, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.keys)

    def find(self, sent: str) -> Key | None:
        """The key that a client has sent; `sent` is the text of a header as aiohttp decodes it."""
        return self._by_digest.get(_digest(sent))

    @cached_property
    def _by_digest(self) -> Mapping[bytes, Key]:
        return {key.digest: key for key in self.keys}


class KeysError(ValueError):
    """Raised when a file of keys cannot be used. The message names the file and the line, and repeats nothing of it."""


def read_keys(path: Path) -> tuple[Keys, bool]:
    """The keys in `path`, and whether every user of the machine can read or change it.

    A line is `NAME KEY`, then `admin` if it may load, unload, reload, download and delete models, then `models=` and
    globs with commas between them if it may not use all models. A line of one word is a key without a name, which may
    do everything. Empty lines and those that begin with # are skipped.

    Raises:
        KeysError: it cannot be read or understood, or holds no key: to serve without one would be worse than not to.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # a pipe would keep whoever opens it waiting
            raise KeysError(f"{path} is not a regular file")
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES + 1)
    except OSError as exc:
        raise KeysError(f"{path} cannot be read: {exc.strerror}") from exc
    if len(raw) > FILE_BYTES:
        raise KeysError(f"{path} is longer than {FILE_BYTES // 1024} KiB: it holds something else than keys")
    return Keys(tuple(_parse(path, raw))), bool(mode & (stat.S_IROTH | stat.S_IWOTH))


def _parse(path: Path, raw: bytes) -> Iterator[Key]:
    names: dict[str, int] = {}
    digests: dict[bytes, int] = {}
    nameless = 0
    for number, line in enumerate(raw.split(b"\n"), start=1):
        where = f"{path}:{number}"
        words = _words(where, line)
        if not words:
            continue
        nameless += len(words) == 1
        key = _named(where, words) if len(words) > 1 else _nameless(where, words[0], nameless)
        if key.name in names:
            raise KeysError(f"{where}: its name is taken by line {names[key.name]}; each key needs one of its own")
        if key.digest in digests:
            raise KeysError(f"{where}: the same key as on line {digests[key.digest]}")
        if len(names) == KEYS_MAX:
            raise KeysError(f"{where}: more than {KEYS_MAX} keys")
        names[key.name] = digests[key.digest] = number
        yield key
    if not names:
        raise KeysError(f"{path} holds no key: write one on a line of its own, or {_FORM}")


def _words(where: str, line: bytes) -> list[str]:
    try:
        text = line.decode("ascii").strip()
    except UnicodeDecodeError:
        raise KeysError(f"{where}: a character that is not ASCII; a key travels in a header of HTTP") from None
    if text.startswith("#"):
        return []
    if not text.replace("\t", " ").isprintable():
        raise KeysError(f"{where}: a control character")
    return text.split()


def _nameless(where: str, word: str, number: int) -> Key:
    return Key("key" if number == 1 else f"key-{number}", _proper(where, word), is_admin=True)


def _named(where: str, words: list[str]) -> Key:
    name, key, *rest = words
    if not _NAME.fullmatch(name):
        raise KeysError(f"{where}: a name is 1 to 32 letters, digits, -, _, . and @; a line is {_FORM}")
    if key == _ADMIN or key.startswith(_MODELS):
        raise KeysError(f"{where}: has no name, or no key; a line is {_FORM}")
    if len(key) < _KEY_CHARS_MIN:
        raise KeysError(f"{where}: a key of less than {_KEY_CHARS_MIN} characters can be guessed; a line is {_FORM}")
    digest = _proper(where, key)
    is_admin, models = False, None
    for word in rest:
        if word == _ADMIN and not is_admin:
            is_admin = True
        elif word.startswith(_MODELS) and models is None:
            models = tuple(word.removeprefix(_MODELS).split(","))
            if not all(models):
                raise KeysError(f"{where}: {_MODELS} wants names or globs of models, with commas and no blanks between")
        else:
            raise KeysError(f"{where}: after the key only {_ADMIN} and {_MODELS}GLOB,… may follow, each once")
    return Key(name, digest, is_admin, models)


def _proper(where: str, key: str) -> bytes:
    if "," in key:  # llama-server takes one for the end of a key: the file is to serve for it too
        raise KeysError(f"{where}: a key has no comma in it")
    return _digest(key)


def _digest(text: str) -> bytes:
    # aiohttp decodes headers as UTF-8 with surrogates for what is none.
    return sha256(text.encode("utf-8", "surrogateescape")).digest()


def glob(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Fully matches the names of models that any of the globs matches; none if there are no globs."""
    return re.compile("|".join(map(fnmatch.translate, patterns)) or "(?!)")
