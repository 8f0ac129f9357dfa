"""``python -m attnfast``."""

from __future__ import annotations

import sys

from attnfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
