"""What a run tells of itself while it runs: events, one JSON object a line, and heartbeats, one small file a role.

    WORKDIR/status/{role}.jsonl    every publish, adopt, skip, restart ..., with the time
    WORKDIR/status/{role}.json     pid, host, stage, what it does, how much of it is done, its rate; written every few seconds

Roles are `run`, the command that brings stages up to date, and `refresh`, which mines while it trains. `python -m jdmdr.status
WORKDIR` shows them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import socket
import time
from typing import Any

RUN, REFRESH = "run", "refresh"
DIRECTORY = "status"
EVERY = 2.0  # seconds between two heartbeats


class _Own:
    """This process's directory, role and last beat; it beats only after `start`."""

    directory: pathlib.Path | None = None
    role = ""
    facts: dict[str, Any] = {}
    last = -math.inf


def start(workdir: pathlib.Path, role: str) -> None:
    """From here on this process's heartbeats and events go to `workdir/status`; the first one comes with the first work."""
    _Own.directory, _Own.role, _Own.facts, _Own.last = workdir / DIRECTORY, role, {}, -math.inf


def finish() -> None:
    """Tells that the work is done, if there was any."""
    if _Own.last > -math.inf:
        beat(now=True, stage=None, doing="finished", done=None, total=None)


def beat(now: bool = False, **facts: Any) -> None:
    """Adds facts to what the heartbeat tells (None removes one), and writes it if the last is old, or `now`."""
    _Own.facts = {key: value for key, value in {**_Own.facts, **facts}.items() if value is not None}
    if _Own.directory is None or (not now and time.monotonic() - _Own.last < EVERY):
        return
    _Own.last = time.monotonic()
    told = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time(), **_Own.facts}
    path = _Own.directory / f"{_Own.role}.json"
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with contextlib.suppress(OSError):  # a full disk is told by who writes something that matters
        path.parent.mkdir(exist_ok=True)
        partial.write_text(json.dumps(told, sort_keys=True), encoding="utf-8")
        os.replace(partial, path)


def event(name: str, **facts: Any) -> None:
    """Appends an event; one write, so that a killed process leaves at most a cut last line."""
    if _Own.directory is None:
        return
    line = json.dumps({"time": time.time(), "event": name, **facts}, sort_keys=True) + "\n"
    with contextlib.suppress(OSError):
        _Own.directory.mkdir(exist_ok=True)
        descriptor = os.open(_Own.directory / f"{_Own.role}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def read(workdir: pathlib.Path, role: str) -> dict[str, Any] | None:
    """The last heartbeat of a role; None where there was none."""
    try:
        return json.loads((workdir / DIRECTORY / f"{role}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def events(workdir: pathlib.Path, role: str) -> list[dict[str, Any]]:
    """The events of a role; lines that a kill cut are left out."""
    path = workdir / DIRECTORY / f"{role}.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found
