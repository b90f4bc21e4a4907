"""``pods/log``: which container, which lines, and following."""

from __future__ import annotations

import time
from collections.abc import Iterator

from tests.kube.clock import Clock, parse_time
from tests.kube.containers import Container
from tests.kube.errors import Object, bad_request


def chosen_name(pod: Object, query: dict[str, str]) -> str:
    """The container asked for. Raises 400 when it is unknown or ambiguous."""
    name = pod["metadata"]["name"]
    main = [container["name"] for container in pod["spec"]["containers"]]
    wanted = query.get("container")
    if not wanted:
        if len(main) > 1:
            shown = " ".join(main)
            raise bad_request(
                f"a container name must be specified for pod {name}, choose one of: [{shown}]"
            )
        return str(main[0])
    every = main + [c["name"] for c in pod["spec"].get("initContainers") or []]
    if wanted not in every:
        raise bad_request(f"container {wanted} is not valid for pod {name}")
    return wanted


def started_container(
    pod: Object, wanted: str, containers: list[Container], query: dict[str, str]
) -> Container:
    """The container with a log. Raises 400 when it has not started (before)."""
    name = pod["metadata"]["name"]
    found = next((container for container in containers if container.name == wanted), None)
    if found is None or not found.log_paths:
        reason = found.waiting_for if found else "ContainerCreating"
        raise bad_request(f'container "{wanted}" in pod "{name}" is waiting to start: {reason}')
    if is_set(query, "previous") and len(found.log_paths) < 2:
        message = f'previous terminated container "{wanted}" in pod "{name}" not found'
        raise bad_request(message)
    return found


def read(container: Container, query: dict[str, str], clock: Clock) -> Iterator[bytes]:
    """Lines as asked for; with ``follow`` empty pieces until there is more."""
    is_previous = is_set(query, "previous")
    path = container.log_paths[-2 if is_previous else -1]
    with path.open("rb") as file:
        lines = _since(file.read().splitlines(keepends=True), query, clock)
        if "tailLines" in query:
            number = int(query["tailLines"])
            lines = lines[-number:] if number else []
        text = b"".join(_shown(line, query) for line in lines)
        if "limitBytes" in query:
            text = text[: int(query["limitBytes"])]
        yield text
        while is_set(query, "follow") and not is_previous:
            is_over = not container.is_running
            rest = file.readline()
            while rest:
                yield _shown(rest, query)
                rest = file.readline()
            if is_over:
                return
            yield b""
            time.sleep(0.05)


def is_set(query: dict[str, str], name: str) -> bool:
    """Booleans as Go's ParseBool reads them; the synchronous client sends ``True``."""
    return query.get(name, "").lower() in ("1", "t", "true")


def _since(lines: list[bytes], query: dict[str, str], clock: Clock) -> list[bytes]:
    if "sinceTime" in query:
        first = parse_time(query["sinceTime"]).timestamp()
    elif "sinceSeconds" in query:
        first = clock.now().timestamp() - float(query["sinceSeconds"])
    else:
        return lines
    return [line for line in lines if _time_of(line) >= first]


def _time_of(line: bytes) -> float:
    return parse_time(line.partition(b" ")[0].decode()).timestamp()


def _shown(line: bytes, query: dict[str, str]) -> bytes:
    return line if is_set(query, "timestamps") else line.partition(b" ")[2]
