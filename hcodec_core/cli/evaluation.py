"""``hcodec evaluate``, and the evaluate jobs of ``hcodec run``."""

from __future__ import annotations

import argparse
import platform
import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from hcodec_core import __version__
from hcodec_core.cli.codecs import bits_per_second
from hcodec_core.cli.output import Commands, Output, Table, add_config, add_json
from hcodec_core.config import GateConfig, describe, load_config
from hcodec_core.errors import EXIT_OK, ConfigError
from hcodec_core.jobs import CodecPin, EvaluateJob
from hcodec_core.tokens import CodecSpec, EncodeSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hcodec_core.codecs import Fetch
    from hcodec_core.evaluation.documents import EvaluationResult, SideFacts
    from hcodec_core.evaluation.measuring import Task
    from hcodec_core.evaluation.scoring import Tools
    from hcodec_core.evaluation.sides import CodecUnderTest, Transcoded
    from hcodec_core.inference.clips import Clip
    from hcodec_core.inference.engine import Engine
    from hcodec_core.storage import Storage

_BASELINE = "baseline:"


def add_commands(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "evaluate", help="score a codec on held-out audio, and against another one"
    )
    parser.add_argument("--codec", required=True, help="codec URI, or models:/NAME@challenger")
    parser.add_argument("--audio", type=Path, required=True, help="held-out folder (or one file)")
    parser.add_argument("--against", default=None, help="champion: codec URI or models:/NAME@alias")
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        help="also opus6 or trivial2 (kbit/s)",
    )
    parser.add_argument("--fit-audio", type=Path, default=None, help="folder that trivial fits on")
    parser.add_argument("--out", type=Path, default=None, help="folder for page and result")
    parser.add_argument("--metrics", nargs="+", default=[], metavar="NAME", help="default: all")
    parser.add_argument("--margins", type=Path, default=None, help="TOML file of margins")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each file (default: 30)")
    parser.add_argument("--max-files", type=int, default=None, help="a spread choice of the files")
    parser.add_argument("--samples", type=int, default=4, help="files to listen to (default: 4)")
    parser.add_argument("--asr", type=Path, default=None, help="local folder of a recogniser (WER)")
    parser.add_argument("--speaker-model", type=Path, default=None, help="local x-vector folder")
    parser.add_argument("--mos-model", type=Path, default=None, help="local opinion model (UTMOS)")
    parser.add_argument("--threshold", type=float, default=None, help="for codecs of variable rate")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the codec")
    add_config(parser)
    add_json(parser)
    parser.set_defaults(handler=_evaluate)


class EngineUnderTest:
    """A codec of this product as the evaluation wants it: an engine, with its facts."""

    def __init__(self, engine: Engine, uri: str, version: str = "") -> None:
        """Take a loaded engine; ``uri`` and ``version`` say where it came from."""
        self._engine = engine
        self._facts = _facts_of(engine, uri, version)

    @property
    def facts(self) -> SideFacts:
        """See ``CodecUnderTest``."""
        return self._facts

    def transcode(self, clip: Clip) -> Transcoded:
        """See ``CodecUnderTest``."""
        from hcodec_core.evaluation.sides import Transcoded
        from hcodec_core.inference.segmented import encode_in_segments

        begun = self._now()
        tokens = encode_in_segments(self._engine, clip)
        encoded = self._now()
        audio = self._engine.decode_clips([tokens])[0]
        done = self._now()
        return Transcoded(
            audio=audio,
            encode_seconds=encoded - begun,
            decode_seconds=done - encoded,
            codes=tokens.codes,
            num_tokens=tokens.num_frames,
        )

    def _now(self) -> float:
        if self._engine.codec.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._engine.codec.device)
        return time.perf_counter()


def run_job(
    job: EvaluateJob,
    storage: Storage,
    options: argparse.Namespace,
    scratch_path: Path,
    stop: Any,
) -> int:
    """Run an evaluate job for ``hcodec run``; returns the exit code."""
    from hcodec_core.evaluation.job import finished, run_evaluate_job

    if finished(job, storage) is not None:
        return EXIT_OK
    with _quiet_threads(options.threads):
        pins = {"codec": job.codec, "against": job.against}
        sides = {
            label: _open_side(wanted, options, storage.read)
            for label, wanted in pins.items()
            if wanted is not None
        }
        rate = sides["codec"].facts.sample_rate
        sides |= {name: _open_baseline(name, rate, None) for name in job.baselines}
        folders = {use: Path(folder) for use, folder in job.local_models.items()}
        tools = _open_tools(tuple(job.metrics), folders, options)
        run_evaluate_job(job, storage, sides, tools, scratch_path, stop.is_set)
    return EXIT_OK


def _evaluate(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.evaluation.listening import make_examples
    from hcodec_core.evaluation.measuring import evaluate
    from hcodec_core.evaluation.report import PAGE_FILE, write_report

    with _quiet_threads(options.threads):
        task = _task(options)
        with output.progress() as progress:
            bar = progress.add_task("files", total=len(task.files))
            result = evaluate(task, lambda done, _: progress.update(bar, completed=done))
        if options.out is not None:
            result = result.model_copy(update={"report_uri": str(options.out / PAGE_FILE)})
            write_report(options.out, result, make_examples(task, result, options.samples))
    _show(result, output)


def _task(options: argparse.Namespace) -> Task:
    from hcodec_core.evaluation.held_out import local_files, open_local
    from hcodec_core.evaluation.measuring import Task
    from hcodec_core.storage import file_uri

    files = local_files(options.audio, options.max_files)
    gate = _gate(options)
    sides = {"codec": _side(options.codec, options, None)}
    rate = sides["codec"].facts.sample_rate
    if options.against:
        sides["against"] = _side(options.against, options, rate)
    for name in options.baseline:
        sides[name] = _open_baseline(name, rate, options.fit_audio)
    folders = {
        use: folder
        for use, folder in (
            ("asr", options.asr),
            ("speaker", options.speaker_model),
            ("mos", options.mos_model),
        )
        if folder is not None
    }
    tools, digests, build = _open_tools(tuple(options.metrics), folders, options)
    return Task(
        sides=sides,
        files=files,
        held_out_uri=file_uri(options.audio.resolve()),
        open_file=open_local,
        tools=tools,
        max_seconds=options.seconds,
        gate=gate,
        build=build,
        local_models=digests,
    )


def _side(uri: str, options: argparse.Namespace, rate: int | None) -> CodecUnderTest:
    """A codec by URI, alias or ``baseline:`` name."""
    if uri.startswith(_BASELINE):
        return _open_baseline(uri.removeprefix(_BASELINE), rate or 16_000, options.fit_audio)
    if uri.startswith("models:/"):
        from hcodec_core.promotion.resolving import resolve_codec
        from hcodec_core.storage import open_storage

        config = load_config(options.config)
        storage = open_storage(config.storage)
        found = resolve_codec(config, uri)
        return _open_side(found.pin(options.threshold), options, storage.read)
    fetch = None
    if uri.startswith("s3://"):
        from hcodec_core.storage import open_storage

        fetch = open_storage(load_config(options.config).storage).read
    return _open_side(CodecPin(uri=uri, digest="", threshold=options.threshold), options, fetch)


def _open_side(
    wanted: CodecPin, options: argparse.Namespace, fetch: Fetch | None
) -> CodecUnderTest:
    from hcodec_core.codecs import load_manifest
    from hcodec_core.inference.engine import Engine, compute_class
    from hcodec_core.models.loading import load_codec

    if wanted.uri.startswith(_BASELINE):
        return _open_baseline(wanted.uri.removeprefix(_BASELINE), 16_000, None)
    threshold = wanted.threshold
    if threshold is not None and not load_manifest(wanted.uri, fetch=fetch).is_variable_rate:
        threshold = None  # the other side may be the one of variable rate
    here = compute_class(options.device, options.threads)
    settings = EncodeSettings.model_validate({"compute_class": here, "threshold": threshold})
    codec = load_codec(
        wanted.uri,
        settings,
        device=options.device,
        expected_digest=wanted.digest or None,
        fetch=fetch,
    )
    return EngineUnderTest(Engine(codec, options.threads), wanted.uri, wanted.version)


def _open_baseline(name: str, rate: int, fit_audio: Path | None) -> CodecUnderTest:
    from hcodec_core.evaluation.baselines import open_baseline

    return open_baseline(name.removeprefix(_BASELINE), rate, fit_audio)


def _open_tools(
    names: tuple[str, ...], folders: Mapping[str, Path], options: argparse.Namespace
) -> tuple[Tools, dict[str, str], dict[str, str]]:
    from hcodec_core.evaluation.metrics import check_names
    from hcodec_core.evaluation.scoring import open_tools

    check_names(names)
    models: dict[str, Any] = {}
    digests: dict[str, str] = {}
    if folders:
        from hcodec_core.evaluation.local_models import open_models

        models, digests = open_models(folders, options.device)
    return open_tools(names, models, options.threads), digests, _build(options)


def _build(options: argparse.Namespace) -> dict[str, str]:
    import torch

    from hcodec_core.inference.engine import compute_class

    return {
        "hcodec": __version__,
        "compute_class": compute_class(options.device, options.threads),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _facts_of(engine: Engine, uri: str, version: str) -> SideFacts:
    from hcodec_core.evaluation.documents import SideFacts, StreamFacts

    spec: CodecSpec = engine.codec.spec
    manifest = spec.manifest
    return SideFacts(
        name=manifest.name,
        uri=uri,
        version=version,
        digest=manifest.digest,
        sample_rate=spec.sample_rate,
        is_trained=manifest.is_trained,
        num_parameters=manifest.num_parameters,
        encode_id=spec.encode_id,
        decode_id=spec.decode_id,
        codebook_id=spec.codebook_id,
        streams=[StreamFacts.model_validate(stream.model_dump()) for stream in spec.streams],
        frames_per_second=float(spec.frame_rate),
        nominal_bits_per_second=bits_per_second(
            spec.frame_rate, spec.streams, engine.codec.max_frame_span
        ),
    )


def _gate(options: argparse.Namespace) -> GateConfig:
    """Margins of the file named, else of the configuration where there is one."""
    if options.margins is not None:
        return read_margins(options.margins)
    return load_config(options.config).gate if options.config.is_file() else GateConfig()


def read_margins(path: Path) -> GateConfig:
    """A gate from a TOML file with the entries of section ``[gate]``. Raises ``ConfigError``."""
    try:
        values = tomllib.loads(path.read_text())
        return GateConfig.model_validate(values.get("gate", values))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"The margins {path} cannot be read: {error}.") from error
    except ValidationError as error:
        raise ConfigError(f"The margins {path}: {describe(error)}.") from error


@contextmanager
def _quiet_threads(num_threads: int) -> Iterator[None]:
    """Threads of torch as asked for, also in local models; as they were afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _show(result: EvaluationResult, output: Output) -> None:
    if output.is_json:
        output.result(result.model_dump(mode="json"))
        return
    output.tables(_tables(result))
    for note in result.notes:
        output.note(note)
    for title, why in sorted(result.not_run.items()):
        output.note(f"not run: {title}: {why}")
    if result.verdict is not None:
        output.note(result.verdict.sentence)
    if result.report_uri:
        output.note(f"Report: {result.report_uri}")


def _tables(result: EvaluationResult) -> list[Table]:
    from hcodec_core.evaluation.metrics import METRICS
    from hcodec_core.evaluation.report import side_names

    names = side_names(result)
    rows: list[Sequence[Any]] = [
        (metric.title, *(_mean(result, label, name) for label in names))
        for name, metric in METRICS.items()
        if any(name in side.metrics for side in result.sides.values())
    ]
    sides, timings = result.sides.values(), result.timings.values()
    rows += [
        ("bit/s, nominal", *(_number(s.facts.nominal_bits_per_second) for s in sides)),
        ("bit/s, entropy", *(_number(s.entropy_bits_per_second) for s in sides)),
        ("encode, x real time", *(_number(t.encode_realtime_factor) for t in timings)),
        ("decode, x real time", *(_number(t.decode_realtime_factor) for t in timings)),
        ("files", *(side.num_files for side in sides)),
        ("files failed", *(side.num_failed for side in sides)),
    ]
    held = result.held_out
    title = (
        f"{held.num_usable} of {held.num_files} files usable, "
        f"{held.audio_seconds / 60:.1f} minutes of audio"
    )
    tables: list[Table] = [(title, ("measure", *names.values()), rows)]
    if result.verdict is not None:
        verdicts = [(METRICS[v.metric].title, v.status, v.sentence) for v in result.verdict.metrics]
        tables.append(("Verdict by metric", ("metric", "result", "in words"), verdicts))
    troubles = _troubles(result, names)
    if troubles:
        tables.append(("Files that could not be used", ("file", "why"), troubles))
    return tables


def _troubles(result: EvaluationResult, names: Mapping[str, str]) -> list[tuple[str, str]]:
    troubles = [(file.name, file.reason) for file in result.held_out.unreadable]
    for scores in result.files:
        troubles += [(scores.name, f"{names[k]}: {why}") for k, why in scores.failures.items()]
    return troubles


def _mean(result: EvaluationResult, label: str, name: str) -> str:
    from hcodec_core.evaluation.metrics import METRICS

    found = result.sides[label].metrics.get(name)
    return "" if found is None else METRICS[name].shown(found.mean)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
