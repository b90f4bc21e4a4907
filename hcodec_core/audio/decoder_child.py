"""Process that decodes files on request: ``python -m hcodec_core.audio.decoder_child``.

Started and supervised by ``supervisor.DecoderPool``. A file that breaks a decoder library breaks
this process and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from hcodec_core.audio.messages import Kind, receive, send
from hcodec_core.errors import AudioError, QuarantineReason

if TYPE_CHECKING:
    from hcodec_core.audio.decode import DecodeSettings

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Serve requests from standard input until it is closed."""
    options = _parse(arguments)
    _follow_parent(options.parent_pid)
    _limit(options.address_space_bytes)
    requests: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    # The pool runs one process per core already.
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
    from hcodec_core.audio.decode import DecodeSettings

    with _private_stdout() as replies:
        settings = DecodeSettings(**json.loads(options.settings))
        send(replies, Kind.READY)
        while True:
            path = Path(os.fsdecode(requests.get()))
            send(replies, Kind.BEGUN)
            _serve(path, settings, replies)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decode audio files for a supervisor.")
    parser.add_argument("--settings", required=True, help="DecodeSettings as JSON")
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--address-space-bytes", type=int, default=0, help="0: no limit")
    return parser.parse_args(arguments)


def _follow_parent(parent_pid: int) -> None:
    """Die with the parent; let the parent alone decide about Ctrl-C and termination."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(0)


def _limit(address_space_bytes: int) -> None:
    """Bound memory, and leave no core files of crashes in the scratch space."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if address_space_bytes and sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (address_space_bytes, address_space_bytes))


def _private_stdout() -> BinaryIO:
    """Standard output for messages alone; whatever libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


def _read_requests(requests: queue.Queue[bytes]) -> None:
    """Queue requests; end the process, even inside a decoder, when the parent is gone."""
    while (message := receive(sys.stdin.buffer)) is not None:
        requests.put(message[1])
    os._exit(0)


def _serve(path: Path, settings: DecodeSettings, replies: BinaryIO) -> None:
    """Decode one file and send all that comes of it."""
    from hcodec_core.audio.decode import Decoding

    decoding = Decoding(path, settings)
    try:
        for block in decoding:
            send(replies, Kind.BLOCK, decoding.digest, block.tobytes())
        send(replies, Kind.INFO, json.dumps(decoding.info.to_dict()).encode())
    except AudioError as error:
        _refuse(replies, error.reason, str(error))
    except MemoryError:
        _refuse(replies, QuarantineReason.TOO_LARGE, "Decoding needs more memory than allowed.")
    except BrokenPipeError:
        os._exit(0)
    except OSError as error:
        message = f"The local copy cannot be read: {error.strerror}."
        send(replies, Kind.UNREADABLE, json.dumps({"message": message}).encode())


def _refuse(replies: BinaryIO, reason: QuarantineReason, message: str) -> None:
    payload = {"reason": reason.value, "message": message}
    send(replies, Kind.REFUSED, json.dumps(payload).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
