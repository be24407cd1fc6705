"""What a working directory is doing: its stages, the step and negatives of its training, rates, time left.

    python -m jdmdr.status WORKDIR

reads heartbeats and events (jdmdr/heartbeat.py), and starts nothing. A process counts as stopped where its lock is free, as lost
where nothing was heard of it for a while, which on one machine means that it hangs.
"""

from __future__ import annotations

import datetime
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from jdmdr import heartbeat, refresh, versions, workdir
from jdmdr.types import UserError

SILENT = 60.0  # seconds without a heartbeat that are told
EVENTS = 6  # last ones shown


def lines(directory: pathlib.Path, now: float) -> list[str]:
    """The status, a line each.

    Raises:
      UserError: there is no such working directory.
    """
    if not directory.is_dir() or not any(directory.iterdir()):
        raise UserError(f"{directory}: nothing has run there; name the --workdir of a run")
    out = [f"{directory}", "", *_stages(directory), ""]
    home = directory / "train" / refresh.DIRECTORY
    for role, lock in ((heartbeat.RUN, directory / ".lock"), (heartbeat.REFRESH, home / ".lock")):
        beat = heartbeat.read(directory, role)
        if beat:
            out += _process(role, beat, refresh.held(lock), now)
    out += _versions(home)
    events = sorted(
        ((event["time"], role, event) for role in (heartbeat.RUN, heartbeat.REFRESH) for event in heartbeat.events(directory, role)),
        key=lambda found: found[0],
    )  # fmt: skip
    if events:
        out += ["", "last events"]
    for at, role, event in events[-EVENTS:]:
        facts = {key: value for key, value in event.items() if key not in ("time", "event")}
        clock = datetime.datetime.fromtimestamp(at).strftime("%H:%M:%S")
        out.append(f"  {clock}  {role:<8} {event['event']:<18} {_facts(facts)}")
    return out


def _stages(directory: pathlib.Path) -> list[str]:
    done, begun = [], []
    for path in sorted(directory.iterdir()):
        if (path / workdir.MANIFEST).is_file():
            done.append(path.name)
        elif (path / workdir.PLAN).is_file():
            begun.append(path.name)
    out = [f"done       {', '.join(done) or 'nothing yet'}"]
    return [*out, f"begun      {', '.join(begun)}"] if begun else out


def _process(role: str, beat: dict[str, Any], alive: bool, now: float) -> list[str]:
    heard = now - beat["time"]
    state = "running" if alive else "finished" if beat.get("doing") == "finished" else "stopped"
    if alive and heard > SILENT:
        state = "silent: it hangs, or computes something long"
    out = [f"{role:<10} {state}, pid {beat['pid']} on {beat['host']}, heard {_time(heard)} ago"]
    if beat.get("stage"):
        out.append(f"  stage    {beat['stage']}")
    if "step" in beat:
        out.append(f"  step     {beat['step']} of {beat['steps']}")
        out.append(f"  taken    negatives of version {beat['negatives_version']}, {beat['negatives_age']} steps old")
    if beat.get("doing") and alive:
        out.append(f"  doing    {beat['doing']}{_progress(beat, heard)}")
    return out


def _progress(beat: dict[str, Any], heard: float) -> str:
    """How much of it is done, how fast, and how long it takes yet."""
    done, total, first = beat.get("done"), beat.get("total"), beat.get("first", 0)
    if done is None:
        return ""
    text = f": {done:g}" + (f" of {total:g}" if total else "") + f" {beat['unit']}"
    seconds = beat["time"] - beat["began"]
    if seconds > 0 and done > first:
        rate = (done - first) / seconds
        text += f", {rate:.3g} a second"
        if total:
            text += f", {_time(max((total - done) / rate - heard, 0))} left"
    return text


def _versions(home: pathlib.Path) -> list[str]:
    out = []
    for number in versions.numbers(home):
        try:
            found = versions.manifest(home, number)
        except versions.Damaged as error:
            out.append(f"  v{number:<7} damaged: {error}")
            continue
        facts = {**found.get("metrics", {}), "changed": found.get("changed"), "seconds": found.get("seconds")}
        out.append(f"  v{number:<7} by the model of step {found['source_step']}; {_facts(facts)}")
    return ["negatives", *out] if out else []


def _facts(facts: dict[str, Any]) -> str:
    parts = []
    for key, value in facts.items():
        if isinstance(value, dict):
            parts.append(_facts(value))
        else:
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(parts)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def show(words: Sequence[str], values: flags.FlagValues) -> int:
    del values
    if len(words) != 1:
        raise UserError("name one working directory: python -m jdmdr.status WORKDIR")
    print("\n".join(lines(pathlib.Path(words[0]), time.time())))
    return 0


if __name__ == "__main__":
    from jdmdr import cli

    cli.run_tool(show, __doc__)
