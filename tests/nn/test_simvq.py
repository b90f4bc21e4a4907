"""Frozen codebooks seen through a learned map."""

from __future__ import annotations

import pytest
import torch

from hcodec_core.nn.simvq import ResidualSimVq


@pytest.fixture
def quantizer() -> ResidualSimVq:
    torch.manual_seed(0)
    return ResidualSimVq(5, 2, 30, 8).double().requires_grad_(False)


def test_nearest_mapped_entries_are_taken_in_turn(quantizer: ResidualSimVq):
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    found = quantizer.encode(x, with_margins=True)
    residual = x.transpose(1, 2)
    assert found.margins is not None
    for index, book in enumerate(quantizer.books):
        mapped = quantizer.transform(book.entries)
        distances = torch.cdist(residual, mapped.expand(2, -1, -1))
        assert torch.equal(found.codes[:, index], distances.argmin(dim=2))
        best = distances.square().sort(dim=2).values
        torch.testing.assert_close(found.margins[:, index], best[..., 1] / best[..., 0] - 1)
        residual = residual - mapped[found.codes[:, index]]
    torch.testing.assert_close(found.vectors, x - residual.transpose(1, 2))


def test_first_book_alone(quantizer: ResidualSimVq):
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    one, both = quantizer.encode(x, num_codebooks=1), quantizer.encode(x)
    assert torch.equal(one.codes, both.codes[:, :1])
    torch.testing.assert_close(quantizer.decode(one.codes), one.vectors)
    torch.testing.assert_close(quantizer.decode(both.codes), both.vectors)


def test_entries_are_never_trained(quantizer: ResidualSimVq):
    names = {name for name, _ in quantizer.named_parameters()}
    assert names == {f"transform.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
