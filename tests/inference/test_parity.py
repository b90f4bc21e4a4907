import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hcodec_core.errors import ConfigError
from hcodec_core.inference.parity import run_parity

FOLDER = Path(__file__).parents[1] / "golden" / "hcodec-1.0-tiny"


def test_hcodec_1_0_agrees_with_the_published_code():
    rows = run_parity([FOLDER])
    assert [row.case for row in rows] == ["wav_0", "wav_1", "wav_2"]
    for row in rows:
        assert row.num_equal == row.num_codes > 0
        assert row.num_ties == 0
        assert row.wave_difference < 1e-4
        assert row.agrees
    assert sum(row.num_codes for row in rows) == 1136


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
