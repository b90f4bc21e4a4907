"""The reader for training as a torch dataset; the only module of this package that needs torch.

>>> dataset = open_token_dataset("hcodec.toml", "demo", options=StreamOptions(chunk_rows=16))
>>> loader = StatefulDataLoader(dataset, batch_size=16, num_workers=4, collate_fn=collate_tokens)

With ``chunk_rows`` equal to the loader's batch size, the batches and their order do not depend on
the number of workers, and ``combined_state(loader.state_dict())`` can be resumed under another
number of ranks or workers. Call ``set_epoch`` before each epoch, as with torch's samplers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from hcodec_core.config import Config
from hcodec_core.dataset.pinned import Snapshot, pin_snapshot
from hcodec_core.dataset.stream import Place, Sample, StreamOptions, StreamState, TokenStream
from hcodec_core.errors import ConfigError


def open_token_dataset(
    config: Config | Path | str,
    name: str,
    version: str = "latest",
    encode_id: str | None = None,
    options: StreamOptions | None = None,
    ranks: tuple[int, int] | None = None,
) -> TokenDataset:
    """Open one version of a dataset as a torch dataset.

    ``ranks``: rank and number of ranks; None asks ``torch.distributed``. Raises as ``open_stream``.
    """
    options = options or StreamOptions()
    snapshot = pin_snapshot(config, name, version, encode_id, options.row_filter)
    return TokenDataset(snapshot, options, *(ranks or _own_ranks()))


def _own_ranks() -> tuple[int, int]:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class TokenDataset(IterableDataset[Sample]):
    """Rows of a pinned version for one rank, shared out among the loader's workers."""

    def __init__(
        self, snapshot: Snapshot, options: StreamOptions, rank: int = 0, num_ranks: int = 1
    ) -> None:
        """Raises ``ConfigError`` for columns, streams or ranks that there are not."""
        self._ranks = rank, num_ranks
        self._stream = TokenStream(snapshot, options, Place(rank, num_ranks))

    def __iter__(self) -> Iterator[Sample]:
        """Samples of this process."""
        return iter(self._placed())

    def __len__(self) -> int:
        """Samples of this rank."""
        return len(self._stream)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; the one that a loaded state is in goes on where it was."""
        self._stream.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where this process stands (in a worker: that worker alone)."""
        return self._placed().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises ``ConfigError`` as ``TokenStream.load_state_dict``."""
        self._placed().load_state_dict(state)

    def _placed(self) -> TokenStream:
        """The stream, told which worker it is in: a worker has a copy of this object."""
        info = get_worker_info()
        if info is not None:
            self._stream.place = Place(*self._ranks, info.id, info.num_workers)
        return self._stream


def combined_state(loader_state: Mapping[str, Any]) -> dict[str, Any]:
    """State of a rank from that of its ``StatefulDataLoader``, for ``TokenDataset``.

    Raises ``ConfigError`` when there is no reader's state in it, or the workers are not in step.
    """
    found = [StreamState.model_validate(state) for state in _reader_states(loader_state)]
    if not found:
        raise ConfigError("There is no state of a TokenDataset in this state of a loader.")
    whole = {(state.content, state.epoch, state.start, state.num_ranks) for state in found}
    if len(whole) != 1 or len(found) != found[0].num_workers:
        raise ConfigError("The states of this loader's workers do not belong together.")
    if not _are_in_step(found):
        raise ConfigError(
            "This loader's workers have left gaps in the epoch, so only as many ranks and workers "
            "can go on: set chunk_rows to the loader's batch size."
        )
    taken = sum(state.num_taken for state in found)
    update = {"num_taken": taken, "worker": 0, "num_workers": 1}
    return found[0].model_copy(update=update).model_dump()


def _are_in_step(states: Sequence[StreamState]) -> bool:
    """Whether the workers' rows together are the first rows of their rank."""
    rows, workers = states[0].chunk_rows, len(states)
    chunks, rest = divmod(sum(state.num_taken for state in states), rows)
    for state in states:
        turns = chunks // workers + (state.worker < chunks % workers)
        expected = turns * rows + rest * (state.worker == chunks % workers)
        if state.num_taken != expected:
            return False
    return True


def _reader_states(state: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(state, Mapping):
        if set(state) == set(StreamState.model_fields):
            yield state
        else:
            for value in state.values():
                yield from _reader_states(value)


def collate_tokens(samples: Sequence[Sample]) -> dict[str, Any]:
    """One batch: per stream int64 [B, Q, T] padded with 0, int64 ``num_frames`` [B], else lists.

    ``frame_spans``, where the rate adapts, is int64 [B, T] padded with 0.
    """
    num_frames = torch.tensor([sample.num_frames for sample in samples])
    longest = int(num_frames.max())
    batch: dict[str, Any] = {
        "audio_id": [sample.audio_id for sample in samples],
        "num_frames": num_frames,
    }
    for name in samples[0].codes:
        batch[name] = _padded([torch.from_numpy(s.codes[name]) for s in samples], longest)
    if samples[0].frame_spans is not None:
        batch["frame_spans"] = _padded([torch.from_numpy(s.frame_spans) for s in samples], longest)
    for name in samples[0].columns:
        batch[name] = [sample.columns[name] for sample in samples]
    return batch


def _padded(rows: Sequence[torch.Tensor], longest: int) -> torch.Tensor:
    padded = torch.zeros((len(rows), *rows[0].shape[:-1], longest), dtype=torch.int64)
    for index, row in enumerate(rows):
        padded[index, ..., : row.shape[-1]] = row
    return padded
