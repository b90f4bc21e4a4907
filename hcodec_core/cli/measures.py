"""Commands that measure a promise: ``invariance``, ``seams``."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hcodec_core.cli.output import Commands, Output, Table, add_json
from hcodec_core.errors import EXIT_FAILURE, EXIT_OK, ConfigError
from hcodec_core.tokens import EncodeSettings, ShapeRule

if TYPE_CHECKING:
    from hcodec_core.inference.engine import Clip, Engine
    from hcodec_core.inference.invariance import Agreement, Difference
    from hcodec_core.inference.seams import SeamReport


def add_commands(commands: Commands) -> None:
    """Register the commands."""
    parser = commands.add_parser(
        "invariance", help="measure whether codes depend on batch, threads or device"
    )
    parser.add_argument("--codec", default="hcodec-nano", help="codec URI (default: hcodec-nano)")
    parser.add_argument("--preset", default=None, help="measure this preset with random weights")
    parser.add_argument("--threshold", type=float, default=None, help="for codecs of variable rate")
    parser.add_argument("--audio", type=Path, default=None, help="file or folder (else synthetic)")
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--clips", type=int, default=64, help="different clips to draw from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch shape (default: 8)")
    parser.add_argument("--mode", choices=("exact", "fast"), default="exact")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--other-threads", type=int, default=None, help="also compare with these")
    parser.add_argument("--other-device", default=None, help="also compare with this device")
    add_json(parser)
    parser.set_defaults(handler=_invariance)
    _add_seams(commands)


def _add_seams(commands: Commands) -> None:
    parser = commands.add_parser(
        "seams", help="measure what cutting long audio into segments costs near the cuts"
    )
    parser.add_argument("--codec", default="hcodec-nano", help="codec URI (default: hcodec-nano)")
    parser.add_argument("--audio", type=Path, default=None, help="file or folder (else synthetic)")
    parser.add_argument("--seconds", type=float, default=240.0, help="of audio (default: 240)")
    parser.add_argument("--segment-seconds", type=float, default=60.0)
    parser.add_argument("--halo-seconds", type=float, nargs="+", default=[2.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    add_json(parser)
    parser.set_defaults(handler=_seams)


def _invariance(options: argparse.Namespace, output: Output) -> int:
    if options.preset is None:
        return _measure_invariance(options, output)
    from hcodec_core.models.random_weights import write_random_codec

    with tempfile.TemporaryDirectory(prefix="hcodec-") as folder:
        write_random_codec(options.preset, Path(folder), options.seed)
        options.codec = folder
        return _measure_invariance(options, output)


def _measure_invariance(options: argparse.Namespace, output: Output) -> int:
    from hcodec_core.inference.invariance import compare_engines, measure_invariance

    if options.batches < 1 or options.clips < 1:
        raise ConfigError("--batches and --clips must be at least 1.")
    engine = _engine(options, options.device, options.threads)
    clips = _clips(options, engine)
    with output.progress() as progress:
        bar = progress.add_task("batches", total=options.batches)
        report = measure_invariance(
            engine,
            clips,
            options.batches,
            options.seed,
            lambda done: progress.update(bar, completed=done),
        )
    title = (
        f"{_name_of(engine)}, mode {options.mode}, {options.device}: {report.num_clips} clips in "
        f"{report.num_batches} random batches against each clip alone"
    )
    tables = [_agreement_table(title, report.agreement)]
    holds = report.agreement.is_complete or options.mode == "fast"
    if options.other_threads or options.other_device:
        other = _engine(options, options.other_device or options.device, options.other_threads or 1)
        agreement, differences = compare_engines(engine, other, clips)
        tables += [
            _agreement_table(f"{len(clips)} clips, second engine against the first", agreement),
            _difference_table(differences),
        ]
        holds = holds and all(difference.is_near_tie for difference in differences)
    output.tables(tables)
    return EXIT_OK if holds else EXIT_FAILURE


def _name_of(engine: Engine) -> str:
    manifest = engine.codec.spec.manifest
    return manifest.name if manifest.is_trained else f"{manifest.name} (random weights)"


def _seams(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.inference.seams import measure_seams

    whole = _plain_engine(options, segment_seconds=options.seconds + 60)
    clip = _long_clip(options, whole.codec.sample_rate)
    tables = []
    for halo in options.halo_seconds:
        rule = {"segment_seconds": options.segment_seconds, "halo_seconds": halo}
        report = measure_seams(_plain_engine(options, **rule), whole, clip)
        tables.append(_seam_table(options, halo, report))
    output.tables(tables)


def _plain_engine(options: argparse.Namespace, **rule: float) -> Engine:
    from hcodec_core.inference.engine import Engine, compute_class
    from hcodec_core.models.loading import load_codec

    here = compute_class(options.device, options.threads)
    settings = EncodeSettings.model_validate({"compute_class": here, **rule})
    return Engine(load_codec(options.codec, settings, device=options.device), options.threads)


def _long_clip(options: argparse.Namespace, sample_rate: int) -> Clip:
    import numpy as np

    from hcodec_core.inference.invariance import LONGEST_SECONDS, synthetic_clips

    if options.audio is None:
        count = int(options.seconds / LONGEST_SECONDS * 4) + 2
        parts = synthetic_clips(sample_rate, count, options.seed)
    else:
        parts = _recordings(options.audio, sample_rate)
    num_samples = int(options.seconds * sample_rate)
    if not any(map(len, parts)):
        raise ConfigError(f"No file in {options.audio} could be decoded: name audio.")
    sound: Clip = np.resize(np.concatenate(parts), num_samples)  # repeats what is too short
    return sound


def _seam_table(options: argparse.Namespace, halo: float, report: SeamReport) -> Table:
    title = (
        f"{options.codec}: {options.seconds:g} s, segments of {options.segment_seconds:g} s, halo "
        f"{halo:g} s, {report.num_cuts} cuts; largest step of the difference {report.step_db:.1f} "
        f"dB at cuts, {report.step_elsewhere_db:.1f} dB elsewhere"
    )
    books = sorted({key for band in report.bands for key in band.equal})
    rows = [
        (
            _band(band.lower_seconds, band.upper_seconds),
            band.num_frames,
            *(f"{100 * band.equal[book]:.1f} %" if band.equal else "" for book in books),
            "" if band.wave_db is None else f"{band.wave_db:.1f} dB",
        )
        for band in report.bands
    ]
    heads = [f"{stream} {book + 1}" for stream, book in books]
    return title, ("seconds from a cut", "frames", *heads, "audio differs by"), rows


def _band(lower: float, upper: float | None) -> str:
    return f"{lower:g} and more" if upper is None else f"{lower:g} to {upper:g}"


def _engine(options: argparse.Namespace, device: str, threads: int) -> Engine:
    from hcodec_core.inference.engine import Engine, compute_class
    from hcodec_core.models.loading import load_codec

    settings = EncodeSettings(
        mode=options.mode,
        threshold=options.threshold,
        compute_class=compute_class(device, threads),
        shapes=ShapeRule(max_rows=options.rows),
    )
    return Engine(load_codec(options.codec, settings, device=device), threads)


def _clips(options: argparse.Namespace, engine: Engine) -> list[Clip]:
    from hcodec_core.inference.invariance import cut_clips, synthetic_clips

    rate = engine.codec.sample_rate
    if options.audio is None:
        return synthetic_clips(rate, options.clips, options.seed)
    recordings = _recordings(options.audio, rate)
    if not recordings:
        raise ConfigError(f"No file in {options.audio} could be decoded: name a folder of audio.")
    return cut_clips(recordings, rate, options.clips, options.seed)


def _recordings(folder: Path, sample_rate: int) -> list[Clip]:
    from hcodec_core.audio.decode import DecodeSettings, decode_all
    from hcodec_core.errors import AudioError

    recordings = []
    paths = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    for path in paths:
        try:
            recordings.append(decode_all(path, DecodeSettings(sample_rate=sample_rate))[0])
        except AudioError:
            continue  # whatever is no audio is not measured
    return recordings


def _agreement_table(title: str, agreement: Agreement) -> Table:
    rows = [
        (stream, book + 1, total, f"{100 * agreement.equal[stream, book] / total:.4f} %")
        for (stream, book), total in sorted(agreement.total.items())
    ]
    if agreement.num_length_faults:
        rows.append(("lengths differ", 0, agreement.num_length_faults, "0 %"))
    return title, ("stream", "codebook", "codes", "equal"), rows


def _difference_table(differences: list[Difference]) -> Table:
    return (
        f"{len(differences)} frames differ; float64 margin of their first differing decision",
        ("clip", "stream", "codebook", "frame", "margin", "near tie"),
        [
            (d.clip, d.stream, d.codebook + 1, d.frame, f"{d.margin:.1e}", d.is_near_tie)
            for d in differences
        ],
    )
