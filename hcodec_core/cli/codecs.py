"""Commands about codecs: ``codecs``, ``convert``, ``parity``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
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


def bits_per_second(
    frame_rate: Fraction, streams: tuple[StreamSpec, ...], max_frame_span: int = 1
) -> float:
    """Bit rate of all streams at the base frame rate.

    Where a token may span up to ``max_frame_span`` frames, its length is part of it.
    """
    bits = sum(stream.num_codebooks * log2(stream.codebook_size) for stream in streams)
    return float(frame_rate) * (bits + log2(max_frame_span))


def _codecs(options: argparse.Namespace, output: Output) -> None:
    codecs = [codec for codec in _all_codecs() if options.all or "tiny" not in codec["codec"]]
    if output.is_json:
        output.result(codecs)
        return
    heads = ("codec", "family", "Hz", "frames/s", "codebooks", "bit/s", "parameters", "batching")
    output.table("Codecs", heads, [_row(codec) for codec in codecs])
    more = ("codec", "support", "weights", "licence of the weights")
    output.table("What works, and whose weights", more, [_support(codec) for codec in codecs])


def _all_codecs() -> list[dict[str, Any]]:
    from hcodec_core.codecs import SHIPPED
    from hcodec_core.models.registry import FAMILIES, facts, presets

    found = []
    for family in FAMILIES:
        known = facts(family)
        for name, make in presets(family).items():
            config = make()
            rate = Fraction(config.sample_rate, config.hop_length)
            span = getattr(config, "max_frame_span", 1)
            found.append(
                {
                    "codec": name,
                    "family": family,
                    "sample_rate": config.sample_rate,
                    "frames_per_second": float(rate),
                    "is_variable_rate": config.is_variable_rate,
                    "streams": [stream.model_dump() for stream in config.streams],
                    "bits_per_second": round(bits_per_second(rate, config.streams, span), 1),
                    "is_shipped": name in SHIPPED,
                    **asdict(known[name]),
                }
            )
    return found


def _row(codec: dict[str, Any]) -> tuple[str, ...]:
    up_to = "up to " if codec["is_variable_rate"] else ""
    streams = codec["streams"]
    return (
        codec["codec"],
        codec["family"],
        str(codec["sample_rate"]),
        f"{up_to}{codec['frames_per_second']:g}",
        " + ".join(f"{s['num_codebooks']} x {s['codebook_size']}" for s in streams),
        f"{up_to}{codec['bits_per_second']:.0f}",
        f"{codec['num_parameters'] / 1e6:.2f} M",
        codec["batching"],
    )


def _support(codec: dict[str, Any]) -> tuple[str, ...]:
    weights = f"shipped; {codec['weights']}" if codec["is_shipped"] else codec["weights"]
    return codec["codec"], codec["support"], weights, codec["weights_licence"]


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

    # A glob over the folders also names the notes beside them.
    files = [path for path in options.folders if path.is_file()]
    for path in files:
        output.note(f"{path} is a file and is passed over: reference outputs are folders.")
    rows = run_parity([path for path in options.folders if path not in files])
    columns = (
        "codec",
        "case",
        "codes equal",
        "near ties",
        "boundary ties",
        "unsteady",
        "waveform difference",
        "agrees",
    )
    output.table(
        "Parity with reference outputs",
        columns,
        [
            (
                row.codec,
                row.case,
                f"{row.num_equal} of {row.num_codes}",
                row.num_ties,
                row.num_boundary_ties,
                row.num_unsteady,
                f"{row.wave_difference:.1e} of peak",
                "yes" if row.agrees else "NO",
            )
            for row in rows
        ],
    )
    return EXIT_OK if rows and all(row.agrees for row in rows) else EXIT_FAILURE
