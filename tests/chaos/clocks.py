"""Wall clocks that jump, in the processes of the test bed only."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

VARIABLE = "CHAOS_CLOCK"
_SOURCE = Path(__file__).with_name("shifted_clock.c")


def build_library(folder: Path) -> Path | None:
    """Compile what is preloaded; None where there is no C compiler."""
    path = folder / "shifted_clock.so"
    command = ["cc", "-shared", "-fPIC", "-O2", "-o", str(path), str(_SOURCE)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return path


class JumpingClock:
    """The wall clock of a process that was given this object's file."""

    def __init__(self, folder: Path, hours: float = 0.0) -> None:
        """Starts ``hours`` off."""
        handle, name = tempfile.mkstemp(prefix="clock-", dir=folder)
        os.close(handle)
        self.path = Path(name)
        self.jump_to(hours)

    def jump_to(self, hours: float) -> None:
        """Be ``hours`` ahead of the machine's clock (behind: negative) from now on."""
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(str(round(3600 * hours)))
        part.replace(self.path)
