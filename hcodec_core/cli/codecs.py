"""Commands about codecs: ``codecs``, ``convert``, ``parity``."""

from __future__ import annotations

import argparse
from fractions import Fraction
from math import log2
from pathlib import Path
from typing import Any

from hcodec_core.cli.output import Commands, Output, add_json
from hcodec_core.errors import EXIT_FAILURE, EXIT_OK
from hcodec_core.tokens import CodecManifest, StreamSpec


def add_commands(commands: Commands) -> None:
    """Register the commands."""
    listing = commands.add_parser("codecs", help="list the codecs and what is known of them")
    listing.add_argument("--all", action="store_true", help="also the tiny ones of the tests")
    add_json(listing)
    listing.set_defaults(handler=_codecs)

    convert = commands.add_parser("convert", help="turn a released checkpoint into a codec folder")
    convert.add_argument("checkpoint", type=Path, help="released file (.pt, .pth, .safetensors)")
    convert.add_argument("--family", default="hcodec", help="codec family (default: hcodec)")
    convert.add_argument("--ssl", default=None, help="folder or hub id of the SSL model")
    convert.add_argument(
        "--model-config",
        type=Path,
        help="the family's configuration file, where shapes do not tell",
    )
    convert.add_argument("--name", default=None, help="name of the codec")
    convert.add_argument("--licence", default="unknown", help="licence of the weights")
    convert.add_argument("--source", default="", help="where the checkpoint came from")
    convert.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="switch of the family"
    )
    convert.add_argument("--out", type=Path, required=True, help="folder to write")
    add_json(convert)
    convert.set_defaults(handler=_convert)

    parity = commands.add_parser(
        "parity", help="compare with reference outputs in folders of the golden format"
    )
    parity.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    add_json(parity)
    parity.set_defaults(handler=_parity)


def bits_per_second(frame_rate: Fraction, streams: tuple[StreamSpec, ...]) -> float:
    """Bit rate of all streams at the base frame rate."""
    bits = sum(stream.num_codebooks * log2(stream.codebook_size) for stream in streams)
    return float(frame_rate) * bits


def _codecs(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.codecs import SHIPPED, load_manifest
    from hcodec_core.models.registry import FAMILIES, presets

    shipped = {name: load_manifest(name) for name in SHIPPED}
    rows = []
    for family in FAMILIES:
        for name, make in presets(family).items():
            if "tiny" in name and not options.all:
                continue
            config = make()
            rate = Fraction(config.sample_rate, config.hop_length)
            rows.append(
                (
                    name,
                    family,
                    config.sample_rate,
                    f"{float(rate):g}",
                    " + ".join(f"{s.num_codebooks} x {s.codebook_size}" for s in config.streams),
                    f"{bits_per_second(rate, config.streams):.0f}",
                    *_weights(shipped.get(name)),
                )
            )
    columns = ("codec", "family", "Hz", "frames/s", "codebooks", "bit/s", "parameters", "weights")
    output.table("Codecs", columns, rows)


def _weights(manifest: CodecManifest | None) -> tuple[str, str]:
    if manifest is None:
        return "", "not shipped: convert a checkpoint"
    state = "trained" if manifest.is_trained else "random, for demo and tests"
    return f"{manifest.num_parameters / 1e6:.2f} M", f"shipped, {state}, {manifest.weights_licence}"


def _convert(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.models.conversion import ConvertRequest
    from hcodec_core.models.registry import conversion

    request = ConvertRequest(
        checkpoint_path=options.checkpoint,
        out_path=options.out,
        ssl=options.ssl,
        config_path=options.model_config,
        name=options.name,
        weights_licence=options.licence,
        source=options.source,
        options=dict(item.partition("=")[::2] for item in options.option),
    )
    manifest = conversion(options.family).convert_checkpoint(request)
    output.result(manifest_facts(manifest) | {"folder": str(options.out)})


def manifest_facts(manifest: CodecManifest) -> dict[str, Any]:
    """What a person wants to know of a codec."""
    return {
        "codec": manifest.name,
        "family": manifest.family,
        "digest": manifest.digest,
        "weights_sha256": manifest.weights_sha256,
        "sample_rate": manifest.sample_rate,
        "frames_per_second": float(manifest.frame_rate),
        "streams": ", ".join(
            f"{s.name} {s.num_codebooks} x {s.codebook_size}" for s in manifest.streams
        ),
        "bits_per_second": round(bits_per_second(manifest.frame_rate, manifest.streams)),
        "parameters": manifest.num_parameters,
        "weights": "trained" if manifest.is_trained else "random (not trained)",
        "weights_licence": manifest.weights_licence,
    }


def _parity(options: argparse.Namespace, output: Output) -> int:
    from hcodec_core.inference.parity import run_parity

    rows = run_parity(options.folders)
    columns = ("codec", "case", "codes equal", "near ties", "waveform difference", "agrees")
    output.table(
        "Parity with reference outputs",
        columns,
        [
            (
                row.codec,
                row.case,
                f"{row.num_equal} of {row.num_codes}",
                row.num_ties,
                f"{row.wave_difference:.1e} of peak",
                "yes" if row.agrees else "NO",
            )
            for row in rows
        ],
    )
    return EXIT_OK if rows and all(row.agrees for row in rows) else EXIT_FAILURE
