"""``python -m hcodec_core.cli`` is the console script ``hcodec``."""

import sys

from hcodec_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
