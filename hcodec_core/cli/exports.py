"""Command ``hcodec export``: a version in the form of another training stack."""

from __future__ import annotations

import argparse
from pathlib import Path

from hcodec_core.cli.output import Commands, Output, add_config, add_json
from hcodec_core.config import load_config
from hcodec_core.storage import file_uri, open_storage


def add_commands(commands: Commands) -> None:
    """Register the command."""
    export = commands.add_parser(
        "export", help="write a version as WebDataset, Hugging Face dataset or MDS"
    )
    export.add_argument("dataset")
    export.add_argument("--to", choices=("webdataset", "huggingface", "mds"), required=True)
    export.add_argument("--out", required=True, metavar="FOLDER|URI", help="an empty folder")
    export.add_argument("--dataset-version", default="latest", help="latest, v3, a tag")
    export.add_argument("--encode-id", default=None, help="first digits, among several codecs")
    export.add_argument("--where", default=None, help="only rows for which this holds")
    export.add_argument("--rows-per-file", type=int, default=10_000)
    add_config(export)
    add_json(export)
    export.set_defaults(handler=_export)


def _export(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.dataset.export import export_dataset

    config = load_config(options.config)
    out: str = options.out
    if "://" in out:
        config.check_destination(out)
    else:
        # A path typed by the person at the keyboard needs no configured permission.
        out = file_uri(Path(out).absolute())
    info = export_dataset(
        config,
        open_storage(config.storage),
        options.dataset,
        options.to,
        out,
        version=options.dataset_version,
        encode_id=options.encode_id,
        row_filter=options.where,
        rows_per_file=options.rows_per_file,
    )
    text = f"{info.num_rows} rows of {info.dataset} {info.version} in {len(info.files)} files"
    output.result(info.model_dump(mode="json"), f"{text} below {info.out_uri}")
