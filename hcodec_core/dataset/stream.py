"""Reading a version for training: one pinned snapshot, shuffled, sharded, resumed exactly.

>>> stream = open_stream("hcodec.toml", "demo", options=StreamOptions(cache_path=Path("/scratch")))
>>> for sample in stream:
...     sample.codes["acoustic"]

Without torch; ``torch_reader`` has the same as a torch dataset. The rank r of R gets the positions
start + r, start + r + R, ... of ``ordering.EpochOrder``. Its state is how many it took, so the
state of any rank says for all ranks in step which rows of the epoch are done, and any number of
ranks goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from hcodec_core.config import Config, describe
from hcodec_core.dataset.ordering import EpochOrder, Shuffle
from hcodec_core.dataset.pinned import Snapshot, pin_snapshot
from hcodec_core.dataset.row_reader import RowReader, Sample
from hcodec_core.errors import ConfigError
from hcodec_core.tokens import digest_of

__all__ = [
    "Place",
    "Sample",
    "Shuffle",
    "StreamOptions",
    "StreamState",
    "TokenStream",
    "open_stream",
]


@dataclass(frozen=True)
class StreamOptions:
    """What is read, in which order.

    ``columns``: further columns of the table in ``Sample.columns``. ``streams``: None for all.
    ``row_filter``: an Iceberg expression such as ``duration_seconds > 1 and container = 'flac'``;
    files that cannot match are never opened. ``shuffle`` None: the files' own order.
    ``remainder``: rows that do not fill a round of all ranks are dropped, or the round is padded
    with rows from the epoch's beginning; ``keep`` gives some ranks one row more (evaluation).
    ``chunk_rows``: rows that a worker takes at once; the loader's batch size. ``cache_path``: a
    folder that outlives the process; ``cache_bytes`` should hold a file for each lane.
    """

    columns: tuple[str, ...] = ()
    streams: tuple[str, ...] | None = None
    row_filter: str | None = None
    shuffle: Shuffle | None = field(default_factory=Shuffle)
    remainder: Literal["drop", "pad", "keep"] = "drop"
    chunk_rows: int = 1
    cache_path: Path | None = None
    cache_bytes: int = 8 * 1024**3


@dataclass(frozen=True)
class Place:
    """Which part of an epoch one reader takes: its rank, and its worker process in that rank."""

    rank: int = 0
    num_ranks: int = 1
    worker: int = 0
    num_workers: int = 1

    def __post_init__(self) -> None:
        """Refuse a place that is not. Raises ``ConfigError``."""
        if not (0 <= self.rank < self.num_ranks and 0 <= self.worker < self.num_workers):
            raise ConfigError(f"There is no such place among readers: {self}.")


class StreamState(BaseModel):
    """Where an epoch stands, in plain JSON.

    ``start``: position from which the readers share the epoch; ``num_taken``: rows that the reader
    at this place has taken since. ``content``: digest of what fixes the order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    content: str
    snapshot_id: int
    epoch: int = 0
    start: int = 0
    num_taken: int = 0
    num_ranks: int = 1
    worker: int = 0
    num_workers: int = 1
    chunk_rows: int = 1


def open_stream(
    config: Config | Path | str,
    name: str,
    version: str = "latest",
    encode_id: str | None = None,
    options: StreamOptions | None = None,
    place: Place | None = None,
) -> TokenStream:
    """Open one version of a dataset for training; a later version does not change what is read.

    Raises ``ConfigError`` when there is no such dataset, version, column or filter.
    """
    options = options or StreamOptions()
    snapshot = pin_snapshot(config, name, version, encode_id, options.row_filter)
    return TokenStream(snapshot, options, place or Place())


class TokenStream:
    """Iterates over one reader's part of an epoch; made by ``open_stream``."""

    def __init__(self, snapshot: Snapshot, options: StreamOptions, place: Place) -> None:
        """Raises ``ConfigError`` for columns or streams that there are not."""
        self.snapshot = snapshot
        self.options = options
        self.place = place
        self._reader = RowReader(
            snapshot, options.streams, options.columns, options.cache_path, options.cache_bytes
        )
        self._content = self._digest()
        self._state = StreamState(content=self._content, snapshot_id=snapshot.snapshot_id)
        self._num_taken = 0
        self._order = EpochOrder(snapshot.num_rows, 0, options.shuffle)
        self._is_finished = False

    def _digest(self) -> str:
        options, shuffle = self.options, self.options.shuffle
        return digest_of(
            {
                "snapshot": self.snapshot.snapshot_id,
                "filter": options.row_filter,
                "shuffle": None
                if shuffle is None
                else [shuffle.seed, shuffle.num_lanes, shuffle.window_rows],
            }
        )

    @property
    def epoch(self) -> int:
        """The epoch that is read, or that will be."""
        return self._state.epoch

    def __len__(self) -> int:
        """Rows that this rank takes from the epoch's start or point of resumption (all workers)."""
        return self._rank_rows()

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; the one that a loaded state is in goes on where it was."""
        if epoch != self._state.epoch or self._is_finished:
            self._begin(
                StreamState(
                    content=self._content, snapshot_id=self.snapshot.snapshot_id, epoch=epoch
                )
            )

    def _begin(self, state: StreamState) -> None:
        self._state = state
        self._num_taken = state.num_taken
        self._order = EpochOrder(self.snapshot.num_rows, state.epoch, self.options.shuffle)
        self._is_finished = False

    def state_dict(self) -> dict[str, Any]:
        """Where this reader stands, as plain values."""
        place = self.place
        return self._state.model_copy(
            update={
                "num_taken": self._num_taken,
                "num_ranks": place.num_ranks,
                "worker": place.worker,
                "num_workers": place.num_workers,
                "chunk_rows": self.options.chunk_rows,
            }
        ).model_dump()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of any rank, under this or another number of ranks.

        Raises ``ConfigError`` when the state is of another version, filter or shuffle, or of one
        worker of several and not of this one (see ``torch_reader.combined_state``).
        """
        try:
            known = StreamState.model_validate(dict(state))
        except ValidationError as error:
            raise ConfigError(f"This is no state of a reader: {describe(error)}.") from error
        if known.content != self._content:
            raise ConfigError(
                f"The state belongs to snapshot {known.snapshot_id} or to another filter or "
                f"shuffle; this reader is at snapshot {self.snapshot.snapshot_id}: open the same "
                "version with the same options."
            )
        self._begin(self._as_own(known))

    def _as_own(self, known: StreamState) -> StreamState:
        place = self.place
        if known.num_workers == 1:
            position = min(known.start + known.num_taken * known.num_ranks, len(self._order))
            return known.model_copy(update={"start": position, "num_taken": 0})
        own = place.num_ranks, place.worker, place.num_workers, self.options.chunk_rows
        if (known.num_ranks, known.worker, known.num_workers, known.chunk_rows) == own:
            return known
        raise ConfigError(
            f"This is the state of worker {known.worker} of {known.num_workers} under "
            f"{known.num_ranks} ranks: combine those of all workers first."
        )

    def __iter__(self) -> Iterator[Sample]:
        """Go on with the epoch, or begin the next one when this one was read to its end."""
        if self._is_finished:
            self.set_epoch(self._state.epoch + 1)
        while (rank_row := self._rank_row(self._num_taken)) < self._rank_rows():
            position = self._state.start + self.place.rank + rank_row * self.place.num_ranks
            sample = self._sample(position % len(self._order))
            # Counted before it is handed out: a state taken then covers it.
            self._num_taken += 1
            yield sample
        self._is_finished = True

    def _rank_row(self, num_taken: int) -> int:
        """Number within the rank of this worker's row; workers take chunks in turn."""
        chunk, offset = divmod(num_taken, self.options.chunk_rows)
        turn = chunk * self.place.num_workers + self.place.worker
        return turn * self.options.chunk_rows + offset

    def _rank_rows(self) -> int:
        left = len(self._order) - self._state.start
        rounds, rest = divmod(left, self.place.num_ranks)
        if self.options.remainder == "keep":
            return rounds + (self.place.rank < rest)
        return rounds + (self.options.remainder == "pad" and rest > 0)

    def _sample(self, position: int) -> Sample:
        file, row = self._order.locate(position)
        matches = self.snapshot.matches
        return self._reader.sample(file, row if matches is None else int(matches[file][row]))
