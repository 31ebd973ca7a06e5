"""The options of real builds of llama-server, from what their --help printed, and of one before presets."""

from __future__ import annotations

from pathlib import Path

from llamavisor.helptext import FlagSet, parse_help

_DATA = Path(__file__).parent / "data"
NEW_HELP = (_DATA / "help-b11434.txt").read_text(encoding="utf-8")
OLD_HELP = (_DATA / "help-b10034.txt").read_text(encoding="utf-8")
"""The last build before --load-mode."""
OLDEST_HELP = """\
-ngl,  --gpu-layers, --n-gpu-layers N   number of layers to store in VRAM
                                        (env: LLAMA_ARG_N_GPU_LAYERS)
-fa,   --flash-attn                     enable Flash Attention (default: disabled)
                                        (env: LLAMA_ARG_FLASH_ATTN)
--mlock                                 force system to keep model in RAM rather than swapping or compressing
--no-mmap                               do not memory-map model (slower load but may reduce pageouts if not
                                        using mlock)
-cb,   --cont-batching                  enable continuous batching (a.k.a dynamic batching) (default: enabled)
-nocb, --no-cont-batching               disable continuous batching
--jinja                                 use jinja template for chat (default: disabled)
--no-mmproj                             explicitly disable multimodal projector
--mmproj FILE                           path to a multimodal projector file
"""
"""How builds of early 2025 wrote what later ones write differently."""

NEW: FlagSet = parse_help(NEW_HELP)
OLD: FlagSet = parse_help(OLD_HELP)
OLDEST: FlagSet = parse_help(OLDEST_HELP)
