"""Start one process per device on a node, as torchrun does, and keep what their exit codes say.

torchrun itself ends with 1 whatever its processes ended with, so that a cluster would start a
refused job again and count a preempted one as a crash. This is torchrun with the same options
(``python -m hcodec_core.training.launch --nproc-per-node=8 -m hcodec_core.cli run JOB_URI``).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Sequence

from hcodec_core.errors import EXIT_BAD_CONFIG, EXIT_FAILURE, EXIT_PREEMPTED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun with ``arguments`` (default: the command line's); returns the exit code.

    43 when a process refused the job, 143 when all were asked to stop, else 1 for a failure.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(None if arguments is None else list(arguments))
    except ChildFailedError as error:
        return verdict(failure.exitcode for failure in error.failures.values())
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def verdict(exit_codes: Iterable[int]) -> int:
    """One exit code for a node from those of its failed processes; signals count as negative.

    A refusal (43) outweighs all: the processes beside it failed because of it.
    """
    found = set(exit_codes)
    if EXIT_BAD_CONFIG in found:
        return EXIT_BAD_CONFIG
    return EXIT_PREEMPTED if found <= {EXIT_PREEMPTED, -signal.SIGTERM} else EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main())
