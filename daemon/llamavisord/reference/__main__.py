"""`python -m llamavisord.reference` prints the page, with `manual` the manual page; `make` writes them to files."""

import sys

from llamavisord.reference.manual import manual
from llamavisord.reference.page import page

text = manual() if sys.argv[1:] == ["manual"] else page()
sys.stdout.buffer.write(text.encode("utf-8"))  # whatever the terminal's encoding is
