"""What a run sounds and looks like: reconstructions of held-out clips as wav and spectrograms."""

from __future__ import annotations

import io

from hcodec_core.audio.measures import spectrogram
from hcodec_core.audio.native import Samples

_DEPTH_DB = 80.0


def wav_bytes(audio: Samples, sample_rate: int) -> bytes:
    """A 16-bit wav file of float32 [N]."""
    import soundfile

    sink = io.BytesIO()
    soundfile.write(sink, audio.clip(-1, 1), sample_rate, format="WAV", subtype="PCM_16")
    return sink.getvalue()


def picture_bytes(original: Samples, decoded: Samples, sample_rate: int, title: str) -> bytes:
    """A PNG of two spectrograms on one scale; empty when matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return b""
    figure = Figure(figsize=(9.0, 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    levels = [spectrogram(audio, sample_rate) for audio in (original, decoded)]
    top = max(float(part.max()) for part in levels)
    extent = (0.0, len(original) / sample_rate, 0.0, sample_rate / 2000)
    for axis, part, name in zip(
        figure.subplots(2, 1), levels, ("original", "decoded"), strict=True
    ):
        axis.imshow(
            part, origin="lower", aspect="auto", extent=extent, vmin=top - _DEPTH_DB, vmax=top
        )
        axis.set_title(f"{title}: {name}", loc="left", fontsize=10)
        axis.set_ylabel("kHz")
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=90)
    return sink.getvalue()
