"""The refresher: mines negatives with the checkpoints of a run that trains, and publishes them as versions.

    python -m jdmdr.mine --follow WORKDIR

A refresh is the ordinary stages (encode, search, mine, filter; with a language model judge and expand) in a working directory of
their own, WORKDIR/train/refresh/work, in which `warmup` is the model of a checkpoint and everything that the model does not
change is a link to WORKDIR. So a killed refresh goes on shard by shard as any run does, and what a language model has judged
before is not asked again.
"""

from __future__ import annotations

import functools
import os
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags, logging
from ml_collections import ConfigDict

from jdmdr import (
    cli,
    compile_cache,
    evaluate,
    heartbeat,
    metrics,
    models,
    negatives,
    objectives,
    parallel,
    processes,
    progress,
    trainable,
    versions,
    workdir,
)
from jdmdr.library import TRAIN, TrainingQuery, docid_lookup
from jdmdr.negatives import Negatives
from jdmdr.recipe import Recipe
from jdmdr.refresh import CONFIG, DEV, DIRECTORY, MEASURE, VALID, WORK, fingerprint
from jdmdr.train import CHECKPOINTS
from jdmdr.types import NO_HIT, UserError

JOB = "job.json"
REDONE = ("embeddings-warmup", "mine", "cross_encoder", "judge", "expand", "negatives")  # by every refresh
PAUSE = 1.0  # seconds between two looks for a checkpoint
ATTEMPTS = 5  # at reading checkpoints that vanish
COMMITTED = "_CHECKPOINT_METADATA"


class Snapshot(Recipe):
    """The recipe with a checkpoint's model in the place of `warmup`, over the queries that a version is mined for."""

    def __init__(self, config: ConfigDict, directory: pathlib.Path, version: int):
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.encode.passages = ""
        super().__init__(config, directory)
        self.version = version

    @functools.cached_property
    def everyone(self) -> list[TrainingQuery]:
        """All training queries."""
        return Recipe.training.func(self)

    @functools.cached_property
    def training(self) -> list[TrainingQuery]:
        """The training queries, those that are not this version's turn as if they were held out."""
        mine = {(q.lang, q.qid) for q in turn(self.everyone, self.version, self.config.refresh.chunks)}
        return [q if (q.lang, q.qid) in mine else q._replace(held_out=True) for q in self.everyone]

    def embed_first(self, out_dir: pathlib.Path) -> dict[str, Any]:
        model = self._model("warmup")
        topics = [TRAIN, *({DEV} & set(self.library.topics()))]
        tokens = self.directory / "tokens"
        return self._embed(model, self.config.encoder, tokens, self.vocab_size, self.library.langs, topics, out_dir)

    def select_negatives(self, out_dir: pathlib.Path) -> dict[str, Any]:
        return self._select_negatives(out_dir, self.version)

    def figures(self) -> dict[str, float]:
        """MRR@10, mean over languages, of the held-out training queries (`valid`) and of `dev`; each where there are any."""
        by_split: dict[str, list[float]] = {VALID: [], DEV: []}
        for index, lang in enumerate(self.library.langs):
            held_out = {q.qid: q for q in self.everyone if q.lang == index and q.held_out}
            collection, base = self.library.collections[index], self.library.bases[index]
            valid = {qid: {d: 1 for d in collection.docids(q.positives - base)} for qid, q in held_out.items()}
            for split, topics, qrels in ((VALID, TRAIN, valid), (DEV, DEV, self.library.qrels(lang, DEV))):
                qids, _ = self.library.queries(lang, topics)
                rows = np.array([row for row, qid in enumerate(qids) if qid in qrels], np.int64)
                if len(rows):
                    hits = self._retriever("warmup", lang, topics).search(rows, min(10, len(collection)))
                    run = evaluate.as_run([qids[row] for row in rows], hits, docid_lookup(collection, [hits]))
                    values = metrics.evaluate_run({qid: qrels[qid] for qid in run}, run, (MEASURE,))[MEASURE]
                    by_split[split].append(float(np.mean(list(values.values()))))
        return {f"{split}_{MEASURE}": metrics.macro_average(dict(enumerate(v))) for split, v in by_split.items() if v}


def turn(training: Sequence[TrainingQuery], version: int, chunks: int) -> list[TrainingQuery]:
    """The queries that a version is mined for: one of `chunks` parts of each language's, in turn."""
    chosen = []
    for lang in sorted({q.lang for q in training}):
        used = [q for q in training if q.lang == lang and not q.held_out]
        part = version % chunks
        chosen += used[len(used) * part // chunks : len(used) * (part + 1) // chunks]
    return chosen


def refresh_next(config: ConfigDict, directory: pathlib.Path, step: int, model: tuple[Any, Any]) -> None:
    """Mines the next version with the model of `step`; all processes of a run call it together."""
    home = directory / "train" / DIRECTORY
    version, previous = processes.from_first(lambda: [versions.next_number(home), _newest(home)[0]])
    refresh(config, directory, step, version, model, previous)


def refresh(
    config: ConfigDict, directory: pathlib.Path, step: int, version: int, model: tuple[Any, Any] | None, previous: int
) -> None:
    """Mines version `version` with the model of `step` and publishes it; goes on where a killed refresh of the same step was.

    All processes of a run call it together.

    Args:
      model: the encoder's config and parameters; None takes those that the killed refresh had.
      previous: the version that it follows, whose negatives queries keep that it is not mined for.
    """
    began = time.time()
    home, work = directory / "train" / DIRECTORY, directory / "train" / DIRECTORY / WORK
    job = {"step": step, "version": version, "previous": previous}
    snapshot = Snapshot(config, work, version)
    if processes.leads():
        if workdir.read_json(work / JOB) != job:
            shutil.rmtree(work, ignore_errors=True)
            workdir.write_json(work / JOB, job)
        _link(directory, work)
    processes.barrier()
    if model:
        digest = models.save(work / "warmup", *model)
        if processes.leads():
            workdir.write_json(
                work / "warmup" / workdir.MANIFEST, {"counts": {"parameters_sha256": digest}, "files": {}}
            )
    heartbeat.event("mine", step=step, version=version)
    for stage in snapshot.stages():
        if stage.name in REDONE:
            workdir.bring_up_to_date(stage, work, True, lambda line: progress.say(f"  version {version}: {line}"))
    if processes.leads():
        before = _store(directory, previous)
        facts = {
            "source_step": step, "fingerprint": fingerprint(directory), "chunks": config.refresh.chunks,
            "chunk": version % config.refresh.chunks, "previous": previous, "metrics": snapshot.figures(),
            "source_parameters_sha256": workdir.counts_of(work, "warmup")["parameters_sha256"],
        }  # fmt: skip
        facts["changed"] = _changed(snapshot, before)
        facts["seconds"] = round(time.time() - began, 3)
        try:
            versions.publish(home, version, functools.partial(_write, snapshot, before), facts)
        except versions.Taken as error:
            raise UserError(f"{error}: another refresher follows {directory}; keep one of them") from error
        told = {key: facts[key] for key in ("changed", "metrics", "seconds")}
        heartbeat.event("publish", version=version, source_step=step, **told)
        shutil.rmtree(work)
    processes.barrier()


def _link(directory: pathlib.Path, work: pathlib.Path) -> None:
    """What the model does not change, as links to the run's own."""
    for path in directory.iterdir():
        own = path.name in (*REDONE, "warmup", "train", heartbeat.DIRECTORY) or path.name.startswith(".")
        if path.is_dir() and not own and not (work / path.name).exists():
            (work / path.name).symlink_to(path.resolve(), target_is_directory=True)


def _store(directory: pathlib.Path, version: int) -> pathlib.Path:
    home = directory / "train" / DIRECTORY if version else directory / "negatives"
    return versions.version_dir(home, version)


def _merged(snapshot: Snapshot, before: pathlib.Path, lang: str) -> tuple[list[str], Negatives]:
    """The negatives of all of a language's training queries: those mined now, and before where it was not their turn or fewer
    than `mine.least` were found."""
    qids, old = negatives.read(before, lang)
    new_qids, new = negatives.read(versions.version_dir(snapshot.directory / "negatives", 0), lang)
    if not new_qids:
        return qids, old
    place = {qid: row for row, qid in enumerate(qids)}
    enough = (np.asarray(new.rows_QxN) != NO_HIT).sum(axis=1) >= (snapshot.config.mine.least or 0)
    new = Negatives(*(np.asarray(of)[enough] for of in new))
    rows = [place[qid] for qid, found in zip(new_qids, enough, strict=True) if found]
    width = max(old.rows_QxN.shape[1], new.rows_QxN.shape[1])
    out = []
    for ours, theirs, empty in zip(old, new, (NO_HIT, 0, np.nan, 0), strict=True):
        merged = np.full((len(qids), width), empty, ours.dtype)
        merged[:, : ours.shape[1]] = ours
        merged[rows] = empty
        merged[rows, : theirs.shape[1]] = theirs
        out.append(merged)
    return qids, Negatives(*out)


def _write(snapshot: Snapshot, before: pathlib.Path, out_dir: pathlib.Path) -> None:
    for lang in snapshot.library.langs:
        qids, merged = _merged(snapshot, before, lang)
        if qids:
            negatives.write(out_dir, lang, qids, merged)


def _changed(snapshot: Snapshot, before: pathlib.Path) -> float:
    """Of the negatives mined now, the share that their query did not have before."""
    fresh = total = 0
    for lang in snapshot.library.langs:
        new_qids, new = negatives.read(versions.version_dir(snapshot.directory / "negatives", 0), lang)
        qids, old = negatives.read(before, lang)
        place = {qid: row for row, qid in enumerate(qids)}
        for qid, rows in zip(new_qids, new.rows_QxN, strict=True):
            found = rows[rows != NO_HIT]
            fresh += int((~np.isin(found, old.rows_QxN[place[qid]])).sum())
            total += len(found)
    return round(fresh / max(total, 1), 6)


# ------------------------------------------------------------------------------------------------------ the second process


def checkpoints(directory: pathlib.Path) -> list[int]:
    """Steps of the finished checkpoints under a working directory, ascending; a bare numbered directory is none."""
    home = directory / "train" / CHECKPOINTS
    names = [path for path in home.iterdir() if path.name.isdigit()] if home.is_dir() else []
    return sorted(int(path.name) for path in names if (path / COMMITTED).is_file() and (path / "state").is_dir())


def read_checkpoint(config: ConfigDict, directory: pathlib.Path, step: int) -> tuple[Any, Any]:
    """The encoder's config and parameters of a checkpoint; raises what orbax does where it is not whole, or gone."""
    encoder_config, start = models.load(directory / "warmup")
    section, mesh = config.train, parallel.own_mesh()
    own = objectives.build(section.objective, encoder_config, mesh, None).parameters
    trained, frozen = trainable.split(section, start, own, config.seed)
    sharding = parallel.replicated(mesh)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), {"params": trained})
    with ocp.PyTreeCheckpointer() as checkpointer:
        path = (directory / "train" / CHECKPOINTS / str(step) / "state").resolve()
        restored = checkpointer.restore(
            path,
            args=ocp.args.PyTreeRestore(
                item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like), partial_restore=True
            ),
        )
    return encoder_config, trainable.assemble(restored["params"], frozen, section.lora)[0]


def follow(directory: pathlib.Path, parent: int = 0) -> None:
    """Mines with every newest checkpoint until the run's training is finished.

    Args:
      parent: pid of the run that started this process; when that ends, so does this, after the version that it is at.

    Raises:
      UserError: another refresher follows the run, or no checkpoint can be read.
    """
    home = directory / "train" / DIRECTORY
    _await_run(directory, parent)
    with workdir.locked(home, "--follow"):
        heartbeat.start(directory, heartbeat.REFRESH)
        heartbeat.event("start")
        versions.sweep(home)
        config = ConfigDict(workdir.read_json(home / CONFIG))
        job = workdir.read_json(home / WORK / JOB)
        begun = (home / WORK / "warmup" / workdir.MANIFEST).is_file()
        if job and begun and job["version"] == versions.next_number(home) and job["previous"] == _newest(home)[0]:
            refresh(config, directory, job["step"], job["version"], None, job["previous"])
        attempts = 0
        while not (directory / "train" / workdir.MANIFEST).exists():
            version, source_step = _newest(home)
            step = max(checkpoints(directory), default=0)
            if step <= source_step:
                if _orphaned(parent):
                    heartbeat.event("end", reason="the run that started it is gone")
                    return
                heartbeat.beat(doing="waiting for a checkpoint", version=version, stage=None, done=None, total=None)
                time.sleep(PAUSE)
                continue
            try:
                model = read_checkpoint(config, directory, step)
            except Exception as error:  # orbax and tensorstore raise many kinds
                attempts += 1
                reason = " ".join(str(error).split())[:160]
                heartbeat.event("retry", step=step, attempt=attempts, reason=reason)
                if attempts == ATTEMPTS:
                    raise UserError(
                        f"{directory / 'train' / CHECKPOINTS}: {ATTEMPTS} times in a row no checkpoint could be read, at last "
                        f"that of step {step} ({reason})"
                    ) from error
                time.sleep(PAUSE * attempts)
                continue
            attempts = 0
            refresh_next(config, directory, step, model)
        heartbeat.event("end", reason="training is finished")


def _newest(home: pathlib.Path) -> tuple[int, int]:
    """(number, source step) of the newest version that can be read; version 0 is of step 0."""
    for number in reversed(versions.numbers(home)):
        try:
            return number, versions.manifest(home, number)["source_step"]
        except versions.Damaged as error:
            heartbeat.event("damaged", version=number, reason=str(error))
    return 0, 0


def _await_run(directory: pathlib.Path, parent: int) -> None:
    config = directory / "train" / DIRECTORY / CONFIG
    if not directory.is_dir():
        raise UserError(f"--follow {directory}: there is no such directory; name the --workdir of a run")
    if not config.exists():
        progress.say(f"{config} is not there yet: waiting for a run with refresh.mode 'async' to start training")
    while not config.exists() and not _orphaned(parent):
        time.sleep(PAUSE)


def _orphaned(parent: int) -> bool:
    return bool(parent) and os.getppid() != parent


def command(doc: str) -> None:
    """The main function of `python -m jdmdr.mine --follow WORKDIR`."""
    cli.restart_with_malloc_settings()
    flags.DEFINE_string("follow", None, "The working directory of the run to mine for.")
    flags.DEFINE_integer("parent", 0, "Pid of the run that starts this process.", lower_bound=0)
    logging.set_verbosity(logging.FATAL)  # orbax logs the tracebacks of what it raises again

    def run(words: list[str], values: flags.FlagValues) -> int:
        if words:
            raise UserError(f"the argument {words[0]!r} belongs to no flag; write --follow=WORKDIR and nothing else")
        compile_cache.switch_on()
        follow(pathlib.Path(values.follow), values.parent)
        return 0

    cli.run_tool(run, doc)
