"""Shape of a BigVGAN generator. No torch here."""

from __future__ import annotations

from math import prod

from pydantic import BaseModel, ConfigDict, Field, model_validator


class BigVganConfig(BaseModel):
    """Shape of a generator; widths halve with each of ``upsample_rates``.

    ``upsample_kernels`` belong to the transposed convolutions; each of ``block_kernels`` makes one
    residual block per rate, with one step for each of ``block_dilations``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_mels: int = Field(gt=0)
    initial_dim: int = Field(gt=0)
    upsample_rates: tuple[int, ...] = Field(min_length=1)
    upsample_kernels: tuple[int, ...]
    block_kernels: tuple[int, ...] = Field(min_length=1)
    block_dilations: tuple[int, ...] = Field(min_length=1)
    has_final_bias: bool = False
    has_final_tanh: bool = False

    @model_validator(mode="after")
    def _check(self) -> BigVganConfig:
        if len(self.upsample_rates) != len(self.upsample_kernels):
            raise ValueError("upsample_rates and upsample_kernels must be as many")
        pairs = zip(self.upsample_rates, self.upsample_kernels, strict=True)
        if any(kernel < rate or (kernel - rate) % 2 for rate, kernel in pairs):
            raise ValueError("a kernel must exceed its rate by an even number")
        if self.initial_dim % 2 ** len(self.upsample_rates):
            raise ValueError("initial_dim must halve with each rate")
        return self

    @property
    def hop_length(self) -> int:
        """Samples per mel frame."""
        return prod(self.upsample_rates)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after each up-sampling."""
        return tuple(self.initial_dim >> (i + 1) for i in range(len(self.upsample_rates)))
