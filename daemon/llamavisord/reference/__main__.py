"""`python -m llamavisord.reference` prints the page; `make reference` writes it to REFERENCE.md."""

import sys

from llamavisord.reference.page import page

sys.stdout.buffer.write(page().encode("utf-8"))  # whatever the terminal's encoding is
