"""Measures that stand for ears: STOI, PESQ and DNSMOS. Nothing is downloaded.

DNSMOS runs the models that the package speechmos bundles, with its own steps around them (windows
of 9.01 s every second, its polynomials). The mel spectrogram of the P.808 model is computed here:
the package takes librosa for it, whose first call compiles for half a minute.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hcodec_core.audio.native import Samples
from hcodec_core.errors import HCodecError
from hcodec_core.evaluation.distances import magnitudes, mel_bank

SPEECH_RATE = 16_000
NARROW_RATE = 8_000

_DNSMOS_SECONDS = 9.01
_DNSMOS_FFT, _DNSMOS_HOP, _DNSMOS_MELS = 321, 160, 120
# Published polynomials from the model's raw scores to opinions (speechmos, not personalised).
_SPEECH_POLYNOMIAL = (-0.08397278, 1.22083953, 0.0052439)
_NOISE_POLYNOMIAL = (-0.13166888, 1.60915514, -0.39604546)
_OVERALL_POLYNOMIAL = (-0.06766283, 1.11546468, 0.04602535)


class NotMeasurableError(HCodecError):
    """A metric has no value for this file (silence, too short); says why."""


def stoi(reference: Samples, estimate: Samples, sample_rate: int) -> float:
    """Short-time objective intelligibility, 0 to 1 (arXiv-free: Taal et al., 2011).

    Raises ``NotMeasurableError`` when fewer than 30 windows are louder than -40 dB of the loudest.
    """
    from pystoi import stoi as measure

    if not np.any(reference):
        raise NotMeasurableError("the source is silent")
    with warnings.catch_warnings():
        # It warns and then returns 1e-5, which is no score.
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(measure(reference, estimate, sample_rate, extended=False))
        except RuntimeWarning as warning:
            raise NotMeasurableError("too little of the source is not silent") from warning


def pesq(reference: Samples, estimate: Samples, sample_rate: int) -> float:
    """PESQ (ITU-T P.862.2 wide-band at 16000 Hz, P.862 narrow-band at 8000 Hz).

    Raises ``NotMeasurableError`` when it finds no utterance or the audio is too short.
    """
    from pesq import PesqError
    from pesq import pesq as measure

    assert sample_rate in (SPEECH_RATE, NARROW_RATE)
    if not np.any(reference) or not np.any(estimate):
        raise NotMeasurableError("source or result is silent")
    band = "wb" if sample_rate == SPEECH_RATE else "nb"
    try:
        return float(measure(sample_rate, reference, estimate, band))
    except PesqError as error:
        raise NotMeasurableError(_pesq_reason(error)) from error


class Dnsmos:
    """Opinions of listeners, estimated without a reference (arXiv 2110.01763)."""

    def __init__(self, num_threads: int = 1) -> None:
        """Load the bundled models. Raises ``ImportError`` when the packages are not installed."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = num_threads
        self._primary, self._p808 = (
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            for path in _model_paths()
        )
        self._bank = mel_bank(_DNSMOS_MELS, _DNSMOS_FFT, SPEECH_RATE)

    def scores(self, audio: Samples) -> dict[str, float]:
        """``ovrl``, ``sig``, ``bak``, ``p808`` of float [N] at 16 kHz; cut to -1..1 first.

        Raises ``NotMeasurableError`` without samples.
        """
        if not len(audio):
            raise NotMeasurableError("there are no samples")
        length = int(_DNSMOS_SECONDS * SPEECH_RATE)
        whole = np.clip(audio, -1.0, 1.0).astype(np.float32)
        while len(whole) < length:
            whole = np.concatenate((whole, whole))
        num_windows = int(len(whole) / SPEECH_RATE - _DNSMOS_SECONDS) + 1
        windows = [whole[k * SPEECH_RATE :][:length] for k in range(num_windows)]
        found = np.array([self._window(part) for part in windows if len(part) == length])
        means = found.mean(axis=0)
        return dict(zip(("ovrl", "sig", "bak", "p808"), map(float, means), strict=True))

    def _window(self, part: Samples) -> tuple[float, float, float, float]:
        speech, noise, overall = self._primary.run(None, {"input_1": part[None]})[0][0]
        levels = self._mel_levels(part[:-160]).astype(np.float32)
        p808 = self._p808.run(None, {"input_1": levels[None]})[0][0][0]
        return (
            float(np.polyval(_OVERALL_POLYNOMIAL, overall)),
            float(np.polyval(_SPEECH_POLYNOMIAL, speech)),
            float(np.polyval(_NOISE_POLYNOMIAL, noise)),
            float(p808),
        )

    def _mel_levels(self, audio: Samples) -> npt.NDArray[np.float64]:
        frames = magnitudes(audio, _DNSMOS_FFT, _DNSMOS_FFT, _DNSMOS_HOP)
        power = np.concatenate([np.square(part) for part in frames]) @ self._bank.T
        levels = 10 * np.log10(np.maximum(power, 1e-10))
        levels -= 10 * np.log10(max(float(power.max()), 1e-10))
        shown: npt.NDArray[np.float64] = (np.maximum(levels, levels.max() - 80.0) + 40) / 40
        return shown


def _model_paths() -> tuple[Path, Path]:
    found = find_spec("speechmos")
    if found is None or not found.submodule_search_locations:
        raise ImportError("speechmos is not installed")
    folder = Path(found.submodule_search_locations[0]) / "dnsmos_models"
    return folder / "sig_bak_ovr.onnx", folder / "model_v8.onnx"


def _pesq_reason(error: Any) -> str:
    text = error.args[0] if error.args else type(error).__name__
    reason = text.decode() if isinstance(text, bytes) else str(text)
    return f"PESQ says: {reason.lower()}"
