"""``python -m fastcaps``: the ``fastcaps`` command."""

import sys

from fastcaps.cli import main

if __name__ == "__main__":
    sys.exit(main())
