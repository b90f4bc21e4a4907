"""What the demo says at the end of a run."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from hcodec_airflow.demo.stage import Stage
from hcodec_core.jobs import Outcome, ShardResult
from hcodec_core.storage import join_uri

_READ_BACK = """\
from hcodec_core.dataset.reader import open_dataset
dataset = open_dataset("{config}", "{dataset}", version="latest")
print(len(dataset), dataset[0].uri, {{n: c.shape for n, c in dataset[0].codes.items()}})"""


def report_run(stage: Stage, dag_id: str, run_id: str, state: str) -> None:
    """Print what a finished run did, or why it failed."""
    _say(f"\n  UI       {stage.airflow_url}/dags/{dag_id}/runs/{run_id}")
    plan = stage.api.xcom(dag_id, run_id, "plan") or {}
    published = stage.api.xcom(dag_id, run_id, "publish")
    if state != "success":
        _report_failure(stage, dag_id, run_id)
    elif published:
        _report_version(stage, plan, published)
    else:
        _say(f"\nNothing new: dataset {stage.dataset} is up to date, nothing was published.\n")
    _say_how_to_read(stage)


def _report_version(stage: Stage, plan: dict[str, Any], published: dict[str, Any]) -> None:
    results = _shard_results(stage, plan["plan_uri"])
    seconds = sum(result.timings.total_seconds for result in results)
    audio = sum(result.audio_seconds for result in results)
    tokens = sum(result.num_tokens for result in results)
    _say(
        f"\nPublished {stage.dataset} {published['version']}: "
        f"{published['num_rows']} files in all, table {published['table']}\n"
        f"  new      {published['num_files']} files, {audio / 3600:.3f} h of audio, "
        f"{tokens} tokens; {audio / max(seconds, 1e-9):.1f} x real time per worker"
    )
    _say(f"  removed  {plan['num_tombstones']} files that are gone from the source")
    _report_codec(stage, plan)
    outcomes = [outcome for result in results for outcome in result.outcomes]
    bad = [outcome for outcome in outcomes if outcome.outcome is not Outcome.TOKENS]
    _say(f"  without tokens: {len(bad)}")
    for outcome in sorted(bad, key=lambda o: o.uri):
        reason = outcome.reason or outcome.outcome
        _say(f"    {_printable(outcome.uri)}\n      {reason}: {_printable(outcome.detail)}")
    _report_page(stage, published)


def _report_codec(stage: Stage, plan: dict[str, Any]) -> None:
    from hcodec_core.jobs import read_job

    manifest = read_job(stage.storage.read(plan["job_uri"])).manifest
    trained = "trained" if manifest.is_trained else "random weights: for trying things out only"
    _say(f"  codec    {manifest.name} ({trained})")


def _report_page(stage: Stage, published: dict[str, Any]) -> None:
    """Copy the report to this disk, so that it opens when the storage has ended."""
    folder_uri = published["report_uri"].rpartition("/")[0] + "/"
    folder = stage.state_path / "reports" / stage.dataset / published["version"]
    for info in stage.storage.list_objects(folder_uri):
        path = folder / info.uri.removeprefix(folder_uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        stage.storage.download(info.uri, path)
    page = published["report_uri"].rpartition("/")[2]
    link, card = (
        published[name].replace("s3://", f"{stage.storage_url}/")
        for name in ("report_uri", "card_uri")
    )
    _say(f"\n  report   {folder / page}\n           {link} (while the storage runs)")
    _say(f"  card     {card} (while the storage runs)")


def _report_failure(stage: Stage, dag_id: str, run_id: str) -> None:
    states = stage.api.task_states(dag_id, run_id)
    for task_id in sorted(task for task, state in states.items() if state == "failed"):
        _say(f"\nTask {task_id} failed; the end of its log:")
        for line in stage.api.log_tail(dag_id, run_id, task_id):
            _say(f"    {_printable(line)}")


def _say_how_to_read(stage: Stage) -> None:
    """Print three lines that read the dataset, and what they print."""
    code = _READ_BACK.format(config=stage.config_path, dataset=stage.dataset)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        _say(f"\nThe dataset cannot be read: {last}")
        return
    _say("\nRead it back (while the storage runs: make demo KEEP=1), in .venv/bin/python:\n")
    _say("\n".join(f"    {line}" for line in code.splitlines()))
    _say(f"\nwhich printed: {done.stdout.strip()}\n")


def _shard_results(stage: Stage, plan_uri: str) -> list[ShardResult]:
    folder = join_uri(plan_uri, "results") + "/"
    uris = [info.uri for info in stage.storage.list_objects(folder)]
    return [ShardResult.model_validate_json(stage.storage.read(uri)) for uri in uris]


def _printable(text: str) -> str:
    """Text of unknown origin on a terminal: control characters shown, not obeyed."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
