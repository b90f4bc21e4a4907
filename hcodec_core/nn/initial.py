"""First values of weights under which a signal neither dies nor grows on its way through."""

from __future__ import annotations

from torch import Tensor, nn


def keep_variance(network: nn.Module) -> None:
    """Draw convolutions and linear maps with deviation 1 / sqrt(fan-in), and biases 0.

    Under torch's own first values (deviation 1 / sqrt(3 fan-in), biases as large) a dozen layers
    leave little but biases of the signal, and an untrained codec gives all audio the same codes.
    """
    for part in network.modules():
        if isinstance(part, nn.ConvTranspose1d):
            # Each step out sees kernel / stride of the kernel's steps.
            fan_in = part.in_channels // part.groups * part.kernel_size[0] / part.stride[0]
        elif isinstance(part, nn.Conv1d | nn.Linear):
            fan_in = part.weight[0].numel()
        else:
            continue
        nn.init.normal_(part.weight, std=fan_in**-0.5)
        if isinstance(part.bias, Tensor):
            nn.init.zeros_(part.bias)
