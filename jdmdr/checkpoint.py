"""Orbax checkpoints of a training run: state, data position and the promise it was made under; the best and the latest.

Saves are asynchronous and appear by an atomic rename; a half-written one is never seen. All processes of a run save and
restore together, each what lies on its devices; what is restored may lie otherwise, on more or fewer devices and processes.
"""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jdmdr import processes
from jdmdr.types import UserError

UNMEASURED = -1.0  # the validation score of a checkpoint that was saved between two validations


def _rank(metrics: dict[str, float]) -> tuple[float, float]:
    """Best by validation score; among equals the latest, which has seen the most."""
    return metrics["score"], metrics["step"]


def together() -> ocp.options.MultiprocessingOptions:
    """Which processes save and restore together: those of the run, or the one that works alone."""
    own = processes.index()
    if processes.count() > 1 or jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"alone{own}"
    )


class Checkpoints:
    """The checkpoints under `directory`: the `latest` newest and the best."""

    def __init__(self, directory: pathlib.Path, latest: int = 1):
        keep = [checkpoint_managers.LatestN(n=latest), checkpoint_managers.BestN(get_metric_fn=_rank, n=1)]
        options = ocp.CheckpointManagerOptions(
            best_fn=lambda metrics: metrics["score"],  # without it orbax stores no metrics
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            multiprocessing_options=together(),
            create=False,  # which orbax refuses to do for one process among several
        )
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        try:
            self._manager = ocp.CheckpointManager(directory.resolve(), options=options, item_names=("state", "data"))
        except ValueError as error:  # the scores of all checkpoints are read at once
            raise _unreadable(
                next(filter(_has_damaged_score, sorted(directory.iterdir())), directory), error
            ) from error

    def save(self, step: int, state: Any, score: float) -> float:
        """Starts saving; `score` is the validation score, UNMEASURED between validations. Raises what an earlier save
        ran into. Returns the seconds that the devices had to wait."""
        began = time.monotonic()
        self._manager.check_for_errors()
        if step in self._manager.all_steps():
            return 0.0
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave({"next_step": step})),
            metrics={"score": float(score), "step": float(step)},
            force=True,
        )
        return time.monotonic() - began

    def steps(self) -> list[int]:
        """Those that are there, or being saved."""
        return list(self._manager.all_steps())

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def best(self) -> int:
        """The step with the best validation score, or the latest where nothing was measured."""
        scored = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        measured = {step: m for step, m in scored.items() if m and m["score"] != UNMEASURED}
        if not measured:
            return self._manager.latest_step()
        return max(measured, key=lambda step: _rank(measured[step]))

    def score(self, step: int) -> float:
        return self._manager.metrics(step)["score"]

    def restore(self, step: int, like: Any) -> tuple[Any, int]:
        """State (with the shapes and shardings of `like`) and the next step of the data."""
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore())
            restored = self._manager.restore(step, args=args)
        except Exception as error:  # orbax and tensorstore raise many kinds; all mean the same to the user
            raise _unreadable(self._directory / str(step), error) from error
        return restored["state"], restored["data"]["next_step"]

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        self._manager.close()


def _has_damaged_score(checkpoint: pathlib.Path) -> bool:
    try:
        json.loads((checkpoint / "metrics" / "metrics").read_bytes())
    except OSError:
        return False
    except ValueError:
        return True
    return False


def _unreadable(path: pathlib.Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:160]
    return UserError(
        f"the checkpoint {path} cannot be read ({reason}); delete that directory, and the same command goes on from the "
        "one before it or from the start"
    )
