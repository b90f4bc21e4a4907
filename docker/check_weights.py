"""Build step: every folder of weights must have the digest that it is named by.

Usage: check_weights.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from hcodec_core.models.loading import load_codec
from hcodec_core.tokens import EncodeSettings


def main(folder: Path) -> None:
    """Load each codec below ``folder``; raises ``CheckpointError`` for one that is not its name."""
    for path in sorted(folder.iterdir()):
        load_codec(str(path), EncodeSettings(compute_class="cpu"), expected_digest=path.name)
        sys.stdout.write(f"{path}: as named\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
