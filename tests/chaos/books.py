"""The books after a fault: rows that readers see beside those of a run without faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.maintenance import expire_snapshots, sweep_orphans
from hcodec_core.dataset.quarantine import read_quarantine
from hcodec_core.dataset.schema import audio_id_of
from hcodec_core.dataset.table import load_table, main_snapshot_id
from hcodec_core.dataset.tabular import list_folder
from hcodec_core.storage import Storage
from tests.chaos.patience import patiently

if TYPE_CHECKING:
    from tests.chaos.bed import Server

_BOOKKEEPING = ("shard_id", "plan_id", "worker_build")

Row = dict[str, Any]


@dataclass
class Books:
    """What is left after a fault and its recovery; all four must be 0."""

    lost: int = 0
    doubled: int = 0
    differing: int = 0
    orphans: int = 0
    details: list[str] = field(default_factory=list)

    @property
    def are_right(self) -> bool:
        return not (self.lost or self.doubled or self.differing or self.orphans)


@dataclass(frozen=True)
class Bookkeeper:
    """Knows one dataset and where its audio lies (``audio_uri`` ends with a slash)."""

    server: Server
    bucket: str
    storage: Storage
    layout: DatasetLayout
    audio_uri: str

    def make(self, reference: Mapping[str, Row], quarantined: Set[str]) -> Books:
        """Clean up as maintenance does, then compare.

        ``reference``: row by etag, of a run without faults; codes of an object follow from its
        content alone. ``quarantined``: names that must have no tokens but be accounted for.
        """
        self.server.age(self.bucket, days=40)
        expire_snapshots(self.layout, datetime.now(UTC))
        sweep_orphans(self.storage, self.layout, dry_run=False)
        rows = self.rows()
        counts = Counter(row["uri"] for row in rows)
        expected = self._expected(reference, quarantined)
        orphans = [*self.orphans(), *self._wrong_quarantine(quarantined)]
        return Books(
            lost=len(expected.keys() - counts.keys()),
            doubled=sum(count - 1 for count in counts.values()),
            differing=sum(row != expected.get(row["uri"]) for row in rows),
            orphans=len(orphans),
            details=orphans[:3],
        )

    def rows(self) -> list[Row]:
        """All rows that readers see, in plain form."""
        return patiently(self._rows)

    def _rows(self) -> list[Row]:
        table = load_table(self.layout)
        rows = table.scan(snapshot_id=main_snapshot_id(table)).to_arrow().to_pylist()
        return [self._plain(row) for row in rows]

    def _plain(self, row: Row) -> Row:
        if row["audio_id"] != audio_id_of(row["uri"], row["etag"]):
            raise AssertionError(f"{row['uri']} has the audio_id of something else")
        kept = {name: row[name] for name in row if name not in (*_BOOKKEEPING, "audio_id")}
        return kept | {"uri": row["uri"].removeprefix(self.audio_uri)}

    def _expected(self, reference: Mapping[str, Row], quarantined: Set[str]) -> dict[str, Row]:
        found = {}
        for info in list_folder(self.storage, self.audio_uri):
            name = info.uri.removeprefix(self.audio_uri)
            if name not in quarantined:
                found[name] = reference[info.etag] | {"uri": name}
        return found

    def orphans(self) -> Iterator[str]:
        """Objects of the table's folder that none of its snapshots refers to."""
        table = load_table(self.layout)
        known = {table.metadata_location, *(e.metadata_file for e in table.metadata.metadata_log)}
        known |= {snapshot.manifest_list for snapshot in table.snapshots()}
        for snapshot in table.snapshots():
            for manifest in snapshot.manifests(table.io):
                known.add(manifest.manifest_path)
                entries = manifest.fetch_manifest_entry(table.io)
                known |= {entry.data_file.file_path for entry in entries}
        listed = {info.uri for info in list_folder(self.storage, self.layout.table_uri)}
        yield from (f"orphan {uri}" for uri in sorted(listed - known))

    def _wrong_quarantine(self, quarantined: Set[str]) -> Iterator[str]:
        held = Counter(read_quarantine(self.storage, self.layout)["uri"].to_pylist())
        for name in sorted(quarantined):
            if held[self.audio_uri + name] < 1:
                yield f"{unquote(name)} is missing from the quarantine"
