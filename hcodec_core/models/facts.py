"""What is known of a codec beside its shape: what supports it, and where its weights come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Batching = Literal["length-aware", "equal-length"]

AS_PUBLISHED = "encode, decode; tiny weights give the published code's codes and audio"
AS_IN_LIBRARY = "encode, decode; tiny weights give the library's codes and audio"
UNTRAINED = "encode, decode; random weights, for demo and tests"


@dataclass(frozen=True)
class CodecFacts:
    """Facts of one preset; a test holds the numbers to the model.

    num_parameters: elements of all tensors, the SSL model and codebooks included.
    batching: see ``Codec.batching``.
    support: what works, and what shows that it does.
    weights: where public weights are: a hub repository (with the file in it where it holds
        several), or why there are none.
    weights_licence: as stated where they are published.
    """

    num_parameters: int
    batching: Batching
    support: str
    weights: str
    weights_licence: str


def untrained(num_parameters: int, batching: Batching) -> CodecFacts:
    """Facts of a preset that exists with random weights only."""
    return CodecFacts(num_parameters, batching, UNTRAINED, "none: drawn at random", "Apache-2.0")
