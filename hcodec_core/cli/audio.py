"""Commands on audio files: ``encode`` and ``decode``."""

from __future__ import annotations

import argparse
import logging
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote

from hcodec_core.cli.compare import agreement_table
from hcodec_core.cli.output import Commands, Output, add_json
from hcodec_core.errors import ConfigError, HCodecError
from hcodec_core.jobs import Outcome, WorkerProgress
from hcodec_core.storage import join_uri
from hcodec_core.tokens import EncodeSettings

if TYPE_CHECKING:
    from hcodec_core.inference.engine import Clip, Engine
    from hcodec_core.inference.files import EncodeReport, LocalEncoding, TokenFile

_POLL_SECONDS = 0.5


def add_commands(commands: Commands) -> None:
    """Register the commands."""
    encode = commands.add_parser("encode", help="audio files and folders to one token file")
    encode.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files or folders")
    encode.add_argument("--out", type=Path, required=True, help="Parquet file to write")
    encode.add_argument("--codec", default="hcodec-nano", help="codec URI (default: hcodec-nano)")
    encode.add_argument("--mode", choices=("exact", "fast"), default="exact")
    encode.add_argument("--channel", choices=("mean", "first"), default="mean")
    encode.add_argument("--gain", type=float, default=1.0, help="factor on the samples")
    encode.add_argument("--threshold", type=float, help="for codecs of variable rate")
    encode.add_argument("--decoders", type=int, default=1, help="audio decoding processes")
    _add_device(encode)
    encode.set_defaults(handler=_encode)

    decode = commands.add_parser("decode", help="a token file to wav files")
    decode.add_argument("tokens", type=Path, help="Parquet file written by hcodec encode")
    decode.add_argument("--out", type=Path, required=True, help="folder to write wav files into")
    decode.add_argument("--codec", default=None, help="another codec with the same codebooks")
    decode.add_argument("--codebooks", type=int, default=None, help="use the first so many only")
    _add_device(decode)
    decode.set_defaults(handler=_decode)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the codec")
    add_json(parser)


def _encode(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.inference.engine import compute_class
    from hcodec_core.inference.files import LocalEncoding
    from hcodec_core.inference.worker import WorkerOptions

    settings = EncodeSettings(
        mode=options.mode,
        channel=options.channel,
        gain=options.gain,
        threshold=options.threshold,
        compute_class=compute_class(options.device, options.threads),
    )
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    # A worker's log is for clusters; here the table below says what happened.
    if not options.verbose:
        logging.getLogger("hcodec_core").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="hcodec-") as scratch:
        encoding = LocalEncoding(options.paths, options.codec, settings, Path(scratch))
        worker = WorkerOptions(
            scratch_path=Path(scratch),
            device=options.device,
            num_threads=options.threads,
            num_decoders=options.decoders,
        )
        with _bar(encoding, output):
            report = encoding.run(worker, options.out, stop)
    _show(report, options, output)


@contextmanager
def _bar(encoding: LocalEncoding, output: Output) -> Iterator[None]:
    """Show the progress that the worker writes."""
    done = threading.Event()
    with output.progress() as progress:
        bar = progress.add_task("files", total=encoding.job.num_files)

        def watch() -> None:
            while not done.wait(_POLL_SECONDS):
                progress.update(bar, completed=_num_files_done(encoding))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            progress.update(bar, completed=_num_files_done(encoding))


def _num_files_done(encoding: LocalEncoding) -> int:
    total = 0
    with suppress(HCodecError):  # nothing is there yet
        for info in encoding.storage.list_objects(join_uri(encoding.job.plan_uri, "workers") + "/"):
            text = encoding.storage.read(info.uri)
            total += WorkerProgress.model_validate_json(text).num_files
    return min(total, encoding.job.num_files)


def _show(report: EncodeReport, options: argparse.Namespace, output: Output) -> None:
    without = [o for o in report.outcomes if o.outcome is not Outcome.TOKENS]
    document = {
        "out": str(options.out),
        "codec": options.codec,
        "files": report.num_files,
        "files_with_tokens": report.num_files - len(without),
        "audio_seconds": round(report.audio_seconds, 3),
        "tokens": report.num_tokens,
        "work": report.work.model_dump(mode="json"),
        "without_tokens": [outcome.model_dump(mode="json") for outcome in without],
        "agreement": None if report.agreement is None else report.agreement.model_dump(mode="json"),
    }
    if output.is_json:
        output.result(document)
        return
    output.note(
        f"{options.out}: {document['files_with_tokens']} of {report.num_files} files, "
        f"{report.audio_seconds:.1f} s of audio, {report.num_tokens} tokens"
    )
    output.note(f"Where the time went: {report.work.for_people}")
    if report.agreement is not None:
        output.table(*agreement_table("mode fast", "mode exact", report.agreement))
    if without:
        rows = [(o.uri, o.reason or o.outcome, o.detail) for o in without]
        output.table("Files without tokens", ("file", "reason", "detail"), rows)


def _decode(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.inference.files import TokenFile, decode_rows

    file = TokenFile(options.tokens)
    engine = _engine_for(file, options)
    written = []
    with output.progress() as progress:
        bar = progress.add_task("files", total=file.num_rows)
        for path, (uri, pieces) in zip(
            _names(file, options.out), decode_rows(file, engine, options.codebooks), strict=True
        ):
            num_samples = _write_wav(path, pieces, engine.codec.sample_rate)
            written.append({"uri": uri, "wav": str(path), "num_samples": num_samples})
            progress.advance(bar)
    if output.is_json:
        output.result(written)
    else:
        output.note(f"{len(written)} wav files in {options.out}")


def _write_wav(path: Path, pieces: Iterator[Clip], sample_rate: int) -> int:
    """Write a file piece by piece, whole or not at all; returns its number of samples."""
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    num_samples = 0
    try:
        with soundfile.SoundFile(
            unfinished, "w", sample_rate, channels=1, subtype="FLOAT", format="WAV"
        ) as file:
            for piece in pieces:
                file.write(piece)
                num_samples += len(piece)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return num_samples


def _engine_for(file: TokenFile, options: argparse.Namespace) -> Engine:
    from hcodec_core.inference.engine import Engine, compute_class
    from hcodec_core.models.loading import load_codec

    # Decoding may run anywhere: only the codebooks must be those of the tokens.
    here = compute_class(options.device, options.threads)
    settings = file.settings.model_copy(update={"compute_class": here})
    codec = load_codec(options.codec or file.codec_uri, settings, device=options.device)
    return Engine(codec, options.threads)


def _names(file: TokenFile, out_path: Path) -> Iterator[Path]:
    """A wav path per row: the source's name below the folder that all sources share."""
    names = [PurePosixPath(unquote(uri.partition("://")[2])) for uri in file.uris()]
    if not names:
        raise ConfigError("The token file has no rows: there is nothing to decode.")
    parents = [name.parent for name in names]
    shared = parents[0]
    while not all(parent.is_relative_to(shared) for parent in parents):
        shared = shared.parent
    for name in names:
        yield out_path / name.relative_to(shared).with_name(name.name + ".wav")
