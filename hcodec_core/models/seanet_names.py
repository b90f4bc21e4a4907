"""SEANet in released checkpoints: reading its shape off the tensors, and naming them.

EnCodec's and Mimi's published classes put a network's layers into one list, where every position
counts, layers without tensors included. A convolution's tensors lie below ``conv.conv`` or
``convtr.convtr``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hcodec_core.errors import CheckpointError
from hcodec_core.models.conversion import State, fold_weight_norm, take

_INNER = {"conv1": "block.1", "conv2": "block.3", "shortcut": "shortcut"}


@dataclass(frozen=True)
class SeanetShape:
    """What tensors tell of a SEANet; field names as in ``nn.seanet.SeanetConfig``.

    ``strides`` in the encoder's order of use, for a decoder as well.
    """

    num_filters: int
    strides: tuple[int, ...]
    out_dim: int
    kernel: int
    last_kernel: int
    residual_kernel: int
    num_residual_layers: int
    compress: int
    has_conv_shortcut: bool

    @property
    def num_stages(self) -> int:
        """Number of strided convolutions."""
        return len(self.strides)

    def encoder_name(self, key: str, has_middle: bool = False) -> str:
        """Released name, from the position on, of our ``SeanetEncoder``'s tensor ``key``.

        ``has_middle``: a module stands before the last ELU; its tensors are named ``middle.`` and
        keep what follows.
        """
        period = self.num_residual_layers + 2
        end = 1 + self.num_stages * period
        first, _, rest = key.partition(".")
        if first == "stages":
            stage, kind, rest = rest.split(".", 2)
            start = 1 + int(stage) * period
            return _in_stage(kind, rest, start, start + period - 1, "conv.conv")
        if first == "middle":
            return f"{end}.{rest}"
        return _outer(first, rest, end + 1 + has_middle)

    def decoder_name(self, key: str) -> str:
        """Released name, from the position on, of our ``SeanetDecoder``'s tensor ``key``."""
        period = self.num_residual_layers + 2
        first, _, rest = key.partition(".")
        if first == "stages":
            stage, kind, rest = rest.split(".", 2)
            up = 2 + int(stage) * period
            return _in_stage(kind, rest, up + 1, up, "convtr.convtr")
        return _outer(first, rest, 2 + self.num_stages * period)


def read_encoder_shape(state: Mapping[str, Tensor], prefix: str) -> SeanetShape:
    """Shape of the encoder whose list of layers lies below ``prefix``.

    Raises:
        CheckpointError: The tensors are not those of a SEANet encoder.
    """
    convs = _weights(state, prefix, r"conv\.conv")
    if len(convs) < 3:
        raise CheckpointError(f"The checkpoint has no SEANet encoder below {prefix!r}.")
    return _shape(
        state,
        prefix,
        inner=convs[0],
        outer=(convs[-1][0], *convs[-1][2:]),
        kernels=(convs[0][2], convs[-1][2]),
        strides=tuple(shape[2] // 2 for shape in convs[1:-1]),
    )


def read_decoder_shape(state: Mapping[str, Tensor], prefix: str) -> SeanetShape:
    """Shape of the decoder whose list of layers lies below ``prefix``.

    Raises:
        CheckpointError: The tensors are not those of a SEANet decoder.
    """
    convs = _weights(state, prefix, r"conv\.conv")
    ups = _weights(state, prefix, r"convtr\.convtr")
    if len(convs) != 2 or not ups:
        raise CheckpointError(f"The checkpoint has no SEANet decoder below {prefix!r}.")
    return _shape(
        state,
        prefix,
        inner=(convs[1][1],),
        outer=(convs[0][1],),
        kernels=(convs[0][2], convs[1][2]),
        strides=tuple(shape[2] // 2 for shape in reversed(ups)),
    )


def released_weight(state: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """Tensor ``name``, its weight norm folded where the checkpoint has one.

    Raises:
        CheckpointError: It is missing or misshapen.
    """
    if f"{name}_v" not in state:
        return take(state, name, shape)
    gain = take(state, f"{name}_g", (shape[0], *(1 for _ in shape[1:])))
    return fold_weight_norm(gain, take(state, f"{name}_v", shape))


def leftovers(state: State, names: Sequence[str]) -> list[str]:
    """Keys of ``state`` that are neither ``names`` nor the weight norm of one of them, sorted."""
    used = {suffixed for name in names for suffixed in (name, f"{name}_g", f"{name}_v")}
    return sorted(state.keys() - used)


def _in_stage(kind: str, rest: str, residual: int, strided: int, wrapper: str) -> str:
    """Name within a stage whose residual layers begin at position ``residual``."""
    if kind != "residuals":
        return f"{strided}.{wrapper}.{rest.removeprefix('conv.')}"
    layer, inner, rest = rest.split(".", 2)
    position = residual + int(layer)
    return f"{position}.{_INNER[inner]}.conv.{rest}"


def _outer(name: str, rest: str, last: int) -> str:
    return f"{0 if name == 'conv_in' else last}.conv.{rest}"


def _weights(state: Mapping[str, Tensor], prefix: str, middle: str) -> list[tuple[int, ...]]:
    """Shapes of the weights ``prefix<position>.<middle>.weight[_v]`` in the order of positions."""
    pattern = re.compile(re.escape(prefix) + rf"(\d+)\.{middle}\.weight(_v)?")
    found = {
        int(match[1]): tuple(value.shape)
        for key, value in state.items()
        if (match := pattern.fullmatch(key))
    }
    return [found[position] for position in sorted(found)]


def _shape(
    state: Mapping[str, Tensor],
    prefix: str,
    *,
    inner: tuple[int, ...],
    outer: tuple[int, ...],
    kernels: tuple[int, int],
    strides: tuple[int, ...],
) -> SeanetShape:
    residuals = _weights(state, prefix, r"block\.1\.conv\.conv")
    if not residuals or len(residuals) % len(strides):
        raise CheckpointError(
            f"Below {prefix!r} are {len(residuals)} residual layers for {len(strides)} stages."
        )
    return SeanetShape(
        num_filters=inner[0],
        strides=strides,
        out_dim=outer[0],
        kernel=kernels[0],
        last_kernel=kernels[1],
        residual_kernel=residuals[0][2],
        num_residual_layers=len(residuals) // len(strides),
        compress=residuals[0][1] // residuals[0][0],
        has_conv_shortcut=bool(_weights(state, prefix, r"shortcut\.conv\.conv")),
    )
