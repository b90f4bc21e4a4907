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


def hubert_base() -> SslConfig:
    """HuBERT base: 12 layers of 768 features at 50 Hz."""
    return SslConfig(
        model_type="hubert",
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        conv_dim=(512,) * 7,
        conv_kernel=(10, 3, 3, 3, 3, 2, 2),
        conv_stride=(5, 2, 2, 2, 2, 2, 2),
        conv_bias=False,
        feat_extract_norm="group",
        num_conv_pos_embeddings=128,
        num_conv_pos_embedding_groups=16,
    )


def wav2vec2_large_xlsr() -> SslConfig:
    """The first 16 of the 24 layers of wav2vec 2.0 large (XLSR-53): 1024 features at 50 Hz."""
    return hubert_base().model_copy(
        update={
            "model_type": "wav2vec2",
            "hidden_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "conv_bias": True,
            "feat_extract_norm": "layer",
            "do_stable_layer_norm": True,
        }
    )
