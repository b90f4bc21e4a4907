"""Whether data grew enough to train a codec anew; looked at from its state, not from events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hcodec_airflow.settings import read_settings
from hcodec_core.errors import ConfigError

if TYPE_CHECKING:
    from hcodec_core.config import Config
    from hcodec_core.storage import Storage

_SECONDS_PER_HOUR = 3600.0


def is_due(codec: str, data: Sequence[str], min_new_hours: float) -> tuple[bool, str]:
    """Whether the datasets among ``data`` grew enough since a codec was last trained on them.

    What counts is the last version that was registered, promoted or not: a codec that was turned
    down is not trained again on the same data. Also the sentence for the log.
    """
    settings = read_settings()
    config, storage = settings.load_config(), settings.open_storage()
    trained = _trained_on(config, codec)
    datasets = [uri.removeprefix("dataset:") for uri in data if uri.startswith("dataset:")]
    if not datasets:
        raise ConfigError("min_new_hours counts datasets: write dataset:NAME into data.")
    hours = sum(_new_hours(config, storage, name, trained) for name in datasets)
    verdict = hours >= min_new_hours
    return verdict, (
        f"{hours:.2f} new hours of audio since the last training of {codec}, "
        f"{min_new_hours:g} are asked for: {'due' if verdict else 'not due'}."
    )


def _trained_on(config: Config, codec: str) -> dict[str, tuple[str, str]]:
    """Version and first digits of the encode id by dataset, of the version registered last."""
    from hcodec_core.promotion.codec_versions import CodecVersions

    registered = CodecVersions(config).versions(codec)
    parts = registered[-1].data_version.split("; ") if registered else []
    named = [part.removeprefix("dataset:") for part in parts if part.startswith("dataset:")]
    known = {}
    for part in named:
        name, _, rest = part.partition("@")
        version, _, encode_id = rest.partition("#")
        known[name] = (version, encode_id)
    return known


def _new_hours(
    config: Config, storage: Storage, name: str, trained: Mapping[str, tuple[str, str]]
) -> float:
    dataset = name.partition("@")[0]
    hours = _hours(config, storage, dataset, None, None)
    if dataset in trained:
        hours -= _hours(config, storage, dataset, *trained[dataset])
    return max(hours, 0.0)


def _hours(
    config: Config, storage: Storage, dataset: str, version: str | None, encode_id: str | None
) -> float:
    """Hours of audio that were encoded up to a version of a dataset, None: the latest."""
    from hcodec_core.dataset.table import find_layout, find_layouts
    from hcodec_core.dataset.versions import list_versions, version_record

    if encode_id is None:
        layout = find_layout(config, dataset)
    else:
        layouts = find_layouts(config, dataset)
        found = [layout for layout in layouts if layout.encode_id.startswith(encode_id)]
        if not found:
            return 0.0
        layout = found[0]
    names = [summary.version for summary in list_versions(layout)]
    kept = names[: names.index(version) + 1] if version in names else names
    records = (version_record(storage, layout, name) for name in kept)
    return sum(record.counts.audio_seconds for record in records) / _SECONDS_PER_HOUR
