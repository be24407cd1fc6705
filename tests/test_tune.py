"""Tuning in an environment of its own, its results loaded by transformers in another."""

import json
import os
import pathlib
import signal
import subprocess
import time

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
REPO = HERE.parent
LLM, TORCH = os.environ.get("JDMDR_LLM_PYTHON"), os.environ.get("JDMDR_TORCH_PYTHON")
FAMILIES = ("qwen3", "llama", "gemma3")
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
        run(TORCH, HERE / "parity" / "logits_with_torch.py", ids, theirs, f"base={base}", f"merged={workdir / 'merged'}")
        theirs = np.load(theirs)
        np.testing.assert_allclose(theirs["merged"], np.load(ours), atol=2e-5)
        assert np.abs(theirs["merged"] - theirs["base"]).max() > 0.01  # the adapters did something

    def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(self, bases, tuned, tmp_path):
        command = [LLM, *map(str, words(bases / "qwen3", tmp_path))]
        process = subprocess.Popen(command, cwd=REPO, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while not (tmp_path / "adapter" / "checkpoints" / "2").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "adapter" / "manifest.json").exists()
        assert "going on with unfinished work" in run(*command)
        assert losses(tmp_path) == losses(tuned)
        name = "adapter/adapter_model.safetensors"
        assert (tmp_path / name).read_bytes() == (tuned / name).read_bytes()
        assert (tmp_path / "merged" / "model.safetensors").exists()
        assert "merged: up to date" in run(*command)

    def test_eight_devices_tune_as_one(self, bases, tuned, tmp_path):
        run(LLM, *words(bases / "qwen3", tmp_path), env={"XLA_FLAGS": "--xla_force_host_platform_device_count=8"})
        one, eight = losses(tuned), losses(tmp_path)
        np.testing.assert_allclose(list(eight.values()), list(one.values()), rtol=1e-4)
