"""Checkpoints that are whole or do not count.

    checkpoints/step-000001000/shard-....safetensors    written by torch.distributed.checkpoint,
                                                        each rank its share; no pickles
    checkpoints/step-000001000/complete.json            ``CheckpointFacts``; written last

A checkpoint without its marker, or whose files are not those that the marker names, is passed over
for the one before. Nothing of a complete checkpoint is touched while a later one is written.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from hcodec_core.dataset.tabular import list_folder
from hcodec_core.errors import CheckpointError, ConfigError, HCodecError, StorageError
from hcodec_core.storage import Storage, join_uri, sha256_of_file
from hcodec_core.training.ranks import Ranks

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
MARKER = "complete.json"
_NAME = re.compile(r"/step-(\d{9})/([^/]+)$")


class StoredFile(BaseModel):
    """One file of a checkpoint: size in bytes, sha256 of its content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    size: int
    sha256: str


class CheckpointFacts(BaseModel):
    """A complete checkpoint after ``step`` steps.

    ``score``: of the validation at that step, lower is better; None: not validated then. The
    digests say under which recipe and data it was made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    step: int
    recipe_digest: str
    data_digest: str
    num_ranks: int
    score: float | None = None
    build: dict[str, str] = {}
    files: tuple[StoredFile, ...] = ()


@dataclass(frozen=True)
class CheckpointPlace:
    """Where checkpoints lie, and local disk for one of them."""

    storage: Storage
    run_uri: str
    scratch_path: Path
    keep_last: int = 3


class Checkpoints:
    """Saving and loading by all ranks together."""

    def __init__(self, place: CheckpointPlace, ranks: Ranks) -> None:
        """Nothing is read or written yet."""
        self._place, self._ranks = place, ranks

    def exist(self) -> bool:
        """Whether the run has any checkpoint, complete or not."""
        return bool(self._listing())

    def save(self, facts: CheckpointFacts, tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint, then remove those that need not be kept.

        Raises ``StorageError`` on every rank when one cannot write; what was complete stays.
        """
        folder_uri = self._folder_uri(facts.step)
        if self._ranks.is_first:
            self._remove(facts.step)
        self._agree(None)
        stored: list[StoredFile] = []
        failure: HCodecError | None = None
        with self._scratch() as path:
            try:
                _write_shards(tensors, path, self._ranks)
                stored = [self._upload(file, folder_uri) for file in sorted(path.iterdir())]
            except HCodecError as error:
                failure = error
        self._agree(failure)
        files = sorted(
            (f for part in self._ranks.gather(stored) for f in part), key=lambda f: f.name
        )
        self._finish(facts.model_copy(update={"files": tuple(files)}))

    def load_latest(
        self, tensors: Mapping[str, Tensor], recipe_digest: str, data_digest: str
    ) -> CheckpointFacts | None:
        """Fill ``tensors`` from the newest checkpoint that is whole; None when there is none.

        Raises ``ConfigError`` when it was made under another recipe or from other data, and
        ``CheckpointError`` when there are checkpoints but none of them is whole.
        """
        steps = self._ranks.from_first(sorted(self._listing(), reverse=True))
        for step in steps:
            facts = self._ranks.from_first(self._facts(step) if self._ranks.is_first else None)
            if facts is None:
                continue
            _check_same(facts, recipe_digest, data_digest)
            if self._load(facts, tensors):
                return facts
            logger.warning("Going back to the checkpoint before step %d.", step)
        if any(MARKER in names for names in self._ranks.from_first(self._listing()).values()):
            raise CheckpointError(
                f"No checkpoint under {join_uri(self._place.run_uri, FOLDER)} is whole: see the "
                "warnings above; start again in another folder."
            )
        return None

    def choose(self, choice: str) -> CheckpointFacts:
        """A complete checkpoint: ``last``, ``best`` (of those that were validated) or a step.

        Raises ``ConfigError`` naming those there are when there is none such.
        """
        known = self._complete()
        scored = [facts for facts in known if facts.score is not None]
        if choice == "last" and known:
            return known[-1]
        if choice == "best" and scored:
            return min(scored, key=lambda facts: facts.score or 0.0)
        chosen = [facts for facts in known if str(facts.step) == choice]
        if chosen:
            return chosen[0]
        steps = ", ".join(str(facts.step) for facts in known) or "no complete one"
        raise ConfigError(
            f"There is no checkpoint {choice!r} under {join_uri(self._place.run_uri, FOLDER)}: it "
            f"has {steps}; name one of these steps, 'last' or 'best'."
        )

    def load(
        self, facts: CheckpointFacts, tensors: Mapping[str, Tensor], recipe_digest: str
    ) -> None:
        """Fill ``tensors`` from one checkpoint, whatever data it was made from.

        Raises ``ConfigError`` when it was made under another recipe, ``CheckpointError`` when it is
        not whole.
        """
        _check_same(facts, recipe_digest, facts.data_digest)
        if not self._load(facts, tensors):
            raise CheckpointError(
                f"The checkpoint of step {facts.step} is damaged, or the run has just removed it "
                "(see the warning above): take another one."
            )

    def _complete(self) -> list[CheckpointFacts]:
        """Checkpoints with a marker, oldest first."""
        steps = sorted(self._listing())
        return [facts for step in steps if (facts := self._facts(step)) is not None]

    def _load(self, facts: CheckpointFacts, tensors: Mapping[str, Tensor]) -> bool:
        with self._scratch() as path:
            fault = self._download(facts, path)
            faults = [text for text in self._ranks.gather(fault) if text]
            if faults:
                logger.warning(
                    "The checkpoint of step %d cannot be used: %s", facts.step, faults[0]
                )
                return False
            _read_shards(tensors, path)
        return True

    def _download(self, facts: CheckpointFacts, path: Path) -> str:
        """Fetch and check all files; what is wrong, or nothing."""
        folder_uri = self._folder_uri(facts.step)
        for file in facts.files:
            try:
                self._place.storage.download(join_uri(folder_uri, file.name), path / file.name)
            except HCodecError as error:
                if error.retryable:
                    raise
                return str(error)
            if sha256_of_file(path / file.name) != file.sha256:
                return f"{file.name} is damaged"
        return ""

    def _upload(self, path: Path, folder_uri: str) -> StoredFile:
        stored = StoredFile(name=path.name, size=path.stat().st_size, sha256=sha256_of_file(path))
        self._place.storage.upload(path, join_uri(folder_uri, path.name))
        return stored

    def _finish(self, facts: CheckpointFacts) -> None:
        failure: HCodecError | None = None
        if self._ranks.is_first:
            try:
                uri = join_uri(self._folder_uri(facts.step), MARKER)
                self._place.storage.write(uri, facts.model_dump_json(indent=1).encode())
                self._prune()
            except HCodecError as error:
                failure = error
        self._agree(failure)

    def _agree(self, failure: HCodecError | None) -> None:
        """Raise on all ranks what one of them met."""
        texts = [text for text in self._ranks.gather(failure and str(failure)) if text]
        if texts:
            raise StorageError(f"The checkpoint could not be written: {texts[0]}") from failure

    def _prune(self) -> None:
        known = self._complete()
        scored = [facts for facts in known if facts.score is not None]
        best = min(scored, key=lambda facts: facts.score or 0.0).step if scored else None
        kept = {facts.step for facts in known[-self._place.keep_last :]} | {best}
        for facts in known:
            if facts.step not in kept:
                self._remove(facts.step)

    def _remove(self, step: int) -> None:
        names = self._listing().get(step, [])
        uris = [join_uri(self._folder_uri(step), name) for name in names if name != MARKER]
        # Without its marker the rest is nothing, should this be interrupted.
        self._place.storage.delete([join_uri(self._folder_uri(step), MARKER)])
        self._place.storage.delete(uris)

    def _listing(self) -> dict[int, list[str]]:
        """Names of files by step."""
        found: dict[int, list[str]] = {}
        folder_uri = join_uri(self._place.run_uri, FOLDER)
        for info in list_folder(self._place.storage, folder_uri):
            match = _NAME.search(info.uri)
            if match is not None:
                found.setdefault(int(match[1]), []).append(match[2])
        return found

    def _facts(self, step: int) -> CheckpointFacts | None:
        try:
            text = self._place.storage.read(join_uri(self._folder_uri(step), MARKER))
            return CheckpointFacts.model_validate_json(text)
        except ValidationError:
            logger.warning("The marker of the checkpoint of step %d is damaged.", step)
        except HCodecError as error:
            if error.retryable:
                raise
        return None

    def _folder_uri(self, step: int) -> str:
        return join_uri(self._place.run_uri, FOLDER, f"step-{step:09d}")

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        path = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=self._place.scratch_path))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _check_same(facts: CheckpointFacts, recipe_digest: str, data_digest: str) -> None:
    if facts.recipe_digest != recipe_digest:
        raise ConfigError(
            f"The run was made under another recipe (digest {facts.recipe_digest[:12]}, now "
            f"{recipe_digest[:12]}): resume with the same one, or start in another folder."
        )
    if facts.data_digest != data_digest:
        raise ConfigError(
            "The run was made from other data than it has now: resume with the same list of files, "
            "or start in another folder."
        )


def _write_shards(tensors: Mapping[str, Tensor], path: Path, ranks: Ranks) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    # Safetensors, not the default format: that one holds a pickle.
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            save(dict(tensors), storage_writer=writer, no_dist=ranks.size == 1)
    except CheckpointException as error:
        raise StorageError(_reason(error.failures)) from error
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error


def _reason(failures: Mapping[int, tuple[BaseException, object]]) -> str:
    rank, (error, _) = sorted(failures.items())[0]
    return f"rank {rank}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _read_shards(tensors: Mapping[str, Tensor], path: Path) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(path))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(dict(tensors), storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(
            f"The checkpoint does not fit this codec ({_reason(error.failures)}): resume with the "
            "recipe and the base that the run began with."
        ) from error
