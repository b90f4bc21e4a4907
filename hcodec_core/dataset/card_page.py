"""The dataset card as a page that opens in a browser without a network."""

from __future__ import annotations

import math
import posixpath
from dataclasses import dataclass

from hcodec_core.dataset.card_values import Breakdown, CodebookCard, DatasetCard, Share
from hcodec_core.dataset.pages import bars_of, render_page

_NAME_LENGTH = 60
_READ_IT = """\
from hcodec_core.dataset.reader import open_dataset
dataset = open_dataset("hcodec.toml", "{dataset}", version="{version}", encode_id="{encode_id}")
print(len(dataset), dataset[0].uri, dataset[0].codes["{stream}"].shape)  # [codebook, frame]"""


@dataclass(frozen=True)
class _Picture:
    """Histogram of a codebook on one scale with the previous version's: all in 0..100.

    ``bars``: left edge, height, count; ``outline``: SVG path of the previous version, or "".
    """

    book: CodebookCard
    bars: list[tuple[float, float, int]]
    outline: str


@dataclass(frozen=True)
class _Line:
    """A line of a breakdown. ``width`` in 0..100 of the largest share."""

    name: str
    num_files: int
    audio_seconds: float
    share: float
    width: float


def render_card(card: DatasetCard) -> str:
    """The page of a card."""
    stream = card.codec.streams[0].name
    return render_page(
        "card.html",
        card=card,
        codec=card.codec,
        changes=card.changes,
        read_it=_READ_IT.format(
            dataset=card.dataset,
            version=card.version,
            encode_id=card.encode_id[:12],
            stream=stream,
        ),
        breakdowns=[
            (found, _lines(found, card.audio_seconds)) for found in [*card.metadata, *card.native]
        ],
        durations=bars_of([bin_.num_files for bin_ in card.durations]),
        pictures=[_picture(book) for book in card.codebooks],
        num_above_noise=sum(bool(drift.is_above_noise) for drift in card.drift),
        report_link=_report_link(card),
    )


def _lines(breakdown: Breakdown, total_seconds: float) -> list[_Line]:
    parts = [(_short(share.name), share) for share in breakdown.shares]
    if breakdown.other is not None:
        parts.append((f"{breakdown.num_names - len(breakdown.shares):,} others", breakdown.other))
    if breakdown.unknown is not None:
        parts.append(("not given", breakdown.unknown))
    longest = max((share.audio_seconds for _, share in parts), default=0.0) or 1.0
    return [_line(name, share, total_seconds or 1.0, longest) for name, share in parts]


def _line(name: str, share: Share, total_seconds: float, longest: float) -> _Line:
    return _Line(
        name=name,
        num_files=share.num_files,
        audio_seconds=share.audio_seconds,
        share=share.audio_seconds / total_seconds,
        width=100 * share.audio_seconds / longest,
    )


def _short(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "\u2026"


def _picture(book: CodebookCard) -> _Picture:
    now = _heights(book.bars)
    before = _heights(book.previous_bars or [])
    highest = max([*now, *before], default=0.0) or 1.0
    bars = [
        (100 * index / len(now), 100 * height / highest, count)
        for index, (height, count) in enumerate(zip(now, book.bars, strict=True))
    ]
    return _Picture(book, bars, _outline([100 * height / highest for height in before]))


def _heights(counts: list[int]) -> list[float]:
    """Square roots of shares: a few frequent entries would flatten all others."""
    total = sum(counts) or 1
    return [math.sqrt(count / total) for count in counts]


def _outline(heights: list[float]) -> str:
    """A staircase over bars of these heights (0..100), as an SVG path; y grows downwards."""
    if not any(heights):
        return ""
    width = 100 / len(heights)
    steps = (
        f"V{100 - height:.2f}H{(index + 1) * width:.3f}" for index, height in enumerate(heights)
    )
    return f"M0 100{''.join(steps)}"


def _report_link(card: DatasetCard) -> str:
    """From the card to the validation report, where both lie in one bucket; else ""."""
    place, found, report = card.report_uri.partition(f"/datasets/{card.dataset}/reports/")
    if not found or not place.startswith(("s3://", "file://")):
        return ""
    here = posixpath.join("/", card.encode_id[:12], "cards", card.version)
    return posixpath.relpath(posixpath.join("/reports", report), here)
