"""`python -m llamavisord.completions bash` prints what bash is to read; likewise zsh and fish."""

import sys

from llamavisord.completions import SHELLS

if len(sys.argv) != 2 or sys.argv[1] not in SHELLS:
    sys.exit(f"expected one of {', '.join(SHELLS)}")
sys.stdout.buffer.write(SHELLS[sys.argv[1]]().encode("utf-8"))
