"""Tuning, most of it in an environment of its own, and its results loaded by transformers in another."""

import json
import os
import pathlib
import signal
import subprocess
import time

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_decoders import save

from jdmdr.llm import tune

HERE = pathlib.Path(__file__).parent
REPO = HERE.parent
LLM, TORCH = os.environ.get("JDMDR_LLM_PYTHON"), os.environ.get("JDMDR_TORCH_PYTHON")
FAMILIES = ("qwen3", "llama", "gemma3")
DEVICES = "--xla_force_host_platform_device_count"
ENV = {**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}

tuning = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (LLM and TORCH), reason="set JDMDR_LLM_PYTHON and JDMDR_TORCH_PYTHON, as `make test-all` does"
    ),
]


def run(python, *words, env=None):
    done = subprocess.run(
        [python, *map(str, words)], cwd=REPO, env={**ENV, **(env or {})}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def words(base, workdir, *more):
    return ["-m", "jdmdr.llm.tune", "--config", "configs/llm_tune.py:smoke", "--workdir", workdir,
            f"--config.tune.model={base}", f"--config.tune.instructions={base.parent / 'rows.json'}", *more]  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bases")
    run(TORCH, HERE / "parity" / "save_llm_with_torch.py", directory)
    rows = [
        {"instruction": "Summarize the text.", "input": f"Text {i}. " * (i + 3), "output": f"It is text {i}."}
        for i in range(9)
    ]
    (directory / "rows.json").write_text(json.dumps(rows))
    return directory


@pytest.fixture(scope="module")
def tuned(bases, tmp_path_factory):
    """A tuned Qwen3, on one device."""
    directory = tmp_path_factory.mktemp("tuned")
    run(LLM, *words(bases / "qwen3", directory, "--config.tune.shard_gb=0.00006"))
    return directory


def losses(workdir):
    return {r["step"]: r["loss"] for r in map(json.loads, (workdir / "adapter" / "log.jsonl").read_text().splitlines())}


def test_small_updates_of_bfloat16_parameters_add_up():
    optimizer = tune.in_float32(optax.sgd(1.0))
    params = {"a": jnp.full(3, 1.0, jnp.bfloat16), "b": jnp.full(2, 0.0, jnp.bfloat16)}
    state = optimizer.init(params)
    grads = {"a": jnp.full(3, 2**-11, jnp.bfloat16), "b": jnp.full(2, -0.25, jnp.bfloat16)}
    for _ in range(16):
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert params["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(params["a"], np.float32), np.full(3, 1 - 2**-7, np.float32))
    np.testing.assert_array_equal(np.asarray(params["b"], np.float32), np.full(2, 4.0, np.float32))


@pytest.mark.skipif(tune.lacking() == [], reason="tunix is here")
def test_without_tunix_a_sentence_says_what_to_install(command, tmp_path):
    done = command("jdmdr.llm.tune", "--config", "configs/llm_tune.py:smoke", "--workdir", tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "tuning needs tunix and qwix, which this Python does not have; run `make llm-env`" in done.stderr


def test_the_data_needs_no_tunix_and_no_model(command, tmp_path):
    (tmp_path / "rows.json").write_text('[{"instruction": "Summarize it.", "input": "A text.", "output": "It."}]')
    words = ["--config", "configs/llm_tune.py:smoke", "--workdir", tmp_path / "workdir"]
    done = command("jdmdr.llm.instructions", *words, f"--config.tune.instructions={tmp_path / 'rows.json'}")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "workdir" / "instructions"
    assert done.stdout.strip() == str(out)
    assert json.loads((out / "en.jsonl").read_text()) == {
        "id": "1", "lang": "en", "instruction": "Summarize it.", "input": "A text.", "output": "It.",
    }  # fmt: skip


def test_a_settings_change_redoes_what_depends_on_it(tmp_path):
    from configs import llm_tune

    config = llm_tune.get_config("smoke")
    (tmp_path / "rows.json").write_text("[]")
    save(tmp_path / "base")
    config.tune.model, config.tune.instructions = str(tmp_path / "base"), str(tmp_path / "rows.json")

    def settings(**changes):
        with config.unlocked():
            changed = config.copy_and_resolve_references()
        changed.tune.update(changes)
        return {stage.name: stage.settings for stage in tune.stages(changed, tmp_path)}

    before = settings()
    differ = lambda **changes: [name for name, found in settings(**changes).items() if found != before[name]]
    assert differ(rank=4) == differ(length=99) == ["adapter"]
    assert differ(shard_gb=1.0) == ["merged"]
    assert differ(samples=3) == ["instructions"]
    assert differ(chunk_rows=1) == differ(checkpoint_every=7) == differ(remat=False) == []


def kill_behind_step_2(base, workdir, env=None):
    """Starts to tune and kills it when step 2 is saved; returns the command."""
    command = [LLM, *map(str, words(base, workdir))]
    process = subprocess.Popen(
        command, cwd=REPO, env={**ENV, **(env or {})}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not (workdir / "adapter" / "checkpoints" / "2").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return command


class TestTuning:
    pytestmark = tuning

    @pytest.mark.parametrize("family", FAMILIES)
    def test_transformers_gives_the_logits_of_the_tuned_model(self, family, bases, tuned, tmp_path):
        base, workdir = bases / family, tuned
        if family != "qwen3":
            workdir = tmp_path / "workdir"
            run(LLM, *words(base, workdir, "--config.tune.shard_gb=0.00006"))
        found = losses(workdir)
        assert list(found) == [1, 2, 3, 4, 5] and found[5] < found[1]
        assert len(list((workdir / "merged").glob("model-*-of-*.safetensors"))) > 3
        ids, ours, theirs = tmp_path / "ids.npy", tmp_path / "ours.npy", tmp_path / "theirs.npz"
        np.save(ids, np.random.default_rng(0).integers(3, 259, (2, 48)).astype(np.int32))
        run(LLM, HERE / "parity" / "logits_of_tuning.py", base, workdir / "adapter", ids, ours)
        directories = {"base": base, "merged": workdir / "merged", "adapter": workdir / "adapter"}
        named = [f"{name}={directory}" for name, directory in directories.items()]
        run(TORCH, HERE / "parity" / "logits_with_torch.py", ids, theirs, *named)
        theirs = np.load(theirs)
        for name in ("merged", "adapter"):
            np.testing.assert_allclose(theirs[name], np.load(ours), atol=2e-5, err_msg=name)
        assert np.abs(theirs["merged"] - theirs["base"]).max() > 0.01  # the adapters did something

    def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(self, bases, tuned, tmp_path):
        command = kill_behind_step_2(bases / "qwen3", tmp_path)
        assert not (tmp_path / "adapter" / "manifest.json").exists()
        assert "going on with unfinished work" in run(*command)
        assert losses(tmp_path) == losses(tuned)
        name = "adapter/adapter_model.safetensors"
        assert (tmp_path / name).read_bytes() == (tuned / name).read_bytes()
        assert (tmp_path / "merged" / "model.safetensors").exists()
        assert "merged: up to date" in run(*command)

    def test_a_run_that_begins_on_eight_devices_ends_on_one_as_on_one(self, bases, tuned, tmp_path):
        command = kill_behind_step_2(bases / "qwen3", tmp_path, {"XLA_FLAGS": f"{DEVICES}=8"})
        assert "going on with unfinished work" in run(*command)
        found, expected = losses(tmp_path), losses(tuned)
        assert found.keys() == expected.keys()
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4)
