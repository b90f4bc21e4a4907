from pathlib import Path

import numpy as np
import pytest
import torch

from hcodec_core.models.hcodec.convert import golden_cases
from hcodec_core.models.hcodec.frame_rates import measure_frame_rates
from hcodec_core.models.loading import load_codec
from hcodec_core.tokens import EncodeSettings

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "tests" / "golden" / "hcodec-1.5-tiny"


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    path = golden_cases(FOLDER, tmp_path_factory.mktemp("golden"))[0].codec_path
    return load_codec(str(path), EncodeSettings(compute_class="cpu-test", threshold=0.9))


@pytest.fixture(scope="module")
def clips():
    with np.load(FOLDER / "expected.npz") as arrays:
        return [arrays["wav_0"], arrays["wav_1"]]


def documented():
    """Rows of the table in the document: threshold -> the other numbers."""
    rows = {}
    for line in (ROOT / "docs" / "hcodec-1.5.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0][:1].isdigit():
            numbers = [float(cell.split(" ")[0]) for cell in cells]
            rows[numbers[0]] = numbers[1:]
    return rows


def test_the_documented_table_is_what_is_measured(codec, clips):
    table = documented()
    assert len(table) >= 8
    rates = measure_frame_rates(codec, clips, list(table))
    for rate in rates:
        found = [
            round(rate.tokens_per_second, 1),
            round(rate.bits_per_second),
            round(100 * rate.span_shares[0]),
            round(100 * rate.span_shares[7]),
        ]
        assert found == table[rate.threshold], rate


def test_it_counts_what_encoding_gives(codec, clips):
    (rate,) = measure_frame_rates(codec, clips, [0.9])
    spans = []
    for clip in clips:
        tokens = codec.encode(torch.from_numpy(clip)[None, None], torch.tensor([len(clip)]))
        spans += tokens.frame_spans[0, : tokens.num_frames[0]].tolist()
    assert rate.num_tokens == len(spans)
    assert rate.audio_seconds == sum(map(len, clips)) / 16000
    assert rate.bits_per_token == 8 * 6 + 3
    shares = np.bincount(spans, minlength=9)[1:] / len(spans)
    assert rate.span_shares == pytest.approx(shares.tolist())
