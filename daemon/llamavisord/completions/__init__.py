"""Completions for shells, from the parser of the command line: `make completions` writes them to deploy/."""

from __future__ import annotations

from llamavisord.completions.bash import bash
from llamavisord.completions.fish import fish
from llamavisord.completions.zsh import zsh

__all__ = ["SHELLS", "bash", "fish", "zsh"]

SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}
