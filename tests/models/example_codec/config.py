"""Shape of the example codec, its presets and what is known of them. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hcodec_core.errors import ConfigError
from hcodec_core.models.facts import CodecFacts, untrained
from hcodec_core.tokens import StreamSpec


class ExampleConfig(BaseModel):
    """Shape of one example codec. A field's default, once released, never changes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample_rate: int = Field(default=16000, gt=0)  # Hz
    hop_length: int = Field(gt=0)  # samples per token frame
    dim: int = Field(gt=0)  # features that are quantised
    kernel_size: int = 5  # frames that a frame sees, odd
    num_codebooks: int = Field(gt=0)
    codebook_size: int = Field(gt=1)

    @property
    def streams(self) -> tuple[StreamSpec, ...]:
        """The one stream."""
        return (
            StreamSpec(
                name="fused", num_codebooks=self.num_codebooks, codebook_size=self.codebook_size
            ),
        )

    @property
    def is_variable_rate(self) -> bool:
        """Every token spans one frame."""
        return False

    def architecture(self) -> dict[str, Any]:
        """All fields as JSON."""
        return self.model_dump(mode="json")

    @classmethod
    def from_architecture(cls, architecture: Mapping[str, Any]) -> ExampleConfig:
        """Read what ``architecture`` wrote. Raises ``ConfigError`` naming the wrong field."""
        try:
            return cls.model_validate(architecture)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise ConfigError(f"Example codec: {field} cannot be used: {first['msg']}.") from error


def tiny() -> ExampleConfig:
    """The smallest example codec, for unit tests."""
    return ExampleConfig(hop_length=160, dim=12, num_codebooks=3, codebook_size=32)


PRESETS: Mapping[str, Callable[[], ExampleConfig]] = {"example-tiny": tiny}

FACTS: Mapping[str, CodecFacts] = {"example-tiny": untrained(5896, "length-aware")}
