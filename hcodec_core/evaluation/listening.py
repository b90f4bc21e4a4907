"""Some files of an evaluation to listen to: the challenger's worst, middle and best."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hcodec_core.audio.native import Samples
from hcodec_core.evaluation.documents import AGAINST, CODEC, EvaluationResult, FileScores
from hcodec_core.evaluation.held_out import first_seconds
from hcodec_core.evaluation.measuring import Task
from hcodec_core.evaluation.metrics import METRICS

MAX_SECONDS = 8.0
MAX_BYTES = 6_000_000
_RANKING = ("stoi", "pesq_wb", "pesq_nb", "mel_distance_db")


@dataclass(frozen=True)
class Sound:
    """One recording: label of its side or ``source``, and a ``data:`` URI of FLAC."""

    label: str
    data_uri: str


@dataclass(frozen=True)
class Example:
    """A file to listen to, why it was chosen, and how it sounds on every side."""

    name: str
    why: str
    sounds: list[Sound]


def make_examples(task: Task, result: EvaluationResult, count: int) -> list[Example]:
    """Up to ``count`` examples of up to 8 seconds, together up to 6 MB (less is made then).

    The files are transcoded again: keeping all audio would need memory for the whole set.
    """
    files = {file.name: file for file in task.files}
    made: list[Example] = []
    size = 0
    for scores, why in choose(result, count):
        with task.open_file(files[scores.name]) as path:
            rates = {side.facts.sample_rate for side in task.sides.values()}
            clips = {rate: first_seconds(path, rate, MAX_SECONDS) for rate in rates}
        sounds = [Sound("source", _data_uri(clips[max(rates)], max(rates)))]
        for label, side in task.sides.items():
            rate = side.facts.sample_rate
            sounds.append(Sound(label, _data_uri(side.transcode(clips[rate]).audio, rate)))
        size += sum(len(sound.data_uri) for sound in sounds)
        if size > MAX_BYTES:
            break
        made.append(Example(scores.name, why, sounds))
    return made


def choose(result: EvaluationResult, count: int) -> list[tuple[FileScores, str]]:
    """Files by rank of the challenger's gain (or score): worst, best, middle, then between."""
    usable = [scores for scores in result.files if not scores.failures]
    labels = [label for label in (CODEC, AGAINST) if label in result.sides]
    name = next((n for n in _RANKING if all(_has(f, n, labels) for f in usable)), None)
    if not usable or not count:
        return []
    if name is None:
        return [(scores, "one of the files") for scores in usable[:count]]
    ranked = sorted(usable, key=lambda scores: (_rank(scores, name), scores.name))
    places = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    return [(ranked[place], _why(ranked, place, name)) for place in dict.fromkeys(places.tolist())]


def _has(scores: FileScores, name: str, labels: Sequence[str]) -> bool:
    return all(name in scores.scores[label] for label in labels)


def _rank(scores: FileScores, name: str) -> float:
    metric = METRICS[name]
    mine = scores.scores[CODEC][name]
    other = scores.scores.get(AGAINST, {}).get(name)
    # Without a champion the score itself ranks.
    return metric.gain(mine, 0.0 if other is None else other)


def _why(ranked: Sequence[FileScores], place: int, name: str) -> str:
    metric = METRICS[name]
    has_champion = AGAINST in ranked[place].scores
    what = f"gain in {metric.title}" if has_champion else metric.title
    if place == 0:
        return f"least {what}" if has_champion else f"worst {what}"
    if place == len(ranked) - 1:
        return f"most {what}" if has_champion else f"best {what}"
    return f"{round(100 * place / (len(ranked) - 1))} % of the files are worse in {what}"


def _data_uri(audio: Samples, sample_rate: int) -> str:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(audio, -1, 1), sample_rate, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(buffer.getvalue()).decode()
