"""``make demo``: one corpus, one bucket, one Airflow, one published dataset version."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from hcodec_airflow.demo.follow import follow_run
from hcodec_airflow.demo.services import DemoError, Services, end_marked_processes
from hcodec_airflow.demo.stage import Stage, prepare
from hcodec_airflow.demo.summary import report_run
from hcodec_core.errors import HCodecError

DAG_ID = "tokenize_corpus"


def main() -> int:
    """Run the demo; the exit code says whether the run succeeded."""
    options = _parse()
    state_path = options.state.resolve()
    state_path.mkdir(parents=True, exist_ok=True)
    if options.stop:
        say(f"Ended {end_marked_processes(state_path)} processes of the demo in {options.state}.")
        return 0
    # Ctrl-C and a terminated shell both end everything that was started.
    signal.signal(signal.SIGTERM, _interrupt)
    services = Services(state_path)
    end_marked_processes(state_path)
    keeps_running = False
    try:
        code = _run(options, services)
        keeps_running = options.keep
    except (DemoError, HCodecError) as error:
        say(f"demo: {error}")
        return 1
    except KeyboardInterrupt:
        say("Interrupted; ending what was started.")
        return 130
    finally:
        if not keeps_running:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            services.stop()
    say("Left running; end it with: make demo-stop" if keeps_running else "Everything has ended.")
    return code


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hcodec_airflow.demo", description=__doc__)
    parser.add_argument("--corpus", type=Path, default=Path("tests/corpus/clips"))
    parser.add_argument("--state", type=Path, default=Path(".demo"), help="folder for all data")
    parser.add_argument("--dags", type=Path, default=Path("dags"))
    parser.add_argument("--keep", action="store_true", help="leave everything running at the end")
    parser.add_argument("--stop", action="store_true", help="end what --keep left running")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    return parser.parse_args()


def _run(options: argparse.Namespace, services: Services) -> int:
    started = time.monotonic()
    stage = prepare(options.corpus, options.dags, services)
    say(f"  airflow  {stage.airflow_url} ready after {time.monotonic() - started:.0f} s")
    run_id = stage.api.trigger(DAG_ID, _params(stage, options.workers))
    say(f"  run      {DAG_ID} {run_id}\n")
    state = follow_run(stage, services, DAG_ID, run_id)
    report_run(stage, DAG_ID, run_id, state)
    say(f"Took {time.monotonic() - started:.0f} s.")
    return 0 if state == "success" else 1


def _params(stage: Stage, workers: int) -> dict[str, object]:
    """The form's fields: small shards to see several, and room for the broken sample files."""
    return {
        "source": stage.source_uri + "/",
        "dataset": stage.dataset,
        "workers": workers,
        "hours_per_shard": 0.02,
        "max_bad_share": 0.35,
    }


def say(text: str) -> None:
    """Print a line for the person who watches."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
