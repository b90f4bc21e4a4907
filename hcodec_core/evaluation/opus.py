"""The baseline ``opus6``: libopus at its floor of 6 kbit/s, through PyAV. Evaluation only."""

from __future__ import annotations

import io
import time
from typing import Any

import numpy as np

from hcodec_core.audio.native import Samples
from hcodec_core.evaluation.documents import SideFacts
from hcodec_core.evaluation.scoring import resampled
from hcodec_core.evaluation.sides import Transcoded

_NATIVE_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)


class Opus:
    """Opus in voice mode at a variable bit rate around the one named, at ``sample_rate``.

    Variable rate, as libopus does by default: on speech at 6 kbit/s a constant one scored 0.2 less
    in PESQ and spent more bits.
    """

    def __init__(self, sample_rate: int, kilobits: int = 6) -> None:
        """``kilobits``: thousands of bits per second. Audio is coded at a rate that Opus knows."""
        self._bits_per_second = 1000 * kilobits
        self._coded_rate = min(r for r in _NATIVE_RATES if r >= min(sample_rate, 48_000))
        self._facts = SideFacts(
            name=f"opus{kilobits}",
            uri=f"baseline:opus{kilobits}",
            sample_rate=sample_rate,
            nominal_bits_per_second=float(self._bits_per_second),
        )

    @property
    def facts(self) -> SideFacts:
        """See ``CodecUnderTest``."""
        return self._facts

    def transcode(self, clip: Samples) -> Transcoded:
        """See ``CodecUnderTest``. Bits are those of the packets, without the container."""
        begun = time.perf_counter()
        coded = resampled(clip, self._facts.sample_rate, self._coded_rate)
        stream, num_bytes = self._encode(coded)
        encoded = time.perf_counter()
        found, rate = _decode(stream)
        audio = np.zeros_like(clip)
        whole = resampled(found, rate, self._facts.sample_rate)[: len(clip)]
        audio[: len(whole)] = whole
        done = time.perf_counter()
        return Transcoded(audio, encoded - begun, done - encoded, num_bits=8 * num_bytes)

    def _encode(self, audio: Samples) -> tuple[bytes, int]:
        import av

        buffer = io.BytesIO()
        num_bytes = 0
        with av.open(buffer, "w", format="ogg") as container:
            options = {"application": "voip", "vbr": "on"}
            stream: Any = container.add_stream(
                "libopus", rate=self._coded_rate, layout="mono", options=options
            )
            stream.bit_rate = self._bits_per_second
            frame = av.AudioFrame.from_ndarray(audio[None], format="flt", layout="mono")
            frame.sample_rate, frame.pts = self._coded_rate, 0
            for packet in [*stream.encode(frame), *stream.encode(None)]:
                num_bytes += packet.size
                container.mux(packet)
        return buffer.getvalue(), num_bytes


def _decode(stream: bytes) -> tuple[Samples, int]:
    import av

    with av.open(io.BytesIO(stream), "r") as container:
        parts = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
        rate = int(container.streams.audio[0].rate)
    return np.concatenate(parts).astype(np.float32), rate
