"""Randomness as a function of what it is for: never the state of a worker or of an iterator.

A draw is named by a key such as ``(seed, "step", 120, 3)``. The same key gives the same numbers in
every process and after every restart.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch

Key = int | str


def seed_of(*key: Key) -> int:
    """63 bits that follow from the key alone."""
    text = "\n".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(*key: Key) -> np.random.Generator:
    """A generator of its own for this key."""
    return np.random.Generator(np.random.Philox(seed_of(*key)))


def torch_generator(*key: Key) -> torch.Generator:
    """A generator on the CPU of its own for this key."""
    return torch.Generator().manual_seed(seed_of(*key))


def permutation(length: int, *key: Key) -> npt.NDArray[np.int64]:
    """The numbers below ``length`` in an order that follows from the key alone."""
    bits = np.random.Philox(seed_of(*key)).random_raw(length)
    return np.argsort(np.asarray(bits, dtype=np.uint64), kind="stable")
