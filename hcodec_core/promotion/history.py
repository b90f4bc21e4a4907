"""Who was champion when: steps that are created once each, and the alias that follows them.

An alias in MLflow can be set but not compared and set. So the order lies in object storage: step N
is created with ``If-None-Match: *``, and whoever creates it moves the alias afterwards. A process
that dies in between leaves a step without its ``.done``; the next one finishes it. After moving
the alias everyone looks at the history again, so that a slow writer cannot leave an old value.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from hcodec_core.config import Config
from hcodec_core.errors import FolderMissingError
from hcodec_core.promotion.codec_versions import CodecVersions
from hcodec_core.promotion.documents import (
    CHALLENGER,
    CHAMPION,
    HistoryStep,
    folder_uri,
    read_document,
)
from hcodec_core.storage import Storage, join_uri

logger = logging.getLogger(__name__)


class History:
    """The history of one codec. Raises what the storage raises."""

    def __init__(self, config: Config, storage: Storage, name: str) -> None:
        """Keep where to look."""
        self._storage, self._name = storage, name
        self._uri = join_uri(folder_uri(config, name), "history")

    def steps(self) -> list[HistoryStep]:
        """All steps, oldest first."""
        return [
            read_document(self._storage, uri, HistoryStep)
            for uri in self._uris()
            if uri.endswith(".json")
        ]

    @property
    def last_number(self) -> int:
        """Number of the last step; 0 when there is none."""
        return sum(uri.endswith(".json") for uri in self._uris())

    def create(self, step: HistoryStep) -> bool:
        """Add the next step; false when another one has that number."""
        return self._storage.create(
            self._step_uri(step.number), step.model_dump_json(indent=1).encode()
        )

    def settle(self, versions: CodecVersions) -> tuple[list[HistoryStep], int | None]:
        """Finish the last step if its process did not; returns steps and champion's version.

        Both belong together: a step that is built on them has the number after the last of these
        steps, and is not created when another came since. An alias that a person moved after the
        last step was finished is left alone: it is what readers see.
        """
        while True:
            steps = self.steps()
            if not steps:
                return steps, versions.aliases(self._name).get(CHAMPION)
            last = steps[-1]
            if self._storage.head(self._done_uri(last.number)) is not None:
                return steps, self._current(last, versions)
            versions.set_alias(self._name, CHAMPION, last.to.version)
            self._storage.create(self._done_uri(last.number), b"")
            if last.kind == "promotion":
                self._retire_challenger(last, versions)
            if self.last_number == last.number:
                return steps, last.to.version

    def _current(self, last: HistoryStep, versions: CodecVersions) -> int | None:
        found = versions.aliases(self._name).get(CHAMPION)
        if found != last.to.version:
            logger.warning(
                "The champion of %s is version %s, though step %d made it %d: somebody moved the "
                "alias by hand.",
                self._name,
                found,
                last.number,
                last.to.version,
            )
        return found

    def _retire_challenger(self, step: HistoryStep, versions: CodecVersions) -> None:
        if versions.aliases(self._name).get(CHALLENGER) == step.to.version:
            versions.delete_alias(self._name, CHALLENGER)

    def _uris(self) -> list[str]:
        with suppress(FolderMissingError):
            return sorted(info.uri for info in self._storage.list_objects(self._uri + "/"))
        return []

    def _step_uri(self, number: int) -> str:
        return join_uri(self._uri, f"{number:08}.json")

    def _done_uri(self, number: int) -> str:
        return join_uri(self._uri, f"{number:08}.done")
