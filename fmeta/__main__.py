"""``python -m fmeta`` is the command ``fmeta``."""

import sys

from fmeta.train.cli import main

if __name__ == "__main__":
    sys.exit(main())
