"""`python -m llamavisord` is the command `llamavisor`."""

import sys

from llamavisord.cli import main

sys.exit(main())
