"""The working directory: its lock, atomic writes, manifests, and the rule that decides what is up to date.

A stage owns one directory `WORKDIR/STAGE`. `manifest.json` is written last, by an atomic rename: no manifest, no
artefact. It names the stage's settings, the manifests and files it read, its counts and the SHA-256 of what it wrote, and
holds no time and no host, so equal inputs give equal bytes. `plan.json` is the same promise written first: a directory
with a matching plan and no manifest is unfinished work to go on with; anything else is emptied and done afresh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import fnmatch
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jdmdr import __version__, heartbeat, processes
from jdmdr.types import UserError

MANIFEST, PLAN = "manifest.json", "plan.json"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One arrow of the pipeline.

    `run(out_dir) -> counts` does the work; `settings` is all of the config that it depends on; `needs` are the stages
    whose output it reads, `files` the input files from outside the working directory. `volatile` are patterns of what
    the manifest leaves out (logs, checkpoints); their `*` reaches into subdirectories. A `precious` stage is not redone
    unless the user says so. A `shared` stage runs in all processes at once (jdmdr/processes.py), any other in the first,
    while the rest wait; the counts are the first's.
    """

    name: str
    run: Callable[[pathlib.Path], Mapping[str, Any]]
    settings: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    files: tuple[pathlib.Path, ...] = ()
    volatile: tuple[str, ...] = ()
    precious: bool = False
    shared: bool = False


@contextlib.contextmanager
def locked(workdir: pathlib.Path, key: str = "--workdir") -> Iterator[None]:
    """Holds a directory for this process; a second process is refused with the owner's pid. `key` is what names it.

    The kernel drops an flock with its process, so a killed run blocks nobody. Of several processes of one run the first
    holds it for all.
    """
    if not processes.leads():
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = open(workdir / ".lock", "a+")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"{key} {workdir}: {error.strerror}; name a directory that can be written") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            owner = handle.read().strip() or "unknown"
            raise UserError(
                f"{key} {workdir} is in use by the process with pid {owner}; wait for it or choose another directory"
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


@contextlib.contextmanager
def atomic(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path` and renames it to `path` once the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    yield temporary
    os.replace(temporary, path)


def write_text(path: pathlib.Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes sorted, indented JSON; non-ASCII stays readable."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); delete its directory and run again") from error


def digest(*parts: Any) -> str:
    """SHA-256 of the canonical JSON of `parts`."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_digest(path: pathlib.Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _input_digests(workdir: pathlib.Path, files: tuple[pathlib.Path, ...]) -> dict[str, str]:
    """SHA-256 of each input file, read again only when its size or modification time changed."""
    cache_path = workdir / ".input_hashes.json"
    cache = read_json(cache_path) or {}
    digests = {}
    for path in files:
        stat = path.stat()
        key, stamp = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
        if cache.get(key, [None])[0] != stamp:
            cache[key] = [stamp, file_digest(path)]
        digests["/".join(path.parts[-2:])] = cache[key][1]
    write_json(cache_path, cache)
    return digests


def _promise(stage: Stage, workdir: pathlib.Path) -> dict[str, Any]:
    inputs = {need: file_digest(workdir / need / MANIFEST) for need in stage.needs}
    if stage.files:
        inputs.update(_input_digests(workdir, stage.files))
    return {"stage": stage.name, "version": __version__, "settings": stage.settings, "inputs": inputs}


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            line
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key)
            for line in differences(old.get(key), new.get(key), f"{prefix}{key}.")
        ]
    if prefix.startswith("inputs."):
        return [f"{prefix[7:-1]} changed"]
    return [f"{prefix[:-1].removeprefix('settings.')} was {old!r}, now {new!r}"]


def _intact(directory: pathlib.Path, manifest: Mapping[str, Any]) -> bool:
    for name, (size, _) in manifest["files"].items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != size:
            return False
    return True


def _partial(path: pathlib.Path) -> bool:
    """Whether it lies under a temporary name, left by a writer that was cut off."""
    return any(part.startswith(".") and part.endswith(".partial") for part in path.parts)


def _written(stage: Stage, directory: pathlib.Path) -> dict[str, list]:
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p.name not in (MANIFEST, PLAN))
    names = {str(p.relative_to(directory)): p for p in paths if not _partial(p.relative_to(directory))}
    return {
        name: [p.stat().st_size, file_digest(p)]
        for name, p in names.items()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in stage.volatile)
    }


def is_done(stage: Stage, workdir: pathlib.Path) -> bool:
    """Whether `bring_up_to_date` would find nothing to do; what the stage needs is up to date."""
    promise, manifest = as_json(_promise(stage, workdir)), read_json(workdir / stage.name / MANIFEST)
    return (
        bool(manifest)
        and {key: manifest.get(key) for key in promise} == promise
        and _intact(workdir / stage.name, manifest)
    )


def bring_up_to_date(stage: Stage, workdir: pathlib.Path, redo: bool, say: Callable[[str], None]) -> None:
    """Runs `stage` unless its manifest says that the same work is already done.

    Unfinished work under the same plan is continued by the stage itself. Changed settings or inputs redo the stage with
    the reason printed; a precious stage refuses with the list of changes unless `redo`.
    """
    directory = workdir / stage.name
    promise = processes.from_first(lambda: _begin(stage, workdir, redo, say))
    if promise is None:
        return
    heartbeat.beat(now=True, stage=stage.name, doing=None, done=None, total=None)

    def finish(counts: Mapping[str, Any]) -> None:
        write_json(directory / MANIFEST, {**promise, "counts": counts, "files": _written(stage, directory)})

    if stage.shared:
        counts = stage.run(directory)
        processes.barrier()
        processes.from_first(lambda: finish(counts))
    else:
        processes.from_first(lambda: finish(stage.run(directory)))


def _begin(stage: Stage, workdir: pathlib.Path, redo: bool, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Makes the stage's directory ready for work and writes its plan, which it returns; None where it is up to date."""
    directory = workdir / stage.name
    promise = as_json(_promise(stage, workdir))
    manifest, plan = read_json(directory / MANIFEST), read_json(directory / PLAN)
    if manifest is not None:
        changes = differences({key: manifest.get(key) for key in promise}, promise)
        if not changes and _intact(directory, manifest):
            say(f"{stage.name}: up to date")
            return None
        changes = changes or ["a file of it is missing or has another size"]
    elif plan is None:
        changes = []
        say(stage.name)
        # what lies there without a plan nobody can vouch for
        shutil.rmtree(directory, ignore_errors=True)
    else:
        changes = differences(plan, promise)
        if not changes:
            say(f"{stage.name}: going on with unfinished work")
    if changes:
        reason = "; ".join(changes[:6])
        if stage.precious and not redo and any(path.name != PLAN for path in directory.iterdir()):
            raise UserError(
                f"{directory} holds a model trained with other settings or data ({reason}); "
                "choose another --workdir, or add --redo to train it again"
            )
        say(f"{stage.name}: done again, because {reason}")
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / PLAN, promise)
    return promise


def adopt(stage: Stage, workdir: pathlib.Path, donors: Iterable[pathlib.Path]) -> None:
    """Takes the stage's directory over from the first of the other working directories that has done the same work.

    Replaces what lies there for other settings or inputs; leaves the same work, finished or begun, to go on. Finished stages
    are never written to, so both can share their files: hard links, or copies where the file system has none.
    """
    target = workdir / stage.name
    promise = as_json(_promise(stage, workdir))
    if read_json(target / PLAN) == promise:
        return
    for donor in donors:
        manifest = read_json(donor / stage.name / MANIFEST)
        if not manifest or {key: manifest.get(key) for key in promise} != promise:
            continue
        if _intact(donor / stage.name, manifest):
            partial = target.with_name(f".{stage.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(donor / stage.name, partial, copy_function=link)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            return


def link(source: str | pathlib.Path, target: str | pathlib.Path) -> None:
    """Another name of a file that nobody writes to any more; a copy where there are no links."""
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:  # no links on this file system, or too many to one file
        shutil.copy2(source, target)


def as_json(value: Any) -> Any:
    """The value after a round trip through JSON, so that tuples and numbers compare as they will be read back."""
    return json.loads(json.dumps(value))


def counts_of(workdir: pathlib.Path, name: str) -> Mapping[str, Any]:
    """The counts that a finished stage recorded."""
    return read_json(workdir / name / MANIFEST)["counts"]
