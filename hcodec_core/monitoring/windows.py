"""Which rows a window has, and which the reference: of versions, by what their data files share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hcodec_core.dataset.checks import rows_of_snapshot
from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.ledger import version_entries
from hcodec_core.dataset.table import data_files, refs_of
from hcodec_core.dataset.versions import list_versions, resolve_version
from hcodec_core.errors import ConfigError
from hcodec_core.monitoring.documents import PINNED, MonitorTerms
from hcodec_core.monitoring.profiles import Profile
from hcodec_core.tokens import CodecManifest

if TYPE_CHECKING:
    from pyiceberg.table import Table


Ids = npt.NDArray[np.bytes_]


@dataclass(frozen=True)
class Side:
    """A version with its snapshot."""

    version: str
    snapshot_id: int


def find_reference(layout: DatasetLayout, table: Table, name: str) -> Side:
    """The reference by its name, ``pinned`` for the newest pinned version.

    Raises ``ConfigError`` when there is none such.
    """
    if name != PINNED:
        return Side(*resolve_version(table, name))
    pinned = [version.version for version in list_versions(layout) if version.is_pinned]
    if not pinned:
        raise ConfigError(
            f"Dataset {layout.dataset} has no pinned version to be compared with: pin one (hcodec "
            f"versions pin {layout.dataset} V), or name a reference."
        )
    return Side(*resolve_version(table, pinned[-1]))


def find_base(
    table: Table, terms: MonitorTerms, reference: Side, last_version: str | None
) -> Side | None:
    """The version whose files a window leaves out; None where it takes all files.

    ``last_version``: of the last window that was judged. One that retention took is no base any
    more; then it is the reference.
    """
    if terms.window == "version":
        return None
    if last_version is not None and last_version in version_entries(table):
        if last_version in refs_of(table):
            return Side(*resolve_version(table, last_version))
    return reference


def earlier_versions(table: Table, version: str) -> list[str]:
    """Versions before this one; all of them for a tag or branch that is none."""
    names = list(version_entries(table))
    return names[: names.index(version)] if version in names else names


def reference_profile(table: Table, reference: Side) -> Profile:
    """The profile of all rows of the reference. Raises ``StorageError``."""
    profile = Profile(manifest_of(table))
    rows = rows_of_snapshot(table, reference.snapshot_id)
    return profile.fill(rows(profile.columns, None))


def window_profile(table: Table, window: Side, base: Side | None) -> Profile:
    """The profile of the window's rows that the base does not have. Raises ``StorageError``."""
    profile = Profile(manifest_of(table))
    rows = rows_of_snapshot(table, window.snapshot_id)
    if base is None:
        return profile.fill(rows(profile.columns, None))
    after = {file.file_path for file in data_files(table, window.snapshot_id)}
    before = {file.file_path for file in data_files(table, base.snapshot_id)}
    if not after - before:
        return profile
    # Files that were swapped out or compacted: most of their rows live on in other files.
    known = _ids(rows_of_snapshot(table, base.snapshot_id)(["audio_id"], before - after))
    return profile.fill(_unknown(rows(profile.columns, after - before), known))


def manifest_of(table: Table) -> CodecManifest:
    """The codec of a table."""
    return CodecManifest.model_validate_json(table.properties["hcodec.codec"])


def _ids(batches: Iterable[pa.RecordBatch]) -> Ids:
    parts = [np.asarray(batch.column("audio_id").to_pylist(), "S32") for batch in batches]
    return np.sort(np.concatenate([np.zeros(0, "S32"), *parts]))


def _unknown(batches: Iterable[pa.RecordBatch], known: Ids) -> Iterator[pa.RecordBatch]:
    """Rows of batches whose ids are not among the sorted known ones."""
    for batch in batches:
        ids = np.asarray(batch.column("audio_id").to_pylist(), "S32")
        is_known = np.isin(ids, known, assume_unique=False)
        yield batch.filter(pa.array(~is_known))
