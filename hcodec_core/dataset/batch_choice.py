"""Which of a job's batch classes workers start with: one small object in the plan's folder.

    <plan_uri>/backend/batch_class.json

Absent: the first. Whoever sees a worker ended for want of memory chooses the next one; a class
changes what a worker holds in memory at once, never the shape of a batch, and so never a token.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hcodec_core.errors import ObjectMissingError, StorageError
from hcodec_core.storage import Storage, join_uri


class BatchChoice(BaseModel):
    """``index`` into ``TokenizeJob.batch_classes``; ``because``: the workers that ran out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = 1
    index: int = Field(default=0, ge=0)
    because: tuple[str, ...] = ()

    def following(self, because: Iterable[str], num_classes: int) -> BatchChoice:
        """The next choice, or the same one when this is the last class."""
        index = min(self.index + 1, num_classes - 1)
        return BatchChoice(index=index, because=(*self.because, *sorted(because)))


def read_batch_choice(storage: Storage, plan_uri: str) -> BatchChoice:
    """The choice that stands. Raises what storage raises."""
    uri = _uri(plan_uri)
    try:
        return BatchChoice.model_validate_json(storage.read(uri))
    except ObjectMissingError:
        return BatchChoice()
    except ValidationError as error:
        raise StorageError(f"{uri} is damaged: delete it to begin with the first class.") from error


def write_batch_choice(storage: Storage, plan_uri: str, choice: BatchChoice) -> None:
    """Make workers that start from now on use ``choice``."""
    storage.write(_uri(plan_uri), choice.model_dump_json().encode())


def _uri(plan_uri: str) -> str:
    return join_uri(plan_uri, "backend", "batch_class.json")
