"""Encoding one clip alone on a CPU: the network of ``model``, with less work around it.

``model`` is what is trained and what says how a codec computes; here is how a CPU gets there
sooner. A clip alone, a whole number of hops long, has no padding to keep out; edges are copied
instead of gathered, tensors are reused, constants are computed once, and
the code search is one product and numpy's ``argmin`` (a tenth of the time of torch's).
Convolutions and products are the same calls on the same values, so codes are equal to the bit.

Shape letters: B batch, D feature, K entry, N sample, Q codebook, T frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcodec_core.nn.conv import EdgeConv1d, pad_ends
from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.quantize import ResidualQuantizer
from hcodec_core.nn.seanet import SeanetEncoder, SeanetResidual, SeanetStage

if TYPE_CHECKING:
    from hcodec_core.models.hcodec.model import HCodec

Codes = npt.NDArray[np.int32]


class HCodecSolo:
    """``SoloEncoder`` of H-Codec 1.0 and codecs of the same plan."""

    def __init__(self, codec: HCodec) -> None:
        """Take a codec on the CPU; computes its constants."""
        assert isinstance(codec.acoustic_encoder, SeanetEncoder)
        self._codec = codec
        self._acoustic_encoder = codec.acoustic_encoder
        self._mel_bank = None if codec.ssl is not None else codec.mel_bank().float()
        self._books = {}
        for name, quantizer in codec.quantizers.items():
            assert isinstance(quantizer, ResidualQuantizer)
            self._books[name] = [_Book(book) for book in quantizer.codebooks]

    def __call__(self, clip: npt.NDArray[np.float32]) -> Mapping[str, Codes]:
        """Codes of each stream int32 [Q, T] of a clip float32 [N], N at least 1 and finite."""
        codec = self._codec
        hop = codec.hop_length
        num_frames = -(-len(clip) // hop)
        padded = np.zeros((1, 1, num_frames * hop), np.float32)
        padded[0, 0, : len(clip)] = clip
        audio = torch.from_numpy(padded)
        with torch.inference_mode():
            features = self._features(audio)
            semantic = codec.semantic_encoder(features, _full(features))
            acoustic = _seanet(self._acoustic_encoder, audio)
            return {
                name: _search(latent, self._books[name])
                for name, latent in (("semantic", semantic), ("acoustic", acoustic))
            }

    def _features(self, audio: Tensor) -> Tensor:
        if self._mel_bank is None:
            return self._codec.features(audio, _full(audio))
        return self._codec.mel_features(audio, self._mel_bank)


class _Book:
    """One codebook, as the search for the nearest entry wants it."""

    def __init__(self, book: Tensor) -> None:
        self.entries = book
        # A factor of 2 changes no digit of a sum, so this is |e|^2 - 2 x.e to the bit.
        self.doubled = -2.0 * book
        self.squares = book.square().sum(dim=1)


def _search(latent: Tensor, books: list[_Book]) -> Codes:
    """Codes [Q, T] of a latent [1, D, T]."""
    residual = latent[0].T.contiguous()
    codes = np.empty((len(books), len(residual)), np.int32)
    for row, book in enumerate(books):
        scores = F.linear(residual, book.doubled, book.squares)
        codes[row] = best = scores.numpy().argmin(axis=1)
        if row + 1 < len(books):
            residual -= book.entries.index_select(0, torch.from_numpy(best))
    return codes


def _seanet(encoder: SeanetEncoder, audio: Tensor) -> Tensor:
    """``SeanetEncoder.forward`` of [1, 1, N]."""
    x = _conv(encoder.conv_in, audio)
    for stage in encoder.stages:
        assert isinstance(stage, SeanetStage)
        for residual in stage.residuals:
            x = _residual(residual, x)
        x = _conv(stage.down, F.elu_(x))
    if encoder.middle is not None:
        x = encoder.middle(x, _full(x))
    return _conv(encoder.conv_out, F.elu(x))


def _residual(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, SeanetResidual)
    # ELU of a whole tensor: of a slice, its last elements would be computed otherwise.
    inner = F.elu_(_conv(layer.conv1, F.elu(x)))
    skip = x if layer.shortcut is None else _conv(layer.shortcut, x)
    y = _conv(layer.conv2, inner)
    return y.add_(skip)


def _conv(layer: EdgeConv1d, x: Tensor) -> Tensor:
    y: Tensor = layer.conv(_extended(layer, x))
    return y


def _extended(layer: EdgeConv1d, x: Tensor) -> Tensor:
    """``pad_ends`` of ``x`` [1, D, T] for the convolution of ``layer``, by copies of slices."""
    steps = x.shape[2]
    left, right = layer.left, layer.right + -steps % layer.stride
    if layer.pad_mode != "reflect" or left + right == 0 or steps <= max(left, right):
        return pad_ends(x, _full(x), left, layer.right, layer.stride, layer.pad_mode)
    extended = x.new_empty(1, x.shape[1], left + steps + right)
    extended[:, :, left : left + steps] = x
    extended[:, :, :left] = x[:, :, 1 : left + 1].flip(2)
    extended[:, :, left + steps :] = x[:, :, steps - 1 - right : steps - 1].flip(2)
    return extended


def _full(x: Tensor) -> Lengths:
    """Lengths of one row [1, D, T] without padding."""
    return Lengths(torch.tensor([x.shape[2]]), x.shape[2])
