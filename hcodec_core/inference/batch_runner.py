"""Running batches; in mode fast with as much audio at once as memory holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from hcodec_core.inference.arithmetic import Mode
from hcodec_core.inference.shaping import Batch, BatchBudget
from hcodec_core.tokens import ShapeRule

logger = logging.getLogger(__name__)

_FIRST_GPU_SECONDS = 120.0
Done = TypeVar("Done")


class BatchRunner:
    """Runs batches of one kind of work on one device; ``budget`` is what mode fast has learned."""

    def __init__(self, device: torch.device, mode: Mode, shapes: ShapeRule) -> None:
        """Nothing is known of the memory that the work needs."""
        self.budget = BatchBudget(
            shapes.batch_seconds, _FIRST_GPU_SECONDS if device.type == "cuda" else None
        )
        self._device = device
        self._is_exact = mode == "exact"

    def run(
        self,
        batches: Iterable[Batch],
        work: Callable[[Batch], list[tuple[int, Done]]],
        sizes_per_second: float,
    ) -> dict[int, Done]:
        """What ``work`` gives for every clip, by the clip's index.

        Raises ``torch.OutOfMemoryError`` when memory does not do for one row, or in mode exact,
        where shapes are part of the result.
        """
        done: dict[int, Done] = {}
        for batch in batches:
            done.update(self._run(batch, work, sizes_per_second))
        return done

    def _run(
        self, batch: Batch, work: Callable[[Batch], list[tuple[int, Done]]], rate: float
    ) -> list[tuple[int, Done]]:
        seconds = batch.num_rows * batch.size / rate
        try:
            if self._is_exact or self._device.type != "cuda":
                return work(batch)
            return self._measure(batch, work, seconds)
        except torch.OutOfMemoryError:
            if self._is_exact or len(batch.indices) == 1:
                raise
        # Only here are the tensors of the batch that failed gone.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self.budget.shrink(seconds)
        logger.info(
            "%.0f s of audio do not fit into memory: batches are now of %.0f s.",
            seconds,
            self.budget.seconds,
        )
        return [done for half in batch.halves() for done in self._run(half, work, rate)]

    def _measure(
        self, batch: Batch, work: Callable[[Batch], list[tuple[int, Done]]], seconds: float
    ) -> list[tuple[int, Done]]:
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        done = work(batch)
        used = torch.cuda.max_memory_allocated(self._device) - before
        allocated = torch.cuda.memory_allocated(self._device)
        unused = torch.cuda.memory_reserved(self._device) - allocated
        self.budget.learn(seconds, used, torch.cuda.mem_get_info(self._device)[0] + unused)
        return done
