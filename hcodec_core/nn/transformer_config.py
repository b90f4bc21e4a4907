"""Shape of a projected transformer. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

TransformerNorm = Literal["layer_norm", "rms_norm", "rms_norm_f32"]
Positions = Literal["sin", "rope", "sin_rope", "none"]
Gating = Literal["none", "silu", "gelu", "relu", "sigmoid", "elu", "mish", "tanh"]


class TransformerConfig(BaseModel):
    """Shape of a transformer; what is not a width or a count does not show in its tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dim: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    hidden_dim: int = Field(gt=0)  # inside the feed-forward layers; of each half when gated
    norm: TransformerNorm = "layer_norm"
    positions: Positions = "rope"
    max_period: float = Field(default=10000.0, gt=0)  # of the positions
    is_causal: bool = False
    context: int | None = Field(default=None, gt=0)  # steps a causal layer sees, itself included
    layer_scale: float | None = None  # first value of the learned scales; None: no scales
    gating: Gating = "none"

    @model_validator(mode="after")
    def _check(self) -> TransformerConfig:
        if self.dim % self.num_heads:
            raise ValueError("num_heads must divide dim")
        if self.context is not None and not self.is_causal:
            raise ValueError("a context is for causal transformers only")
        return self
