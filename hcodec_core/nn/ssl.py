"""Self-supervised speech models as frozen feature extractors: HuBERT and wav2vec 2.0.

HuBERT (arXiv 2106.07447) and wav2vec 2.0 (arXiv 2006.11477) share this network; tensor names are
those of the transformers library. It is written out here because the library may leave the
attention mask out when nothing is padded, and may change kernels between versions: either would
let codes depend on a clip's neighbours or on an unpinned library.

Deliberate differences: the group norm of the first layer looks at valid steps only, padded steps
are zeroed before the positional convolution and masked in attention, the positional
convolution's weight norm is folded, and there is no dropout, layer drop or masking.

Shape letters: B batch, D feature, N sample, T frame.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from hcodec_core.nn.attention import attend, split_heads
from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.norm import ValidGroupNorm
from hcodec_core.nn.precision import at_least_float32
from hcodec_core.nn.ssl_config import SslConfig


class SslModel(nn.Module):
    """The network; every module has the name that it has in transformers."""

    def __init__(self, config: SslConfig) -> None:
        """Build with random weights."""
        super().__init__()
        self.config = config
        self.feature_extractor = _FeatureExtractor(config)
        self.feature_projection = _FeatureProjection(config)
        self.encoder = _Encoder(config)

    def hidden_states(self, audio: Tensor, lengths: Lengths) -> Iterator[tuple[Tensor, Lengths]]:
        """Embedding output, then each layer's output, [B, T, D] with their lengths.

        Args:
            audio: [B, N], not normalised, zero past each row's end.
            lengths: Samples that count as signal.

        Yields:
            ``num_hidden_layers + 1`` states; past a row's end anything finite. Models with
            ``do_stable_layer_norm`` have a norm after the last layer: it is left out, so that a
            model cut after layer k yields the first k + 1 states of the whole one.
        """
        x, lengths = self.feature_extractor(audio, lengths)
        x = self.feature_projection(x.transpose(1, 2))
        for state in self.encoder(x, lengths):
            yield state, lengths


class _FeatureExtractor(nn.Module):
    def __init__(self, config: SslConfig) -> None:
        super().__init__()
        self.shapes = tuple(zip(config.conv_kernel, config.conv_stride, strict=True))
        widths = (1, *config.conv_dim)
        self.conv_layers = nn.ModuleList(
            _ConvLayer(config, index, widths[index]) for index in range(len(config.conv_dim))
        )

    def forward(self, audio: Tensor, lengths: Lengths) -> tuple[Tensor, Lengths]:
        x = audio[:, None]
        for layer, (kernel_size, stride) in zip(self.conv_layers, self.shapes, strict=True):
            lengths = lengths.unpadded_conv(kernel_size, stride)
            x = layer(x, lengths)
        return x, lengths


class _ConvLayer(nn.Module):
    """Convolution without padding, the norm that the model asks for, GELU."""

    def __init__(self, config: SslConfig, index: int, in_dim: int) -> None:
        super().__init__()
        dim = config.conv_dim[index]
        self.conv = nn.Conv1d(
            in_dim,
            dim,
            config.conv_kernel[index],
            stride=config.conv_stride[index],
            bias=config.conv_bias,
        )
        self.layer_norm: ValidGroupNorm | nn.LayerNorm | None = None
        if config.feat_extract_norm == "layer":
            self.layer_norm = nn.LayerNorm(dim)
        elif index == 0:
            self.layer_norm = ValidGroupNorm(dim, dim, eps=1e-5)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """``lengths`` are those of the output."""
        x = self.conv(x)
        if isinstance(self.layer_norm, ValidGroupNorm):
            x = self.layer_norm(x, lengths)
        elif self.layer_norm is not None:
            x = self.layer_norm(x.transpose(1, 2)).transpose(1, 2)
        return F.gelu(x)


class _FeatureProjection(nn.Module):
    def __init__(self, config: SslConfig) -> None:
        super().__init__()
        dim = config.conv_dim[-1]
        self.layer_norm = (
            nn.LayerNorm(dim, eps=config.layer_norm_eps) if config.feat_proj_layer_norm else None
        )
        self.projection = nn.Linear(dim, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.projection(x if self.layer_norm is None else self.layer_norm(x))
        return y


class _Encoder(nn.Module):
    def __init__(self, config: SslConfig) -> None:
        super().__init__()
        self.pos_conv_embed = _PositionalConv(config)
        self.layer_norm: nn.LayerNorm | None = None
        if not config.do_stable_layer_norm:
            self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, lengths: Lengths) -> Iterator[Tensor]:
        x = lengths.zero_past_rows(at_least_float32(x))
        x = x + self.pos_conv_embed(x)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        yield x
        for layer in self.layers:
            x = layer(x, lengths)
            yield x


class _PositionalConv(nn.Module):
    def __init__(self, config: SslConfig) -> None:
        super().__init__()
        kernel_size = config.num_conv_pos_embeddings
        self.conv = nn.Conv1d(
            config.hidden_size,
            config.hidden_size,
            kernel_size,
            padding=kernel_size // 2,
            groups=config.num_conv_pos_embedding_groups,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] zero past each row's end -> [B, T, D]."""
        y = self.conv(x.transpose(1, 2))[:, :, : x.shape[1]]  # an even kernel makes one too many
        return F.gelu(y).transpose(1, 2)


class _Layer(nn.Module):
    """Post-norm layer, or pre-norm where the model says ``do_stable_layer_norm``."""

    def __init__(self, config: SslConfig) -> None:
        super().__init__()
        self.is_stable = config.do_stable_layer_norm
        self.attention = _Attention(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = _FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        if self.is_stable:
            x = x + self.attention(self.layer_norm(x), lengths)
            y: Tensor = x + self.feed_forward(self.final_layer_norm(x))
            return y
        x = self.layer_norm(x + self.attention(x, lengths))
        y = self.final_layer_norm(x + self.feed_forward(x))
        return y


class _Attention(nn.Module):
    def __init__(self, config: SslConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        query, key, value = (
            split_heads(project(x), self.num_heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        y: Tensor = self.out_proj(attend(query, key, value, lengths))
        return y


class _FeedForward(nn.Module):
    def __init__(self, config: SslConfig) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output_dense = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.output_dense(F.gelu(self.intermediate_dense(x)))
        return y
