"""What MLflow does not take is held and sent again; what it has is not sent twice."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from pathlib import Path

import pytest

from hcodec_core.training import tracking
from hcodec_core.training.tracking import MlflowTracker, TrackedRun


def test_numbers_wait_while_the_server_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mlflow import MlflowClient

    monkeypatch.setattr(tracking, "_RETRY_SECONDS", 0.05)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run = TrackedRun("key", "name", "experiment", f"file://{tmp_path}/artifacts")
    tracker = MlflowTracker(uri, run, tmp_path)
    tracker.log(1, {"loss": 1.0})
    refused = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "did not take step 2" in record.getMessage():
                refused.set()

    logging.getLogger(tracking.__name__).addHandler(listener := Listener())
    try:
        deadline = time.monotonic() + 120
        while not MlflowClient(uri).get_metric_history(tracker.run_id, "loss"):
            assert time.monotonic() < deadline
        rename(tmp_path / "mlflow.db", "metrics", "hidden")
        tracker.log(2, {"loss": 2.0})
        tracker.attach(2, {"a.txt": b"later"})
        assert refused.wait(120)
        rename(tmp_path / "mlflow.db", "hidden", "metrics")
        tracker.finish("FINISHED")
    finally:
        logging.getLogger(tracking.__name__).removeHandler(listener)
    history = MlflowClient(uri).get_metric_history(tracker.run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(1, 1.0), (2, 2.0)]
    again = MlflowTracker(uri, run, tmp_path)
    assert again.run_id == tracker.run_id
    again.log(2, {"loss": 2.0, "more": 5.0})
    again.log(3, {"loss": 3.0})
    again.finish("FINISHED")
    client = MlflowClient(uri)
    steps = [metric.step for metric in client.get_metric_history(again.run_id, "loss")]
    assert sorted(steps) == [1, 2, 3]
    assert [metric.step for metric in client.get_metric_history(again.run_id, "more")] == [2]
    assert [file.path for file in client.list_artifacts(again.run_id, "samples/step-000000002")]


def rename(path: Path, old: str, new: str) -> None:
    with sqlite3.connect(path, timeout=60) as connection:
        connection.execute(f"ALTER TABLE {old} RENAME TO {new}")
