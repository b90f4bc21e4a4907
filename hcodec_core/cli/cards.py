"""Command ``hcodec card``: what a version of a dataset holds, as text, JSON or a page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hcodec_core.cli.output import Commands, Output, add_config, add_json
from hcodec_core.config import load_config
from hcodec_core.storage import Storage, open_storage

if TYPE_CHECKING:
    from hcodec_core.dataset.card_values import Breakdown, DatasetCard
    from hcodec_core.dataset.layout import DatasetLayout


def add_commands(commands: Commands) -> None:
    """Register the command."""
    card = commands.add_parser("card", help="say what a version of a dataset holds")
    card.add_argument("dataset")
    card.add_argument("--version", default="latest", help="v3, or 3 (default: the latest)")
    card.add_argument("--encode-id", default=None, help="first digits, among several codecs")
    card.add_argument("--out", type=Path, default=None, help="folder for the page and the JSON")
    card.add_argument("--refresh", action="store_true", help="make the stored card anew")
    add_config(card)
    add_json(card)
    card.set_defaults(handler=_card)


def _card(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.dataset.card import card_files, card_page_uri
    from hcodec_core.dataset.table import find_layout

    config = load_config(options.config)
    layout = find_layout(config, options.dataset, options.encode_id)
    card = _find(open_storage(config.storage), layout, options.version, options.refresh)
    place = card_page_uri(layout, card.version)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        for name, data in card_files(card).items():
            (options.out / name).write_bytes(data)
        place = str(options.out / "index.html")
    output.result(card.model_dump(mode="json"), "\n".join([*_lines(card), f"page       {place}"]))


def _find(storage: Storage, layout: DatasetLayout, version: str, refresh: bool) -> DatasetCard:
    """The stored card; made and stored where there is none, or where it should be made anew."""
    from hcodec_core.dataset.card import read_card, write_card
    from hcodec_core.dataset.table import load_table
    from hcodec_core.dataset.versions import resolve_version

    name = f"v{version}" if version.isdecimal() else version
    name, _ = resolve_version(load_table(layout), name)
    found = None if refresh else read_card(storage, layout, name)
    return write_card(storage, layout, name) if found is None else found


def _lines(card: DatasetCard) -> list[str]:
    changes = card.changes
    trained = "" if card.codec.is_trained else " (random weights)"
    lines = [
        f"{card.dataset} {card.version}, published {card.published_at:%Y-%m-%d %H:%M} UTC",
        f"codec      {card.codec.name}{trained}, encode id {card.encode_id[:12]}",
        f"audio      {card.audio_seconds / 3600:.2f} h in {card.num_files} files; since "
        f"{card.previous_version or 'the beginning'}: {changes.num_added} added, "
        f"{changes.num_changed} changed, {changes.num_removed} removed",
    ]
    lines += [_shares(found) for found in [*card.metadata, *card.native]]
    if card.speakers is not None:
        lines.append(f"{'speakers':10} {card.speakers.num_speakers}")
    if card.bitrate is not None:
        rate = card.bitrate
        lines.append(
            f"bitrate    {rate.nominal:.0f} bit/s nominal, {rate.entropy:.0f} by entropy, "
            f"{rate.stored:.0f} stored; {rate.tokens_per_second:.4g} token frames a second"
        )
    lines += [
        f"codebook   {book.stream} {book.codebook}: {book.num_used} of {book.size} used, "
        f"perplexity {book.perplexity:.1f}"
        for book in card.codebooks
    ]
    return [*lines, f"drift      {_drift(card)}"]


def _shares(found: Breakdown) -> str:
    from hcodec_core.dataset.pages import printable

    shown = [f"{printable(s.name)} {s.audio_seconds / 3600:.2f} h" for s in found.shares[:5]]
    more = [f"{found.num_names - 5} more"] if found.num_names > 5 else []
    unknown = found.unknown
    given = [] if unknown is None else [f"not given {unknown.audio_seconds / 3600:.2f} h"]
    return f"{found.title.lower():10} {', '.join([*shown, *more, *given])}"


def _drift(card: DatasetCard) -> str:
    if not card.drift:
        return "nothing to compare"
    verdicts = [drift.is_above_noise for drift in card.drift]
    if None in verdicts:
        return f"not known: only {card.num_noise_files} files before"
    return f"{sum(map(bool, verdicts))} of {len(verdicts)} codebooks above noise"
