"""Residual quantisation by angle in few dimensions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hcodec_core.nn.factorised import FactorisedResidualQuantizer


@pytest.fixture
def quantizer() -> FactorisedResidualQuantizer:
    torch.manual_seed(0)
    return FactorisedResidualQuantizer(6, 3, 20, 4).double().requires_grad_(False)


def by_hand(quantizer: FactorisedResidualQuantizer, vector: Tensor) -> tuple[list[int], Tensor]:
    residual, codes = vector, []
    for book in quantizer.books:
        inner = book.project_in.weight @ residual + book.project_in.bias
        unit = book.entries / book.entries.norm(dim=1, keepdim=True)
        code = int((unit - inner / inner.norm()).square().sum(dim=1).argmin())
        residual = residual - (book.project_out.weight @ book.entries[code] + book.project_out.bias)
        codes.append(code)
    return codes, vector - residual


def test_each_book_takes_the_nearest_direction(quantizer: FactorisedResidualQuantizer):
    x = torch.randn(2, 6, 9, dtype=torch.float64)
    found = quantizer.encode(x)
    assert found.codes.shape == (2, 3, 9)
    for row in range(2):
        for step in range(9):
            codes, vector = by_hand(quantizer, x[row, :, step])
            assert found.codes[row, :, step].tolist() == codes
            torch.testing.assert_close(found.vectors[row, :, step], vector)


def test_decoding_sums_the_books_that_are_given(quantizer: FactorisedResidualQuantizer):
    x = torch.randn(2, 6, 9, dtype=torch.float64)
    quantised = quantizer.encode(x)
    torch.testing.assert_close(quantizer.decode(quantised.codes), quantised.vectors)
    one = quantizer.decode(quantised.codes[:, :1])
    torch.testing.assert_close(
        one[:, :, 0].T, quantizer.books[0].decode(quantised.codes[:, 0, 0]).T
    )


def test_margins_compare_the_two_nearest_directions(quantizer: FactorisedResidualQuantizer):
    x = torch.randn(1, 6, 5, dtype=torch.float64)
    margins = quantizer.encode(x, with_margins=True).margins
    assert margins is not None
    book = quantizer.books[0]
    inner = torch.nn.functional.normalize(x[0].T @ book.project_in.weight.T + book.project_in.bias)
    unit = book.entries / book.entries.norm(dim=1, keepdim=True)
    distances = torch.cdist(inner, unit).square().sort(dim=1).values
    torch.testing.assert_close(margins[0, 0], distances[:, 1] / distances[:, 0] - 1)
