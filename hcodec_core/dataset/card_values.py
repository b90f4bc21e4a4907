"""What a dataset card says, as values: the JSON beside the page."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from hcodec_core.dataset.summary import DurationBin
from hcodec_core.jobs import ModeAgreement
from hcodec_core.tokens import EncodeSettings, StreamSpec


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CardCodec(_Value):
    """The codec of a version. ``frame_rate``: base frames per second."""

    name: str
    family: str
    uri: str
    digest: str
    is_trained: bool
    weights_licence: str
    source: str
    sample_rate: int
    frame_rate: float
    is_variable_rate: bool
    streams: tuple[StreamSpec, ...]


class Changes(_Value):
    """Objects that differ from the previous version.

    ``new_seconds``: audio of added and changed ones.
    """

    num_added: int
    num_changed: int
    num_removed: int
    num_kept: int
    new_seconds: float


class Share(_Value):
    """Files that have something in common, by name."""

    name: str
    num_files: int
    audio_seconds: float


class Breakdown(_Value):
    """Files by what they have in common: the largest shares, the rest as one, and what is unknown.

    ``num_names``: how many different ones there are.
    """

    title: str
    shares: list[Share]
    num_names: int
    other: Share | None
    unknown: Share | None


class Speakers(_Value):
    """Speakers as counted by a metadata column, without their names; seconds of audio of each."""

    num_speakers: int
    num_files: int
    median_seconds: float
    max_seconds: float


class Bitrate(_Value):
    """Bits per second of audio.

    ``nominal``: codes at their full width; ``entropy``: as an ideal coder of each codebook by
    itself would need; ``stored``: of all columns of the data files. Spans of adaptive rates are
    counted in both of the former.
    """

    tokens_per_second: float
    nominal: float
    entropy: float
    stored: float


class CodebookCard(_Value):
    """Use of one codebook.

    ``bars``: counts over equal ranges of code indices; ``previous_bars``: of the previous version,
    None when there is none.
    """

    stream: str
    codebook: int
    size: int
    num_codes: int
    num_used: int
    perplexity: float
    entropy_bits: float
    bars: list[int]
    previous_bars: list[int] | None

    @property
    def use(self) -> float:
        """Share of the codebook's entries that were used at all."""
        return self.num_used / self.size


class CodebookDrift(_Value):
    """New rows against the previous version, in one codebook; ``version_js_bits``: all rows.

    ``js_noise`` and ``psi_noise``: what 99 % of samples of equal size stay below when nothing
    changed; None when there are too few files to say.
    """

    stream: str
    codebook: int
    num_new_codes: int
    num_previous_codes: int
    js_bits: float
    js_noise: float | None
    psi: float
    psi_noise: float | None
    version_js_bits: float

    @property
    def is_above_noise(self) -> bool | None:
        """Whether both divergences exceed what chance explains; None when that is not known."""
        if self.js_noise is None or self.psi_noise is None:
            return None
        return self.js_bits > self.js_noise and self.psi > self.psi_noise


class ReasonCount(_Value):
    """Quarantined files by reason.

    ``num_of_plan``: of this version's plan; ``num_still``: of all plans up to it, without tokens in
    this version.
    """

    reason: str
    num_of_plan: int
    num_still: int


class CardAudit(_Value):
    """The round-trip audit of a version's plan, without names; see ``audit.AuditResult``."""

    num_files: int
    num_with_other_codes: int
    num_with_wrong_length: int
    num_not_finite: int
    num_codes: int
    num_equal_codes: int
    median_si_sdr_db: float | None
    median_spectral_db: float | None


class CardPurge(_Value):
    """Objects erased from a version since: when, and how many of its rows; never which."""

    purged_at: datetime
    num_rows: int


class DatasetCard(_Value):
    """One version of a dataset in numbers; it names no object and no speaker."""

    format_version: Literal[1] = 1
    dataset: str
    version: str
    previous_version: str | None
    published_at: datetime
    snapshot_id: int
    table: str
    encode_id: str
    decode_id: str
    codebook_id: str
    plan_id: str
    report_uri: str
    sources: tuple[str, ...]
    codec: CardCodec
    settings: EncodeSettings
    builds: list[str]
    num_files: int
    audio_seconds: float
    num_tokens: int
    num_codes: int
    num_data_files: int
    num_bytes: int
    changes: Changes
    durations: list[DurationBin]
    seconds_quantiles: dict[str, float]
    native: list[Breakdown]
    metadata: list[Breakdown]
    speakers: Speakers | None
    metadata_keys: dict[str, int]
    silent_share: float | None
    clipped_share: float | None
    num_clipped_files: int
    bitrate: Bitrate | None
    codebooks: list[CodebookCard]
    drift: list[CodebookDrift]
    num_noise_files: int
    outcomes: dict[str, int]
    quarantine: list[ReasonCount]
    agreement: ModeAgreement | None
    audit: CardAudit | None = None
    purges: tuple[CardPurge, ...] = ()
