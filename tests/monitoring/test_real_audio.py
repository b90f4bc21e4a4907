"""Codes of real audio by hcodec-nano: silence where nothing changed, drift where something did."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hcodec_core.audio.decode import DecodeSettings, decode_all
from hcodec_core.cli import main
from hcodec_core.codecs import load_manifest
from hcodec_core.monitoring.documents import StatisticDrift
from hcodec_core.monitoring.judging import judge
from hcodec_core.monitoring.profiles import Profile

pytestmark = pytest.mark.slow

CORPUS = Path(__file__).parents[1] / "corpus"
RATE = 16000
PIECE = 24000  # samples
NUM_WINDOWS = 100
NUM_REFERENCE, NUM_WINDOW = 60, 30
DECLARED = 0.2
Audio = npt.NDArray[np.float32]


def _lowpass(audio: Audio) -> Audio:
    """Nothing above 1 kHz, as over a bad line."""
    spectrum = np.fft.rfft(audio)
    spectrum[np.fft.rfftfreq(len(audio), 1 / RATE) > 1000] = 0
    return np.fft.irfft(spectrum, len(audio)).astype(np.float32)


CHANGES: dict[str, tuple[set[str], Callable[[Audio], Audio]]] = {
    "speech": ({"speech"}, lambda audio: audio),
    "music": ({"music", "noise"}, lambda audio: audio),
    "lowpass": ({"speech"}, _lowpass),
    "quiet": ({"speech"}, lambda audio: audio / 4),
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> dict[str, pa.Table]:
    """Rows of pieces of 1.5 s of the sample corpus: as they are, and changed."""
    folder = tmp_path_factory.mktemp("pieces")
    clips = [
        entry
        for entry in json.loads((CORPUS / "manifest.json").read_text())
        if entry["expected"] == "decoded" and entry["seconds"] >= PIECE / RATE
    ]
    made = {}
    for name, (kinds, change) in CHANGES.items():
        (folder / name).mkdir()
        chosen = [clip for clip in clips if clip["kind"] in kinds]
        for number, clip in enumerate(chosen):
            audio = decode_all(CORPUS / "clips" / clip["file"], DecodeSettings(sample_rate=RATE))[0]
            _write_pieces(folder / name, number, change(np.asarray(audio).reshape(-1)))
        out = folder / f"{name}.parquet"
        assert main(["encode", str(folder / name), "--out", str(out)]) == 0
        made[name] = pq.read_table(out)
    return made


def _write_pieces(folder: Path, number: int, audio: Audio) -> None:
    for place in range(len(audio) // PIECE):
        piece = audio[place * PIECE : (place + 1) * PIECE]
        with wave.open(str(folder / f"{number:02}-{place:02}.wav"), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes((np.clip(piece, -1, 1) * 32767).astype("<i2").tobytes())


def _profile(rows: pa.Table) -> Profile:
    return Profile(load_manifest("hcodec-nano")).fill(rows.combine_chunks().to_batches())


def _judged(reference: pa.Table, window: pa.Table, rate: float, draws: int) -> list[StatisticDrift]:
    return judge(
        _profile(reference),
        _profile(window),
        false_alarm_rate=rate,
        least_psi=0.0,
        num_draws=draws,
    )


def _moved(found: list[StatisticDrift]) -> list[str]:
    return [statistic.name for statistic in found if statistic.is_drifted]


def test_resampled_speech_drifts_at_the_declared_rate(tokens):
    speech = tokens["speech"]
    rng = np.random.default_rng(7)
    num_hits = 0
    for _ in range(NUM_WINDOWS):
        order = rng.permutation(len(speech))[: NUM_REFERENCE + NUM_WINDOW]
        reference, window = order[:NUM_REFERENCE], order[NUM_REFERENCE:]
        found = _judged(speech.take(reference), speech.take(window), DECLARED, 59)
        num_hits += bool(_moved(found))
    print(f"{num_hits} of {NUM_WINDOWS} windows without change drifted; declared: {DECLARED}")
    # 20 expected, four standard deviations are 16.
    assert 4 <= num_hits <= 36


@pytest.mark.parametrize("change", ["music", "lowpass", "quiet"])
def test_a_real_change_is_seen_every_time(tokens, change):
    speech, changed = tokens["speech"], tokens[change]
    for seed in range(5):
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(speech))
        # The same speech must not be on both sides, once plain and once changed.
        others = order[NUM_REFERENCE:] if len(changed) == len(speech) else np.arange(len(changed))
        window = rng.permutation(others)[:NUM_WINDOW]
        found = _judged(speech.take(order[:NUM_REFERENCE]), changed.take(window), 0.01, 400)
        print(change, _moved(found))
        if change == "quiet":
            assert "loudness" in _moved(found)
        else:
            assert {"semantic", "acoustic"} & {name.split()[0] for name in _moved(found)}
