"""The numbers of a dataset card, from facts that were gathered.

Floats are rounded to six digits: sums in another order, or on another machine, give the same card.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from hcodec_core.dataset.card_drift import (
    Ints,
    Noise,
    jensen_shannon_bits,
    population_stability,
)
from hcodec_core.dataset.card_facts import CardFacts
from hcodec_core.dataset.card_values import (
    Bitrate,
    Breakdown,
    Changes,
    CodebookCard,
    CodebookDrift,
    ReasonCount,
    Share,
    Speakers,
)
from hcodec_core.dataset.summary import DURATION_EDGES, QUANTILES, DurationBin
from hcodec_core.tokens import CodecManifest

_NUM_SHARES = 12
_NUM_KEYS = 30
_NUM_BARS = 128
_CLIPPED_ABOVE = 0.01  # share of samples at full scale that makes a file count as clipped
_NATIVE = {
    "Sample rate": "native_sample_rate || ' Hz'",
    "Channels": "native_channels::VARCHAR",
    "Container": "container",
}
_METADATA = {"Language": "language", "Licence": "licence"}


def rounded(value: float) -> float:
    """A number to six digits."""
    return float(f"{value:.6g}")


def totals_of(facts: CardFacts, rate: int) -> dict[str, Any]:
    """Entries of a card that are sums over its files. ``rate``: the codec's, Hz."""
    # Whole numbers first: sums of floats depend on the order.
    ((files, samples, tokens, level, silent, measured, clipped, clipped_files),) = facts.ask(
        "SELECT count(*), coalesce(sum(num_samples), 0)::BIGINT,"
        " coalesce(sum(num_frames), 0)::BIGINT,"
        " (sum(num_samples) FILTER (has_level))::BIGINT,"
        " (sum(num_samples) FILTER (has_level AND is_silent))::BIGINT,"
        " (sum(num_samples) FILTER (clipped_share IS NOT NULL))::BIGINT,"
        " (sum(round(clipped_share * num_samples)::BIGINT))::BIGINT,"
        f" count(*) FILTER (clipped_share > {_CLIPPED_ABOVE}) FROM files"
    )
    return {
        "num_files": files,
        "audio_seconds": rounded(samples / rate),
        "num_tokens": tokens,
        "silent_share": rounded((silent or 0) / level) if level else None,
        "clipped_share": rounded(clipped / measured) if measured else None,
        "num_clipped_files": clipped_files,
        "durations": _durations(facts, rate),
        "seconds_quantiles": _quantiles(facts, rate) if files else {},
    }


def _durations(facts: CardFacts, rate: int) -> list[DurationBin]:
    edges = [*DURATION_EDGES, None]
    pairs = list(pairwise(edges))
    counts = ", ".join(
        f"count(*) FILTER (num_samples >= {(lower or 0) * rate}"
        + ("" if upper is None else f" AND num_samples < {upper * rate}")
        + ")"
        for lower, upper in pairs
    )
    (values,) = facts.ask(f"SELECT {counts} FROM files")
    return [
        DurationBin(lower_seconds=float(lower or 0), upper_seconds=upper, num_files=count)
        for (lower, upper), count in zip(pairs, values, strict=True)
    ]


def _quantiles(facts: CardFacts, rate: int) -> dict[str, float]:
    ((found,),) = facts.ask(
        f"SELECT quantile_disc(num_samples, {list(QUANTILES.values())}) FROM files"
    )
    return {name: rounded(samples / rate) for name, samples in zip(QUANTILES, found, strict=True)}


def changes_of(facts: CardFacts, num_files: int, rate: int) -> Changes:
    """What differs from the previous version."""
    ((added, changed),) = facts.ask(
        "SELECT count(*) FILTER (before.uri IS NULL),"
        " count(*) FILTER (before.etag <> now.etag)"
        " FROM (FROM sides WHERE is_after) now"
        " LEFT JOIN (FROM sides WHERE NOT is_after) before USING (uri)"
    )
    ((removed,),) = facts.ask(
        "SELECT count(*) FROM sides before WHERE NOT is_after AND NOT EXISTS"
        " (FROM sides now WHERE now.is_after AND now.uri = before.uri)"
    )
    ((samples,),) = facts.ask(
        "SELECT coalesce(sum(num_samples) FILTER (is_new), 0)::BIGINT FROM files"
    )
    return Changes(
        num_added=added,
        num_changed=changed,
        num_removed=removed,
        num_kept=num_files - added - changed,
        new_seconds=rounded(samples / rate),
    )


def native_breakdowns(facts: CardFacts, rate: int) -> list[Breakdown]:
    """Files by what they were before they were tokens."""
    return [_breakdown(facts, title, column, rate) for title, column in _NATIVE.items()]


def metadata_breakdowns(facts: CardFacts, rate: int) -> list[Breakdown]:
    """Files by language and licence, as far as their manifests say."""
    found = (_breakdown(facts, title, column, rate) for title, column in _METADATA.items())
    return [breakdown for breakdown in found if breakdown.num_names]


def _breakdown(facts: CardFacts, title: str, column: str, rate: int) -> Breakdown:
    groups = (
        f"(SELECT {column} AS name, count(*) AS files, sum(num_samples)::BIGINT AS samples"
        " FROM files GROUP BY name)"
    )
    largest = facts.ask(
        f"SELECT * FROM {groups} WHERE name IS NOT NULL ORDER BY samples DESC, name"
        f" LIMIT {_NUM_SHARES}"
    )
    ((num_names, files, samples),) = facts.ask(
        "SELECT count(*), coalesce(sum(files), 0)::BIGINT, coalesce(sum(samples), 0)::BIGINT"
        f" FROM {groups} WHERE name IS NOT NULL"
    )
    unknown = facts.ask(f"SELECT * FROM {groups} WHERE name IS NULL")
    shown_files = sum(count for _, count, _ in largest)
    shown_samples = sum(count for _, _, count in largest)
    other = ("", files - shown_files, samples - shown_samples)
    return Breakdown(
        title=title,
        shares=[_share(row, rate) for row in largest],
        num_names=num_names,
        other=_share(other, rate) if num_names > len(largest) else None,
        unknown=_share(unknown[0], rate) if unknown else None,
    )


def _share(row: tuple[Any, ...], rate: int) -> Share:
    name, files, samples = row
    return Share(name=name or "", num_files=files, audio_seconds=rounded(samples / rate))


def speakers_of(facts: CardFacts, rate: int) -> Speakers | None:
    """How the audio is spread over speakers, None when no manifest names one."""
    ((count, files, median, longest),) = facts.ask(
        "SELECT count(*), sum(files)::BIGINT, quantile_disc(samples, 0.5), max(samples) FROM"
        " (SELECT count(*) AS files, sum(num_samples)::BIGINT AS samples FROM files"
        " WHERE speaker IS NOT NULL GROUP BY speaker)"
    )
    if not count:
        return None
    return Speakers(
        num_speakers=count,
        num_files=files,
        median_seconds=rounded(median / rate),
        max_seconds=rounded(longest / rate),
    )


def metadata_keys(facts: CardFacts) -> dict[str, int]:
    """Columns of source manifests, and how many files have each."""
    found = facts.ask(
        "SELECT key, count(*) FROM metadata_keys GROUP BY key ORDER BY count(*) DESC, key"
        f" LIMIT {_NUM_KEYS}"
    )
    return dict(found)


def builds_of(facts: CardFacts) -> list[str]:
    """Devices and library versions of the workers, JSON as they wrote it, most files first."""
    found = facts.ask(
        "SELECT worker_build FROM files WHERE worker_build IS NOT NULL"
        " GROUP BY worker_build ORDER BY count(*) DESC, worker_build"
    )
    return [build for (build,) in found]


def quarantine_of(facts: CardFacts, version_number: int) -> list[ReasonCount]:
    """Files without tokens by reason. A file that has a row by now is not counted as still bad."""
    found = facts.ask(
        "SELECT reason, count(*) FILTER (version_number = ?),"
        " count(*) FILTER (is_last AND NOT EXISTS (FROM files WHERE files.uri = bad.uri))"
        " FROM (SELECT *, row_number() OVER (PARTITION BY uri ORDER BY version_number DESC) = 1"
        " AS is_last FROM quarantined) bad GROUP BY reason ORDER BY ALL",
        [version_number],
    )
    counts = [ReasonCount(reason=r, num_of_plan=plan, num_still=still) for r, plan, still in found]
    return [count for count in counts if count.num_of_plan or count.num_still]


def codebooks_of(
    facts: CardFacts, manifest: CodecManifest, has_previous: bool
) -> list[CodebookCard]:
    """Use of every codebook."""
    before = facts.before
    cards = []
    for index, (stream, book, counts) in enumerate(_books(manifest, facts.now)):
        entropy = _entropy_bits(counts)
        cards.append(
            CodebookCard(
                stream=stream,
                codebook=book,
                size=len(counts),
                num_codes=int(counts.sum()),
                num_used=int(np.count_nonzero(counts)),
                perplexity=rounded(2.0**entropy) if counts.any() else 0.0,
                entropy_bits=rounded(entropy),
                bars=_bars(counts),
                previous_bars=_bars(before[index]) if has_previous else None,
            )
        )
    return cards


def _books(manifest: CodecManifest, counts: Sequence[Ints]) -> Iterator[tuple[str, int, Ints]]:
    names = [(s.name, book) for s in manifest.streams for book in range(s.num_codebooks)]
    for (stream, book), found in zip(names, counts, strict=True):
        yield stream, book, found


def _bars(counts: Ints) -> list[int]:
    return [int(bar.sum()) for bar in np.array_split(counts, min(_NUM_BARS, len(counts)))]


def _entropy_bits(counts: Ints) -> float:
    used = counts[counts > 0]
    shares = used / max(int(counts.sum()), 1)
    return float(-(shares * np.log2(shares)).sum()) if len(used) else 0.0


def drift_of(facts: CardFacts, manifest: CodecManifest) -> list[CodebookDrift]:
    """New rows against the previous version, by codebook; nothing when either has no codes."""
    now, new, before = facts.now, facts.new, facts.before
    if not new[0].any() or not before[0].any():
        return []
    ((num_new,),) = facts.ask("SELECT count(*) FROM files WHERE is_new")
    noises = facts.sample.noise(num_new, facts.num_before)
    return [
        _drift(stream, book, (counts, before[index], now[index]), noise)
        for index, ((stream, book, counts), noise) in enumerate(
            zip(_books(manifest, new), noises, strict=True)
        )
    ]


def _drift(
    stream: str, book: int, counts: tuple[Ints, Ints, Ints], noise: Noise | None
) -> CodebookDrift:
    new, before, now = counts
    return CodebookDrift(
        stream=stream,
        codebook=book,
        num_new_codes=int(new.sum()),
        num_previous_codes=int(before.sum()),
        js_bits=rounded(float(jensen_shannon_bits(new, before))),
        js_noise=None if noise is None else rounded(noise.js_bits),
        psi=rounded(float(population_stability(new, before))),
        psi_noise=None if noise is None else rounded(noise.psi),
        version_js_bits=rounded(float(jensen_shannon_bits(now, before))),
    )


def bitrate_of(
    facts: CardFacts, manifest: CodecManifest, seconds: float, num_bytes: int
) -> Bitrate | None:
    """Bits per second of audio, None without audio."""
    if not seconds:
        return None
    ((tokens,),) = facts.ask("SELECT sum(num_frames)::BIGINT FROM files")
    books = [(int(counts.sum()), len(counts), counts) for counts in facts.now]
    nominal = sum(count * np.log2(size) for count, size, _ in books)
    entropy = sum(count * _entropy_bits(counts) for count, _, counts in books)
    if facts.spans.any():
        nominal += int(facts.spans.sum()) * np.log2(len(facts.spans) - 1)
        entropy += int(facts.spans.sum()) * _entropy_bits(facts.spans)
    return Bitrate(
        tokens_per_second=rounded(tokens / seconds),
        nominal=rounded(float(nominal) / seconds),
        entropy=rounded(float(entropy) / seconds),
        stored=rounded(8 * num_bytes / seconds),
    )
