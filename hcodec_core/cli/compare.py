"""The command ``compare``: two codecs, or one run in two ways, over the same files."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcodec_core.cli.output import Commands, Output, Table, add_json
from hcodec_core.errors import ConfigError
from hcodec_core.tokens import EncodeSettings

if TYPE_CHECKING:
    from hcodec_core.inference.comparison import Comparison, FileComparison, Refusal, Sounds
    from hcodec_core.inference.engine import Engine
    from hcodec_core.jobs import ModeAgreement


def add_commands(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "compare", help="codes and decoded audio of two codecs or two modes over the same files"
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files or folders")
    parser.add_argument("--codec", default="hcodec-nano", help="codec URI (default: hcodec-nano)")
    parser.add_argument("--mode", choices=("exact", "fast"), default="exact")
    parser.add_argument("--threshold", type=float, help="for codecs of variable rate")
    parser.add_argument("--gain", type=float, default=1.0, help="factor on the samples")
    parser.add_argument("--against-codec", default=None, help="second codec (default: the first)")
    parser.add_argument("--against-mode", choices=("exact", "fast"), default="exact")
    parser.add_argument("--against-threshold", type=float, default=None)
    parser.add_argument("--picture", type=Path, default=None, help="PNG of the first file to write")
    parser.add_argument(
        "--picture-seconds", type=float, default=8.0, help="how much of the file to draw"
    )
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the codecs")
    add_json(parser)
    parser.set_defaults(handler=_compare)


def _compare(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.inference.comparison import Comparison, FileComparison, audio_files

    missing = [path for path in options.paths if not path.exists()]
    if missing:
        raise ConfigError(f"{missing[0]} does not exist: name audio files or folders of them.")
    comparison = Comparison(_side(options, "against_"), _side(options, ""))
    _check_differs(comparison)
    found: list[FileComparison] = []
    refused: list[Refusal] = []
    with output.progress() as progress:
        bar = progress.add_task("files", total=len(audio_files(options.paths)))
        for outcome in comparison.files(options.paths):
            if isinstance(outcome, FileComparison):
                if options.picture is not None and not found:
                    _draw(outcome.sounds, comparison, options)
                found.append(outcome)
            else:
                refused.append(outcome)
            progress.advance(bar)
    if not found:
        raise ConfigError("No file could be compared: name audio that both codecs can encode.")
    _show(comparison, found, refused, output)


def _side(options: argparse.Namespace, prefix: str) -> Engine:
    from hcodec_core.inference.engine import Engine, compute_class
    from hcodec_core.models.loading import load_codec

    threshold = getattr(options, f"{prefix}threshold")
    if threshold is None and options.against_codec is None:
        threshold = options.threshold
    settings = EncodeSettings(
        mode=getattr(options, f"{prefix}mode"),
        threshold=threshold,
        gain=options.gain,
        compute_class=compute_class(options.device, options.threads),
    )
    uri = getattr(options, f"{prefix}codec") or options.codec
    return Engine(load_codec(uri, settings, device=options.device), options.threads)


def _check_differs(comparison: Comparison) -> None:
    first, second = (side.codec.spec for side in (comparison.first, comparison.second))
    if (first.encode_id, first.decode_id) == (second.encode_id, second.decode_id):
        raise ConfigError(
            "Both sides are the same: name another --against-codec or --against-threshold, or "
            "--mode fast."
        )


def _labels(comparison: Comparison) -> tuple[str, str]:
    first, second = (side.codec.spec for side in (comparison.first, comparison.second))

    def label(spec: Any) -> str:
        threshold = spec.settings.threshold
        words = [spec.name, spec.settings.mode, *([] if threshold is None else [f"{threshold:g}"])]
        return " ".join(words if spec.manifest.is_trained else [*words, "(random weights)"])

    return label(first), label(second)


def _draw(sounds: Sounds, comparison: Comparison, options: argparse.Namespace) -> None:
    from hcodec_core.inference.comparison import Sounds
    from hcodec_core.inference.pictures import draw_comparison

    size = int(options.picture_seconds * sounds.sample_rate)
    shown = Sounds(
        sounds.sample_rate, sounds.original[:size], sounds.first[:size], sounds.second[:size]
    )
    draw_comparison(shown, _labels(comparison), options.picture)


def _show(
    comparison: Comparison,
    found: list[FileComparison],
    refused: list[Refusal],
    output: Output,
) -> None:
    rate = comparison.first.codec.sample_rate
    agreement = None if comparison.tally is None else comparison.tally.result(rate)
    labels = _labels(comparison)
    if output.is_json:
        output.result(_document(labels, agreement, found, refused))
        return
    if agreement is None:
        output.note(f"{labels[1]} and {labels[0]} have other codebooks: no codes to compare.")
    else:
        output.table(*agreement_table(labels[1], labels[0], agreement))
    output.table(*_file_table(labels, found))
    for refusal in refused:
        output.note(f"{refusal.path} was not compared: {refusal.reason}")


def agreement_table(found: str, expected: str, agreement: ModeAgreement) -> Table:
    """How far codes agree, codebook by codebook; ``found`` and ``expected`` name the two sides."""
    heads = ("stream", "codebook", "frames", "equal", "holds")
    title = (
        f"Codes of {found} against {expected}: {agreement.num_clips} clips, "
        f"{agreement.audio_seconds:.1f} s; tokens begin together: F1 {agreement.boundary_f1:.4f}. "
        "Holds: of the frames whose codebooks before agree"
    )
    rows = [
        (
            depth.stream,
            depth.codebook + 1,
            depth.num_frames,
            _percent(depth.equal_share),
            _percent(depth.holding_share),
        )
        for depth in agreement.depths
    ]
    return title, heads, rows


def _file_table(labels: tuple[str, str], found: list[FileComparison]) -> Table:
    rows = [
        (
            file.path.name,
            f"{file.seconds:.2f}",
            f"{file.first.num_frames} / {file.second.num_frames}",
            f"{_db(file.first.distance.si_sdr_db)} / {_db(file.second.distance.si_sdr_db)}",
            f"{_db(file.first.distance.spectral_db)} / {_db(file.second.distance.spectral_db)}",
            _db(file.between.si_sdr_db),
            _db(file.between.spectral_db),
        )
        for file in found
    ]
    heads = (
        "file",
        "seconds",
        "tokens",
        "SI-SDR, dB",
        "log-spectral, dB",
        "SI-SDR between",
        "log-spectral between",
    )
    return f"Decoded audio against the original: {labels[0]} / {labels[1]}", heads, rows


def _document(
    labels: tuple[str, str],
    agreement: ModeAgreement | None,
    found: list[FileComparison],
    refused: list[Refusal],
) -> dict[str, Any]:
    def plain(values: dict[str, Any]) -> dict[str, Any]:
        """JSON has no infinity and no NaN."""
        return {
            key: plain(value)
            if isinstance(value, dict)
            else (None if isinstance(value, float) and not isfinite(value) else value)
            for key, value in values.items()
        }

    return {
        "first": labels[0],
        "second": labels[1],
        "agreement": None if agreement is None else agreement.model_dump(mode="json"),
        "files": [
            {
                "path": str(file.path),
                "seconds": file.seconds,
                "first": plain(asdict(file.first)),
                "second": plain(asdict(file.second)),
                "between": plain(asdict(file.between)),
            }
            for file in found
        ],
        "not_compared": [{"path": str(r.path), "reason": r.reason} for r in refused],
    }


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def _db(value: float) -> str:
    return f"{value:.2f}" if isfinite(value) else str(value)
