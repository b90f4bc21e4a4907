"""How fast workers were, for the estimates of later plans.

<work_uri>/rates/<codec>/<compute class>-<mode>.json    ``MeasuredRate`` of the last plan measured
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hcodec_core.config import Config, describe
from hcodec_core.errors import ConfigError, ObjectMissingError
from hcodec_core.jobs import TokenizeJob, WorkUse
from hcodec_core.storage import Storage, join_uri
from hcodec_core.tokens import CodecManifest, EncodeSettings

_FEWEST_SECONDS = 60.0  # of audio: below, a rate is that of starting and ending


class MeasuredRate(BaseModel):
    """What one worker of a compute class did: seconds of audio in seconds of work on shards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    plan_id: str
    audio_seconds: float = Field(gt=0)
    worker_seconds: float = Field(gt=0)

    @property
    def realtime_factor(self) -> float:
        """Seconds of audio per second of one worker."""
        return self.audio_seconds / self.worker_seconds


def remember_rate(config: Config, storage: Storage, job: TokenizeJob, work: WorkUse) -> None:
    """Keep the rate of a plan's workers, unless they did too little to know it."""
    encode = work.steps.get("encode")
    if encode is None or not encode.lane_seconds or work.audio_seconds < _FEWEST_SECONDS:
        return
    rate = MeasuredRate(
        plan_id=job.plan_id, audio_seconds=work.audio_seconds, worker_seconds=encode.lane_seconds
    )
    uri = _rate_uri(config, job.manifest, job.settings)
    storage.write(uri, rate.model_dump_json(indent=1).encode())


def expected_rate(
    config: Config, storage: Storage, manifest: CodecManifest, settings: EncodeSettings
) -> tuple[float, str]:
    """Seconds of audio per second of one worker, and where the number comes from.

    Measured by an earlier plan of the codec on the compute class, else configured
    (``cost.realtime_factors``), else the configured default. Raises ``ConfigError`` when the
    document cannot be read.
    """
    uri = _rate_uri(config, manifest, settings)
    try:
        rate = MeasuredRate.model_validate_json(storage.read(uri))
    except ObjectMissingError:
        cost = config.cost
        if manifest.name in cost.realtime_factors:
            return cost.realtime_factors[manifest.name], "configured"
        return cost.default_realtime_factor, "default, not measured"
    except ValidationError as error:
        raise ConfigError(
            f"{uri} is no measured rate: {describe(error)}. Remove it; the next plan writes it."
        ) from error
    return rate.realtime_factor, f"measured by plan {rate.plan_id}"


def _rate_uri(config: Config, manifest: CodecManifest, settings: EncodeSettings) -> str:
    name = f"{settings.compute_class}-{settings.mode}.json"
    return join_uri(config.work.work_uri, "rates", manifest.name, name)
