"""One attempt at one shard: from its files to its result."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hcodec_core.audio.decode import DecodedInfo
from hcodec_core.dataset.leases import Lease, read_attempts
from hcodec_core.dataset.results import result_uri
from hcodec_core.dataset.shards import (
    AudioFacts,
    PlanFiles,
    ShardRef,
    ShardWriter,
    TokenRow,
    data_file_uri,
    discard_file,
    lease_uri,
    publish_result,
    upload_shard,
)
from hcodec_core.errors import AudioError, HCodecError, LeaseLostError, PreemptedError
from hcodec_core.inference.agreement import AgreementTally
from hcodec_core.inference.batching import Encoded
from hcodec_core.inference.feed import ClipPart, FedFile, Feed, FeedParts, FeedSeconds, quarantined
from hcodec_core.inference.joining import FileTokens, interior_of, join
from hcodec_core.inference.reports import Gain, ProgressBoard
from hcodec_core.jobs import DataFile, FileOutcome, Outcome, ShardResult, Timings, TokenizeJob
from hcodec_core.storage import local_write_failed

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_SILENCE_DB = -120.0


@dataclass(frozen=True)
class Workshop:
    """What all attempts of a worker share. ``settle_seconds``: see ``Attempt``."""

    job: TokenizeJob
    worker_id: str
    plan: PlanFiles
    feed: FeedParts
    board: ProgressBoard
    build: dict[str, str]
    scratch_path: Path
    settle_seconds: float


@dataclass
class _Tally:
    outcomes: list[FileOutcome] = field(default_factory=list)
    audio_seconds: float = 0.0
    num_tokens: int = 0
    encode_seconds: float = 0.0
    write_seconds: float = 0.0
    feed_seconds: FeedSeconds = field(default_factory=FeedSeconds)
    agreement: AgreementTally = field(default_factory=AgreementTally)
    started: float = field(default_factory=time.monotonic)

    def add(self, outcome: FileOutcome, num_tokens: int, encode_seconds: float) -> None:
        self.outcomes.append(outcome)
        self.audio_seconds += outcome.audio_seconds
        self.num_tokens += num_tokens
        self.encode_seconds += encode_seconds

    def write(self, writer: ShardWriter, row: TokenRow) -> None:
        started = time.monotonic()
        writer.add(row)
        self.write_seconds += time.monotonic() - started

    def timings(self) -> Timings:
        return Timings(
            download_seconds=self.feed_seconds.download,
            decode_seconds=self.feed_seconds.decode,
            encode_seconds=self.encode_seconds,
            write_seconds=self.write_seconds,
            total_seconds=time.monotonic() - self.started,
        )


class Attempt(threading.Thread):
    """Works on one shard under a lease, in a thread of its own.

    Afterwards ``result`` is the result that stands when it is this attempt's, and ``error`` what
    made the attempt fail. Neither is set when the lease was lost or the work was stopped.

    A claim that is not counted does no work: the shard has used up its attempts, and its failure
    is written. It waits ``settle_seconds`` before, so that an attempt that is just finishing wins.
    """

    def __init__(self, workshop: Workshop, shard: ShardRef, lease: Lease) -> None:
        """Nothing runs before ``start``."""
        super().__init__(name=f"shard-{shard.index}", daemon=True)
        self.shard, self.lease = shard, lease
        self.result: ShardResult | None = None
        self.error: BaseException | None = None
        self._workshop = workshop
        self._stopped = threading.Event()

    def run(self) -> None:
        """Make the attempt; never raises."""
        try:
            # Another attempt may have finished between the look at the results and our claim.
            if self._number > 1 and self._has_result():
                return
            if self.lease.claim.is_counted:
                self._tokenize()
            else:
                self._give_up()
        except LeaseLostError as error:
            logger.info("Shard %s: %s", self.shard.shard_id, error)
        except PreemptedError as error:
            self._end(self.lease.release, error)
        except Exception as error:
            logger.exception("Attempt %d of shard %s failed.", self._number, self.shard.shard_id)
            self.error = error
            self._end(self.lease.fail, error)
        finally:
            self.lease.close()

    def stop(self) -> None:
        """Ask the attempt to end without a result; returns at once."""
        self._stopped.set()

    @property
    def _number(self) -> int:
        return self.lease.attempt

    @property
    def _job(self) -> TokenizeJob:
        return self._workshop.job

    def _check(self) -> None:
        if self._stopped.is_set():
            raise PreemptedError("The attempt was stopped.")
        self.lease.check()

    def _require(self) -> None:
        """Ask storage whether the shard is still ours: before anything that others can see."""
        self._check()
        self.lease.require()

    def _has_result(self) -> bool:
        uri = result_uri(self._job.plan_uri, self.shard.shard_id)
        return self._workshop.feed.storage.head(uri) is not None

    def _end(self, end: Callable[[str], None], error: BaseException) -> None:
        try:
            end(f"{type(error).__name__}: {error}")
        except HCodecError as second:
            # Others find out all the same, only later: the lease stands still from now on.
            logger.warning("The end of %s was not written: %s", self.lease.prefix_uri, second)

    def _tokenize(self) -> None:
        tally = _Tally()
        build = json.dumps(self._workshop.build, sort_keys=True)
        with self._folder() as folder:
            path = folder / "rows.parquet"
            with (
                ShardWriter(path, self._job, self.shard, build) as writer,
                self._feed(folder / "audio") as feed,
            ):
                for fed in feed:
                    self._check()
                    self._account(fed, writer, tally)
            tally.feed_seconds = feed.seconds
            self._publish(writer, tally)
        self._log(tally)

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        folder = self._workshop.scratch_path / f"{self.shard.shard_id}-{self._number}"
        try:
            (folder / "audio").mkdir(parents=True)
        except OSError as error:
            raise local_write_failed(error, folder) from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _feed(self, folder_path: Path) -> Feed:
        files = self._workshop.plan.files(self.shard)
        return Feed(self._workshop.feed, files, folder_path, self._check, self.lease.progress)

    def _account(self, fed: FedFile, writer: ShardWriter, tally: _Tally) -> None:
        """Give a file its outcome, and its row when it has tokens."""
        outcome, num_tokens, encode_seconds = fed.outcome, 0, 0.0
        if fed.info is not None:
            try:
                tokens, encode_seconds = self._tokens_of(fed.parts, fed.info, tally)
            except AudioError as error:
                outcome = quarantined(fed.file, error.reason, str(error))
            else:
                row = TokenRow(fed.file, _facts_of(fed.info), tokens.codes, tokens.frame_spans)
                tally.write(writer, row)
                num_tokens = row.num_codes
                outcome = FileOutcome(
                    uri=fed.file.uri,
                    etag=fed.file.etag,
                    outcome=Outcome.TOKENS,
                    audio_seconds=fed.info.duration_seconds,
                )
        assert outcome is not None
        tally.add(outcome, num_tokens, encode_seconds)
        self._workshop.board.advance(Gain(0, 1, outcome.audio_seconds, num_tokens, encode_seconds))

    def _tokens_of(
        self, parts: Sequence[ClipPart], info: DecodedInfo, tally: _Tally
    ) -> tuple[FileTokens, float]:
        pieces, seconds = [], 0.0
        try:
            for part in parts:
                encoded = self._await(part.encoded)
                seconds += encoded.seconds
                if encoded.reference is not None:
                    tally.agreement.add(encoded.tokens, encoded.reference)
                pieces.append(interior_of(encoded.tokens, part.first_frame, part.end_frame))
        finally:
            for part in parts:
                part.encoded.cancel()
        return join(pieces, info.num_samples, self._workshop.feed.spec), seconds

    def _await(self, encoded: Future[Encoded]) -> Encoded:
        while not encoded.done():
            wait([encoded], _POLL_SECONDS)
            self._check()
        if encoded.cancelled():
            raise PreemptedError("The encoder was closed.")
        return encoded.result()

    def _publish(self, writer: ShardWriter, tally: _Tally) -> None:
        """Upload the rows, then create the result: in this order, and only while it is ours."""
        self._require()
        started = time.monotonic()
        data_file = self._upload(writer)
        tally.write_seconds += time.monotonic() - started
        try:
            self.lease.progress()
            self._require()
        except BaseException:
            self._discard(data_file)
            raise
        result = self._result_of(tally, data_file)
        if not publish_result(self._workshop.feed.storage, self._job, result):
            raise LeaseLostError("Another attempt has finished the shard first.")
        self.result = result

    def _upload(self, writer: ShardWriter) -> DataFile | None:
        if writer.num_rows == 0:
            return None
        storage = self._workshop.feed.storage
        uri = data_file_uri(self._job, self.shard.shard_id, self._number)
        try:
            return upload_shard(storage, writer, uri, self._job)
        except BaseException:
            discard_file(storage, uri)
            raise

    def _discard(self, data_file: DataFile | None) -> None:
        if data_file is not None:
            discard_file(self._workshop.feed.storage, data_file.uri)

    def _result_of(self, tally: _Tally, data_file: DataFile | None) -> ShardResult:
        timings = tally.timings()
        return ShardResult(
            plan_id=self._job.plan_id,
            shard_id=self.shard.shard_id,
            shard_index=self.shard.index,
            attempt=self._number,
            worker_id=self._workshop.worker_id,
            status="done",
            data_file=data_file,
            outcomes=tally.outcomes,
            audio_seconds=tally.audio_seconds,
            num_tokens=tally.num_tokens,
            timings=timings,
            work=self._workshop.feed.work(tally.feed_seconds, timings, tally.audio_seconds),
            build=self._workshop.build,
            agreement=tally.agreement.result(self._workshop.feed.spec.sample_rate),
        )

    def _give_up(self) -> None:
        """Write that the shard failed, unless an attempt finished it after all."""
        storage, job = self._workshop.feed.storage, self._job
        self._stopped.wait(self._workshop.settle_seconds)
        self._require()
        if self._has_result():
            return
        attempts = [
            attempt
            for attempt in read_attempts(storage, lease_uri(job, self.shard.shard_id))
            if attempt.is_counted
        ]
        reasons = [
            attempt.ending.detail if attempt.ending else "its worker vanished"
            for attempt in attempts
        ]
        result = ShardResult(
            plan_id=job.plan_id,
            shard_id=self.shard.shard_id,
            shard_index=self.shard.index,
            attempt=self._number,
            worker_id=self._workshop.worker_id,
            status="failed",
            error=f"{len(reasons)} attempts failed; the last: {reasons[-1] if reasons else ''}",
            build=self._workshop.build,
        )
        if publish_result(storage, job, result):
            self.result = result
            logger.error("Shard %s failed for good: %s", self.shard.shard_id, result.error)

    def _log(self, tally: _Tally) -> None:
        seconds = tally.timings().total_seconds
        counts = Counter(outcome.outcome.value for outcome in tally.outcomes)
        fields = {
            "shard_id": self.shard.shard_id,
            "attempt": self._number,
            "num_files": len(tally.outcomes),
            **{f"num_{outcome.value}": counts[outcome.value] for outcome in Outcome},
            "audio_seconds": round(tally.audio_seconds, 3),
            "num_codes": tally.num_tokens,
            "seconds": round(seconds, 3),
            "real_time_factor": round(tally.audio_seconds / max(seconds, 1e-9), 2),
        }
        logger.info("Shard %s is done.", self.shard.shard_id, extra={"fields": fields})


def _facts_of(info: DecodedInfo) -> AudioFacts:
    return AudioFacts(
        content_sha256=info.pcm_sha256,
        num_samples=info.num_samples,
        duration_seconds=info.duration_seconds,
        peak=info.peak,
        loudness_db=info.rms_db if info.rms_db > _SILENCE_DB else None,
        clipped_share=info.clipped_share,
        container=info.container.value,
        native_sample_rate=info.sample_rate,
        native_channels=info.num_channels,
    )
