"""How errors of the product end a task: retried where a later try may do better, else at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from airflow.sdk.exceptions import AirflowException, AirflowFailException

from hcodec_core.errors import ConfigError, HCodecError

logger = logging.getLogger(__name__)


@contextmanager
def task_failures() -> Iterator[None]:
    """Turn ``HCodecError`` into a failed try (retryable) or a failed task, with its sentence."""
    try:
        yield
    except HCodecError as error:
        logger.error("%s", error)
        if isinstance(error, ConfigError):
            # The user's own mistake: where in our code it was noticed would only hide the sentence.
            raise AirflowFailException(str(error)) from None
        kind = AirflowException if error.retryable else AirflowFailException
        raise kind(str(error)) from error
