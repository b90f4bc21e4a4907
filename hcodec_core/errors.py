"""Every error that a user can meet, with the exit code and retry rule that operators read.

    HCodecError                     1   not retryable unless said otherwise
    |- ConfigError                 43   the job or its configuration is wrong: fail at once
    |  |- CheckpointError          43   weights or codec manifest are wrong
    |  |- ForeignTokensError       43   tokens of another codec
    |  |- DivergedError            43   training gave a loss that is no number
    |  `- AccessError              43   no such bucket, no permission, prefix not allowed
    |     `- FolderMissingError    43   a local folder does not exist (an unmounted volume?)
    |- StorageError                 1   object storage did not answer as it should (retry)
    |- ClusterError                 1   Kubernetes did not answer as it should (retry)
    |- ObjectMissingError           1   an object that should be there is not
    |- SourceChangedError           1   an object is not the one that was listed
    |- AudioError                   1   one file cannot be used; carries a quarantine reason
    |- LeaseLostError               1   another worker owns the shard or the run now
    |- PlanIncompleteError          1   shards of a plan have no result, failed, or do not add up
    |- CommitConflictError          1   another writer moved the table (retry)
    |- ValidationFailedError        1   the dataset did not pass its checks
    |- BudgetExceededError          1   more bad files, or more cost, than the budget allows
    |- RegistryError                1   the model registry did not answer as it should (retry)
    |- PromotionRefusedError        1   this codec may not become champion, or not any more
    `- PreemptedError             143   asked to stop; work goes on elsewhere

A message is one sentence: what is wrong, where, and what to do. Secrets never appear in one.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_CONFIG = 43
EXIT_PREEMPTED = 143


class HCodecError(Exception):
    """Root of all errors raised on purpose; ``exit_code`` and ``retryable`` drive the operator."""

    exit_code: ClassVar[int] = EXIT_FAILURE
    retryable: ClassVar[bool] = False


class ConfigError(HCodecError):
    """A value given by the user cannot be used; retrying would fail in the same way."""

    exit_code = EXIT_BAD_CONFIG


class CheckpointError(ConfigError):
    """Weights or their manifest are missing, damaged, misshapen or have a wrong digest."""


class ForeignTokensError(ConfigError):
    """Tokens were made with codebooks other than those of the codec asked to decode them."""


class DivergedError(ConfigError):
    """Training gave a loss or gradient that is not finite; repeating the step would do it again."""


class AccessError(ConfigError):
    """A bucket does not exist, permission is missing, or a prefix is outside the allowed ones."""


class FolderMissingError(AccessError):
    """A local folder to be listed does not exist: perhaps a volume is not mounted."""


class StorageError(HCodecError):
    """Object storage failed in a way that a later try may not."""

    retryable = True


class ClusterError(HCodecError):
    """The Kubernetes API failed in a way that a later try may not."""

    retryable = True


class ObjectMissingError(HCodecError):
    """An object that was asked for by name does not exist."""


class SourceChangedError(HCodecError):
    """A source object is gone or has another etag than the one in the inventory."""


class QuarantineReason(StrEnum):
    """Why a source file has no tokens; stored with the file, shown in every report."""

    EMPTY = "empty"  # zero bytes, or a container without samples
    NOT_AUDIO = "not_audio"  # magic bytes of no allowed container
    REFUSED_CONTAINER = (
        "refused_container"  # playlist or script that makes decoders open other files
    )
    TRUNCATED = "truncated"  # the header promises more than the file holds
    UNDECODABLE = "undecodable"  # the decoder gave up
    NON_FINITE = "non_finite"  # NaN or infinite samples
    TOO_LARGE = "too_large"  # over the cap on decoded length or bytes
    TOO_MANY_CHANNELS = "too_many_channels"
    UNSUPPORTED_RATE = "unsupported_rate"
    TIMEOUT = "timeout"  # decoding took longer than allowed
    CRASHED = "crashed"  # killed the decoder process twice
    TOO_SHORT = "too_short"  # shorter than the codec can encode
    MISMATCH = "mismatch"  # tokens failed a per-file check


class AudioError(HCodecError):
    """One audio file cannot be used. It goes to quarantine; its shard goes on."""

    def __init__(self, reason: QuarantineReason, message: str) -> None:
        """Keep the machine-readable ``reason`` beside the sentence."""
        super().__init__(message)
        self.reason = reason


class LeaseLostError(HCodecError):
    """Another worker has the shard or the run; nothing may be written for it here."""


class PlanIncompleteError(HCodecError):
    """Not every file of a plan is accounted for: nothing can be committed."""


class CommitConflictError(HCodecError):
    """Another writer moved the table first."""

    retryable = True


class ValidationFailedError(HCodecError):
    """The dataset version failed its checks; nothing was published."""


class BudgetExceededError(HCodecError):
    """More bad files, or more cost, than the run was allowed."""


class RegistryError(HCodecError):
    """The model registry failed in a way that a later try may not; nothing was promoted."""

    retryable = True


class PromotionRefusedError(HCodecError):
    """A codec may not take the champion's place: the gate, a person, or events said no."""


class PreemptedError(HCodecError):
    """The process was asked to stop; released work is taken up by others."""

    exit_code = EXIT_PREEMPTED
    retryable = True
