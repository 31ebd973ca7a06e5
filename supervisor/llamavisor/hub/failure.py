"""What can go wrong between this machine and the Hub, in words for the person who asked."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from llamavisor.errors import LlamavisorError
from llamavisor.gguf.container import printable

_SOURCES = "HF_TOKEN in the daemon's environment, the credential huggingface.token, or `hf auth login` as its user"
"""Where the token is taken from, as people are told."""
_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


class Why(StrEnum):
    """What kind of failure it is; programs match on it."""

    SPEC = "spec"
    """What was asked for is no `USER/REPO[:QUANT]`, or no name that can be used here."""
    NO_REPOSITORY = "no_repository"
    """There is no such repository, or it is private."""
    NO_REVISION = "no_revision"
    """The repository has no such revision."""
    NO_FILE = "no_file"
    """The repository has no such file or quantization, or no GGUF file at all, or not all of its parts."""
    UNAUTHORIZED = "unauthorized"
    """A token is needed, or the one that there is is no good."""
    FORBIDDEN = "forbidden"
    """The token may not read this; of a gated repository somebody has to ask for access first."""
    BUSY = "busy"
    """The Hub wants fewer requests (429)."""
    OFFLINE = "offline"
    """HF_HUB_OFFLINE says that the Hub is not to be asked."""
    UNREACHABLE = "unreachable"
    """No connection, or it was cut."""
    STALLED = "stalled"
    """The server sends nothing any more."""
    SERVER = "server"
    """The Hub fails, or answers what nobody understands."""
    NO_SPACE = "no_space"
    """The disk has no room for it."""
    WRONG_CONTENT = "wrong_content"
    """What came is not what the Hub says it has."""
    EXISTS = "exists"
    """Something else has that name in the models folder."""
    TOO_MANY = "too_many"
    """So many pulls wait already that no other is taken."""
    NO_PULL = "no_pull"
    """There is no such pull."""
    DISK = "disk"
    """The models folder cannot be written."""
    NOT_NOW = "not_now"
    """llamavisor has just begun, or ends."""
    INTERNAL = "internal"
    """A bug in llamavisor."""


_PASSING = frozenset({Why.BUSY, Why.UNREACHABLE, Why.STALLED, Why.SERVER})


class HubError(LlamavisorError):
    """Raised when the Hub, or what was asked of it, or the disk stands in the way of a model.

    Attributes:
        why: what kind of failure it is.
        retry_after_s: when the server wants to be asked again; None if it does not say.
    """

    code = "hub_failed"

    def __init__(self, message: str, *, why: Why, hint: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.why = why
        self.retry_after_s = retry_after_s

    @property
    def is_passing(self) -> bool:
        """Whether the same may succeed in a while though nobody does anything."""
        return self.why in _PASSING


def refusal(status: int, headers: dict[str, str], *, what: str, has_token: bool) -> HubError:
    """What an HTTP status of the Hub means. There are seven cases; the first that holds counts.

    The Hub says 401 of what is private and of what is not there, so as not to tell the difference.

    Args:
        status: 400 or more.
        headers: of the answer, with names in lower case.
        what: what was asked for, as it is told: `USER/REPO`, or a file of it.
        has_token: whether a token was sent.
    """
    code, said = headers.get("x-error-code", ""), printable(headers.get("x-error-message", ""), 200)
    if code == "GatedRepo":
        hint = "Ask for access on its page of the Hub"
        hint += "." if has_token else f", and give llamavisor a token of that account: {_SOURCES}."
        return HubError(f"{what}: access is restricted by its owner", why=Why.FORBIDDEN, hint=hint)
    if code == "RevisionNotFound":
        return HubError(f"{what}: there is no such revision", why=Why.NO_REVISION)
    if code == "EntryNotFound":
        return HubError(f"{what}: there is no such file", why=Why.NO_FILE)
    if status == 401 and has_token and code != "RepoNotFound":
        hint = f"Make a new one in the settings of your account on the Hub: {_SOURCES}."
        return HubError(f"{what}: the Hub does not accept the token", why=Why.UNAUTHORIZED, hint=hint)
    if status in {401, 404}:
        hint = "Look at the name." + ("" if has_token else f" If it is private, a token is needed: {_SOURCES}.")
        return HubError(f"{what}: there is no such repository, or it is private", why=Why.NO_REPOSITORY, hint=hint)
    if status in _PASSING_STATUS:
        after_s = retry_after(headers.get("retry-after", ""))
        if status == 429:
            hint = "" if has_token else f"With a token it allows more: {_SOURCES}."
            text = f"{what}: the Hub wants fewer requests"
            text += f", and to be asked again in {after_s:.0f} s" if after_s else ""
            return HubError(text, why=Why.BUSY, hint=hint, retry_after_s=after_s)
        text = f"{what}: the Hub fails: {status}"
        return HubError(text, why=Why.SERVER, hint="Try again later.", retry_after_s=after_s)
    told = f": {said}" if said else ""
    hint = "Look at what its token may read, in the settings of your account on the Hub." if has_token else ""
    return HubError(f"{what}: the Hub refuses it with {status}{told}", why=Why.FORBIDDEN, hint=hint)


def retry_after(text: str) -> float | None:
    """The seconds of a `Retry-After`, None if there are none; dates are not read, as huggingface_hub does not."""
    text = text.strip()
    return float(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Errors of the disk as ours.

    Raises:
        HubError: in place of an OSError.
    """
    try:
        yield
    except OSError as exc:
        if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
            hint = "Make room, and pull again: it goes on."
            raise HubError(f"{path.parent}: the disk is full", why=Why.NO_SPACE, hint=hint) from exc
        is_denied = exc.errno in {errno.EACCES, errno.EPERM, errno.EROFS}
        hint = "Let the user of the daemon write there." if is_denied else ""
        raise HubError(f"{path} cannot be written: {exc.strerror}", why=Why.DISK, hint=hint) from exc
