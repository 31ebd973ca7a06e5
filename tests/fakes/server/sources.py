"""Where a router's models come from: a folder, the sections of a preset, and the router's own command line."""

from __future__ import annotations

import os

from .options import Option, OptionTable, PresetError

RESERVED = (
    "LLAMA_ARG_SSL_KEY_FILE",
    "LLAMA_ARG_SSL_CERT_FILE",
    "LLAMA_API_KEY",
    "LLAMA_ARG_API_KEY_FILE",
    "LLAMA_ARG_MODELS_DIR",
    "LLAMA_ARG_MODELS_MAX",
    "LLAMA_ARG_MODELS_PRESET",
    "LLAMA_ARG_MODELS_AUTOLOAD",
)
"""What no model is told, by environment variable."""

_OF_ONE_MODEL = (
    "LLAMA_ARG_MODEL",
    "LLAMA_ARG_MMPROJ",
    "LLAMA_ARG_ALIAS",
    "LLAMA_ARG_HF_REPO",
    "LLAMA_ARG_LOG_FILE",
)
_DRAFT_PREFIXES = ("mtp-", "dspark-", "dflash-")


class Found:
    """A model as its sources tell it: where it comes from, and its options."""

    def __init__(self, source: str, options: dict[Option, str]) -> None:
        self.source = source
        self.options = options


class Sources:
    """The sources of one router.

    Args:
        table: the options of this build.
        arguments: the router's own options, which go over every preset.
    """

    def __init__(self, table: OptionTable, arguments: dict[Option, str]) -> None:
        own = {option.env: value for option, value in arguments.items()}
        self._folder = own.get("LLAMA_ARG_MODELS_DIR", "")
        self._preset = own.get("LLAMA_ARG_MODELS_PRESET", "")
        self._table = table
        unfit = RESERVED + _OF_ONE_MODEL
        self._own = {option: value for option, value in arguments.items() if option.env not in unfit}

    def read(self) -> dict[str, Found]:
        """The models by name; the options are the common ones, then a model's own, then the router's.

        Raises:
            PresetError: folder or preset cannot be used.
        """
        path_option = self._table.of("LLAMA_ARG_MODEL")
        found: dict[str, Found] = {}
        files = _scan(self._folder) if self._folder else []
        sections = self._table.read_preset(self._preset) if self._preset else {}
        common = sections.pop("*", {})
        for name, path in files:
            found[name] = Found("models_dir", {**common, path_option: path})
        for name, options in sections.items():
            base = found[name].options if name in found else common
            found[name] = Found("preset", {**base, **options})
        return {name: Found(one.source, {**one.options, **self._own}) for name, one in sorted(found.items())}


def _scan(folder: str) -> list[tuple[str, str]]:
    """The models in a folder and one level of folders in it, as names and paths.

    Raises:
        PresetError: it is no folder.
    """
    if not os.path.isdir(folder):
        raise PresetError(f"error: '{folder}' does not exist or is not a directory\n")
    found = []
    for entry in os.scandir(folder):
        if entry.is_dir():
            model = shard = ""
            for file in os.scandir(entry.path):
                if not file.is_file() or not file.name.endswith(".gguf") or _is_companion(file.name):
                    continue
                if "-00001-of-" in file.name:
                    shard = file.path
                else:
                    model = file.path
            if shard or model:
                found.append((entry.name, shard or model))
        elif entry.is_file() and entry.name.endswith(".gguf") and not _is_companion(entry.name):
            found.append((entry.name.replace(".gguf", ""), entry.path))
    return found


def _is_companion(name: str) -> bool:
    return "mmproj" in name or name.startswith(_DRAFT_PREFIXES)
