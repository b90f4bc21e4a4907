"""Judges from local folders: tiny random models of transformers, saved and loaded offline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hcodec_core.errors import CheckpointError, ConfigError
from hcodec_core.evaluation.local_models import open_models, word_error_rate
from hcodec_core.evaluation.perception import NotMeasurableError

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 8),
    "conv_stride": (5, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "tdnn_dim": (8, 8),
    "tdnn_kernel": (3, 1),
    "tdnn_dilation": (1, 1),
    "xvector_output_dim": 8,
    "classifier_proj_size": 8,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    from hcodec_core.nn.torchaudio_guard import guard_torchaudio

    guard_torchaudio()
    import transformers as tf

    root = tmp_path_factory.mktemp("models")
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghij"]
    (root / "vocab.json").write_text(json.dumps({x: i for i, x in enumerate(letters)}))
    torch.manual_seed(3)
    extractor = tf.Wav2Vec2FeatureExtractor(sampling_rate=16_000)
    tokenizer = tf.Wav2Vec2CTCTokenizer(str(root / "vocab.json"))
    config = tf.Wav2Vec2Config(**TINY, vocab_size=len(letters), pad_token_id=0)
    tf.Wav2Vec2ForCTC(config).save_pretrained(root / "asr")
    tf.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(root / "asr")
    tf.Wav2Vec2ForXVector(config).save_pretrained(root / "speaker")
    extractor.save_pretrained(root / "speaker")
    single = tf.Wav2Vec2Config(**TINY, num_labels=1)
    tf.Wav2Vec2ForSequenceClassification(single).save_pretrained(root / "mos")
    extractor.save_pretrained(root / "mos")
    return {use: root / use for use in ("asr", "speaker", "mos")}


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(16_000)).astype(np.float32)


def test_a_copy_of_the_source_has_no_word_errors_and_the_same_speaker(folders, clip):
    models, digests = open_models(folders)
    assert models["wer"](clip, clip) == 0.0
    assert models["speaker_similarity"](clip, clip) == pytest.approx(1.0, abs=1e-6)
    assert np.isfinite(models["utmos"](clip, clip))
    assert set(digests) == {"asr", "speaker", "mos"}
    assert len(set(digests.values())) == 3


def test_judges_hear_a_difference_and_say_the_same_again(folders, clip):
    models, _ = open_models(folders)
    again, _ = open_models(folders)
    other = np.roll(clip, 4321) * np.linspace(0, 1, len(clip), dtype=np.float32)
    for name, model in models.items():
        assert model(clip, other) == again[name](clip, other)
    assert models["speaker_similarity"](clip, other) < 1.0
    assert models["wer"](clip, other) > 0.0


def test_a_clip_shorter_than_the_kernels_cannot_be_measured(folders):
    models, _ = open_models({"speaker": folders["speaker"]})
    short = np.zeros(8, np.float32)
    with pytest.raises(NotMeasurableError, match="refused the clip"):
        models["speaker_similarity"](short, short)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "rate"),
    [
        ("the cat sat", "the cat sat", 0.0),
        ("The cat sat.", "the CAT, sat", 0.0),
        ("the cat sat", "the bat sat", 1 / 3),
        ("the cat sat", "cat sat", 1 / 3),
        ("the cat", "the cat sat down", 1.0),
        ("the cat sat", "", 1.0),
    ],
)
def test_word_errors_by_hand(reference, hypothesis, rate):
    assert word_error_rate(reference, hypothesis) == pytest.approx(rate)


def test_without_words_there_is_no_rate():
    with pytest.raises(NotMeasurableError, match="no words"):
        word_error_rate("...", "the cat")


def test_folders_that_cannot_be_used_are_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match="is no folder"):
        open_models({"asr": tmp_path / "nothing"})
    with pytest.raises(CheckpointError, match="holds no safetensors"):
        open_models({"asr": tmp_path})
    with pytest.raises(ConfigError, match="no use 'taste'"):
        open_models({"taste": folders["asr"]})
    (tmp_path / "model.safetensors").write_bytes(
        (folders["mos"] / "model.safetensors").read_bytes()
    )
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        open_models({"mos": tmp_path})
