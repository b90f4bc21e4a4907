"""Training data: which sample a step sees is a pure function of (seed, step, place in the batch).

Sample ``index = step * batch_size + place`` of a run is a crop of file
``permutation(epoch)[index mod num_files]``, with ``epoch = index // num_files``; where the crop
lies, and how it is varied, follows from (seed, index). Worker processes only compute samples.

Shape letters: B batch, N sample.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hcodec_core.audio.native import Samples
from hcodec_core.audio.supervisor import DecoderPool
from hcodec_core.config import StorageConfig
from hcodec_core.errors import (
    AudioError,
    BudgetExceededError,
    HCodecError,
    ObjectMissingError,
    SourceChangedError,
)
from hcodec_core.storage import open_storage
from hcodec_core.training.augment import change_speed, num_source_samples, vary
from hcodec_core.training.keys import numpy_generator, permutation
from hcodec_core.training.pcm_store import PcmStore, decode_settings
from hcodec_core.training.recipe import AugmentRecipe, DataRecipe
from hcodec_core.training.sources import SourceFile
from hcodec_core.training.synthetic import synthesise

_MAX_TRIES = 20
_SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class BadFile:
    """A file that gave no sample, and why."""

    uri: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Origin:
    """Where a sample came from: its URI and first sample at the codec's rate."""

    uri: str
    start_sample: int


@dataclass(frozen=True)
class SamplePlan:
    """What decides samples, beside the files. ``crop_samples`` at ``sample_rate`` Hz."""

    seed: int
    sample_rate: int
    crop_samples: int
    data: DataRecipe
    augment: AugmentRecipe


@dataclass(frozen=True)
class Place:
    """Where decoded audio may lie, and how storage is reached."""

    storage: StorageConfig
    scratch_path: Path
    cache_bytes: int = 8 << 30


@dataclass(frozen=True)
class Batch:
    """audio: float32 [B, 1, N]. origins: of each row. bad: files met on the way."""

    audio: Tensor
    origins: tuple[Origin, ...]
    bad: tuple[BadFile, ...] = ()

    def pin_memory(self) -> Batch:
        """Asked by the loader, so that copies to a GPU need not wait."""
        return replace(self, audio=self.audio.pin_memory())


@dataclass(frozen=True)
class _Sample:
    audio: Samples
    origin: Origin
    bad: tuple[BadFile, ...]


class SampleDataset(Dataset["_Sample | HCodecError"]):
    """Samples by index; may be copied to other processes."""

    def __init__(self, files: Sequence[SourceFile], plan: SamplePlan, place: Place) -> None:
        """Nothing is opened before the first sample."""
        self._files, self._plan, self._place = tuple(files), plan, place
        self._store: PcmStore | None = None
        self._pool: DecoderPool | None = None
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without processes and files, which belong to one process."""
        return self.__dict__ | {"_store": None, "_pool": None, "_order": None}

    def __getitem__(self, index: int) -> _Sample | HCodecError:
        """Sample ``index`` of the run, or the error that ended it: a loader would wrap it."""
        try:
            return self.sample(index)
        except HCodecError as error:
            return error

    def sample(self, index: int) -> _Sample:
        """Sample ``index`` of the run.

        Raises ``BudgetExceededError`` when file after file is bad, ``StorageError``.
        """
        bad: list[BadFile] = []
        for attempt in range(_MAX_TRIES):
            rng = numpy_generator(self._plan.seed, "sample", index, attempt)
            if rng.random() < self._plan.data.synthetic_share:
                return self._varied(self._synthetic(index, rng), bad, rng)
            file = self._file_of(index, attempt)
            try:
                return self._varied(self._crop(file, rng), bad, rng)
            except (AudioError, SourceChangedError, ObjectMissingError) as error:
                bad.append(_bad_file(file, error))
        raise BudgetExceededError(
            f"{len(bad)} files in a row gave no sample (last: {bad[-1].uri}: {bad[-1].detail}): "
            "check the sources."
        )

    def clip(self, file: SourceFile, num_samples: int) -> Samples:
        """The first ``num_samples`` of a file (or all it has); raises as a sample does."""
        return np.array(self._samples(file)[:num_samples])

    def close(self) -> None:
        """End the decoder process."""
        if self._pool is not None:
            self._pool.close()
        self._pool = self._store = None

    def _file_of(self, index: int, attempt: int) -> SourceFile:
        if attempt:
            draw = numpy_generator(self._plan.seed, "instead", index, attempt)
            return self._files[int(draw.integers(len(self._files)))]
        epoch, place = divmod(index, len(self._files))
        if self._order is None or self._order[0] != epoch:
            order = permutation(len(self._files), self._plan.seed, "order", epoch)
            self._order = epoch, order
        return self._files[int(self._order[1][place])]

    def _samples(self, file: SourceFile) -> Samples:
        if self._store is None:
            self._pool = DecoderPool(1, decode_settings(self._plan.sample_rate))
            self._store = PcmStore(
                open_storage(self._place.storage),
                self._place.scratch_path / "pcm",
                self._place.cache_bytes,
                self._pool,
            )
        least = int(self._plan.data.min_seconds * self._plan.sample_rate)
        return self._store.samples(file, least, self._plan.data.allows_lower_rates)

    def _crop(self, file: SourceFile, rng: np.random.Generator) -> tuple[Samples, Origin]:
        samples = self._samples(file)
        speed = float(rng.uniform(*self._plan.augment.speed))
        wanted = num_source_samples(self._plan.crop_samples, speed)
        start = int(rng.integers(max(1, len(samples) - wanted + 1)))
        piece = np.array(samples[start : start + wanted])
        if len(piece) < wanted:
            piece = np.resize(piece, wanted)  # a short clip is repeated
        audio = change_speed(piece, speed, self._plan.crop_samples)
        return audio, Origin(file.uri, start)

    def _synthetic(self, index: int, rng: np.random.Generator) -> tuple[Samples, Origin]:
        plan = self._plan
        return synthesise(plan.crop_samples, plan.sample_rate, rng), Origin(_SYNTHETIC, index)

    def _varied(
        self, found: tuple[Samples, Origin], bad: list[BadFile], rng: np.random.Generator
    ) -> _Sample:
        audio, origin = found
        audio = vary(audio, self._plan.sample_rate, self._plan.augment, rng)
        return _Sample(audio, origin, tuple(bad))


def _bad_file(file: SourceFile, error: HCodecError) -> BadFile:
    if isinstance(error, AudioError):
        return BadFile(file.uri, error.reason.value, str(error))
    reason = "changed" if isinstance(error, SourceChangedError) else "deleted"
    return BadFile(file.uri, reason, str(error))


@dataclass(frozen=True)
class Share:
    """The rows of each step's batch that one rank computes."""

    batch_size: int
    rank: int = 0
    num_ranks: int = 1

    @property
    def num_rows(self) -> int:
        """Rows of this rank."""
        return self.batch_size // self.num_ranks

    def indices(self, step: int) -> list[int]:
        """Indices of the samples of one step."""
        first = step * self.batch_size + self.rank * self.num_rows
        return list(range(first, first + self.num_rows))


@dataclass
class BatchSource:
    """Batches of one rank, step by step, computed ahead by ``num_workers`` processes.

    With 0 workers they are computed when asked for; the batches are the same.
    """

    dataset: SampleDataset
    share: Share
    num_workers: int = 0
    pins_memory: bool = False
    prefetch: int = 4

    def batches(self, start_step: int, end_step: int) -> Iterator[Batch]:
        """Batches of steps ``start_step`` to ``end_step`` - 1.

        Raises what ``SampleDataset`` raises, and ``HCodecError`` when a worker was killed.
        """
        workers = self.num_workers
        loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_sampler=_Steps(self.share, start_step, end_step),
            num_workers=workers,
            collate_fn=collate,
            pin_memory=self.pins_memory,
            multiprocessing_context="spawn" if workers else None,
            prefetch_factor=self.prefetch if workers else None,
            worker_init_fn=_ignore_signals if workers else None,
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        try:
            for batch in loader:
                if isinstance(batch, HCodecError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise HCodecError(
                f"A data worker ended ({error}): it may have run out of memory; use fewer workers."
            ) from error


class _Steps:
    def __init__(self, share: Share, start_step: int, end_step: int) -> None:
        self._share, self._steps = share, range(start_step, end_step)

    def __iter__(self) -> Iterator[list[int]]:
        return (self._share.indices(step) for step in self._steps)

    def __len__(self) -> int:
        return len(self._steps)


def collate(results: Sequence[_Sample | HCodecError]) -> Batch | HCodecError:
    """One batch of samples of equal length, or the first error among them."""
    samples = [result for result in results if isinstance(result, _Sample)]
    if len(samples) < len(results):
        return next(result for result in results if isinstance(result, HCodecError))
    audio = torch.from_numpy(np.stack([sample.audio for sample in samples]))[:, None]
    bad = dict.fromkeys(bad for sample in samples for bad in sample.bad)
    return Batch(audio, tuple(sample.origin for sample in samples), tuple(bad))


def _ignore_signals(_: int) -> None:
    """The main process decides when to stop; workers end with it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
