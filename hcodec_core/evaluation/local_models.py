"""Judges whose weights the user has: speech recognition, speaker embeddings, estimated opinion.

Each is a folder as transformers writes it, with safetensors and a feature extractor, loaded
offline and without code from the folder; nothing is ever downloaded.

    asr       CTC (Wav2Vec2ForCTC, HubertForCTC, ...) or sequence to sequence (Whisper)
    speaker   x-vectors (Wav2Vec2ForXVector, WavLMForXVector, ...)
    mos       audio classification with one output, a regression to opinion scores
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hcodec_core.audio.native import Samples
from hcodec_core.errors import CheckpointError, ConfigError
from hcodec_core.evaluation.perception import SPEECH_RATE, NotMeasurableError
from hcodec_core.evaluation.scoring import ModelScores
from hcodec_core.storage import sha256_of_file

logger = logging.getLogger(__name__)

USES: Mapping[str, str] = {"asr": "wer", "speaker": "speaker_similarity", "mos": "utmos"}
"""Metric that a local model is for, by its use."""

_MAX_TEXT_TOKENS = 400


def open_models(
    folders: Mapping[str, Path], device: str = "cpu"
) -> tuple[dict[str, ModelScores], dict[str, str]]:
    """Judges by metric, and the digest of each folder's weights by use.

    Raises ``ConfigError`` for a folder that does not exist or a model of another kind, and
    ``CheckpointError`` when it has no safetensors or cannot be loaded.
    """
    from hcodec_core.nn.torchaudio_guard import guard_torchaudio

    guard_torchaudio()  # before transformers is imported
    judges: dict[str, Callable[[Path, str], ModelScores]] = {
        "asr": _Recogniser,
        "speaker": _Speaker,
        "mos": _Opinion,
    }
    models: dict[str, ModelScores] = {}
    digests: dict[str, str] = {}
    for use, folder in folders.items():
        if use not in USES:
            raise ConfigError(f"There is no use {use!r} of a local model: {', '.join(USES)}.")
        digests[use] = _digest(folder)
        models[USES[use]] = judges[use](folder, device)
    return models, digests


def word_error_rate(reference: str, hypothesis: str) -> float:
    """Edits of words over the reference's words; lower case, without punctuation.

    Raises ``NotMeasurableError`` when the reference holds no word.
    """
    wanted, found = _words(reference), _words(hypothesis)
    if not wanted:
        raise NotMeasurableError("no words were recognised in the source")
    row = list(range(len(found) + 1))
    for index, word in enumerate(wanted, 1):
        before, row[0] = row[0], index
        for place, other in enumerate(found, 1):
            cost = before + (word != other)
            before = row[place]
            row[place] = min(cost, row[place] + 1, row[place - 1] + 1)
    return row[-1] / len(wanted)


class _Judge:
    """A model and its feature extractor on a device."""

    def __init__(self, model: Any, processor: Any, device: str) -> None:
        self._model = model.to(device).eval()
        self._processor, self._device = processor, device

    def _inputs(self, audio: Samples) -> dict[str, Any]:
        found = self._processor(audio, sampling_rate=SPEECH_RATE, return_tensors="pt")
        return {name: values.to(self._device) for name, values in found.items()}

    def _run(self, audio: Samples) -> Any:
        import torch

        with torch.inference_mode():
            try:
                return self._model(**self._inputs(audio))
            except RuntimeError as error:
                # Convolutions refuse clips shorter than their kernels.
                raise NotMeasurableError(f"a local model refused the clip ({error})") from error


class _Recogniser(_Judge):
    """Word errors of the result against the transcript of the source by the same model."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import (
            AutoConfig,
            AutoModelForCTC,
            AutoModelForSpeechSeq2Seq,
            AutoProcessor,
        )

        config = _load(folder, AutoConfig.from_pretrained)
        self._is_generative = bool(getattr(config, "is_encoder_decoder", False))
        kind = AutoModelForSpeechSeq2Seq if self._is_generative else AutoModelForCTC
        model = _load(folder, partial(kind.from_pretrained, use_safetensors=True))
        super().__init__(model, _load(folder, AutoProcessor.from_pretrained), device)
        self._last: tuple[bytes, str] = (b"", "")

    def __call__(self, source: Samples, result: Samples) -> float:
        return word_error_rate(self._source_text(source), self._text(result))

    def _source_text(self, source: Samples) -> str:
        # All sides are scored on one source after the other: its text is needed again at once.
        key = hashlib.sha256(source.tobytes()).digest()
        if self._last[0] != key:
            self._last = (key, self._text(source))
        return self._last[1]

    def _text(self, audio: Samples) -> str:
        import torch

        if self._is_generative:
            with torch.inference_mode():
                ids = self._model.generate(
                    **self._inputs(audio), do_sample=False, max_new_tokens=_MAX_TEXT_TOKENS
                )
            return str(self._processor.batch_decode(ids, skip_special_tokens=True)[0])
        ids = self._run(audio).logits.argmax(dim=-1)
        return str(self._processor.batch_decode(ids)[0])


class _Speaker(_Judge):
    """Cosine of the speaker embeddings of source and result."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

        load = partial(AutoModelForAudioXVector.from_pretrained, use_safetensors=True)
        extractor = _load(folder, AutoFeatureExtractor.from_pretrained)
        super().__init__(_load(folder, load), extractor, device)

    def __call__(self, source: Samples, result: Samples) -> float:
        one, other = (
            self._run(audio).embeddings[0].double().cpu().numpy() for audio in (source, result)
        )
        size = float(np.linalg.norm(one) * np.linalg.norm(other))
        if size == 0.0:
            raise NotMeasurableError("a speaker embedding is zero")
        return float(one @ other) / size


class _Opinion(_Judge):
    """Opinion score of the result alone."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

        load = partial(AutoModelForAudioClassification.from_pretrained, use_safetensors=True)
        model = _load(folder, load)
        if model.config.num_labels != 1:
            raise ConfigError(
                f"The opinion model {folder} has {model.config.num_labels} outputs: it must have "
                "one, the score."
            )
        super().__init__(model, _load(folder, AutoFeatureExtractor.from_pretrained), device)

    def __call__(self, source: Samples, result: Samples) -> float:
        return float(self._run(result).logits[0, 0])


def _load(folder: Path, load: Callable[..., Any]) -> Any:
    try:
        return load(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"The local model {folder} cannot be loaded ({reason}).") from error


def _digest(folder: Path) -> str:
    if not folder.is_dir():
        raise ConfigError(f"The local model {folder} is no folder: name one on this machine.")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"The local model {folder} holds no safetensors: convert it first.")
    digest = hashlib.sha256()
    for path in [*files, *sorted(folder.glob("*.json"))]:
        digest.update(f"{path.name} {sha256_of_file(path)}\n".encode())
    return digest.hexdigest()[:32]


def _words(text: str) -> list[str]:
    return re.sub(r"[^\w\s']", " ", text.lower()).split()
