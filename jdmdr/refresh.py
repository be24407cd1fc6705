"""Negatives that are mined again while the model trains (ANCE): which version a step takes, and who mines the next one.

    train/refresh/v00001/       versions (jdmdr/versions.py)
    train/refresh/taken.jsonl   one line for every step at which the run looked for a version: the one it takes from there on

`refresh.mode` says where new versions come from. `inline`: the trainer stops after a checkpoint and mines with its own devices.
`async`: a second process, `python -m jdmdr.mine --follow WORKDIR`, watches the checkpoints. `replay`: another run's versions, at
the steps at which that run took them.

The batch of a step depends on the step and on `taken.jsonl` alone: a run that goes on after a kill takes again what it took, up
to the last step that it ever reached, and only then looks for what is new.

Source: Xiong et al., "Approximate Nearest Neighbor Negative Contrastive Learning for Dense Text Retrieval" (ICLR 2021).
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from jdmdr import batches, heartbeat, parallel, processes, progress, versions, workdir
from jdmdr.batches import Ragged
from jdmdr.types import UserError

MODES, ON_STALE = ("off", "inline", "async", "replay"), ("warn", "wait", "fail")
DIRECTORY, TAKEN, LOCK, CONFIG, WORK, MINER_LOG = (
    "refresh",
    "taken.jsonl",
    ".lock",
    "config.json",
    "work",
    "refresher.log",
)
TOLD = ("changed", "metrics", "seconds")
MEASURE, DEV, VALID = "mrr@10", "dev", "valid"  # what a refresh measures of its model, and on which queries
PAUSE = 0.2  # seconds between two looks of a run that waits
RESTARTS = 5  # of a refresher that ends without a new version


class Version(NamedTuple):
    """A version as training uses it."""

    number: int
    source_step: int  # the checkpoint whose model found the negatives
    negatives: Ragged
    told: Mapping[str, Any] = {}  # of its manifest, what a report shows


class Refresh:
    """Which version of the negatives each step of a run takes."""

    def __init__(
        self, section: Any, every: int, first: Version, directory: pathlib.Path, read: Callable[[pathlib.Path], Ragged],
        fingerprint: str, mesh: jax.sharding.Mesh, mine: Callable[[int, Any], None] | None = None,
        refresher: Refresher | None = None,
    ):  # fmt: skip
        """
        Args:
          section: the recipe's `refresh` keys.
          every: steps between two checkpoints.
          first: version 0.
          directory: of the run's versions and of its log of them.
          read: the directory of a version -> its negatives, a list a training query; raises what damaged files make it raise.
          fingerprint: of the passages and queries (`versions.verify`).
          mine: inline, (step, the encoder's parameters) -> publishes the version of that step.
          refresher: async, the process that mines, where this run starts it.
        """
        self._section, self._directory, self._read, self._fingerprint, self._mesh = (
            section, directory, read, fingerprint, mesh
        )  # fmt: skip
        self._every = (section.every or every) if section.mode == "inline" else None
        self._max_age = section.max_age or 3 * every
        self._checkpoint_every = every
        self._mine, self._refresher = mine, refresher
        self._versions = pathlib.Path(section.replay) / "train" / DIRECTORY if section.mode == "replay" else directory
        self._first = self._current = first
        self._refused: set[int] = set()
        self._loading: tuple[int, concurrent.futures.Future] | None = None
        self._loader = concurrent.futures.ThreadPoolExecutor(1, "refresh")
        self._stale = self._warned = False  # what has been told
        self._began: tuple[float, int] | None = None
        if processes.leads():
            directory.mkdir(parents=True, exist_ok=True)
            _cut(directory / TAKEN)
        processes.barrier()
        self._taken = read_taken(self._versions / TAKEN) if section.mode == "replay" else {}
        self._taken |= read_taken(directory / TAKEN)
        processes.barrier()  # the first process writes to that file with its first look

    def negatives(self) -> Ragged:
        """Those of the steps up to the next look."""
        return self._current.negatives

    def figures(self, step: int) -> dict[str, int]:
        return {"negatives_version": self._current.number, "negatives_age": step - self._current.source_step}

    def batches(
        self, make_batch: Callable[[int], Any], first: int, steps: int, stopping: Callable[[], bool]
    ) -> Iterator[Any]:
        """`batches.batch_iterator` from look to look: no batch is made ahead of the choice of its negatives."""
        earlier = [step for step in self._taken if step <= first]
        if earlier:
            self._take(max(earlier), self._taken[max(earlier)])
        self._began = time.monotonic(), first
        step = first
        while step < steps:
            if self._looks_at(step):
                self._look(step, stopping)
            until = next((s for s in range(step + 1, steps) if self._looks_at(s)), steps)
            for batch in batches.batch_iterator(make_batch, step, until):
                heartbeat.beat(step=step + 1, steps=steps, **self.figures(step))
                step += 1
                yield batch

    def saved(self, step: int, steps: int, params: Callable[[], Any], kept: list[int]) -> None:
        """A checkpoint of `step` is there, and with it those of the steps `kept`: mines where that is due, and deletes
        versions that nobody needs."""
        due = self._every and step % self._every == 0 and 0 < step < steps
        if due and step not in processes.from_first(self._sources):
            self._mine(step, params())
            heartbeat.beat(stage="train")
        if processes.leads() and self._section.keep and self._section.mode != "replay":
            self._retire({*kept, step})

    def close(self) -> None:
        self._loader.shutdown()
        if self._refresher:
            self._refresher.stop()

    # --- the choice --------------------------------------------------------------------------------------------------

    def _looks_at(self, step: int) -> bool:
        return step % self._section.poll == 0 or bool(self._every and step % self._every == 0)

    def _look(self, step: int, stopping: Callable[[], bool]) -> None:
        """Decides what is taken from `step` on; the first process does, and all follow."""
        before = self._current.number
        if step in self._taken:
            self._take(step, self._taken[step])
            return
        version = self._current.number
        if self._section.mode != "replay":
            version = processes.from_first(lambda: self._choice(step, stopping))
        self._take(step, version)
        self._taken[step] = self._current.number
        if processes.leads():
            line = {"step": step, "version": self._current.number, "source_step": self._current.source_step}
            line |= self._current.told if self._current.number != before else {}
            _append(self._directory / TAKEN, json.dumps(line, sort_keys=True) + "\n")

    def _take(self, step: int, version: int) -> None:
        """Makes the version current in every process, or in none; a version that is gone gives way to the newest."""
        if version == self._current.number:
            return
        found = self._loaded(version)
        failed = parallel.anywhere(found is None, self._mesh)()
        if failed and step in self._taken:  # it was there when the run took it
            newest = processes.from_first(lambda: max(versions.numbers(self._versions), default=0))
            heartbeat.event("gone", step=step, version=version, newest=newest)
            progress.say(
                f"  version {version} of the negatives, taken at step {step}, is gone; version {newest} stands in"
            )
            found = self._loaded(newest)
            failed = parallel.anywhere(found is None, self._mesh)()
        if failed:
            self._refuse(version, "a process could not read it")
            return
        self._current, self._stale = found, False
        heartbeat.event("adopt", step=step, version=found.number, source_step=found.source_step)
        progress.say(f"  step {step}: negatives of version {found.number}, by the model of step {found.source_step}")

    def _choice(self, step: int, stopping: Callable[[], bool]) -> int:
        """The version from `step` on, as the first process finds it; waits or fails where that is too old."""
        while True:
            if self._refresher:
                self._refresher.keep_running()
            version, source_step = self._newest_ready(step)
            age = step - source_step
            if age <= self._max_age or stopping():
                return version
            sentence = (
                f"the negatives are of step {source_step}, {age} steps old at step {step}, and refresh.max_age is "
                f"{self._max_age}"
            )
            if not self._stale:
                heartbeat.event("stale", step=step, version=version, age=age, on_stale=self._section.on_stale)
                progress.say(f"  warning: {sentence}")
                self._stale = True
            if self._section.on_stale == "fail":
                raise UserError(
                    f"{sentence}; see whether the refresher runs (python -m jdmdr.status WORKDIR), give it more devices, save "
                    "checkpoints less often, or raise refresh.max_age"
                )
            if self._section.on_stale == "warn":
                return version
            heartbeat.beat(doing="waiting for negatives", step=step)
            time.sleep(PAUSE)

    def _newest_ready(self, step: int) -> tuple[int, int]:
        """(version, its source step) of the newest that is loaded; starts loading a newer one."""
        number = max((n for n in versions.numbers(self._versions) if n not in self._refused), default=0)
        if number > self._current.number:
            if self._loading is None or self._loading[0] != number:
                self._loading = number, self._loader.submit(self._load, number)
            future = self._loading[1]
            if future.done() or self._section.mode == "inline":
                try:
                    found = future.result()
                    self._check_bound(number, step)
                    return number, found.source_step
                except Exception as error:  # whatever damaged files make the readers raise
                    self._refuse(number, str(error) or type(error).__name__)
                    return self._newest_ready(step)
        return self._current.number, self._current.source_step

    def _load(self, version: int) -> Version:
        if version == self._first.number:
            return self._first
        found = versions.verify(self._versions, version, self._fingerprint)
        negatives = self._read(versions.version_dir(self._versions, version))
        return Version(version, found["source_step"], negatives, {key: found[key] for key in TOLD if key in found})

    def _loaded(self, version: int) -> Version | None:
        try:
            if self._loading and self._loading[0] == version:
                return self._loading[1].result()
            return self._load(version)
        except Exception:  # whatever damaged files make the readers raise
            return None

    def _refuse(self, version: int, reason: str) -> None:
        self._refused.add(version)
        if processes.leads():
            heartbeat.event("skip", version=version, reason=reason)
            progress.say(f"  version {version} of the negatives is refused: {reason}")
            if self._section.mode != "replay":
                versions.set_aside(self._versions, version)

    def _check_bound(self, version: int, step: int) -> None:
        """Warns once where mining is too slow for `max_age`.

        With M the steps that mining takes and S those between checkpoints, negatives get M + S + poll steps old; where M is above S,
        2 M + S + poll, because the newest checkpoint is up to S steps old when the next refresh begins.
        """
        seconds, (began, first) = versions.manifest(self._versions, version).get("seconds", 0), self._began
        if self._section.mode != "async" or self._warned or step <= first:
            return
        mining = seconds * (step - first) / max(time.monotonic() - began, 1e-9)
        waiting = mining if mining > self._checkpoint_every else 0
        bound = round(mining + waiting + self._checkpoint_every + self._section.poll)
        if bound > self._max_age:
            self._warned = True
            heartbeat.event("slow", version=version, bound=bound, max_age=self._max_age)
            progress.say(
                f"  warning: mining takes about {mining:.0f} steps, so that negatives will get up to {bound} steps old; "
                f"refresh.max_age is {self._max_age}"
            )

    # --- versions ----------------------------------------------------------------------------------------------------

    def _sources(self) -> list[int]:
        found = []
        for number in versions.numbers(self._versions):
            try:
                found.append(versions.manifest(self._versions, number)["source_step"])
            except versions.Damaged as error:
                self._refuse(number, str(error))
        return found

    def _retire(self, steps: set[int]) -> None:
        """Deletes all versions but the newest `keep`, the current one, and those that kept checkpoints go on from."""
        there = versions.numbers(self._versions)
        needed = {self._current.number, *there[-self._section.keep :]}
        for step in steps:
            needed.add(self._taken.get(max((s for s in self._taken if s <= step), default=-1), 0))
        needed |= {number for step, number in self._taken.items() if step > max(steps)}
        for number in there:
            if number not in needed:
                versions.remove(self._versions, number)
                heartbeat.event("retire", version=number)


class Refresher:
    """The process that mines beside a run on the same machine: started, and started again when it ends."""

    def __init__(self, directory: pathlib.Path, section: Any):
        """`directory` is the working directory; what the process says goes to `train/refresh/refresher.log`."""
        self._directory, self._section = directory, section
        self._process: subprocess.Popen | None = None
        self._ends, self._version = 0, -1

    def keep_running(self) -> None:
        """Starts it where none runs, unless it has ended RESTARTS times in a row without a new version."""
        home = self._directory / "train" / DIRECTORY
        if self._process and self._process.poll() is None:
            return
        if self._process:
            newest = max(versions.numbers(home), default=0)
            self._ends = self._ends + 1 if newest == self._version else 1
            self._version = newest
            code, self._process = self._process.returncode, None
            heartbeat.event("refresher ended", code=code, ends=self._ends)
            if self._ends == RESTARTS:
                progress.say(
                    f"  warning: the refresher has ended {RESTARTS} times without a new version and is not started again; see "
                    f"{home / MINER_LOG}"
                )
        if self._ends >= RESTARTS or held(home / LOCK):  # somebody's own refresher, or one that outlived a killed run
            return
        environment = dict(os.environ)
        if self._section.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self._section.devices
        words = [sys.executable, "-m", "jdmdr.mine", f"--follow={self._directory}", f"--parent={os.getpid()}"]
        with open(home / MINER_LOG, "ab") as log:
            self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        heartbeat.event("refresher started", pid=self._process.pid)

    def stop(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def prepare(config: Any, directory: pathlib.Path) -> Refresher | None:
    """Leaves the recipe where a refresher finds it; the refresher that this process starts, if it does.

    Raises:
      UserError: both would sit on the same accelerators.
    """
    section = config.refresh
    if section.mode != "async":
        return None
    backend = jax.default_backend()
    if section.start and (backend == "tpu" or (backend == "gpu" and not section.devices)):
        raise UserError(
            f"refresh.mode is 'async', and a second process cannot use the devices of this one ({backend}); name GPUs of its own "
            "with refresh.devices, or set refresh.start to False and run python -m jdmdr.mine --follow WORKDIR elsewhere, or set "
            "refresh.mode to 'inline'"
        )
    if not processes.leads():
        return None
    workdir.write_json(directory / "train" / DIRECTORY / CONFIG, config.to_dict())
    return Refresher(directory, section) if section.start else None


def taken_path(run: str) -> pathlib.Path:
    """The log of versions of the working directory `run`."""
    return pathlib.Path(run) / "train" / DIRECTORY / TAKEN


def fingerprint(directory: pathlib.Path) -> str:
    """Of a working directory's passages and queries, which the rows and qids of its negatives refer to."""
    files = workdir.read_json(directory / "corpus" / workdir.MANIFEST)["files"]
    return workdir.digest({name: value for name, value in files.items() if not name.endswith("report.json")})


def tidy(directory: pathlib.Path) -> None:
    """Deletes the refresh that nobody will finish, unless a refresher of somebody's is still at it."""
    if not held(directory / LOCK):
        shutil.rmtree(directory / WORK, ignore_errors=True)


def read_taken(path: pathlib.Path) -> dict[int, int]:
    """step -> version from there on; a last line that a kill cut is left out."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
        if line.endswith("}\n"):
            told = json.loads(line)
            found[told["step"]] = told["version"]
    return found


def held(path: pathlib.Path) -> bool:
    """Whether a living process holds the lock file."""
    try:
        with open(path, "rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _cut(path: pathlib.Path) -> None:
    """Drops a half-written last line."""
    if path.exists():
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            with open(path, "r+b") as handle:
                handle.truncate(len(whole))


def _append(path: pathlib.Path, line: str) -> None:
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(line)
        handle.flush()
        os.fsync(handle.fileno())
