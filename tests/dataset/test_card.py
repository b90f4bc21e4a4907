"""Dataset cards: right numbers, the same bytes each time, no name of an object, honest drift."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hcodec_core.cli import main
from hcodec_core.dataset.card import (
    card_files,
    card_page_uri,
    make_card,
    read_card,
    write_card,
)
from hcodec_core.dataset.card_drift import (
    FileSample,
    jensen_shannon_bits,
    population_stability,
)
from hcodec_core.dataset.card_facts import CardFacts, VersionFiles
from hcodec_core.dataset.card_numbers import drift_of, totals_of
from hcodec_core.dataset.card_values import DatasetCard
from hcodec_core.dataset.compaction import compact
from hcodec_core.dataset.reader import open_dataset
from hcodec_core.dataset.schema import arrow_schema
from hcodec_core.errors import ConfigError
from hcodec_core.jobs import Outcome
from hcodec_core.storage import join_uri
from tests.dataset import factories
from tests.dataset.factories import World

EVIL = '<script>alert("x")</script>'


def _manifest(world: World, rows: list[dict[str, str]]) -> str:
    uri = join_uri(world.source_uri, "corpus.jsonl")
    lines = (json.dumps({"audio_filepath": row.pop("name"), **row}) for row in rows)
    world.storage.write(uri, "\n".join(lines).encode())
    return uri


@pytest.fixture
def moved(world: World) -> World:
    """Version v1 of 24 files; v2 with one more, one changed, one gone."""
    names = [f"data/{number}.wav" for number in range(24)]
    world.put(*names)
    rows = [
        {"name": n, "lang": "de" if i % 3 else EVIL, "licence": "CC0", "speaker": f"s{i % 4}"}
        for i, n in enumerate(names)
    ]
    inventory_uri = world.inventory(_manifest(world, rows)).inventory_uri
    world.version(inventory_uri=inventory_uri)
    world.put("data/new.wav")
    world.put("data/3.wav", data="other")
    world.delete("data/4.wav")
    # Only the listing of a folder shows that something is gone.
    world.version(inventory_uri=world.inventory(world.uri("data/")).inventory_uri)
    return world


def _card(world: World, version: str) -> DatasetCard:
    return make_card(world.storage, world.layout, version)


def test_numbers_are_those_of_the_rows(moved: World) -> None:
    for version, num_files in (("v1", 24), ("v2", 24)):
        card = _card(moved, version)
        rows = list(open_dataset(moved.config, "demo", version))
        assert card.num_files == len(rows) == num_files
        assert card.audio_seconds == pytest.approx(sum(r.num_samples for r in rows) / 16000)
        assert card.num_tokens == sum(row.num_frames for row in rows)
        assert card.num_codes == 5 * card.num_tokens
        for book in card.codebooks:
            codes = np.concatenate([row.codes[book.stream][book.codebook] for row in rows])
            counts = np.bincount(codes, minlength=64)
            assert book.bars == counts.tolist()
            shares = counts[counts > 0] / counts.sum()
            assert book.entropy_bits == pytest.approx(-(shares * np.log2(shares)).sum(), rel=1e-5)
            assert book.perplexity == pytest.approx(2**book.entropy_bits, rel=1e-5)
            assert book.num_used == (counts > 0).sum()
        rate = card.bitrate
        assert rate is not None
        assert rate.nominal == pytest.approx(50 * 5 * 6)
        assert 0 < rate.entropy < rate.nominal
        assert sum(bin_.num_files for bin_ in card.durations) == num_files
        assert card.seconds_quantiles["max"] == max(r.num_samples for r in rows) / 16000


def test_changes_are_told_from_files_that_were_only_written_again(moved: World) -> None:
    first, second = _card(moved, "v1"), _card(moved, "v2")
    assert first.previous_version is None
    assert (first.changes.num_added, first.changes.num_kept) == (24, 0)
    assert first.drift == []
    changes = second.changes
    assert (changes.num_added, changes.num_changed, changes.num_removed) == (1, 1, 1)
    assert changes.num_kept == 22
    new = {moved.uri("data/new.wav"), moved.uri("data/3.wav")}
    rows = [row for row in open_dataset(moved.config, "demo", "v2") if row.uri in new]
    assert changes.new_seconds == pytest.approx(sum(r.num_samples for r in rows) / 16000)
    assert second.drift[0].num_new_codes == sum(row.num_frames for row in rows)
    assert second.drift[0].num_previous_codes == first.num_tokens
    assert second.codebooks[0].previous_bars == first.codebooks[0].bars


def test_metadata_is_counted_where_it_is_given(moved: World) -> None:
    card = _card(moved, "v2")
    language, licence = card.metadata
    rows = list(open_dataset(moved.config, "demo", "v2"))
    found = Counter(row.metadata.get("lang", "not given") for row in rows)
    assert {share.name: share.num_files for share in language.shares} == {
        "de": found["de"],
        EVIL: found[EVIL],
    }
    assert language.unknown is not None
    assert language.unknown.num_files == found["not given"] == 2
    assert [share.name for share in licence.shares] == ["CC0"]
    assert card.speakers is not None
    assert (card.speakers.num_speakers, card.speakers.num_files) == (4, 22)
    assert card.metadata_keys == {"lang": 22, "licence": 22, "speaker": 22}
    assert [share.name for share in card.native[0].shares] == ["16000 Hz"]


def test_a_card_is_the_same_to_the_byte_whenever_it_is_made(moved: World) -> None:
    layout, storage = moved.layout, moved.storage
    write_card(storage, layout, "v2")
    before = card_files(_card(moved, "v1")), storage.read(card_page_uri(layout, "v2"))
    assert compact(storage, layout, dry_run=False).snapshot_id is not None
    moved.put("data/later.wav")
    moved.version(inventory_uri=moved.inventory(moved.uri("data/")).inventory_uri)
    write_card(storage, layout, "v2")
    assert card_files(_card(moved, "v1")) == before[0]
    assert storage.read(card_page_uri(layout, "v2")) == before[1]
    # The version after a compaction shares no file with the one before, and yet most rows.
    later = _card(moved, "v3")
    assert (later.changes.num_added, later.changes.num_kept) == (1, 24)
    assert later.drift[0].num_previous_codes == _card(moved, "v2").num_tokens


def test_a_page_escapes_loads_nothing_and_names_no_object(moved: World) -> None:
    files = card_files(_card(moved, "v2"))
    page = files["index.html"].decode()
    assert EVIL not in page
    assert "&lt;script&gt;" in page
    assert "http://" not in page.replace(moved.source_uri, "")
    assert "<img" not in page
    assert "src=" not in page
    assert "default-src 'none'" in page
    assert 'href="../v1/index.html"' in page
    for data in files.values():
        for name in ("new.wav", "3.wav", "12.wav", "s3"):
            assert f"{name}<" not in data.decode()
            assert f'{name}"' not in data.decode()


def test_a_stored_card_is_read_back_and_one_of_another_snapshot_is_not(local_world: World) -> None:
    world = local_world
    world.put("a.wav")
    world.version()
    assert read_card(world.storage, world.layout, "v1") is None
    card = write_card(world.storage, world.layout, "v1")
    assert read_card(world.storage, world.layout, "v1") == card
    uri = join_uri(world.layout.card_uri("v1"), "card.json")
    other = card.model_copy(update={"snapshot_id": 1})
    world.storage.write(uri, other.model_dump_json().encode())
    assert read_card(world.storage, world.layout, "v1") is None
    world.storage.write(uri, b"{}")
    with pytest.raises(ConfigError, match="is no dataset card of ours"):
        read_card(world.storage, world.layout, "v1")
    with pytest.raises(ConfigError, match="no version 'v7' of this dataset; versions: v1"):
        write_card(world.storage, world.layout, "v7")


def test_quarantine_by_reason_forgets_what_was_mended(local_world: World) -> None:
    world = local_world
    world.put("a.wav", "b.wav", "c.wav")

    def bad(*names: str):
        uris = {world.uri(name) for name in names}
        return lambda uri: Outcome.QUARANTINED if uri in uris else Outcome.TOKENS

    world.version(bad("a.wav", "b.wav"), bad_files={"max_share": 1.0})
    world.put("a.wav", data="mended")
    world.version(bad_files={"max_share": 1.0})
    world.put("b.wav", data="bad in another way")
    world.version(bad("b.wav"), bad_files={"max_share": 1.0})
    for version, expected in (("v1", (2, 2)), ("v2", (0, 1)), ("v3", (1, 1))):
        (count,) = _card(world, version).quarantine
        assert (count.reason, count.num_of_plan, count.num_still) == ("undecodable", *expected)


def test_versions_without_rows_or_without_new_rows_have_cards(local_world: World) -> None:
    world = local_world
    world.put("a.wav", "b.wav")
    world.version(lambda uri: Outcome.QUARANTINED, bad_files={"max_share": 1.0})
    empty = _card(world, "v1")
    assert (empty.num_files, empty.bitrate, empty.silent_share) == (0, None, None)
    world.put("c.wav", "d.wav")
    world.version()
    world.delete("d.wav")
    world.version(allow_many_deletes=True)
    removed = _card(world, "v3")
    assert (removed.num_files, removed.changes.num_removed, removed.drift) == (1, 1, [])
    for version in ("v1", "v2", "v3"):
        assert b"</html>" in card_files(_card(world, version))["index.html"]


def test_drift_is_told_from_chance(local_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """New files of the same kind stay below the noise, files of another kind exceed it."""
    world = local_world
    plain = factories.toy_row

    def skewed(job, shard_id, file):
        row = plain(job, shard_id, file)
        if "odd" in file["uri"]:
            row["semantic"] = [code // 4 for code in row["semantic"]]
        return row

    monkeypatch.setattr(factories, "toy_row", skewed)
    world.put(*(f"{number}.wav" for number in range(100)))
    world.version()
    world.put(*(f"same{number}.wav" for number in range(50)))
    world.version()
    world.put(*(f"odd{number}.wav" for number in range(50)))
    world.version()
    same, odd = _card(world, "v2"), _card(world, "v3")
    assert [drift.is_above_noise for drift in same.drift] == [False] * 5
    assert [drift.is_above_noise for drift in odd.drift] == [True, *[False] * 4]
    assert odd.drift[0].js_bits > 0.3
    assert 0 < odd.drift[0].version_js_bits < odd.drift[0].js_bits
    assert same.drift[0].psi_noise is not None
    assert same.drift[0].psi > 0.03


def test_few_files_say_nothing_about_drift(local_world: World) -> None:
    local_world.put("a.wav")
    local_world.version()
    local_world.put("b.wav")
    local_world.version()
    card = _card(local_world, "v2")
    assert card.drift[0].js_noise is None
    assert card.drift[0].is_above_noise is None
    assert "Too few files to tell" in card_files(card)["index.html"].decode()


def test_divergences_are_those_of_the_books() -> None:
    assert jensen_shannon_bits(np.array([1, 1]), np.array([5, 5])) == 0
    assert jensen_shannon_bits(np.array([3, 0]), np.array([0, 9])) == pytest.approx(1)
    p, q = np.array([30, 70]), np.array([50, 50])
    middle = np.array([0.4, 0.6])
    expected = sum((s * np.log2(s / middle)).sum() for s in (p / 100, q / 100)) / 2
    assert jensen_shannon_bits(p, q) == pytest.approx(expected)
    rng = np.random.default_rng(0)
    first, second = rng.multinomial(10_000, np.full(1024, 1 / 1024), 2)
    assert population_stability(first, second) == pytest.approx(0.2, abs=0.03)


def _batch(world: World, names: list[str]) -> pa.RecordBatch:
    plan = world.plan(dry_run=True)
    job = factories.TokenizeJob(
        plan_id=plan.plan_id,
        dataset="demo",
        plan_uri=plan.plan_uri,
        data_uri=plan.data_uri,
        codec_uri="x",
        manifest=world.manifest,
        settings=factories.SETTINGS,
        encode_id=plan.encode_id,
        num_shards=1,
        num_files=1,
        num_bytes=1,
    )
    rows = [factories.toy_row(job, "s", {"uri": world.uri(n), "etag": n}) for n in names]
    (batch,) = pa.Table.from_pylist(rows, arrow_schema(world.manifest)).to_batches()
    return batch


def test_the_order_of_files_changes_nothing(local_world: World, tmp_path: Path) -> None:
    world = local_world
    world.put("x.wav")
    before = [_batch(world, [f"a{number}"]) for number in range(40)]
    after = [_batch(world, [f"b{number}", f"c{number}"]) for number in range(40)]

    def gathered(order: int):
        with CardFacts(world.manifest, tmp_path) as facts:
            files = VersionFiles(kept=[], added=["after"], dropped=["before"])
            read = {"before": before[::order], "after": after[::order]}
            facts.gather(*(lambda columns, uris: read[next(iter(uris))],) * 2, files)
            facts.sample.max_files = 25
            return totals_of(facts, 16000), drift_of(facts, world.manifest)

    assert gathered(1) == gathered(-1)


def test_a_sample_is_of_the_smallest_ids_in_any_order(local_world: World) -> None:
    world = local_world
    world.put("x.wav")
    batches = [_batch(world, [f"{number}", f"{number}b"]) for number in range(15)]
    forwards, backwards = (FileSample(world.manifest.streams, max_files=7) for _ in range(2))
    for batch in batches:
        forwards.add(batch)
    for batch in reversed(batches):
        backwards.add(batch)
    ids = sorted(audio_id for batch in batches for audio_id in batch["audio_id"].to_pylist())
    assert [file.audio_id for file in forwards.files] == ids[:7]
    assert str(forwards.files) == str(backwards.files)


def test_the_command(local_world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world = local_world
    world.put("a.wav", "b.wav")
    world.version()
    path = world.write_config()
    out = world.local_path / "card"
    command = ["card", "demo", "--config", str(path)]
    assert main([*command, "--version", "1", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "demo v1, published" in text
    assert "2 files; since the beginning: 2 added" in text
    assert "drift      nothing to compare" in text
    assert (out / "index.html").read_bytes() == world.storage.read(
        card_page_uri(world.layout, "v1")
    )
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((out / "card.json").read_text())
    assert main([*command, "--version", "v9"]) == 43
    assert "There is no version 'v9'" in capsys.readouterr().err
