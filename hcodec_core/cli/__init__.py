"""Console script ``hcodec``: the only place that reads environment variables and prints.

Every command prints text, or one JSON document with ``--json``. Errors are one sentence on
standard error; exit codes are those of ``hcodec_core.errors`` (0, 1, 43, 143).
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from hcodec_core import __version__
from hcodec_core.cli import (
    audio,
    audits,
    bench,
    cards,
    catalogs,
    codecs,
    compare,
    datasets,
    evaluation,
    exports,
    measures,
    monitoring,
    promotion,
    training,
    upkeep,
    worker,
)
from hcodec_core.cli.output import Output, setup_logging
from hcodec_core.errors import EXIT_FAILURE, EXIT_OK, HCodecError

_logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    output = Output(is_json=getattr(options, "json", False))
    setup_logging(is_json=getattr(options, "log_json", False), is_verbose=options.verbose)
    try:
        code: int | None = options.handler(options, output)
        return EXIT_OK if code is None else code
    except HCodecError as error:
        output.error(error)
        return error.exit_code
    except KeyboardInterrupt:
        output.note("Interrupted.")
        return 130
    except BrokenPipeError:
        return EXIT_FAILURE


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="hcodec",
        description="Audio corpora as tokens: versioned, checked, reproducible.",
    )
    parser.add_argument("--version", action="version", version=f"hcodec {__version__}")
    parser.add_argument("--verbose", action="store_true", help="log what happens inside")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    scoring = (measures, compare, bench, evaluation, promotion)
    keeping = (upkeep, catalogs)
    data = (datasets, audits, cards, monitoring, exports)
    for group in (codecs, *scoring, audio, *data, training, *keeping, worker):
        group.add_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
