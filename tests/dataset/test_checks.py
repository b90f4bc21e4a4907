"""Checks of a snapshot: a good one passes, and each kind of damage fails the check made for it."""

from __future__ import annotations

import copy
import json
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hcodec_core.config import StorageConfig
from hcodec_core.dataset.checks import (
    SnapshotName,
    failure_of,
    raise_if_failed,
    validate_plan,
    validate_snapshot,
)
from hcodec_core.dataset.commit import commit_plan
from hcodec_core.dataset.facts import RowReader, SnapshotFacts, fault_names
from hcodec_core.dataset.pages import printable
from hcodec_core.dataset.plan_documents import BadFileBudget, Plan
from hcodec_core.dataset.report import ValidationResult, upload_report
from hcodec_core.dataset.rowfacts import CodeCounter, needed_columns, row_facts, slices
from hcodec_core.dataset.rules import Thresholds, rules_of
from hcodec_core.dataset.schema import arrow_schema, audio_id_of, unflatten_codes
from hcodec_core.dataset.summary import summarise
from hcodec_core.dataset.table import RefChange, load_table
from hcodec_core.errors import BudgetExceededError, QuarantineReason, ValidationFailedError
from hcodec_core.jobs import DataFile, DataFileStats, FileOutcome, Outcome, ShardResult, TokenizeJob
from hcodec_core.storage import Storage, file_uri, join_uri, open_storage
from hcodec_core.tokens import CodecManifest, EncodeSettings, PartDigests, StreamSpec
from tests.dataset import factories

HOP = 320
BOOKS = {"semantic": 1, "acoustic": 4}
EVIL_NAME = "s3://audio/<script>alert('&')</script>.wav"
EVIL_DETAIL = "<img src=https://evil.example/x onerror=alert(1)>"
TURNED_NAME = "s3://audio/turned\u202egnp.wav"


def make_manifest(**changes: Any) -> CodecManifest:
    facts: dict[str, Any] = {
        "name": "toy",
        "family": "toy",
        "sample_rate": 16000,
        "hop_length": HOP,
        "streams": tuple(
            StreamSpec(name=name, num_codebooks=books, codebook_size=64)
            for name, books in BOOKS.items()
        ),
        "architecture": {},
        "parts": PartDigests(encoder="e" * 32, codebooks="c" * 32, decoder="d" * 32),
        "weights_sha256": "0" * 64,
        "is_trained": True,
        "num_parameters": 1,
        "weights_licence": "Apache-2.0",
    }
    return CodecManifest(**(facts | changes))


def make_row(uri: str, shard_id: str, plan_id: str, rng: np.random.Generator) -> dict[str, Any]:
    num_frames = int(rng.integers(5, 60))
    num_samples = num_frames * HOP - int(rng.integers(0, HOP))
    row = {
        "audio_id": audio_id_of(uri, "etag"),
        "uri": uri,
        "etag": "etag",
        "content_sha256": f"{rng.integers(1 << 60):064x}",
        "start_sample": 0,
        "num_samples": num_samples,
        "sample_rate": 16000,
        "num_frames": num_frames,
        "peak": 0.5,
        "loudness_db": -20.0,
        "clipped_share": 0.0,
        "duration_seconds": num_samples / 16000,
        "shard_id": shard_id,
        "plan_id": plan_id,
        "data_uri": f"s3://tokens/{shard_id}.parquet",
    }
    for name, books in BOOKS.items():
        row[name] = rng.integers(0, 64, books * num_frames).tolist()
        row[f"{name}_num_codebooks"] = books
    return row


@dataclass
class Case:
    """A plan with its results and the rows of a snapshot, as plain values that a test can spoil."""

    files: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    tombstones: list[dict[str, str]] = field(default_factory=list)
    num_rows: int = 0
    is_trained: bool = True
    budget: BadFileBudget = field(default_factory=lambda: BadFileBudget(max_share=0.2))

    def outcome(self, index: int) -> dict[str, Any]:
        """Outcome of a file of the plan."""
        file = self.files[index]
        (found,) = (
            outcome
            for outcome in self.results[file["shard_id"]]["outcomes"]
            if outcome["uri"] == file["uri"]
        )
        return dict(found)

    def replace_outcome(self, index: int, *outcomes: dict[str, Any]) -> None:
        file = self.files[index]
        result = self.results[file["shard_id"]]
        others = [o for o in result["outcomes"] if o["uri"] != file["uri"]]
        result["outcomes"] = [*others, *outcomes]

    def job(self, root: Path) -> TokenizeJob:
        return TokenizeJob(
            plan_id="plan1",
            dataset="demo",
            plan_uri=file_uri(root / "plan"),
            data_uri=file_uri(root / "data"),
            codec_uri="s3://models/toy",
            manifest=make_manifest(is_trained=self.is_trained),
            settings=EncodeSettings(compute_class="cpu-test"),
            encode_id="e" * 32,
            num_shards=3,
            num_files=120,
            num_bytes=0,
        )

    def write(self, root: Path, storage: Storage) -> TokenizeJob:
        import pyarrow.parquet as pq

        job = self.job(root)
        (root / "plan").mkdir()
        pq.write_table(pa.Table.from_pylist(self.files), root / "plan" / "files.parquet")
        gone = pa.Table.from_pylist(self.tombstones, pa.schema({"uri": "string", "etag": "string"}))
        pq.write_table(gone, root / "plan" / "tombstones.parquet")
        for shard_id, result in self.results.items():
            text = json.dumps(result).encode() if isinstance(result, dict) else result
            storage.write(join_uri(job.plan_uri, "results", f"{shard_id}.json"), text)
        return job

    def table(self) -> pa.Table:
        # Damaged rows may lack what is required, so nothing is required here.
        schema = arrow_schema(make_manifest())
        nullable = pa.schema([pa.field(f.name, f.type) for f in schema])
        return pa.Table.from_pylist(self.rows, nullable.append(pa.field("data_uri", "string")))

    def validate(self, root: Path) -> ValidationResult:
        storage = open_storage(StorageConfig())
        job = self.write(root, storage)
        work_path = root / "scratch"
        work_path.mkdir()
        return validate_snapshot(
            storage,
            job,
            SnapshotName(77, "audit_plan1", self.num_rows),
            reader_of(self.table()),
            self.budget,
            file_uri(root / "reports" / "plan1"),
            work_path,
        )


def reader_of(table: pa.Table) -> RowReader:
    def rows(columns: Sequence[str], data_uris: Collection[str] | None) -> Iterator[pa.RecordBatch]:
        import pyarrow.compute as pc

        wanted = table
        if data_uris is not None:
            wanted = table.filter(
                pc.is_in(table["data_uri"], pa.array(sorted(data_uris), "string"))
            )
        yield from wanted.select(list(columns)).to_batches(max_chunksize=50)

    return rows


def make_case() -> Case:
    """120 files in three shards: 4 quarantined, 1 changed, 1 deleted; 3 rows of an older plan."""
    rng = np.random.default_rng(0)
    case = Case()
    names = [f"s3://audio/{index:03}.wav" for index in range(117)]
    names[39:39] = [EVIL_NAME, TURNED_NAME, "s3://audio/x&y.wav"]
    lost = {39: "crashed", 40: "truncated", 41: "empty", 2: "not_audio", 3: "changed", 4: "deleted"}
    for index, uri in enumerate(names):
        shard_index, file_index = divmod(index, 40)
        file = {"shard_index": shard_index, "shard_id": f"shard{shard_index}"}
        case.files.append(file | {"file_index": file_index, "uri": uri, "etag": "etag", "size": 9})
        outcome = FileOutcome(uri=uri, etag="etag", outcome=Outcome.TOKENS)
        if index in (3, 4):
            outcome = FileOutcome(uri=uri, etag="etag", outcome=Outcome(lost[index]))
        elif index in lost:
            reason = QuarantineReason(lost[index])
            outcome = outcome.model_copy(
                update={"outcome": Outcome.QUARANTINED, "reason": reason, "detail": EVIL_DETAIL}
            )
        else:
            case.rows.append(make_row(uri, file["shard_id"], "plan1", rng))
            seconds = case.rows[-1]["duration_seconds"]
            outcome = outcome.model_copy(update={"audio_seconds": seconds})
        add_outcome(case, file, outcome)
    case.rows += [make_row(f"s3://audio/old{i}.wav", "shard9", "plan0", rng) for i in range(3)]
    case.num_rows = len(case.rows)
    case.tombstones = [{"uri": "s3://audio/gone.wav", "etag": "etag"}]
    return case


def add_outcome(case: Case, file: dict[str, Any], outcome: FileOutcome) -> None:
    empty = ShardResult(
        plan_id="plan1",
        shard_id=file["shard_id"],
        shard_index=file["shard_index"],
        attempt=1,
        worker_id="w",
        status="done",
        build={"device": "cpu", "torch": "2.13.0"},
        data_file=DataFile(
            uri=f"s3://tokens/{file['shard_id']}.parquet",
            size=1,
            etag="e",
            sha256="0" * 64,
            stats=DataFileStats(num_rows=1),
        ),
    )
    result = case.results.setdefault(file["shard_id"], empty.model_dump(mode="json"))
    result["outcomes"].append(outcome.model_dump(mode="json"))


@pytest.fixture(scope="module")
def good_case() -> Case:
    return make_case()


@pytest.fixture(scope="module")
def good(good_case: Case, tmp_path_factory: pytest.TempPathFactory) -> ValidationResult:
    """Result of a good snapshot, made where every attempt to reach the network is an error."""

    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"validation tried to connect to {address}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        return good_case.validate(tmp_path_factory.mktemp("good"))


def test_good_snapshot_passes(good: ValidationResult) -> None:
    assert good.passed
    assert [check.name for check in good.checks if not check.passed] == []
    assert failure_of(good) is None
    raise_if_failed(good)
    assert ValidationResult.model_validate_json(good.model_dump_json()) == good


def test_numbers_are_those_of_the_rows(good: ValidationResult, good_case: Case) -> None:
    summary, rows = good.summary, [r for r in good_case.rows if r["plan_id"] == "plan1"]
    assert summary.outcomes == {"tokens": 114, "quarantined": 4, "changed": 1, "deleted": 1}
    assert (summary.num_files, summary.num_rows, summary.num_snapshot_rows) == (120, 114, 117)
    assert summary.reasons == {"crashed": 1, "empty": 1, "not_audio": 1, "truncated": 1}
    assert summary.num_frames == sum(row["num_frames"] for row in rows)
    assert summary.audio_seconds == pytest.approx(sum(row["duration_seconds"] for row in rows))
    assert sum(bin_.num_files for bin_ in summary.durations) == 114
    lengths = [row["duration_seconds"] for row in rows]
    assert summary.seconds_quantiles["median"] == pytest.approx(np.median(lengths))
    assert summary.builds == ["device cpu, torch 2.13.0"]
    for use in summary.codebooks:
        codes = np.concatenate(
            [
                unflatten_codes(np.array(r[use.stream]), BOOKS[use.stream])[use.codebook]
                for r in rows
            ]
        )
        counts = np.bincount(codes, minlength=64)
        assert (use.bars, use.num_used) == (counts.tolist(), np.count_nonzero(counts))
        shares = counts[counts > 0] / counts.sum()
        assert use.perplexity == pytest.approx(2 ** -(shares * np.log2(shares)).sum())


def spoil_row(index: int = 20, **values: Any) -> Callable[[Case], None]:
    def spoil(case: Case) -> None:
        case.rows[index].update(values)

    return spoil


def spoil_code(stream: str, code: int) -> Callable[[Case], None]:
    def spoil(case: Case) -> None:
        case.rows[20][stream][7 % len(case.rows[20][stream])] = code

    return spoil


def cut_codes(case: Case) -> None:
    case.rows[20]["acoustic"].pop()


def lie_about_samples(case: Case) -> None:
    case.rows[20]["num_samples"] += 3 * HOP


def lie_about_frames(case: Case) -> None:
    case.rows[20]["num_frames"] += 1


def lie_about_length(case: Case) -> None:
    case.rows[20]["duration_seconds"] += 0.5


def lie_in_outcome(case: Case) -> None:
    case.replace_outcome(20, case.outcome(20) | {"audio_seconds": 1000.0})


def repeat_row(case: Case) -> None:
    case.rows.append(dict(case.rows[20]))
    case.num_rows += 1


def keep_old_content(case: Case) -> None:
    uri = case.rows[20]["uri"]
    case.rows[-1].update(uri=uri, etag="older", audio_id=audio_id_of(uri, "older"))


def lose_row(case: Case) -> None:
    del case.rows[20]
    case.num_rows -= 1


def lose_old_row(case: Case) -> None:
    del case.rows[-1]


def lose_data_file(case: Case) -> None:
    for row in case.rows:
        if row["shard_id"] == "shard2":
            row["data_uri"] = "s3://tokens/elsewhere.parquet"


def keep_row_of_gone_object(case: Case) -> None:
    case.tombstones.append({"uri": case.rows[-1]["uri"], "etag": "etag"})


def keep_old_row_of_quarantined(case: Case) -> None:
    uri = case.files[2]["uri"]
    case.rows[-1].update(uri=uri, etag="older", audio_id=audio_id_of(uri, "older"))


def add_foreign_row(case: Case) -> None:
    case.rows[-1].update(data_uri=case.rows[0]["data_uri"], shard_id=case.rows[0]["shard_id"])


def keep_row_of_quarantined(case: Case) -> None:
    case.replace_outcome(20, case.outcome(20) | {"outcome": "quarantined", "reason": "timeout"})


def lose_outcome(case: Case) -> None:
    case.replace_outcome(20)


def repeat_outcome(case: Case) -> None:
    case.replace_outcome(20, case.outcome(20), case.outcome(20))


def report_in_wrong_shard(case: Case) -> None:
    outcome = case.outcome(20)
    case.replace_outcome(20)
    case.results["shard2"]["outcomes"].append(outcome)


def fail_shard(case: Case) -> None:
    case.results["shard1"].update(status="failed", error="out of memory")


def lose_result(case: Case) -> None:
    del case.results["shard1"]


def damage_result(case: Case) -> None:
    case.results["shard1"] = b'{"shard_id": 3'


def mix_up_results(case: Case) -> None:
    case.results["shard1"]["plan_id"] = "another"


def repeat_file(case: Case) -> None:
    case.files.append(dict(case.files[20]))


def stick_codebook(case: Case) -> None:
    for row in case.rows:
        row["semantic"] = [5] * row["num_frames"]


def shrink_budget(case: Case) -> None:
    case.budget = BadFileBudget(max_share=0.03)


def shrink_count(case: Case) -> None:
    case.budget = BadFileBudget(max_share=0.5, max_files=3)


UNREPORTED = {"shard_done", "file_accounted_once"}
FAULTS = [
    (spoil_code("acoustic", 64), {"codes_in_range_acoustic"}),
    (spoil_code("semantic", -1), {"codes_in_range_semantic"}),
    (cut_codes, {"codes_length_acoustic"}),
    (spoil_row(acoustic_num_codebooks=8), {"codes_length_acoustic"}),
    (spoil_row(semantic=[]), {"codes_length_semantic"}),
    (lie_about_samples, {"frames_match_samples", "duration_agrees"}),
    (
        lie_about_frames,
        {"frames_match_samples", "codes_length_semantic", "codes_length_acoustic"},
    ),
    (lie_about_length, {"duration_agrees"}),
    (lie_in_outcome, {"duration_agrees"}),
    (spoil_row(sample_rate=8000), {"sample_rate_agrees", "duration_agrees"}),
    (spoil_row(content_sha256=None), {"required_values"}),
    (spoil_row(audio_id="0" * 32), {"audio_id_matches"}),
    (spoil_row(etag="newer"), {"row_in_plan", "audio_id_matches"}),
    (repeat_row, {"tokens_have_one_row", "audio_id_unique", "uri_unique"}),
    (keep_old_content, {"uri_unique"}),
    (lose_row, {"tokens_have_one_row"}),
    (lose_data_file, {"tokens_have_one_row"}),
    (keep_row_of_gone_object, {"outdated_rows_gone"}),
    (keep_old_row_of_quarantined, {"outdated_rows_gone"}),
    (add_foreign_row, {"row_in_plan", "row_has_tokens_outcome"}),
    (keep_row_of_quarantined, {"row_has_tokens_outcome"}),
    (lose_outcome, {"file_accounted_once", "row_has_tokens_outcome"}),
    (repeat_outcome, {"file_accounted_once"}),
    (report_in_wrong_shard, {"outcome_in_plan"}),
    (fail_shard, {"shard_done"}),
    (lose_result, UNREPORTED),
    (damage_result, UNREPORTED),
    (mix_up_results, UNREPORTED),
    (repeat_file, {"plan_lists_file_once"}),
]
BLOCKED = [
    (cut_codes, {"codes_length_acoustic"}),
    (lie_about_samples, {"frames_match_samples", "duration_agrees"}),
    (repeat_row, {"tokens_have_one_row", "audio_id_unique", "uri_unique"}),
    (lose_old_row, {"snapshot_is_whole"}),
    (lose_result, {*UNREPORTED, "accounts_add_up"}),
    (repeat_file, {"plan_lists_file_once", "plan_is_whole", "accounts_add_up"}),
    (stick_codebook, {"codebook_alive"}),
    (shrink_budget, {"bad_file_share"}),
]


def names(cases: list[tuple[Callable[[Case], None], set[str]]]) -> list[str]:
    return [f"{damage.__name__}-{min(expected)}" for damage, expected in cases]


@pytest.mark.parametrize(("damage", "expected"), FAULTS, ids=names(FAULTS))
def test_damage_is_a_fault_of_its_check(
    damage: Callable[[Case], None], expected: set[str], good_case: Case, tmp_path: Path
) -> None:
    case = copy.deepcopy(good_case)
    damage(case)
    storage = open_storage(StorageConfig())
    job = case.write(tmp_path, storage)
    with SnapshotFacts(job, tmp_path) as facts:
        facts.gather(storage, reader_of(case.table()))
        counts = facts.faults_by_shard()
    assert set(counts["shard_id"].to_pylist()) <= {"", "shard0", "shard1", "shard2"}
    found = {name for name in fault_names(job) if sum(counts[name].to_pylist())}
    assert found == expected


@pytest.mark.parametrize(("damage", "expected"), BLOCKED, ids=names(BLOCKED))
def test_damage_blocks_the_version(
    damage: Callable[[Case], None], expected: set[str], good_case: Case, tmp_path: Path
) -> None:
    case = copy.deepcopy(good_case)
    damage(case)
    result = case.validate(tmp_path)
    assert {check.name for check in result.failed("error")} == expected
    assert not result.passed
    assert failure_of(result) is not None


def test_every_fault_is_judged_by_a_rule_that_blocks(tmp_path: Path) -> None:
    job = make_case().job(tmp_path)
    rules = rules_of(job, BadFileBudget(max_files=0), Thresholds())
    blocking = {rule.name for rule in rules if rule.severity == "error" and rule.maximum == 0}
    assert blocking > set(fault_names(job))


def test_failure_names_files_and_counts_the_rest(good_case: Case, tmp_path: Path) -> None:
    case = copy.deepcopy(good_case)
    for row in case.rows[20:33]:
        row["semantic"][0] = 99
    case.rows[5]["acoustic"].pop()
    result = case.validate(tmp_path)
    with pytest.raises(ValidationFailedError) as caught:
        raise_if_failed(result)
    sentence = str(caught.value)
    assert "codes_in_range_semantic (13)" in sentence
    assert "codes_length_acoustic (1)" in sentence
    assert sentence.count(".wav") == 10
    assert "and 4 more" in sentence
    assert sentence.count(". ") == 0
    assert sentence.endswith("index.html.")


def test_budget_failure_names_files_and_reasons(good_case: Case, tmp_path: Path) -> None:
    case = copy.deepcopy(good_case)
    shrink_count(case)
    result = case.validate(tmp_path)
    with pytest.raises(BudgetExceededError) as caught:
        raise_if_failed(result)
    sentence = str(caught.value)
    assert "4 of 120 files" in sentence
    assert "s3://audio/x&y.wav (empty)" in sentence
    assert "\\u202e" in sentence
    assert "\u202e" not in sentence


def test_low_use_and_silence_warn_for_an_untrained_codec(good_case: Case, tmp_path: Path) -> None:
    case = copy.deepcopy(good_case)
    case.is_trained = False
    stick_codebook(case)
    for row in case.rows[:60]:
        row["loudness_db"] = None
    result = case.validate(tmp_path)
    assert result.passed
    warnings = {check.name: check for check in result.failed("warning")}
    assert set(warnings) == {"codebook_alive", "codebook_use", "silent_share"}
    assert warnings["codebook_alive"].examples == ["semantic codebook 0 (1 of 64 codes in use)"]
    page = Path(result.report_path).read_text()
    assert "Untrained codec" in page


class Loads(HTMLParser):
    """What a page would load, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in {"src", "srcset", "data", "action", "background"}:
                self.loads.append(f"{tag} {value}")
            if name.startswith("on") and tag not in {"label", "button"}:
                self.loads.append(f"{tag} {name}")
            if name == "href":
                (self.links if tag == "a" else self.loads).append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_front_page_escapes_names_and_holds_itself(good: ValidationResult) -> None:
    text = Path(good.report_path).read_text()
    page = Loads(text)
    assert page.tags.isdisjoint({"script", "img", "link", "iframe", "object", "embed", "form"})
    assert page.loads == []
    assert "url(" not in text
    assert "@import" not in text
    assert EVIL_NAME in page.text
    assert EVIL_DETAIL in page.text
    assert "s3://audio/x&amp;y.wav" in text
    assert printable(TURNED_NAME) in page.text
    assert "\u202e" not in text
    assert "Untrained codec" not in text


def test_links_of_the_report_lead_somewhere(good: ValidationResult) -> None:
    folder = Path(good.report_path).parent
    uploaded = Path(good.report_uri.removeprefix("file://")).parent
    pages = sorted(folder.rglob("*.html"))
    assert len(pages) == 7  # front page; results and suite of three frames
    for path in pages:
        text = path.read_text()
        page = Loads(text)
        assert page.tags.isdisjoint({"script", "img", "link", "iframe"}), path
        assert page.loads == []
        assert "https://" not in text.replace('href="https://greatexpectations.io', "").replace(
            "https://evil.example", ""
        )
        for link in page.links:
            if not link.startswith(("#", "https:")):
                assert (path.parent / link).is_file(), (path, link)
        assert (uploaded / path.relative_to(folder)).read_text() == text
    front = Loads(Path(good.report_path).read_text())
    assert sum(link.startswith("validations/") for link in front.links) == 3


def test_all_files_without_tokens_are_beside_the_page(good: ValidationResult) -> None:
    path = Path(good.report_path).with_name("files_without_tokens.jsonl")
    files = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(files) == 6
    assert {file["uri"] for file in files} >= {EVIL_NAME, TURNED_NAME}
    assert {file["outcome"] for file in files} == {"quarantined", "changed", "deleted"}
    stored = json.loads(path.with_name("result.json").read_text())
    assert ValidationResult.model_validate(stored) == good


def test_report_in_a_bucket_opens_in_a_browser(
    good: ValidationResult, s3_storage: Storage, bucket_uri: str, s3_endpoint: str
) -> None:
    import boto3

    uri = upload_report(s3_storage, Path(good.report_path).parent, f"{bucket_uri}/reports/plan1")
    assert uri == f"{bucket_uri}/reports/plan1/index.html"
    client = boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1")
    head = client.head_object(Bucket=bucket_uri[5:], Key="reports/plan1/index.html")
    assert head["ContentType"] == "text/html"


def test_summary_of_a_plan_without_files(tmp_path: Path) -> None:
    storage = open_storage(StorageConfig())
    case = make_case()
    rows = reader_of(case.table().slice(0, 0))
    case.files, case.results = case.files[:1], {}
    job = case.write(tmp_path, storage)
    summary = summarise(storage, job, rows, tmp_path)
    assert (summary.num_files, summary.num_rows, summary.num_unaccounted) == (1, 0, 1)
    assert summary.silent_share is None
    assert summary.seconds_quantiles == {}
    assert [use.perplexity for use in summary.codebooks] == [0.0] * 5


def fact_batch(manifest: CodecManifest, rows: list[dict[str, Any]]) -> pa.RecordBatch:
    schema = pa.schema([pa.field(f.name, f.type) for f in arrow_schema(manifest)])
    table = pa.Table.from_pylist(rows, schema).select(needed_columns(manifest))
    return table.combine_chunks().to_batches()[0]


@pytest.mark.parametrize(
    ("spans", "is_wrong"),
    [
        ([2, 1, 3, 1], False),
        ([2, 1, 3, 2], True),  # more base frames than the samples make
        ([2, 1, 4], True),  # one token too few
        ([3, 0, 3, 1], True),  # a token of no frames
        (None, True),
    ],
)
def test_spans_of_an_adaptive_rate(spans: list[int] | None, is_wrong: bool) -> None:
    manifest = make_manifest(is_variable_rate=True)
    rng = np.random.default_rng(1)
    rows = [make_row(f"s3://audio/{i}.wav", "s", "p", rng) for i in range(3)]
    for row in rows:
        row.update(num_frames=4, num_samples=7 * HOP - 3, frame_spans=[2, 1, 3, 1])
        row.update(semantic=[1] * 4, acoustic=[1] * 16)
    rows[1]["frame_spans"] = spans
    facts = row_facts(fact_batch(manifest, rows), manifest, [])
    assert facts["frames_match_samples"].to_pylist() == [False, is_wrong, False]


def test_frames_follow_the_codecs_law_of_lengths() -> None:
    manifest = make_manifest(min_tail_samples=HOP)  # an unfinished hop is dropped
    rng = np.random.default_rng(1)
    rows = [make_row(f"s3://audio/{i}.wav", "s", "p", rng) for i in range(3)]
    lengths = ((2 * HOP, 2), (3 * HOP - 1, 2), (HOP - 1, 0))  # the last is too short to encode
    for row, (samples, frames) in zip(rows, lengths, strict=True):
        row.update(num_samples=samples, num_frames=frames)
    facts = row_facts(fact_batch(manifest, rows), manifest, [])
    assert facts["frames_match_samples"].to_pylist() == [False, False, True]


def test_codes_are_judged_row_by_row_whatever_the_slices() -> None:
    manifest = make_manifest()
    rng = np.random.default_rng(2)
    rows = [make_row(f"s3://audio/{i}.wav", "s", "p", rng) for i in range(50)]
    rows[7]["semantic"] = []
    rows[8]["semantic"] = None
    rows[9]["semantic"][-1] = 64
    rows[11]["acoustic"][0] = -5
    rows[49]["acoustic"][-1] = 1000
    batch = fact_batch(manifest, rows).slice(3)
    found: dict[str, list[bool]] = {}
    for pieces in ([batch], [batch.slice(0, 5), batch.slice(5, 3), batch.slice(8)]):
        counters = [CodeCounter(stream) for stream in manifest.streams]
        tables = [row_facts(piece, manifest, counters) for piece in pieces]
        facts = pa.concat_tables(tables)
        wrong = {
            name: [i + 3 for i, bad in enumerate(facts[name].to_pylist()) if bad]
            for name in facts.column_names
            if name.startswith(("codes_", "required"))
        }
        assert wrong == {
            "required_values": [8],
            "codes_in_range_semantic": [9],
            "codes_length_semantic": [7, 8],
            "codes_in_range_acoustic": [11, 49],
            "codes_length_acoustic": [],
        }
        found.setdefault("counts", []).append(counters[1].counts.tobytes())
    assert len(set(found["counts"])) == 1


def test_slices_bound_codes_and_lose_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hcodec_core.dataset.rowfacts._CODES_PER_SLICE", 500)
    manifest = make_manifest()
    rng = np.random.default_rng(3)
    rows = [make_row(f"s3://audio/{i}.wav", "s", "p", rng) for i in range(60)]
    batch = fact_batch(manifest, rows)
    pieces = list(slices([batch.slice(0, 0), batch], manifest))
    assert len(pieces) > 5
    assert pa.Table.from_batches(pieces)["uri"].to_pylist() == [row["uri"] for row in rows]
    for piece in pieces:
        codes = sum(len(values) for values in piece.column("semantic").to_pylist()) * 5
        assert codes < 500 + 5 * 60  # and one more row


def test_committed_plan_of_a_second_generation_passes(
    s3_world: factories.World, tmp_path: Path
) -> None:
    world = s3_world
    world.put(*(f"{index:02}.wav" for index in range(24)))
    first = world.plan(num_shards=3)
    job = factories.job_of(world.storage, first.plan_uri)
    lost = factories.by_shard(world.files(first))
    factories.fail_shard(world.storage, job, lost[0])
    for files in lost[1:]:
        factories.finish_shard(world.storage, job, files)
    second = world.plan(num_shards=3)  # takes over the two shards that were done
    job = factories.job_of(world.storage, second.plan_uri)
    factories.finish_shard(world.storage, job, factories.by_shard(world.files(second))[0])
    result = validate(world, second, tmp_path / "second")
    assert result.passed
    assert (result.summary.num_rows, result.summary.num_snapshot_rows) == (24, 24)
    page_uri = f"{world.config.work.work_uri}/datasets/demo/reports/{second.plan_id}/index.html"
    assert result.report_uri == page_uri
    assert b"Untrained codec" in world.storage.read(page_uri)


def test_rows_that_a_later_plan_left_behind_are_found(
    local_world: factories.World, tmp_path: Path
) -> None:
    world = local_world
    world.put(*(f"{index:02}.wav" for index in range(12)))
    first = world.plan()
    world.work(first)
    published = commit_plan(world.config, world.storage, first.plan_uri)
    RefChange(load_table(world.layout)).set_branch("main", published.snapshot_id).commit()
    world.put("00.wav", data="new")
    world.put("99.wav", data="broken")
    world.delete("11.wav")
    plan = world.plan()
    world.work(plan, lambda uri: Outcome.QUARANTINED if "99" in uri else Outcome.TOKENS)
    result = validate(world, plan, tmp_path / "good")
    assert {check.name for check in result.failed("error")} == {"bad_file_share"}
    assert result.summary.outcomes == {"tokens": 1, "quarantined": 1, "changed": 0, "deleted": 0}
    assert result.summary.num_snapshot_rows == 11
    # The snapshot of before, taken for the one that the plan committed.
    info = commit_plan(world.config, world.storage, plan.plan_uri)
    stale = info.model_copy(update={"snapshot_id": info.base_snapshot_id})
    (tmp_path / "stale").mkdir()
    result = validate_plan(world.config, world.storage, stale, tmp_path / "stale")
    failed = {check.name for check in result.failed("error")}
    assert failed == {
        "bad_file_share",
        "outdated_rows_gone",
        "snapshot_is_whole",
        "tokens_have_one_row",
    }


def test_plan_that_only_removes_rows_passes(local_world: factories.World, tmp_path: Path) -> None:
    world = local_world
    world.put(*(f"{index:02}.wav" for index in range(12)))
    first = world.plan()
    world.work(first)
    published = commit_plan(world.config, world.storage, first.plan_uri)
    RefChange(load_table(world.layout)).set_branch("main", published.snapshot_id).commit()
    world.delete("11.wav")
    result = validate(world, world.plan(), tmp_path / "work")
    assert result.passed
    assert (result.summary.num_files, result.summary.num_snapshot_rows) == (0, 11)
    judged = {check.name: check.observed for check in result.checks}
    assert judged["codebook_use"] is None
    assert judged["outdated_rows_gone"] == 0


def validate(world: factories.World, plan: Plan, work_path: Path) -> ValidationResult:
    work_path.mkdir()
    info = commit_plan(world.config, world.storage, plan.plan_uri)
    return validate_plan(world.config, world.storage, info, work_path)
