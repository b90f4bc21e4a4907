"""H-Codec 1.5 learns at thresholds of its own for every sample, from the tokens it would encode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lessons import Lesson, lesson, recipe_of_lesson
from runs import write_teacher
from torch import Tensor

from hcodec_core.errors import ConfigError
from hcodec_core.models.base import FrameCodes
from hcodec_core.models.conversion import read_ssl_model
from hcodec_core.models.hcodec.config import tiny, tiny_1_5
from hcodec_core.models.hcodec.model import AdaptiveHCodec, codec_of
from hcodec_core.training.batches import Share
from hcodec_core.training.hcodec_objective import AdaptiveObjective
from hcodec_core.training.teacher import take_teacher

SAMPLES = [40, 41]


@pytest.fixture(scope="module")
def given() -> Lesson:
    changes = {"quantizer.dropout_share": 0}
    return lesson(recipe_of_lesson("hcodec-1.5-tiny", changes), num_hops=24)


@pytest.fixture
def objective(given: Lesson) -> AdaptiveObjective:
    assert isinstance(given.learner.objective, AdaptiveObjective)
    given.codec.eval()
    return given.learner.objective


def encoded_at(codec: AdaptiveHCodec, audio: Tensor, threshold: float) -> FrameCodes:
    """What the codec makes of one clip when it encodes at this threshold."""
    before, codec.threshold = codec.threshold, threshold
    try:
        return codec.encode_frames(audio, torch.tensor([audio.shape[2]]))
    finally:
        codec.threshold = before


def test_thresholds_follow_from_seed_and_sample_alone(objective: AdaptiveObjective):
    whole = objective.thresholds(Share(4).indices(7))
    parts = [objective.thresholds(Share(4, rank, 2).indices(7)) for rank in (0, 1)]
    assert torch.equal(whole, torch.cat(parts))  # whoever computes a sample
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(whole, objective.thresholds(Share(4).indices(7)))
    assert not torch.equal(whole, objective.thresholds(Share(4).indices(8)))
    assert len(set(whole.tolist())) == 4


def test_thresholds_fill_the_trained_range(objective: AdaptiveObjective):
    drawn = objective.thresholds(range(400))
    lowest, highest = objective.codec.trained_thresholds
    assert (lowest, highest) == (0.7, 1.0)
    assert lowest <= drawn.min() < 0.72
    assert 0.98 < drawn.max() <= highest


def test_a_pass_is_what_encoding_and_decoding_give(given: Lesson, objective: AdaptiveObjective):
    """Rows of one batch at their own thresholds: padding of tokens must not be seen."""
    audio = given.batch.audio
    thresholds = torch.tensor([0.2, 1.0], dtype=torch.float64)
    objective.thresholds = lambda samples: thresholds  # type: ignore[method-assign]
    try:
        passed = objective.generate(audio, 3, SAMPLES)
    finally:
        del objective.thresholds
    frames = [
        encoded_at(objective.codec, audio[row : row + 1], thresholds[row].item()) for row in (0, 1)
    ]
    counts = [int(frame.num_frames[0]) for frame in frames]
    assert counts[0] < counts[1] == 24  # at 1.0 nothing is joined
    for name, quantised in passed.quantised.items():
        assert quantised.counts.sum(dim=1).tolist() == [sum(counts)] * 3
        for book in range(3):
            codes = torch.cat([frame.codes[name][0, book] for frame in frames])
            assert torch.equal(quantised.counts[book], torch.bincount(codes, minlength=32).float())
    with torch.inference_mode():
        for row, frame in enumerate(frames):
            expected = objective.codec._decode(frame)[0]
            assert torch.allclose(passed.audio[row].detach(), expected, atol=1e-5)


def test_drawn_thresholds_decide_the_tokens(given: Lesson, objective: AdaptiveObjective):
    audio = given.batch.audio
    passed = objective.generate(audio, 3, SAMPLES)
    drawn = objective.thresholds(SAMPLES)
    counts = [
        int(encoded_at(objective.codec, audio[r : r + 1], drawn[r].item()).num_frames[0])
        for r in (0, 1)
    ]
    assert passed.quantised["semantic"].counts[0].sum() == sum(counts)


def test_first_codebooks_see_tokens_not_padding(given: Lesson, objective: AdaptiveObjective):
    latents = objective.latents(given.batch.audio)
    assert latents["semantic"].shape == (2, 16, 24)  # equally many on every rank
    lowest, highest = objective.codec.trained_thresholds
    frames = [
        encoded_at(objective.codec, given.batch.audio[row : row + 1], threshold)
        for row, threshold in enumerate((lowest, highest))
    ]
    num_tokens = sum(int(frame.num_frames[0]) for frame in frames)
    vectors = latents["semantic"].transpose(1, 2).flatten(0, 1)
    assert len(vectors.unique(dim=0)) == num_tokens


def test_a_teacher_may_have_more_layers_than_are_looked_at(tmp_path: Path):
    wanted = tiny_1_5().ssl
    assert wanted is not None
    deeper = wanted.model_copy(update={"num_hidden_layers": wanted.num_hidden_layers + 2})
    write_teacher(tmp_path, deeper)
    codec = codec_of(tiny_1_5())
    take_teacher(codec, str(tmp_path), "hcodec-1.5-tiny")
    _, tensors = read_ssl_model(str(tmp_path))
    assert codec.ssl is not None
    assert all(torch.equal(value, tensors[key]) for key, value in codec.ssl.state_dict().items())


def test_a_teacher_of_another_shape_is_refused(tmp_path: Path):
    ssl = tiny().ssl
    assert ssl is not None
    # Tensors would fit; what comes out would be wrong.
    write_teacher(tmp_path, ssl.model_copy(update={"num_attention_heads": 4}))
    with pytest.raises(ConfigError, match="its num_attention_heads is 4, the codec's 2"):
        take_teacher(codec_of(tiny()), str(tmp_path), "hcodec-tiny")
    write_teacher(tmp_path, ssl.model_copy(update={"num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match="its num_hidden_layers is 3, the codec's 2"):
        take_teacher(codec_of(tiny()), str(tmp_path), "hcodec-tiny")  # which averages all of them
