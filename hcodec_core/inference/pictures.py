"""Spectrograms of a comparison as a picture: original, both sides, and how these two differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hcodec_core.audio.measures import Levels, spectrogram
from hcodec_core.errors import ConfigError
from hcodec_core.inference.comparison import Sounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DEPTH_DB = 80.0
_DIFFERENCE_DB = 30.0
_SIZE_INCHES = (11.0, 11.0)


def draw_comparison(sounds: Sounds, labels: tuple[str, str], path: Path) -> None:
    """Write a PNG of four spectrograms, one above the other, on common scales.

    Original, first side, second side, and the level of the second less that of the first; time in
    seconds, frequency in kHz, levels in dB of full scale.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "Drawing needs matplotlib, which is not installed: install this package with the extra "
            "'train', or leave the picture out."
        ) from error
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(4, 1, sharex=True, sharey=True)
    original, first, second = (
        spectrogram(audio, sounds.sample_rate)
        for audio in (sounds.original, sounds.first, sounds.second)
    )
    top = max(float(levels.max()) for levels in (original, first, second))
    scale = {"cmap": "magma", "vmin": top - _DEPTH_DB, "vmax": top}
    titles = ("original", *labels)
    for axis, levels, title in zip(axes, (original, first, second), titles, strict=False):
        image = _draw(axis, levels, title, sounds, scale)
    figure.colorbar(image, ax=list(axes[:3]), label="level, dB of full scale", shrink=0.5)
    around = {"cmap": "RdBu_r", "vmin": -_DIFFERENCE_DB, "vmax": _DIFFERENCE_DB}
    title = f"{labels[1]} less {labels[0]}"
    difference = _draw(axes[3], _shown(second, top) - _shown(first, top), title, sounds, around)
    figure.colorbar(difference, ax=axes[3], label="difference, dB")
    axes[3].set_xlabel("time, s")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The picture {path} cannot be written: {error}.") from error


def _draw(axis: Axes, levels: Levels, title: str, sounds: Sounds, scale: dict[str, Any]) -> Any:
    seconds = len(sounds.original) / sounds.sample_rate
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_ylabel("frequency, kHz")
    return axis.imshow(
        levels,
        origin="lower",
        aspect="auto",
        extent=(0.0, seconds, 0.0, sounds.sample_rate / 2000),
        interpolation="nearest",
        **scale,
    )


def _shown(levels: Levels, top: float) -> Levels:
    """Levels no lower than what the pictures show: differences between two silences are none."""
    shown: Levels = np.maximum(levels, top - _DEPTH_DB)
    return shown
