"""The processes of a run. All meet in the same calls in the same order.

Sums are the same bits on every rank, so decisions made from them need no further talk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process among ``size``; the group is torch's default one, which the caller made."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def stack(self, tensor: Tensor) -> Tensor:
        """The tensor of every rank, [size, ...]; shapes must be equal."""
        if self.size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def gather(self, item: Item) -> list[Item]:
        """A small object of every rank, in their order."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return cast("list[Item]", items)

    def from_first(self, item: Item) -> Item:
        """The first rank's object."""
        if self.size == 1:
            return item
        items = [item]
        dist.broadcast_object_list(items, src=0)
        return items[0]


class GradientSum:
    """Means of gradients over all ranks, in buckets whose layout never changes.

    Torch's own wrapper lays its buckets out anew after the first step; with more than two ranks
    another layout is another order of additions, so a resumed run would differ in the last bits.
    Here the layout follows from the parameters alone. Buckets are sent while the backward pass
    goes on, in a fixed order.
    """

    def __init__(self, parameters: Sequence[Tensor], ranks: Ranks, bucket_bytes: int = 32 << 20):
        """``parameters``: those that are trained, in an order that all ranks share."""
        self._ranks = ranks
        self._buckets = _buckets_of(parameters, bucket_bytes) if ranks.size > 1 else []
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent: list[tuple[Tensor, Any]] = []
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda _, n=number: self._ready(n)
                )

    def finish(self) -> None:
        """After the backward pass: wait until every gradient is the mean over all ranks.

        A parameter without a gradient counts as one with zeros.
        """
        while len(self._sent) < len(self._buckets):
            self._send()
        for bucket, (flat, work) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            _scatter(bucket, flat.div_(self._ranks.size))
        self._sent.clear()
        self._missing = [len(bucket) for bucket in self._buckets]

    def _ready(self, number: int) -> None:
        self._missing[number] -= 1
        while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[len(self._sent)]
        grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in bucket)
        flat = torch.cat([grad.flatten() for grad in grads])
        self._sent.append((flat, dist.all_reduce(flat, async_op=True)))


def _buckets_of(parameters: Sequence[Tensor], bucket_bytes: int) -> list[list[Tensor]]:
    """Last parameters first: their gradients come first."""
    buckets: list[list[Tensor]] = []
    room = 0
    for parameter in reversed(parameters):
        size = parameter.numel() * parameter.element_size()
        if not buckets or size > room:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(parameter)
        room -= size
    return buckets


def _scatter(bucket: Sequence[Tensor], flat: Tensor) -> None:
    parts = torch.split(flat, [parameter.numel() for parameter in bucket])
    for parameter, part in zip(bucket, parts, strict=True):
        parameter.grad = part.view_as(parameter)
