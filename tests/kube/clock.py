"""The server's own time: the machine's, moved by what a test asks for."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime


class Clock:
    """Says what time it is on the server: in timestamps, in ``Date`` and for its deadlines."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._offset_seconds = 0.0

    def advance(self, seconds: float) -> None:
        """Let time jump, so that deadlines and ttl pass at once; negative: the server is behind."""
        with self._lock:
            self._offset_seconds += seconds

    def now(self) -> datetime:
        with self._lock:
            return datetime.fromtimestamp(time.time() + self._offset_seconds, UTC)

    def timestamp(self) -> str:
        """``metav1.Time``: RFC 3339, whole seconds."""
        return format_time(self.now())

    def micro_timestamp(self) -> str:
        """``metav1.MicroTime`` of leases and events."""
        return self.now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")

    def http_date(self) -> str:
        return format_datetime(self.now(), usegmt=True)

    def seconds_since(self, timestamp: str) -> float:
        return (self.now() - parse_time(timestamp)).total_seconds()


def format_time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(timestamp: str) -> datetime:
    return datetime.fromisoformat(timestamp.replace("Z", "+00:00"))


def shifted(timestamp: str, seconds: float) -> str:
    return format_time(parse_time(timestamp) + timedelta(seconds=seconds))
