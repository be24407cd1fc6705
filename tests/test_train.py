import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import REPO, tiny_config
from tensorboardX.proto.event_pb2 import Event

from jdmdr import encoders, hardware, models, objectives, perf, sources
from jdmdr import train as loop
from jdmdr.checkpoint import Checkpoints
from jdmdr.cli import EXIT_TERMINATED, EXIT_USER_ERROR, Terminated
from jdmdr.optim import make_optimiser
from jdmdr.recipe import Recipe
from jdmdr.step import init_state
from jdmdr.types import UserError

STEPS, EVERY = 12, 4


def twelve_steps(root, directory):
    config = tiny_config(root)
    config.train.steps, config.train.checkpoint_every = STEPS, EVERY
    return Recipe(config, directory)


@pytest.fixture(scope="module")
def recipe(finished):
    return twelve_steps(finished.config.data.root, finished.directory)


@pytest.fixture(scope="module")
def straight(recipe, tmp_path_factory):
    """(counts, log lines) of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("straight")
    return recipe.train(out), read_log(out)


def read_log(out):
    """The lines of the log without what a clock says."""
    lines = [json.loads(line) for line in (out / loop.LOG).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("time", loop.HELD_UP)} for line in lines]


def small_batches(recipe, section, weights):
    found = [sources.Source(sources.pairs(recipe.training, recipe.stores), 1.0, 1)]
    return sources.batch_maker(found, section, weights, (32, 96), 1, 0, 2, 1)[:2]


def small_run(recipe, out, validate=lambda params: None, batch=lambda step, batch: batch, stall=0, **changes):
    """`train.train` on the recipe's training queries without mined negatives, with what a test puts in."""
    config = tiny_config(recipe.config.data.root)
    section = config.warmup
    section.steps, section.checkpoint_every, section.learning_rates = 6, 2, ()
    section.update(changes)
    make_batch, shapes = small_batches(recipe, section, config.weights)
    encoder_config, params = recipe._first_encoder()
    objective = objectives.OBJECTIVES["contrastive"](section.objective)

    def make(step):
        arrays, figures = make_batch(step)
        return batch(step, arrays), figures

    return loop.train(
        section, encoders.build(encoder_config), params, objective, make, shapes, validate, out, 0, recipe.mesh,
        stall=stall,
    )  # fmt: skip


# --- the log and the choice of the best ------------------------------------------------------------------------------


def test_log_has_every_step_and_every_validation_once(straight):
    counts, log = straight
    assert [line["step"] for line in log if "loss" in line] == list(range(1, STEPS + 1))
    scores = {line["step"]: line["valid_ndcg@10"] for line in log if "loss" not in line}
    assert list(scores) == [0, 4, 8, 12]
    assert counts["best_step"] == max(scores, key=lambda step: (scores[step], step))
    assert counts["valid_ndcg@10"] == scores[counts["best_step"]] and counts["steps"] == STEPS


def test_tensorboard_holds_the_figures_of_the_log(recipe, tmp_path):
    small_run(recipe, tmp_path, lambda params: 0.5, log_every=1)
    assert (tmp_path / loop.LOG).read_text().count(
        loop.HELD_UP
    ) == 2  # saves at steps 2 and 4; no step follows the last
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    found = [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in events if e.summary.value]
    expected = [(line.pop("step"), line) for line in read_log(tmp_path)]
    assert len(found) == len(expected) == 6 + 4
    for (step, figures), (wanted_step, wanted) in zip(found, expected, strict=True):
        for clock in ("time", loop.HELD_UP):
            figures.pop(clock, None)
        assert step == wanted_step and figures == pytest.approx(wanted)


def test_parameters_of_the_best_validation_are_returned(recipe, tmp_path):
    seen, scores = [], iter([0.5, 0.2, 0.7, 0.6])

    def validate(params):
        seen.append(jax.tree.map(np.array, params))
        return next(scores)

    params, counts = small_run(recipe, tmp_path, validate)
    assert counts["best_step"] == 4 and counts["valid_ndcg@10"] == 0.7
    jax.tree.map(np.testing.assert_array_equal, params, seen[2])
    assert not np.array_equal(seen[2]["weight"], seen[3]["weight"])


def test_the_start_is_kept_where_no_checkpoint_does_better(recipe, tmp_path, capsys):
    scores = iter([0.9, 0.2, 0.8, 0.7])
    params, counts = small_run(recipe, tmp_path, lambda params: next(scores))
    assert counts["best_step"] == 0 and counts["valid_ndcg@10"] == 0.9
    jax.tree.map(np.testing.assert_array_equal, params, recipe._first_encoder()[1])
    assert "that is kept" in capsys.readouterr().err


def test_last_parameters_are_returned_and_no_score_is_told_where_nothing_is_held_out(recipe, tmp_path):
    _, counts = small_run(recipe, tmp_path)
    assert counts == {"steps": 6, "best_step": 6, "skipped_updates": 0}
    assert not any("valid_ndcg@10" in line for line in read_log(tmp_path))


def test_no_steps_return_the_encoder_as_it_is(recipe, tmp_path):
    params, counts = small_run(recipe, tmp_path, lambda params: 0.5, steps=0)
    assert counts == {"steps": 0, "best_step": 0, "skipped_updates": 0, "valid_ndcg@10": 0.5}
    jax.tree.map(np.testing.assert_array_equal, params, recipe._first_encoder()[1])


def test_a_run_tells_its_memory_before_the_first_step_and_at_its_end_where_the_time_went(recipe, tmp_path, capsys):
    small_run(recipe, tmp_path, lambda params: 0.5)
    told = capsys.readouterr().err
    assert re.search(
        r"memory of a step: [\d.]+ [kMG]B of state and batch, [\d.]+ [kMG]?B of scratch; a device has", told
    )
    found = json.loads((tmp_path / loop.GOODPUT).read_text())
    assert set(found["seconds"]) == {"computing", "waiting for batches", "compiling", "validating", "saving"}
    assert sum(found["seconds"].values()) == pytest.approx(found["total"]) and min(found["seconds"].values()) > 0
    assert found["steps"] == 6 and f"6 steps in {found['total']:.3g} s: " in told
    config = tiny_config(recipe.config.data.root)
    config.warmup.steps = 6
    make_batch, _ = small_batches(recipe, config.warmup, config.weights)
    assert found["tokens"] == sum(int(perf.lengths(make_batch(step)[0]).sum()) for step in range(6)) > 0


def test_a_step_that_needs_more_memory_than_there_is_is_told_before_it_runs(recipe, tmp_path, capsys, monkeypatch):
    here = hardware.find("")
    monkeypatch.setattr(hardware, "find", lambda name: here._replace(memory=1000.0))
    small_run(recipe, tmp_path)
    assert "of a device and it has 1.0 kB; if it fails, lower batch_size" in capsys.readouterr().err


# --- interruptions ---------------------------------------------------------------------------------------------------

KILLED = """
import os, pathlib, signal, sys
from test_train import twelve_steps
from jdmdr import sources
from jdmdr import train as loop

root, directory, out, moment, number = sys.argv[1:]


def fatal(function):
    calls = []
    def wrapped(*arguments, **named):
        calls.append(0)
        if len(calls) > int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return wrapped


if moment == "batch":
    original = sources.batch_maker
    def batch_maker(*arguments):
        make, *rest = original(*arguments)
        return fatal(make), *rest
    sources.batch_maker = batch_maker
elif moment == "validation":
    loop._score = fatal(loop._score)
else:  # the save has begun and goes on in the background
    original = loop.Checkpoints.save
    stop = fatal(lambda: None)
    def save(*arguments):
        seconds = original(*arguments)
        stop()
        return seconds
    loop.Checkpoints.save = save
twelve_steps(root, pathlib.Path(directory)).train(pathlib.Path(out))
"""


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("batch", 7),
        pytest.param("batch", 0, marks=pytest.mark.slow),
        ("save", 2),
        pytest.param("validation", 1, marks=pytest.mark.slow),
    ],
)
def test_killed_run_goes_on_bit_for_bit(recipe, straight, tmp_path, moment, number):
    arguments = [recipe.config.data.root, recipe.directory, tmp_path, moment, number]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    counts = recipe.train(tmp_path)
    assert counts == straight[0]
    assert read_log(tmp_path) == straight[1]


def test_sigterm_saves_the_step_it_was_in_and_the_run_goes_on_bit_for_bit(recipe, tmp_path):
    undisturbed = small_run(recipe, tmp_path / "a", lambda params: 0.5)

    def terminate(step, batch):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    with pytest.raises(Terminated):
        small_run(recipe, tmp_path / "b", lambda params: 0.5, terminate)
    checkpoints = Checkpoints(tmp_path / "b" / loop.CHECKPOINTS)
    reached = checkpoints.latest()
    checkpoints.close()
    assert [line["step"] for line in read_log(tmp_path / "b") if "loss" in line] == list(range(1, reached + 1))
    params, counts = small_run(recipe, tmp_path / "b", lambda params: 0.5)
    assert counts == undisturbed[1] and read_log(tmp_path / "b") == read_log(tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, params, undisturbed[0])


def test_sigterm_after_the_last_step_is_not_lost(recipe, tmp_path):
    scores = iter([0.1, 0.2, 0.3, 0.4])

    def validate(params):
        score = next(scores)
        if score == 0.4:
            os.kill(os.getpid(), signal.SIGTERM)
        return score

    with pytest.raises(Terminated):
        small_run(recipe, tmp_path, validate)
    assert small_run(recipe, tmp_path)[1]["best_step"] == 6


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def untrained(finished, tmp_path):
    """A copy of the finished working directory that lacks `train` and what follows."""
    shutil.copytree(finished.directory, tmp_path / "w", ignore=shutil.ignore_patterns("train", "embeddings", "export"))
    return tmp_path / "w"


def arguments(finished, directory, **keys):
    return [
        "--config", "configs/quickstart.py:smoke", "--workdir", directory, "--config.data.langs=",
        f"--config.data.root={finished.config.data.root}", "--config.tokenizer.vocab_size=600",
        *(f"--config.train.{key}={value}" for key, value in keys.items()),
    ]  # fmt: skip


@pytest.mark.slow
def test_sigterm_to_the_command_exits_143_and_the_same_command_goes_on(finished, untrained):
    log, reached = untrained / "train" / loop.LOG, []
    words = arguments(finished, untrained, steps=1_000_000, checkpoint_every=1_000_000)
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-m", "jdmdr.train", *map(str, words)],
            cwd=REPO,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )
        wanted = 20 + sum(reached[-1:])
        deadline = time.monotonic() + 60
        while not log.exists() or log.read_text().count("\n") < wanted:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.terminate()
        _, said = process.communicate(timeout=60)
        assert process.returncode == EXIT_TERMINATED
        assert "Traceback" not in said and said.rstrip().endswith("the same command goes on from here")
        reached.append(json.loads(log.read_text().splitlines()[-1])["step"])
    assert f"going on from step {reached[0]}" in said and "warmup: up to date" in said
    steps = [line["step"] for line in read_log(untrained / "train") if "loss" in line]
    assert steps == list(range(1, reached[1] + 1))


@pytest.mark.slow
def test_updates_that_are_never_finite_stop_the_run_in_a_sentence_and_keep_the_checkpoints(
    finished, untrained, command
):
    keys = dict(steps=50, checkpoint_every=50, learning_rates="()", learning_rate=1e38, max_skipped=3)
    result = command("jdmdr.train", *arguments(finished, untrained, **keys))
    assert result.returncode == EXIT_USER_ERROR
    assert "Traceback" not in result.stderr
    (sentence,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "step 4: loss or gradient was not finite 3 times in a row" in sentence
    log = read_log(untrained / "train")
    assert [line.get("skipped", 0) for line in log] == [0, 0, 1, 2, 3]
    config, params = models.load(untrained / "warmup")
    checkpoints = Checkpoints(untrained / "train" / loop.CHECKPOINTS)
    section = tiny_config(finished.config.data.root).train
    section.learning_rates = ()
    optimiser = make_optimiser(section, params)
    state, next_step = checkpoints.restore(checkpoints.latest(), init_state(params, optimiser))
    checkpoints.close()
    assert next_step == 0
    jax.tree.map(np.testing.assert_array_equal, state["params"], params)


def test_non_finite_updates_below_the_limit_are_counted_and_the_run_ends_well(recipe, tmp_path):
    def poison(step, batch):
        if step in (1, 3):
            batch["query_weight_B"][:] = np.nan
        return batch

    changes = dict(objective={"mode": "literal_trainer"}, max_skipped=2, log_every=100)
    _, counts = small_run(recipe, tmp_path, batch=poison, **changes)
    assert counts["skipped_updates"] == 2
    assert [(line["step"], line["skipped"]) for line in read_log(tmp_path)] == [(2, 1), (4, 2)]
    with pytest.raises(UserError, match="step 3: loss or gradient was not finite 2 times in a row"):
        small_run(recipe, tmp_path / "x", batch=lambda step, batch: poison(min(step, 1), batch), **changes)
