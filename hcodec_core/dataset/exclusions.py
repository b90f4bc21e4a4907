"""Objects that were erased and must not come back: salted digests, never their names.

One document per dataset, kept for all of its encode ids. A plan leaves out what is listed here,
whatever the sources hold, until somebody asks for the object again (``hcodec purge --readmit``).
The salt lies beside the digests: whoever may read this folder and guesses a name can check the
guess, but nobody can read a name out of it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from typing import Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from hcodec_core.config import Config, describe
from hcodec_core.errors import ConfigError, ObjectMissingError
from hcodec_core.storage import Storage, join_uri


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Exclusion(_Document):
    """One name, or with ``num_chars`` all names whose first so many characters have the digest."""

    digest: str
    num_chars: int | None = None
    purge_id: str


class Exclusions(_Document):
    """All that is excluded from one dataset."""

    format_version: Literal[1] = 1
    salt: str
    entries: tuple[Exclusion, ...] = ()

    def digest(self, text: str) -> str:
        """Salted digest of a name, 32 hex digits."""
        data = text.encode(errors="surrogateescape")
        return hashlib.blake2b(data, digest_size=16, key=bytes.fromhex(self.salt)).hexdigest()

    def flags(self, uris: pa.Array | pa.ChunkedArray) -> pa.Array:
        """Boolean array: which URIs are excluded."""
        if not self.entries:
            return pa.repeat(False, len(uris))
        whole = {entry.digest for entry in self.entries if entry.num_chars is None}
        begins = {(e.num_chars, e.digest) for e in self.entries if e.num_chars is not None}
        lengths = sorted({length for length, _ in begins})
        known: dict[str, str] = {}

        def is_out(uri: str) -> bool:
            if whole and self.digest(uri) in whole:
                return True
            for length in lengths:
                begin = uri[:length]
                if begin not in known:
                    known[begin] = self.digest(begin)
                if len(uri) > length and (length, known[begin]) in begins:
                    return True
            return False

        return pa.array([is_out(uri) for uri in uris.to_pylist()], pa.bool_())

    def entries_of(
        self, uris: Sequence[str], is_prefix: bool, purge_id: str
    ) -> tuple[Exclusion, ...]:
        """Entries for names, or for all names that begin so."""
        return tuple(
            Exclusion(
                digest=self.digest(uri),
                num_chars=len(uri) if is_prefix else None,
                purge_id=purge_id,
            )
            for uri in uris
        )


def exclusions_uri(config: Config, dataset: str) -> str:
    """Document of a dataset's exclusions."""
    return join_uri(config.work.work_uri, "datasets", dataset, "exclusions.json")


def read_exclusions(storage: Storage, config: Config, dataset: str) -> Exclusions | None:
    """What is excluded, None when nothing ever was."""
    uri = exclusions_uri(config, dataset)
    try:
        return Exclusions.model_validate_json(storage.read(uri))
    except ObjectMissingError:
        return None
    except ValidationError as error:
        # Going on without it would bring erased objects back.
        raise ConfigError(
            f"{uri} is no list of exclusions of ours: {describe(error)}: restore it from a backup."
        ) from error


def ensure_exclusions(storage: Storage, config: Config, dataset: str) -> Exclusions:
    """What is excluded; the document is made, with its salt, when there is none."""
    known = read_exclusions(storage, config, dataset)
    if known is None:
        text = Exclusions(salt=secrets.token_hex(16)).model_dump_json(indent=1)
        storage.create(exclusions_uri(config, dataset), text.encode())
        known = read_exclusions(storage, config, dataset)
    assert known is not None, "the document was just made, by this process or another"
    return known


def exclude(storage: Storage, config: Config, dataset: str, entries: Iterable[Exclusion]) -> None:
    """Add entries, on the caller's dataset lock; those that are there already stay as they are."""
    known = ensure_exclusions(storage, config, dataset)
    names = {(entry.digest, entry.num_chars) for entry in known.entries}
    new = [entry for entry in entries if (entry.digest, entry.num_chars) not in names]
    if new:
        _write(storage, config, dataset, known, (*known.entries, *new))


def readmit(storage: Storage, config: Config, dataset: str, entries: Iterable[Exclusion]) -> int:
    """Take entries away, on the caller's dataset lock; returns how many were there."""
    known = ensure_exclusions(storage, config, dataset)
    names = {(entry.digest, entry.num_chars) for entry in entries}
    kept = tuple(e for e in known.entries if (e.digest, e.num_chars) not in names)
    if len(kept) < len(known.entries):
        _write(storage, config, dataset, known, kept)
    return len(known.entries) - len(kept)


def _write(
    storage: Storage,
    config: Config,
    dataset: str,
    known: Exclusions,
    entries: tuple[Exclusion, ...],
) -> None:
    text = known.model_copy(update={"entries": entries}).model_dump_json(indent=1)
    storage.write(exclusions_uri(config, dataset), text.encode())
