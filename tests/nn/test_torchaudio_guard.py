import subprocess
import sys

CODE = """
from hcodec_core.nn.torchaudio_guard import guard_torchaudio
guard_torchaudio()
guard_torchaudio()
import torch, torchaudio
from transformers import HubertModel
resampled = torchaudio.functional.resample(torch.ones(1, 4800), 48000, 16000)
print(resampled.shape[1], HubertModel.__name__)
"""


def test_torchaudio_and_transformers_import_beside_this_torch():
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1600", "HubertModel"]
