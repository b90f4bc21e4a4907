"""Windows of a dataset: what is due, what counts, when the alarm comes, what is remembered."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from hcodec_core.cli import main
from hcodec_core.dataset.compaction import FileSizes, compact
from hcodec_core.dataset.purge import PurgeRequest, purge
from hcodec_core.dataset.table import load_table
from hcodec_core.dataset.versions import pin, rollback
from hcodec_core.errors import ConfigError
from hcodec_core.monitoring import watching
from hcodec_core.monitoring.documents import MonitorTerms, WindowState
from hcodec_core.monitoring.evidence import JSON_FILE
from hcodec_core.monitoring.history import WindowHistory
from hcodec_core.monitoring.watching import look, monitor

TERMS = MonitorTerms(min_files=20, windows_in_a_row=2, cool_down_days=7)
NOW = datetime(2026, 11, 21, tzinfo=UTC)


@pytest.fixture
def watch(drifting_world):
    """Judge what is due; ``days``: after the first day."""

    def judge(terms=TERMS, owner="run", days=0.0):
        world = drifting_world
        now = NOW + timedelta(days=days)
        return monitor(world.storage, world.layout, terms, owner=owner, now=now)

    return judge


@pytest.fixture
def pinned(drifting_world, add):
    """A reference of 60 files of speech."""
    pin(drifting_world.layout, add("speech", 60))
    return drifting_world


def _steps(world):
    return WindowHistory(world.storage, world.layout).steps()


def _read(world, evidence_uri):
    page = world.storage.read(evidence_uri).decode()
    document = world.storage.read(evidence_uri.replace("index.html", JSON_FILE))
    return page, json.loads(document)


def test_silent_while_nothing_changes_and_an_alarm_once_it_does(pinned, add, watch):
    states, alarms = [], []
    for day, kind in enumerate(["speech", "speech", "music", "music", "music"]):
        add(kind, 25)
        result = watch(days=day)
        states.append(result.state.value)
        alarms.append(result.is_alarm)
    assert states == ["same", "same", "drifted", "drifted", "drifted"]
    # The last one is in the cool-down.
    assert alarms == [False, False, False, True, False]
    assert [step.num_in_a_row for step in _steps(pinned)] == [0, 0, 1, 0, 0]
    assert "cool-down until 2026-12-01" in result.text


def test_after_the_cool_down_windows_count_again(pinned, add, watch):
    alarms = []
    for days in (0, 1, 5, 9, 10):
        add("music", 25)
        alarms.append(watch(days=days).is_alarm)
    assert alarms == [False, True, False, False, True]


def test_a_window_that_is_the_same_starts_the_count_anew(pinned, add, watch):
    alarms = []
    for kind in ("music", "speech", "music", "music"):
        add(kind, 25)
        alarms.append(watch().is_alarm)
    assert alarms == [False, False, False, True]


def test_a_window_is_counted_once_and_only_its_run_tells_of_the_alarm_again(pinned, add, watch):
    add("music", 25)
    terms = TERMS.model_copy(update={"windows_in_a_row": 1})
    assert watch(terms, owner="first").is_alarm
    assert watch(terms, owner="first").is_alarm
    again = watch(terms, owner="second")
    assert not again.is_alarm
    assert "is not counted again" in again.text
    assert len(_steps(pinned)) == 1


def test_of_two_runs_at_once_one_counts(pinned, add, watch, monkeypatch):
    """The other one finds, when it would write, that the step has been taken."""
    add("music", 25)
    write = watching.write_evidence

    def overtaken(*arguments):
        monkeypatch.setattr(watching, "write_evidence", write)
        assert watch(owner="faster").step.number == 1
        return write(*arguments)

    monkeypatch.setattr(watching, "write_evidence", overtaken)
    result = watch(owner="slower")
    assert result.step.owner == "faster"
    assert "is not counted again" in result.text
    assert [step.num_in_a_row for step in _steps(pinned)] == [1]


def test_few_files_are_judged_with_the_next_ones(pinned, add, watch):
    add("music", 15)
    assert watch().state is WindowState.TOO_FEW
    assert _steps(pinned) == []
    version = add("music", 15)
    result = watch()
    assert (result.state, result.report.num_window_files) == (WindowState.DRIFTED, 30)
    assert (result.step.version, result.step.base_version) == (version, "v1")


def test_a_window_holds_what_came_since_the_last_one_also_after_compaction(pinned, add, watch):
    add("speech", 25)
    assert watch().report.num_window_files == 25
    pinned.delete("speech-1-0.wav", "speech-1-1.wav")
    add("speech", 30)
    compact(pinned.storage, pinned.layout, FileSizes(small_bytes=1 << 30), dry_run=False)
    result = watch()
    assert (result.step.base_version, result.report.num_window_files) == ("v2", 30)
    whole = look(pinned.storage, pinned.layout, TERMS.model_copy(update={"window": "version"}))
    assert whole.report.num_window_files == 113


def test_nothing_new_after_a_rollback_or_for_the_reference_itself(pinned, add, watch):
    assert watch().state is WindowState.NOTHING_NEW
    add("music", 25)
    watch()
    rollback(pinned.layout, "v1")
    assert watch().state is WindowState.NOTHING_NEW
    assert len(_steps(pinned)) == 1


def test_a_dataset_without_a_pinned_version_or_with_a_small_one_is_refused(
    drifting_world, add, watch
):
    add("speech", 15)
    with pytest.raises(ConfigError, match="no pinned version"):
        watch()
    pin(drifting_world.layout, "v1")
    add("speech", 25)
    with pytest.raises(ConfigError, match="15 files, and 20 are needed"):
        watch()
    with pytest.raises(ConfigError, match="no version 'v9'"):
        watch(TERMS.model_copy(update={"reference": "v9"}))


def test_evidence_says_what_moved_and_which_files(pinned, add, watch):
    add("music", 25)
    result = watch()
    page, document = _read(pinned, result.step.evidence_uri)
    assert "statistics moved more than chance explains" in page
    assert "1 of 2 drifted windows in a row" in page
    assert "semantic 0" in page
    assert "/music-" in page
    assert document == result.report.model_dump(mode="json")
    assert 'href="../../../cards/v2/index.html"' in page
    assert "http" not in page.replace("http-equiv", "")


def test_names_in_the_evidence_are_erased_by_a_purge(pinned, add, watch):
    add("music", 25)
    result = watch()
    _, document = _read(pinned, result.step.evidence_uri)
    uri = document["files"][0]["uri"]
    record = purge(pinned.config, pinned.storage, PurgeRequest(dataset="demo", uris=(uri,)))
    assert record.proof.num_mentions == 0
    page, after = _read(pinned, result.step.evidence_uri)
    assert uri not in page
    assert [file["uri"] for file in after["files"]] == [
        file["uri"] for file in document["files"][1:]
    ]
    # Windows of versions that were purged are still known.
    assert load_table(pinned.layout) is not None
    assert not watch().is_alarm


def _hcodec(world, capsys, *options):
    config = world.write_config()
    code = main(
        ["monitor", "--dataset", "demo", "--config", str(config), "--min-files", "20", *options]
    )
    return code, capsys.readouterr()


def test_the_command(pinned, add, capsys, tmp_path):
    add("speech", 10)
    assert _hcodec(pinned, capsys)[0] == 4
    add("speech", 20)
    code, shown = _hcodec(pinned, capsys, "--reference", "v1", "--record")
    assert code == 0, shown.out
    assert "nothing moved against v1 beyond chance" in shown.out
    add("music", 25)
    code, shown = _hcodec(pinned, capsys, "--reference", "v1", "--out", str(tmp_path / "page"))
    assert code == 3
    assert "moved" in shown.out
    assert (tmp_path / "page" / "index.html").exists()
    assert len(_steps(pinned)) == 1
    code, shown = _hcodec(pinned, capsys, "--record", "--windows-in-a-row", "1", "--json")
    found = json.loads(shown.out)
    assert (code, found["is_alarm"], found["step"]["number"]) == (3, True, 2)
    code, shown = _hcodec(pinned, capsys, "--version", "3")
    assert code == 0, shown.out
    assert "30 files of v3 that v1 does not have" in shown.out
    assert _hcodec(pinned, capsys, "--record", "--version", "v2")[0] == 43
    code, shown = _hcodec(pinned, capsys, "--false-alarm-rate", "2")
    assert code == 43
    assert "false_alarm_rate" in shown.err
