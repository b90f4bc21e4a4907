"""The dataset card of a version: what it holds, how its codebooks are used, how far it moved.

A card is a page and the same in JSON, beside the version's record. It is a pure function of the
version's tag, the quarantine files of published plans and the plan's audit: made again, it is the
same to the byte. It names no object, so that erasing one leaves nothing of it here.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from hcodec_core.config import describe
from hcodec_core.dataset.audit import AuditResult, read_audit
from hcodec_core.dataset.card_facts import CardFacts, VersionFiles
from hcodec_core.dataset.card_numbers import (
    bitrate_of,
    builds_of,
    changes_of,
    codebooks_of,
    drift_of,
    metadata_breakdowns,
    metadata_keys,
    native_breakdowns,
    quarantine_of,
    speakers_of,
    totals_of,
)
from hcodec_core.dataset.card_page import render_card
from hcodec_core.dataset.card_values import CardAudit, CardCodec, CardPurge, DatasetCard
from hcodec_core.dataset.checks import rows_of_snapshot
from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.ledger import version_entries, version_number, version_of
from hcodec_core.dataset.quarantine import read_quarantine
from hcodec_core.dataset.table import data_files, load_table
from hcodec_core.dataset.versions import VersionRecord, resolve_version, version_record
from hcodec_core.errors import ConfigError, ObjectMissingError
from hcodec_core.storage import Storage, join_uri
from hcodec_core.tokens import CodecManifest

if TYPE_CHECKING:
    from pyiceberg.manifest import DataFile
    from pyiceberg.table import Table

logger = logging.getLogger(__name__)

CARD_PAGE_FILE = "index.html"
CARD_JSON_FILE = "card.json"


def card_page_uri(layout: DatasetLayout, version: str) -> str:
    """Where the page of a version's card lies."""
    return join_uri(layout.card_uri(version), CARD_PAGE_FILE)


def write_card(storage: Storage, layout: DatasetLayout, version: str) -> DatasetCard:
    """Make the card of a published version and store it, the page last.

    Raises ``ConfigError`` when there is no such version, ``ObjectMissingError`` when its record is
    missing (publish the plan again), ``StorageError`` and ``AccessError`` as storage does.
    """
    layout.config.check_destination(layout.card_uri(version))
    card = make_card(storage, layout, version)
    files = card_files(card)
    for name in (CARD_JSON_FILE, CARD_PAGE_FILE):
        storage.write(join_uri(layout.card_uri(version), name), files[name])
    logger.info("card of %s %s: %s", card.dataset, version, card_page_uri(layout, version))
    return card


def card_files(card: DatasetCard) -> dict[str, bytes]:
    """Content of a card's files by name."""
    text = card.model_dump_json(indent=1)
    return {CARD_PAGE_FILE: render_card(card).encode(), CARD_JSON_FILE: (text + "\n").encode()}


def read_card(storage: Storage, layout: DatasetLayout, version: str) -> DatasetCard | None:
    """The stored card of a version; None when there is none of its present snapshot."""
    uri = join_uri(layout.card_uri(version), CARD_JSON_FILE)
    try:
        card = DatasetCard.model_validate_json(storage.read(uri))
    except ObjectMissingError:
        return None
    except ValidationError as error:
        raise ConfigError(f"{uri} is no dataset card of ours: {describe(error)}.") from error
    _, snapshot_id = resolve_version(load_table(layout), version)
    return card if card.snapshot_id == snapshot_id else None


def make_card(storage: Storage, layout: DatasetLayout, version: str) -> DatasetCard:
    """The card of a published version; see ``write_card``."""
    table = load_table(layout)
    if version not in version_entries(table):
        names = ", ".join(version_entries(table)) or "none yet"
        raise ConfigError(f"There is no version {version!r} of this dataset; versions: {names}.")
    record = version_record(storage, layout, version)
    sides = _Sides.of(table, record)
    manifest = CodecManifest.model_validate_json(table.properties["hcodec.codec"])
    with tempfile.TemporaryDirectory(prefix="hcodec-card-") as folder:
        with CardFacts(manifest, Path(folder)) as facts:
            facts.gather(
                rows_of_snapshot(table, sides.snapshot_id),
                rows_of_snapshot(table, sides.previous_id),
                sides.files,
            )
            facts.add_quarantine(_quarantine(storage, layout, table, version))
            card = _card_of(facts, manifest, record, sides)
    audit = read_audit(storage, record.plan_uri)
    return card if audit is None else card.model_copy(update={"audit": _audit_of(audit)})


@dataclass(frozen=True)
class _Sides:
    """A version's snapshot and that of the version before (its own where there is none)."""

    previous: str | None
    snapshot_id: int
    previous_id: int
    files: VersionFiles
    num_data_files: int
    num_bytes: int

    @classmethod
    def of(cls, table: Table, record: VersionRecord) -> _Sides:
        _, snapshot_id = resolve_version(table, record.version)
        previous = record.previous_version
        # A version that retention took away is none to compare with.
        previous = previous if previous in table.refs() else None
        previous_id, before = snapshot_id, set[str]()
        if previous is not None:
            _, previous_id = resolve_version(table, previous)
            before = _uris(data_files(table, previous_id))
        now = data_files(table, snapshot_id)
        after = _uris(now)
        return cls(
            previous=previous,
            snapshot_id=snapshot_id,
            previous_id=previous_id,
            files=VersionFiles(after & before, after - before, before - after),
            num_data_files=len(now),
            num_bytes=sum(file.file_size_in_bytes for file in now),
        )


def _uris(files: list[DataFile]) -> set[str]:
    return {file.file_path for file in files}


def _quarantine(storage: Storage, layout: DatasetLayout, table: Table, version: str) -> pa.Table:
    """Quarantined files of a version and those it was built on, with the versions' numbers."""
    entries = version_entries(table)
    lineage: list[str] = []
    name: str | None = version
    while name is not None and name not in lineage:
        lineage.append(name)
        name = version_of(table, entries[name].base_snapshot_id)
    rows = read_quarantine(storage, layout)
    rows = rows.filter(pc.is_in(rows["version"], value_set=pa.array(lineage)))
    numbers = pa.array([version_number(name) for name in rows["version"].to_pylist()], pa.int32())
    return rows.select(["uri", "etag", "reason"]).append_column("version_number", numbers)


def _card_of(
    facts: CardFacts, manifest: CodecManifest, record: VersionRecord, sides: _Sides
) -> DatasetCard:
    rate = manifest.sample_rate
    totals = totals_of(facts, rate)
    codebooks = codebooks_of(facts, manifest, sides.previous is not None)
    return DatasetCard(
        **_facts_of(record),
        **totals,
        previous_version=sides.previous,
        snapshot_id=sides.snapshot_id,
        codec=_codec_of(manifest, record),
        builds=[_build_text(build) for build in builds_of(facts)],
        num_codes=sum(book.num_codes for book in codebooks),
        num_data_files=sides.num_data_files,
        num_bytes=sides.num_bytes,
        changes=changes_of(facts, totals["num_files"], rate),
        native=native_breakdowns(facts, rate),
        metadata=metadata_breakdowns(facts, rate),
        speakers=speakers_of(facts, rate),
        metadata_keys=metadata_keys(facts),
        bitrate=bitrate_of(facts, manifest, totals["audio_seconds"], sides.num_bytes),
        codebooks=codebooks,
        drift=drift_of(facts, manifest),
        num_noise_files=len(facts.sample.files),
        quarantine=quarantine_of(facts, version_number(record.version)),
    )


def _audit_of(audit: AuditResult) -> CardAudit:
    files = audit.compared
    return CardAudit(
        num_files=len(files),
        num_with_other_codes=len(audit.with_other_codes),
        num_with_wrong_length=len(audit.with_wrong_length),
        num_not_finite=len(audit.not_finite),
        num_codes=sum(file.num_codes for file in files),
        num_equal_codes=sum(file.num_equal_codes for file in files),
        median_si_sdr_db=_median(file.si_sdr_db for file in files),
        median_spectral_db=_median(file.spectral_db for file in files),
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _facts_of(record: VersionRecord) -> dict[str, Any]:
    names = (
        "dataset",
        "version",
        "published_at",
        "table",
        "encode_id",
        "decode_id",
        "codebook_id",
        "plan_id",
        "report_uri",
        "sources",
        "settings",
        "agreement",
    )
    purges = [CardPurge(purged_at=note.purged_at, num_rows=note.num_rows) for note in record.purges]
    counted = {"outcomes": record.counts.outcomes, "purges": tuple(purges)}
    return {name: getattr(record, name) for name in names} | counted


def _codec_of(manifest: CodecManifest, record: VersionRecord) -> CardCodec:
    return CardCodec(
        name=manifest.name,
        family=manifest.family,
        uri=record.codec_uri,
        digest=manifest.digest,
        is_trained=manifest.is_trained,
        weights_licence=manifest.weights_licence,
        source=manifest.source,
        sample_rate=manifest.sample_rate,
        frame_rate=float(manifest.frame_rate),
        is_variable_rate=manifest.is_variable_rate,
        streams=manifest.streams,
    )


def _build_text(build: str) -> str:
    """A worker's build as text; what is no JSON object of ours is shown as it is."""
    try:
        parts = json.loads(build)
    except ValueError:
        return build
    if not isinstance(parts, dict):
        return build
    return ", ".join(f"{name} {value}" for name, value in sorted(parts.items()))
