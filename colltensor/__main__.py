"""``python -m colltensor``: the command ``colltensor``."""

from __future__ import annotations

import sys

from colltensor.cli import main

if __name__ == "__main__":
    sys.exit(main())
