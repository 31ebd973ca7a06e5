"""What a person asks for: `USER/REPO`, `USER/REPO:QUANT`, a file, a revision."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llamavisor.gguf.container import printable
from llamavisor.hub.failure import HubError, Why

MAIN = "main"
"""The revision that is meant if none is named."""
MAX_CHARS = 96
"""No name of a repository is longer; as huggingface_hub has it."""

_PREFIXES = ("hf.co/", "huggingface.co/")
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_QUANTIZATION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,199}")
_MAX_GLOB_CHARS = 500
_MAX_PATH_CHARS = 500
_HINT = "Write USER/REPO or USER/REPO:QUANT, as in ggml-org/gemma-3-4b-it-GGUF:Q4_K_M."


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What is asked for.

    Attributes:
        repository: `USER/REPO`.
        quantization: as llama-server's `-hf` takes it, in upper case; empty for the usual one.
        file: a pattern for the path of the file in the repository, such as `*Q4_K_M*`; empty for none.
        revision: a branch, a tag or a commit.
        with_projector: whether the projector comes too, where there is one.
        with_draft: likewise the draft.
    """

    repository: str
    quantization: str = ""
    file: str = ""
    revision: str = MAIN
    with_projector: bool = True
    with_draft: bool = True

    def __str__(self) -> str:
        tag = f":{self.quantization}" if self.quantization else ""
        at = f" at {self.revision}" if self.revision != MAIN else ""
        return f"{self.repository}{tag}{at}"


def parse(
    text: str, *, file: str = "", revision: str = "", with_projector: bool = True, with_draft: bool = True
) -> Spec:
    """Reads what a person wrote. The address of a repository's page will do, too.

    Raises:
        HubError: it is nothing that could be asked for; nothing that is let through leads out of a folder.
    """
    name = text.strip().removeprefix("https://")
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    name, colon, quantization = name.rstrip("/").partition(":")
    parts = name.split("/")
    if len(parts) != 2:
        raise _wrong(text, "names no user" if len(parts) == 1 else "has more than one slash")
    for part in parts:
        if not _NAME.fullmatch(part) or ".." in part or "--" in part or len(part) > MAX_CHARS:
            raise _wrong(text, f"{_quoted(part)} is no name on the Hub" if part else "a name is missing")
    if len(name) > MAX_CHARS:
        raise _wrong(text, f"is longer than {MAX_CHARS} characters")
    if colon and not _QUANTIZATION.fullmatch(quantization):
        raise _wrong(text, f"{_quoted(quantization)} is no quantization" if quantization else "names none behind ':'")
    if colon and file:
        raise HubError("A quantization and a file pattern cannot both be given", why=Why.SPEC, hint="Leave one out.")
    revision = revision or MAIN
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise HubError(
            f"{_quoted(revision)} is no revision", why=Why.SPEC, hint="Name a branch, a tag or a whole commit hash."
        )
    if len(file) > _MAX_GLOB_CHARS or not file.isprintable():
        raise HubError(f"{_quoted(file)} is no pattern for a file", why=Why.SPEC, hint='Write one as in "*Q4_K_M*".')
    return Spec(
        repository=name,
        quantization=quantization.upper(),
        file=file,
        revision=revision,
        with_projector=with_projector,
        with_draft=with_draft,
    )


def path_problem(path: str) -> str:
    """Why a file of a repository is not taken by this path; empty when it is. The Hub is not trusted with names."""
    parts = path.split("/")
    if not path.isprintable() or "\\" in path:
        return "holds a character that no file name should"
    if any(part in {"", ".", ".."} for part in parts):
        return "leads out of its folder"
    if parts[-1].startswith("."):
        return "is hidden"
    if len(path) > _MAX_PATH_CHARS or any(len(part.encode(errors="surrogateescape")) > 200 for part in parts):
        return "is too long"
    return ""


def _wrong(text: str, reason: str) -> HubError:
    return HubError(f"{_quoted(text)}: {reason}", why=Why.SPEC, hint=_HINT)


def _quoted(text: str) -> str:
    return repr(printable(text, 80))
