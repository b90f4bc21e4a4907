"""Codebooks learn as the published library does, and alike on all ranks."""

from __future__ import annotations

import pytest
import torch

from hcodec_core.nn.quantize import ResidualQuantizer
from hcodec_core.training.quantizer import QuantizerTrainer, kmeans, rotated
from hcodec_core.training.ranks import Ranks
from hcodec_core.training.recipe import QuantizerRecipe


def trainer(**changes: object) -> QuantizerTrainer:
    torch.manual_seed(0)
    recipe = QuantizerRecipe.model_validate({"gradient": "straight-through", **changes})
    made = QuantizerTrainer(ResidualQuantizer(4, 2, 8), recipe)
    made.go_on_from(16)
    return made


def test_codes_and_vectors_are_those_of_encoding():
    quantizer = trainer()
    x = torch.randn(3, 4, 5)
    passed = quantizer.quantise(x, 2)
    encoded = quantizer.quantizer.encode(x)
    assert torch.allclose(passed.vectors, encoded.vectors, atol=1e-6)
    assert passed.counts.sum(dim=1).tolist() == [15, 15]
    for book in (0, 1):
        counts = torch.bincount(encoded.codes[:, book].flatten(), minlength=8)
        assert torch.equal(passed.counts[book], counts.float())


def test_entries_follow_moving_averages():
    quantizer = trainer(decay=0.9)
    before = quantizer.quantizer.codebooks.clone()
    x = torch.randn(3, 4, 5)
    passed = quantizer.quantise(x, 1)
    quantizer.apply(passed.counts, passed.sums)
    sizes = 0.9 * 2.0 + 0.1 * passed.counts[0]
    vectors = 0.9 * 2.0 * before[0] + 0.1 * passed.sums[0]
    smooth = (sizes + 1e-5) / (sizes.sum() + 8e-5) * sizes.sum()
    assert torch.allclose(quantizer.quantizer.codebooks[0], vectors / smooth[:, None], atol=1e-6)
    assert torch.equal(quantizer.quantizer.codebooks[1], before[1])  # not in use


def test_masked_steps_teach_nothing():
    quantizer = trainer()
    x = torch.randn(2, 4, 6)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    masked = quantizer.quantise(x, 2, mask)
    changed = quantizer.quantise(torch.where(mask[:, None], x, 99.0), 2, mask)
    assert torch.equal(masked.counts, changed.counts)
    assert torch.allclose(masked.commitment, changed.commitment)
    assert masked.counts.sum(dim=1).tolist() == [8, 8]


def test_gradients_pass_straight_through():
    quantizer = trainer()
    x = torch.randn(2, 4, 3, requires_grad=True)
    quantizer.quantise(x, 2).vectors.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_rotation_turns_gradients_as_it_turns_vectors():
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    entries = torch.randn(5, 4, dtype=torch.float64)
    turned = rotated(x, entries)
    assert torch.allclose(turned, entries)
    # The map is linear at fixed rotation and scale: moving along x moves along the entry.
    _, moved = torch.autograd.functional.jvp(lambda y: rotated(y, entries), x, x.detach())
    assert torch.allclose(moved, entries)


def test_kmeans_finds_clusters():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = centres.repeat(50, 1) + 0.1 * torch.randn(150, 2)
    found = kmeans(points, 3, 20, torch.Generator().manual_seed(2))
    assert torch.cdist(centres, found).min(dim=1).values.max() < 0.5


def test_start_uses_all_points():
    quantizer = trainer(kmeans_steps=10)
    points = torch.randn(400, 4)
    quantizer.start(points, 50, 7, "kmeans")
    assert quantizer.cluster_sizes.sum(dim=1).tolist() == pytest.approx([50, 50])
    first = quantizer.quantizer.codebooks.clone()
    quantizer.start(points, 50, 7, "kmeans")
    assert torch.equal(first, quantizer.quantizer.codebooks)
    encoded = quantizer.quantizer.encode(points.T[None])
    assert (points.T[None] - encoded.vectors).square().mean() < 0.35 * points.square().mean()


def test_dead_entries_become_vectors_of_the_batch():
    quantizer = trainer(dead_below=1.0)
    quantizer.cluster_sizes[0, 3] = 0.2
    passed = quantizer.quantise(torch.randn(2, 4, 9), 2)
    assert quantizer.replace_dead(passed.candidates, Ranks(), 1, "dead") == 1
    entry = quantizer.quantizer.codebooks[0, 3]
    assert (passed.candidates[0] == entry).all(dim=1).any()
    assert quantizer.cluster_sizes[0, 3] == 1.0


def test_number_of_codebooks_is_drawn_by_key():
    quantizer = trainer(dropout_share=1.0)
    draws = [quantizer.draw_num_used(0, step) for step in range(64)]
    assert draws == [quantizer.draw_num_used(0, step) for step in range(64)]
    assert set(draws) == {1, 2}
    never = trainer(dropout_share=0.0)
    assert {never.draw_num_used(0, step) for step in range(20)} == {2}
