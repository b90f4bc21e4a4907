"""The dataset's lock in the hands of a DAG run: taken by one task, kept alive by all the others.

A lock travels between tasks as plain values; an empty dictionary stands for a run that needs none.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hcodec_core.errors import HCodecError, StorageError

if TYPE_CHECKING:
    from hcodec_core.dataset.lock import LockSeeker

logger = logging.getLogger(__name__)
RENEW_SECONDS = 60.0


class LockWait:
    """Asks for a dataset's lock again and again; keep it while asking, it watches the holder."""

    def __init__(self, dataset: str, owner: str) -> None:
        """``owner`` names the run: its own retry gets what it holds already."""
        self._seeker = _open_seeker(dataset, owner)

    def ask(self) -> tuple[dict[str, Any] | None, str]:
        """The lock as values, or None and for whom the run waits."""
        from hcodec_core.dataset.lock import DatasetLock

        answer = self._seeker.acquire()
        if isinstance(answer, DatasetLock):
            return answer.model_dump(mode="json"), f"Dataset {answer.dataset}: lock taken."
        if not answer.owner:
            return None, f"Dataset {answer.dataset}: the lock is just changing hands."
        return (
            None,
            f"Dataset {answer.dataset} is locked by run {answer.owner} since {answer.since}.",
        )


def _open_seeker(dataset: str, owner: str) -> LockSeeker:
    from hcodec_airflow.settings import read_settings
    from hcodec_core.dataset.lock import LockSeeker

    settings = read_settings()
    return LockSeeker(settings.load_config(), settings.open_storage(), dataset, owner)


def renewer(lock: Mapping[str, Any] | None) -> Callable[[], None] | None:
    """What keeps a lock alive, None when there is none to keep.

    The function raises ``LeaseLostError`` when the lock is not held any more.
    """
    if not lock:
        return None
    from hcodec_airflow.settings import read_settings
    from hcodec_core.dataset.lock import DatasetLock, renew

    storage, held = read_settings().open_storage(), DatasetLock.model_validate(lock)
    return lambda: renew(storage, held)


def release_lock(lock: Mapping[str, Any] | None) -> None:
    """Give a lock back; doing so twice does no harm."""
    if not lock:
        return
    from hcodec_airflow.settings import read_settings
    from hcodec_core.dataset.lock import DatasetLock, release

    held = DatasetLock.model_validate(lock)
    release(read_settings().open_storage(), held)
    logger.info("Dataset %s: lock given back.", held.dataset)


@contextmanager
def kept_alive(lock: Mapping[str, Any] | None) -> Iterator[None]:
    """Keep a lock alive while a step runs.

    Raises ``LeaseLostError`` when it is lost at the start or the end of the step; in between that
    is only said, for nothing that was written is wrong without it.
    """
    renew = renewer(lock)
    if renew is None:
        yield
        return
    renew()
    stop = threading.Event()
    keeper = threading.Thread(target=_keep, args=(renew, stop), daemon=True)
    keeper.start()
    try:
        yield
    finally:
        stop.set()
        keeper.join()
    renew()


def _keep(renew: Callable[[], None], stop: threading.Event) -> None:
    while not stop.wait(RENEW_SECONDS):
        try:
            renew()
        except StorageError as error:
            logger.warning("%s The lock is renewed later.", error)
        except HCodecError as error:
            logger.error("%s", error)
            return
