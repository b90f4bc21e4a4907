import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hcodec_core.errors import ConfigError
from hcodec_core.inference.engine import compute_class
from hcodec_core.inference.parity import TIE_MARGIN, run_parity
from hcodec_core.inference.spans import start_margins
from hcodec_core.models.hcodec.convert import golden_cases
from hcodec_core.models.hcodec.offset_ids import join_offset_ids
from hcodec_core.models.loading import load_codec
from hcodec_core.tokens import EncodeSettings

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDER = GOLDEN / "hcodec-1.0-tiny"
ADAPTIVE = GOLDEN / "hcodec-1.5-tiny"


@pytest.mark.parametrize(
    ("version", "cases", "num_codes"),
    [
        ("1.0", ["wav_0", "wav_1", "wav_2"], 1136),
        (
            "1.5",
            [f"wav_{i}{thr}" for i in (0, 1) for thr in ("", "_thr900", "_thr970", "_thr995")],
            1360,
        ),
        ("2.0", ["wav_0"], 160),
    ],
)
def test_hcodec_agrees_with_the_published_code(version, cases, num_codes):
    rows = run_parity([GOLDEN / f"hcodec-{version}-tiny"])
    assert [row.case for row in rows] == cases
    for row in rows:
        assert row.num_equal == row.num_codes > 0
        assert row.num_ties == row.num_boundary_ties == 0
        assert row.wave_difference < 1e-4
        assert row.agrees
    assert rows[0].wave_difference > 0
    assert sum(row.num_codes for row in rows) == num_codes


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "golden")
    with np.load(FOLDER / "expected.npz") as arrays:
        return tmp_path / "golden", dict(arrays)


def test_a_wrong_code_is_found(copy):
    folder, arrays = copy
    arrays["semantic_0"][1, 3] ^= 1
    arrays["semantic_0"][3, 5] ^= 1
    np.savez(folder / "expected.npz", **arrays)
    first, *others = run_parity([folder])
    assert first.num_codes - first.num_equal == 2
    assert first.num_ties == 0
    assert not first.agrees
    assert all(row.agrees for row in others)


def test_a_wrong_waveform_is_found(copy):
    folder, arrays = copy
    arrays["recon_1"][77] += 0.01 * np.abs(arrays["recon_1"]).max()
    np.savez(folder / "expected.npz", **arrays)
    rows = run_parity([folder])
    assert [row.agrees for row in rows] == [True, False, True]
    assert rows[1].wave_difference == pytest.approx(0.01, rel=0.05)


def test_another_number_of_frames_is_found(copy):
    folder, arrays = copy
    arrays["acoustic_2"] = arrays["acoustic_2"][:, :-1]
    arrays["semantic_2"] = arrays["semantic_2"][:, :-1]
    arrays["recon_2"] = arrays["recon_2"][:-640]
    np.savez(folder / "expected.npz", **arrays)
    assert not run_parity([folder])[2].agrees


@pytest.fixture
def spectral_copy(tmp_path):
    """H-Codec 2.0, whose phases of all but empty bins are decided by rounding, as published."""
    shutil.copytree(GOLDEN / "hcodec-2.0-tiny", tmp_path / "golden")
    with np.load(tmp_path / "golden" / "expected.npz") as arrays:
        return tmp_path / "golden", dict(arrays)


def recorded_elsewhere(folder, work, codes):
    """Codes as a machine might give them that rounds otherwise: of the clip with unheard noise."""
    (case,) = golden_cases(folder, work)
    codec = load_codec(str(case.codec_path), EncodeSettings(compute_class=compute_class("cpu")))
    audio = torch.from_numpy(case.audio)[None, None]
    noise = torch.Generator().manual_seed(9)
    for _ in range(64):
        other = audio + 2.0**-26 * audio.abs().max() * torch.randn(audio.shape, generator=noise)
        found = codec.encode(other, torch.tensor([audio.shape[2]])).clip(0)["acoustic"]
        if not np.array_equal(found, codes):
            return found
    raise AssertionError("nothing depends on rounding: 2.0 was thought to")


def test_codes_that_rounding_decides_are_counted_and_accepted(spectral_copy, tmp_path):
    folder, arrays = spectral_copy
    recorded = arrays["acoustic_0"]
    arrays["acoustic_0"] = recorded_elsewhere(folder, tmp_path, recorded)
    np.savez(folder / "expected.npz", **arrays)
    (row,) = run_parity([folder])
    assert row.num_equal < row.num_codes
    assert row.num_ties == 0
    # The recorded audio is of other codes, so the row as a whole does not agree.
    assert row.num_unsteady == (arrays["acoustic_0"] != recorded).any(axis=0).sum() > 0


def test_a_wrong_code_of_a_steady_frame_is_found_there_too(spectral_copy):
    folder, arrays = spectral_copy
    arrays["semantic_0"][0, :] ^= 1
    np.savez(folder / "expected.npz", **arrays)
    (row,) = run_parity([folder])
    assert row.num_unsteady < arrays["semantic_0"].shape[1]
    assert not row.agrees


def test_a_near_tie_is_counted_and_accepted(copy):
    """Two equal entries: which of them is taken is a matter of taste."""
    from safetensors.torch import load_file, save_file

    folder, arrays = copy
    state = load_file(folder / "codec.safetensors")
    book = state["quantizer.layers.3._codebook.embed"]
    used = int(arrays["acoustic_0"][3, 4])
    unused = next(
        code
        for code in range(book.shape[1])
        if not any((arrays[f"acoustic_{i}"][3] == code).any() for i in range(3))
    )
    book[0, unused] = book[0, used]
    save_file(state, folder / "codec.safetensors")
    wanted, other = max(used, unused), min(used, unused)
    for i in range(3):
        codes = arrays[f"acoustic_{i}"]
        codes[3][codes[3] == other] = wanted
    np.savez(folder / "expected.npz", **arrays)
    rows = run_parity([folder])
    assert rows[0].num_ties == rows[0].num_codes - rows[0].num_equal > 0
    assert all(row.agrees for row in rows)


def test_unknown_folders_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no golden folder"):
        run_parity([tmp_path])
    (tmp_path / "config.json").write_text(json.dumps({"version": "0.1"}))
    with pytest.raises(ConfigError, match="No codec family knows"):
        run_parity([tmp_path])


def adaptive_codec(tmp_path, threshold):
    path = tmp_path / "codec" / ADAPTIVE.name
    if not path.is_dir():
        golden_cases(ADAPTIVE, tmp_path / "codec")
    settings = EncodeSettings(compute_class=compute_class("cpu"), threshold=threshold)
    return load_codec(str(path), settings)


def record(tmp_path, audio, named, threshold):
    """A golden folder whose one case claims threshold ``named``; recorded at ``threshold``."""
    codec = adaptive_codec(tmp_path, threshold)
    tokens = codec.encode(torch.from_numpy(audio)[None, None], torch.tensor([len(audio)]))
    spans = tokens.frame_spans[0, : tokens.num_frames[0]]
    ids = join_offset_ids(tokens.clip(0), spans, codebook_size=64)
    folder = tmp_path / "golden"
    shutil.copytree(ADAPTIVE, folder, dirs_exist_ok=True)
    name = f"0_thr{round(1000 * named):03d}"
    arrays = {f"{stream}_{name}": values for stream, values in ids.items()}
    np.savez(folder / "expected.npz", wav_0=audio, **arrays)
    return folder


@pytest.fixture
def near_tie(tmp_path):
    """A clip, a threshold of three digits, and one of its similarities next to that."""
    with np.load(ADAPTIVE / "expected.npz") as arrays:
        audio = arrays["wav_1"]
    margins = start_margins(adaptive_codec(tmp_path, 0.9).double(), audio)[1:]
    similarities = margins + 0.9
    trained = similarities[(similarities > 0.7) & (similarities < 0.99)]
    distances = np.abs(trained - trained.round(3))
    nearest = trained[distances.argmin()]
    assert 1e-7 < distances.min() < TIE_MARGIN
    return audio, float(nearest.round(3)), float(nearest)


def test_a_boundary_next_to_the_threshold_is_counted_and_accepted(tmp_path, near_tie):
    audio, threshold, similarity = near_tie
    # On the other side of the similarity: the recorded decision goes the other way there.
    folder = record(tmp_path, audio, threshold, 2 * similarity - threshold)
    (row,) = run_parity([folder])
    assert row.num_boundary_ties == 1
    assert row.num_equal == row.num_codes > 0
    assert row.agrees


def test_a_wrong_boundary_is_found(tmp_path, near_tie):
    audio, threshold, _ = near_tie
    (row,) = run_parity([record(tmp_path, audio, threshold, threshold + 0.03)])
    assert not row.agrees
    (row,) = run_parity([record(tmp_path, audio, threshold, threshold)])
    assert row.agrees
