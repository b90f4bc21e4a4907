"""Requests and declarations: wrong entries are named in one sentence."""

from __future__ import annotations

import pytest

from hcodec_airflow.requests import (
    TokenizeRequest,
    check_declaration,
    read_declarations,
    read_request,
)
from hcodec_core.errors import ConfigError


def test_form_values_become_a_request():
    request = read_request({"dataset": "demo", "source": "s3://audio/x/", "workers": 3})
    assert request == TokenizeRequest(dataset="demo", sources=("s3://audio/x/",), workers=3)


@pytest.mark.parametrize(
    ("values", "entry"),
    [
        ({"source": "/data/audio"}, "sources.0"),
        ({"source": "s3:///audio"}, "sources.0"),
        ({"dataset": "Demo"}, "dataset"),
        ({"dataset": "a__b"}, "dataset"),
        ({"dataset": "a" * 65}, "dataset"),
        ({"workers": 0}, "workers"),
        ({"mode": "quick"}, "mode"),
        ({"channel": "left"}, "channel"),
        ({"gain": 0}, "gain"),
        ({"gain": 1000}, "gain"),
        ({"threshold": 1.5}, "threshold"),
        ({"max_bad_share": 1.5}, "max_bad_share"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_wrong_entries_are_named(values, entry):
    good = {"dataset": "demo", "source": "s3://audio/x/"}
    with pytest.raises(ConfigError, match=f"This run cannot be started: {entry}: "):
        read_request({**good, **values})


def test_declarations_are_read_one_by_one(tmp_path):
    path = tmp_path / "datasets.toml"
    path.write_text(
        '[datasets.good]\nsources = ["s3://a/b/"]\nschedule = "@daily"\nworkers = 4\n'
        '[datasets.bad]\nsources = ["s3://a/b/"]\nworker = 4\n'
        '[datasets.Worse]\nsources = ["s3://a/b/"]\n'
    )
    tables = read_declarations(path)
    good = check_declaration(path, "good", tables["good"])
    assert (good.schedule, good.workers, good.mode) == ("@daily", 4, "exact")
    assert good.request_values()["sources"] == ["s3://a/b/"]
    with pytest.raises(ConfigError, match=r"datasets.toml, \[datasets.bad\]: worker: Extra inputs"):
        check_declaration(path, "bad", tables["bad"])
    with pytest.raises(ConfigError, match=r"\[datasets.Worse\]: a dataset's name has lower-case"):
        check_declaration(path, "Worse", tables["Worse"])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (None, "does not exist"),
        ("[datasets", "is not TOML"),
        ("[dataset.x]\n", "dataset: write one table"),
        ("datasets = 3\n", "datasets: write one table"),
    ],
)
def test_unreadable_declarations(tmp_path, text, fault):
    path = tmp_path / "datasets.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=fault):
        read_declarations(path)
