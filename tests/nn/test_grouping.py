"""Groups of similar frames, against loops that follow the specification step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hcodec_core.nn.aggregator import QueryAggregator
from hcodec_core.nn.grouping import Groups, similarity_to_previous, split_long_runs, spread
from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.transformer_config import TransformerConfig

CONFIG = TransformerConfig(dim=8, num_heads=2, num_layers=2, hidden_dim=12, layer_scale=0.7)


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def spans_by_loop(begins: list[bool], max_span: int) -> list[int]:
    """Runs from one beginning to the next, each cut into pieces of ``max_span``."""
    runs: list[int] = []
    for step, begin in enumerate(begins):
        if begin or step == 0:
            runs.append(0)
        runs[-1] += 1
    spans = []
    for run in runs:
        spans += [max_span] * (run // max_span) + ([run % max_span] if run % max_span else [])
    return spans


def groups_of(begins: Tensor, ends: list[int], max_span: int) -> Groups:
    return Groups(split_long_runs(begins, max_span), Lengths(torch.tensor(ends), begins.shape[1]))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("max_span", [2, 8])
def test_spans_are_those_of_the_loop(share: float, max_span: int) -> None:
    begins, ends = torch.rand(5, 40) < share, [40, 1, 8, 9, 33]
    groups = groups_of(begins, ends, max_span)
    assert groups.spans.shape == (5, 40)
    for row, end in enumerate(ends):
        wanted = spans_by_loop(begins[row, :end].tolist(), max_span)
        count = int(groups.lengths.valid[row])
        assert groups.spans[row, :count].tolist() == wanted
        alone = groups_of(begins[row : row + 1, :end], [end], max_span)
        assert alone.lengths.size == count
        assert alone.spans[0].tolist() == wanted


def test_the_size_of_a_batch_does_not_follow_from_its_rows() -> None:
    begins = torch.zeros(2, 16, dtype=torch.bool)
    assert groups_of(begins, [16, 16], 8).lengths.size == 16
    assert groups_of(begins, [1, 3], 8).lengths.size == 16


def test_similarity_is_the_cosine_with_the_step_before() -> None:
    x = noise(2, 5, 7).float()
    found = similarity_to_previous(x)
    assert found.dtype == torch.float64
    assert (found[:, 0] == -torch.inf).all()
    wanted = torch.nn.functional.cosine_similarity(x[:, :, 1:], x[:, :, :-1], dim=1)
    torch.testing.assert_close(found[:, 1:].float(), wanted)


def test_equal_steps_are_never_more_than_equal() -> None:
    """A threshold of 1 must keep them apart, so rounding may not lift a cosine above 1."""
    x = noise(64, 512, 1).float().expand(-1, -1, 3)
    similarity = similarity_to_previous(x)[:, 1:]
    assert (similarity <= 1).all()
    assert (similarity > 1 - 1e-12).all()
    assert (similarity_to_previous(torch.zeros(1, 4, 3))[:, 1:] == 0).all()


def test_places_interleave_frames_and_groups() -> None:
    begins = torch.tensor([[True, False, True, False, False]] * 2)
    groups = groups_of(begins, [5, 3], 8)
    # Frames f0 f1 (query 0) f2 f3 f4 (query 1), then the queries that nobody needs.
    assert groups.frame_places[0].tolist() == [0, 1, 3, 4, 5]
    assert groups.group_places[0, :2].tolist() == [2, 6]
    assert groups.interleaved.valid.tolist() == [7, 5]
    assert groups.interleaved.size == 10
    for row in range(2):
        places = groups.frame_places[row].tolist() + groups.group_places[row].tolist()
        assert sorted(places) == list(range(10))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_places_are_a_permutation_whatever_the_groups(share: float) -> None:
    for rows in (1, 4):
        begins = torch.rand(rows, 23) < share
        ends = [23, 1, 9, 17][:rows]
        groups = groups_of(begins, ends, 8)
        for row in range(rows):
            places = groups.frame_places[row].tolist() + groups.group_places[row].tolist()
            assert sorted(places) == list(range(groups.interleaved.size))
            valid = int(groups.lengths.valid[row])
            last = int(groups.group_places[row, valid - 1])
            assert last == int(groups.interleaved.valid[row]) - 1


def test_means_are_over_the_frames_of_a_group() -> None:
    x = noise(1, 11, 3)
    begins = torch.zeros(1, 11, dtype=torch.bool)
    begins[0, 2] = True
    means = groups_of(begins, [11], 8).means(x, 8)
    wanted = [x[0, :2].mean(0), x[0, 2:10].mean(0), x[0, 10:].mean(0)]
    torch.testing.assert_close(means[0], torch.stack(wanted))


def test_means_of_half_precision_frames_are_summed_in_float32() -> None:
    x = noise(1, 8, 3).bfloat16()
    means = groups_of(torch.zeros(1, 8, dtype=torch.bool), [8], 8).means(x, 8)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means[0, 0], x[0].float().mean(0))


def by_loop(model: QueryAggregator, x: Tensor, spans: list[int]) -> Tensor:
    """One row [D, T] without padding: [D, G]."""
    steps, readouts, start = [], [], 0
    for span in spans:
        frames = x[:, start : start + span]
        steps += [*frames.unbind(1), frames.mean(1) + model.query]
        readouts.append(len(steps) - 1)
        start += span
    sequence = torch.stack(steps, dim=1)[None]
    mixed = model.transformer(sequence, Lengths(torch.tensor([len(steps)]), len(steps)))
    return mixed[0][:, readouts]


def test_an_aggregator_reads_its_queries_out() -> None:
    model = QueryAggregator(CONFIG, 4).double().eval()
    model.query.copy_(noise(8))
    x, begins, ends = noise(3, 8, 13), torch.rand(3, 13) < 0.4, [13, 1, 6]
    together = model(x, groups_of(begins, ends, 4))
    assert together.shape == (3, 8, 13)
    assert torch.isfinite(together).all()
    for row, end in enumerate(ends):
        spans = spans_by_loop(begins[row, :end].tolist(), 4)
        wanted = by_loop(model, x[row, :, :end], spans)
        torch.testing.assert_close(together[row, :, : len(spans)], wanted)
        alone = model(x[row : row + 1, :, :end], groups_of(begins[row : row + 1, :end], [end], 4))
        torch.testing.assert_close(alone[0], wanted)


def test_steps_are_repeated_over_their_spans() -> None:
    x = torch.arange(6.0).view(2, 1, 3)
    spans = torch.tensor([[2, 1, 3], [1, 4, 0]])
    found = spread(x, spans, 7)
    assert found[0, 0].tolist() == [0, 0, 1, 2, 2, 2, 2]
    assert found[1, 0, :5].tolist() == [3, 4, 4, 4, 4]
    assert spread(x, torch.zeros(2, 3, dtype=torch.int64), 2).shape == (2, 1, 2)
