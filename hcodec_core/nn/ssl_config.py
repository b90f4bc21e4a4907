"""Shape of a self-supervised speech model. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from hcodec_core.errors import CheckpointError


class SslConfig(BaseModel):
    """The fields of a transformers configuration that decide results, under the same names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: Literal["hubert", "wav2vec2"]
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    conv_dim: tuple[int, ...]
    conv_kernel: tuple[int, ...]
    conv_stride: tuple[int, ...]
    conv_bias: bool
    feat_extract_norm: Literal["group", "layer"]
    feat_proj_layer_norm: bool = True
    do_stable_layer_norm: bool = False
    num_conv_pos_embeddings: int
    num_conv_pos_embedding_groups: int
    layer_norm_eps: float = 1e-5
    feat_extract_activation: Literal["gelu"] = "gelu"
    hidden_act: Literal["gelu"] = "gelu"
    conv_pos_batch_norm: Literal[False] = False

    @classmethod
    def from_transformers(cls, values: Mapping[str, Any]) -> SslConfig:
        """Pick the fields out of a ``config.json``.

        Raises ``CheckpointError`` naming the field that is missing or not supported.
        """
        try:
            return cls.model_validate(
                {key: values[key] for key in cls.model_fields & values.keys()}
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise CheckpointError(
                f"The SSL model's configuration cannot be used: {'.'.join(map(str, first['loc']))} "
                f"({first['msg']}); supported are HuBERT and wav2vec 2.0."
            ) from error

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return prod(self.conv_stride)
