"""Trains a bi-encoder: the one loop of every recipe.

    python -m jdmdr.train --config configs/dmdr.py --workdir runs/dmdr --config.data.root=DIR

brings everything that training reads up to date first (see jdmdr/pipeline.py), then trains, or goes on training.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from jdmdr import batches, hardware, models, parallel, peft, perf, processes, progress, trainable, workdir
from jdmdr.checkpoint import UNMEASURED, Checkpoints
from jdmdr.cli import Terminated
from jdmdr.objectives import Objective
from jdmdr.optim import make_optimiser
from jdmdr.refresh import DIRECTORY as REFRESH
from jdmdr.refresh import Refresh
from jdmdr.step import init_state, make_step
from jdmdr.types import UserError

READ_BY_OTHERS = 3  # latest checkpoints that are kept where another process reads them
CHECKPOINTS, LOG, ADAPTER, GOODPUT = "checkpoints", "log.jsonl", "adapter", "goodput.json"
OWN = "objective.safetensors"  # the parameters that the objective brought
HELD_UP = "save_seconds"  # that the step after the last save began later for it
# The bytes of checkpoints differ from run to run; the parameters are promised by their hash among the counts.
VOLATILE = (f"{CHECKPOINTS}/*", f"{models.PARAMETERS}/*", "tensorboard/*", f"{REFRESH}/*", LOG, GOODPUT)


def train(
    section: Any,
    encoder: Any,
    params: Any,
    objective: Objective,
    make_batch: Callable[[int], tuple[dict, dict]],
    shapes: int,
    validate: Callable[[Any], float | None],
    out_dir: pathlib.Path,
    seed: int,
    mesh: jax.sharding.Mesh,
    base: str | None = None,
    measure: str = "ndcg@10",
    fsdp: int = 1,
    rules: Sequence[tuple[str, str]] = (),
    stall: float = 0,
    refresh: Refresh | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Trains for `section.steps` steps and returns the best parameters and the run's counts.

    All processes of the mesh run it together; the first writes the logs.

    Args:
      section: the recipe's `train` or `warmup` keys (configs/default.py).
      encoder: what `encoders.build` returns; `params` are its starting parameters.
      objective: what `objectives.build` returns.
      make_batch: step -> (arrays, figures to log), a pure function of the step.
      shapes: how many differently shaped batches `make_batch` can give; more compilations than that are an error.
      validate: params -> nDCG@10 on the held-out train queries, or None where there are none.
      out_dir: gets `checkpoints/`, `log.jsonl`, `tensorboard/`, and `goodput.json`: where the time went. A run found there is gone on with, bit for bit as
        if it had never stopped (same device count, CPU). Adapters of a transformer are left in `adapter/` too.
      measure: what `validate` measures.
      base: the checkpoint that `params` are, for the adapters to name; None where they are of no checkpoint.
      fsdp, rules: how the state is split over the devices (`parallel.shardings`).
      stall: seconds without the end of a step after which the stacks of all threads are printed, again and again; 0: off.
      refresh: chooses the version of the negatives of each step, which `make_batch` reads.

    Raises:
      UserError: the checkpoint is corrupt, or `section.max_skipped` updates in a row were not finite.
      Terminated: SIGTERM arrived, in any process; the state is saved.
    """
    # --- setup ---------------------------------------------------------------------------------------------------
    stop = _StopOnSigterm()
    trained, frozen = trainable.split(section, params, objective.parameters, seed)
    optimiser = make_optimiser(section, trained, frozen)
    state = init_state(trained, optimiser, frozen)
    shardings = parallel.shardings(state, mesh, fsdp, rules)
    state = parallel.put(state, shardings)
    step_fn = make_step(encoder, objective, optimiser, seed, section.lora, mesh, section.grad_cache, shardings)

    def encoder_params(state: dict) -> Any:
        return trainable.assemble(state["params"], state.get("frozen", {}), section.lora)[0]

    # --- resume --------------------------------------------------------------------------------------------------
    checkpoints = Checkpoints(out_dir / CHECKPOINTS, READ_BY_OTHERS if refresh else 1)
    latest = checkpoints.latest()
    if latest is None:
        first = 0
        log = _Log(out_dir, -1)
        before = validate(encoder_params(state))
        log.validation(0, measure, before)
        checkpoints.save(0, _saved(state), _score(before))
    else:
        restored, first = checkpoints.restore(latest, _saved(state))
        state = {**state, **restored}
        progress.say(f"  going on from step {first}")
        log = _Log(out_dir, first)

    # --- loop ----------------------------------------------------------------------------------------------------
    if refresh:
        refresh.saved(first, section.steps, functools.partial(encoder_params, state), checkpoints.steps())
        iterator = refresh.batches(make_batch, first, section.steps, lambda: stop.requested)
    else:
        iterator = batches.batch_iterator(make_batch, first, section.steps)
    bar = progress.bar(None, "  training", "steps", total=section.steps, initial=first)
    meter = perf.Meter(encoder.config)
    pending = None  # the metrics of the step before: fetched while the device works on the next one
    asked = lambda: False  # whether a process was told to stop before that step
    held_up = {}
    compiled = set()  # shapes of batches that the step is compiled for
    for step, (batch, figures) in enumerate(meter.waits(iterator), first):
        if stall:
            faulthandler.dump_traceback_later(stall, repeat=True, file=sys.__stderr__)
        meter.count(batch)
        arrays = {**parallel.put_batch(batch, mesh), **objective.arrays}
        shape = tuple(array.shape for array in jax.tree.leaves(arrays))
        if shape not in compiled:
            with meter.timed(perf.COMPILING):
                _tell_memory(step_fn.lower(state, arrays).compile(), first=not compiled)
            compiled.add(shape)
        state, metrics = step_fn(state, arrays)
        if pending:
            _account(log, bar, section, *pending)
        pending = step, metrics, {**figures, **held_up}
        bar.update()
        done = step + 1
        if done % section.log_every == 0:
            held_up = {}
        asked, stopping = parallel.anywhere(stop.requested, mesh), asked()
        validating = done % section.checkpoint_every == 0 or done == section.steps
        if validating or stopping:
            # The log first: of what a checkpoint holds, every line is there.
            _account(log, bar, section, *pending)
            pending = None
            faulthandler.cancel_dump_traceback_later()
            with meter.timed("validating"):
                score = validate(encoder_params(state)) if validating else None
            log.validation(done, measure, score)
            with meter.timed("saving"):
                held_up = {HELD_UP: round(checkpoints.save(done, _saved(state), _score(score)), 4)}
            if refresh and not stopping:
                with meter.timed("mining"):
                    refresh.saved(done, section.steps, functools.partial(encoder_params, state), checkpoints.steps())
        if stopping:
            checkpoints.close()
            log.close()
            bar.close()
            raise Terminated
    if step_fn._cache_size() > shapes:
        raise AssertionError(f"{step_fn._cache_size()} compilations of the step for {shapes} batch shapes")

    # --- finish --------------------------------------------------------------------------------------------------
    bar.close()
    if meter.steps:
        _tell_goodput(meter.figures(), encoder.config, mesh, out_dir)
    log.close()
    checkpoints.close()
    checkpoints = Checkpoints(out_dir / CHECKPOINTS)
    best = checkpoints.best() if section.keep == "best" else checkpoints.latest()
    skipped = int(state["skipped"])
    score = checkpoints.score(best)
    restored, _ = checkpoints.restore(best, _saved(state))
    state = {**state, **restored}
    checkpoints.close()
    stop.restore()
    if parallel.anywhere(stop.requested, mesh)():
        raise Terminated
    if section.steps and not best:
        progress.say(
            "  no checkpoint does better on the held-out queries than what training started from: that is kept"
        )
    counts = {"steps": section.steps, "best_step": best, "skipped_updates": skipped}
    if score != UNMEASURED:
        counts[f"valid_{measure}"] = score
    if section.lora.rank and encoder.config.kind == "transformer":
        adapters = parallel.to_host(state["params"][trainable.LORA])
        if processes.leads():
            peft.save(out_dir / ADAPTER, encoder.config, adapters, section.lora, base)
    if objective.parameters:
        own = state["params"][trainable.OBJECTIVE]
        counts["objective"] = objective.figures(own)
        models.save_tree(out_dir / OWN, own)
    return encoder_params(state), counts


def _saved(state: dict) -> dict:
    """What a checkpoint holds of the state: parameters that do not train are where they came from."""
    return {key: value for key, value in state.items() if key != "frozen"}


def _score(value: float | None) -> float:
    return UNMEASURED if value is None else value


def _tell_memory(compiled: jax.stages.Compiled, first: bool) -> None:
    """Of the step as it was compiled for a batch: told once, and again where a device has less."""
    found = compiled.memory_analysis()
    needed = (
        found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes - found.alias_size_in_bytes
    )
    there = hardware.find("").memory
    if first:
        scratch, state = progress.size(found.temp_size_in_bytes), progress.size(needed - found.temp_size_in_bytes)
        progress.say(
            f"  memory of a step: {state} of state and batch, {scratch} of scratch; a device has {progress.size(there)}"
        )
    if needed > there:
        progress.say(
            f"  warning: a step needs {progress.size(needed)} of a device and it has {progress.size(there)}; if it fails, lower "
            "batch_size or passages_per_query, or set grad_cache (docs/scaling.md)"
        )


def _tell_goodput(found: dict[str, Any], config: Any, mesh: jax.sharding.Mesh, out_dir: pathlib.Path) -> None:
    """Where the time since this process's first step went, on stderr and in `goodput.json`."""
    peak = perf.matmul_peak(config.dtype) * len(mesh.local_devices) if found["flops_per_second"] else None
    if processes.leads():
        workdir.write_json(out_dir / GOODPUT, {**found, "peak_flops_per_second": peak})
    progress.say(f"  {perf.sentence(found, peak)}")


class _StopOnSigterm:
    """Turns SIGTERM into a flag that the loop looks at between steps, so that a save is never cut in two."""

    def __init__(self):
        self.requested = False
        self._before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, signum, frame):
        self.requested = True

    def restore(self):
        signal.signal(signal.SIGTERM, self._before)


class _Log:
    """`log.jsonl` and TensorBoard; lines behind step `last`, which a resumed run repeats, are dropped first.

    Of several processes the first writes them.
    """

    def __init__(self, out_dir: pathlib.Path, last: int):
        self._writes = processes.leads()
        if not self._writes:
            return
        path = out_dir / LOG
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                # the last line may be half-written
                if line.endswith("}") and json.loads(line)["step"] <= last:
                    kept.append(line + "\n")
        workdir.write_text(path, "".join(kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        # The SummaryWriter of tensorboardX writes in a thread; a full disk ends that and the run waits for it for ever.
        (out_dir / "tensorboard").mkdir(exist_ok=True)
        self._board = EventsWriter(str(out_dir / "tensorboard" / "events"))
        self._board.write_event(Event(step=last + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, figures: dict[str, float]) -> None:
        if not self._writes:
            return
        self._file.write(json.dumps({"step": step, **figures}, sort_keys=True) + "\n")
        self._file.flush()
        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._board.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._board.flush()

    def validation(self, step: int, measure: str, score: float | None) -> None:
        if score is not None:
            self.write(step, {f"valid_{measure}": score})

    def close(self) -> None:
        if self._writes:
            self._file.close()
            self._board.close()


def _account(log: _Log, bar: Any, section: Any, step: int, metrics: dict, figures: dict) -> None:
    """Logs a step and stops the run when too many updates in a row were not finite."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    in_a_row = int(values.pop("skipped_in_a_row"))
    if (step + 1) % section.log_every == 0 or in_a_row:
        log.write(step + 1, {**{k: v for k, v in values.items() if np.isfinite(v)}, **figures, "time": time.time()})
        bar.set_postfix_str(f"loss {values['loss']:.4f}", refresh=False)
    if in_a_row >= section.max_skipped:
        raise UserError(
            f"step {step + 1}: loss or gradient was not finite {in_a_row} times in a row; the checkpoints before it are "
            "intact; lower the learning rate or raise the temperature"
        )


if __name__ == "__main__":
    from jdmdr import pipeline

    pipeline.command("train", __doc__)
