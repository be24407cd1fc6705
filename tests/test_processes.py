"""Several real processes (gloo): they divide work, train, search and stop as one."""

import concurrent.futures
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
from conftest import REPO, tiny_config
from test_checkpoint import save_all, state_at
from test_step import run_steps

from jdmdr import parallel, processes, workdir
from jdmdr import train as loop
from jdmdr.checkpoint import Checkpoints
from jdmdr.cli import EXIT_TERMINATED
from jdmdr.recipe import Recipe
from jdmdr.types import UserError


def start_processes(count, words, devices=1):
    """The processes of one run, and the pipes to read them by."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {
        **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count),
    }  # fmt: skip
    return [
        subprocess.Popen([sys.executable, *map(str, words)], cwd=REPO, env={**env, "JAX_PROCESS_ID": str(i)},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(count)
    ]  # fmt: skip


def ends(started, timeout=280):
    """(exit code, stdout, stderr) of each process."""
    with concurrent.futures.ThreadPoolExecutor(len(started)) as pool:
        said = list(pool.map(lambda process: process.communicate(timeout=timeout), started))
    return [(process.returncode, *of) for process, of in zip(started, said, strict=True)]


def together(count, program, *arguments, devices=1):
    """Runs a program as `count` processes; returns what each printed as JSON on its last line."""
    found = ends(start_processes(count, ["-c", textwrap.dedent(program), *arguments], devices))
    for code, _, err in found:
        assert code == 0, err
    return [json.loads(out.splitlines()[-1]) for _, out, _ in found]


# --- how they find each other ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "some are set and some are not"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_PROCESS_ID": "0"}, "some are set and some are not"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; it is a number"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "numbered from 0 to 1"),
    ],
)
def test_wrong_settings_are_told(monkeypatch, env, message):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        processes.start()


def test_one_process_waits_for_nobody():
    assert list(processes.claimed(iter("abc"))) == ["a", "b", "c"]
    assert processes.from_first(lambda: {"a": 1}) == {"a": 1}
    assert processes.leads() and processes.count() == 1
    processes.barrier()
    assert parallel.own_rows(parallel.data_mesh()) is None


# --- what they do together -------------------------------------------------------------------------------------------

EVERYTHING = """
    import json, pathlib, sys, time
    from jdmdr import processes
    processes.start()
    import jax, numpy as np
    from jdmdr import encode, encoders, parallel
    from jdmdr.checkpoint import Checkpoints
    from jdmdr.index.exact import ExactSearcher
    from test_checkpoint import state_at
    from test_encode import LENGTHS, MAX_LENGTH, Source, VOCABULARY, WIDTH
    from test_step import run_steps

    directory, root, out, fsdp = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]), int(sys.argv[4])
    found = {"index": processes.index(), "count": processes.count(), "tasks": []}
    for task in processes.claimed(range(5)):
        found["tasks"].append(task)
        (out / f"task{task}").touch()
        time.sleep(0.05)
    found["all done"] = all((out / f"task{task}").exists() for task in range(5))
    found["told"] = processes.from_first(lambda: ["from", processes.index(), processes.count()])
    mesh = parallel.data_mesh()
    found["own rows"] = parallel.own_rows(mesh)(16).tolist()
    found["anywhere"] = [parallel.anywhere(flag, mesh)() for flag in (False, processes.index() == processes.count() - 1)]

    data = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    hits = ExactSearcher([data[:20], data[20:]], mesh, block_rows=16).search(data[:3], 7)
    found["hits"] = hits.rows_QxK.tolist()
    config = encoders.EncoderConfig(kind="static", vocab_size=VOCABULARY, width=WIDTH, pooling="mean")
    encoder = encoders.build(config)
    params = parallel.put(encoder.init(jax.random.key(0)), parallel.replicated(mesh))
    vectors = encode.Embedder(encoder, mesh, MAX_LENGTH, "passage").embed(params, Source(LENGTHS), np.arange(100))

    like = parallel.put(jax.device_get(state_at(0)), parallel.replicated(mesh))
    checkpoints = Checkpoints(out / "of-one")
    state, step = checkpoints.restore(3, like)
    checkpoints.close()
    found["restored"] = [float(state["params"]["w"].addressable_data(0).sum()), step]
    split = {**state, "params": {"w": jax.device_put(state["params"]["w"], parallel.rows(mesh))}}
    checkpoints = Checkpoints(out / "of-all")
    checkpoints.save(4, split, 0.5)
    checkpoints.close()

    losses, norms, ids, own, trained = run_steps(directory, root, "plain", fsdp=fsdp)
    found |= {"losses": losses, "norms": norms, "ids": ids, "read": own}
    if processes.leads():
        np.savez(out / "all.npz", vectors=vectors, **trained)
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def straight(finished):
    return run_steps(finished.directory, finished.config.data.root, "plain")


def check_everything(found, count, straight, out):
    losses, norms, ids, _, params = straight
    assert [of["index"] for of in found] == list(range(count)) and {of["count"] for of in found} == {count}
    assert sorted(task for of in found for task in of["tasks"]) == list(range(5))
    assert all(of["all done"] for of in found)
    rows = [row for of in found for row in of["own rows"]]
    assert sorted(rows) == list(range(16))
    data = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    nearest = np.argsort(-data[:3].astype(np.float64) @ data.T, axis=1)[:, :7]
    for of in found:
        assert of["told"] == ["from", 0, 1] and of["anywhere"] == [False, True]
        assert of["hits"] == nearest.tolist()
        assert of["restored"] == [48.0, 3]
        assert of["ids"] == ids  # every process plans the same batches, on any number of them
        np.testing.assert_allclose(of["losses"], losses, rtol=1e-5)
        np.testing.assert_allclose(of["norms"], norms, rtol=1e-5)
    # of the tokens each reads a share, and no two the same
    assert np.sum([of["read"] for of in found], axis=0).tolist() == straight[3]
    assert max(of["read"][0] for of in found) < straight[3][0]
    with np.load(out / "all.npz") as saved:
        assert saved["vectors"].shape[0] == 100 and np.isfinite(saved["vectors"]).all()
        for name, expected in params.items():
            np.testing.assert_allclose(saved[name], expected, atol=1e-5, err_msg=name)
    checkpoints = Checkpoints(out / "of-all")
    state, step = checkpoints.restore(4, state_at(0))
    checkpoints.close()
    assert step == 4 and (np.asarray(state["params"]["w"]) == 3).all()


def run_everything(finished, count, devices, fsdp, straight, out):
    save_all(out / "of-one", {3: 0.5})
    root = finished.config.data.root
    found = together(count, EVERYTHING, finished.directory, root, out, fsdp, devices=devices)
    check_everything(found, count, straight, out)


def test_two_processes_of_four_devices_are_as_one_process(finished, straight, tmp_path):
    run_everything(finished, 2, 4, 4, straight, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 8])
def test_four_processes_of_two_devices_are_as_one_process(finished, straight, tmp_path, fsdp):
    run_everything(finished, 4, 2, fsdp, straight, tmp_path)


# --- the whole pipeline ----------------------------------------------------------------------------------------------


def words(root, directory, *more, module="jdmdr.pipeline"):
    return [
        "-m", module, "--config", "configs/quickstart.py:smoke", "--workdir", directory, f"--config.data.root={root}",
        "--config.data.langs=", "--config.tokenizer.vocab_size=600", *more,
    ]  # fmt: skip


def test_two_processes_reach_what_one_does(finished, tmp_path):
    found = ends(start_processes(2, words(finished.config.data.root, tmp_path)))
    assert [code for code, *_ in found] == [0, 0], found
    assert "error" not in found[0][2].lower()
    assert not [line for line in found[1][1].splitlines() if "Gloo" not in line]  # the first speaks
    for stage in ("corpus", "tokenizer", "tokens", "cloze", "bm25"):  # no sums over devices: equal to the byte
        paths = [directory / stage / workdir.MANIFEST for directory in (tmp_path, finished.directory)]
        assert paths[0].read_bytes() == paths[1].read_bytes(), stage
    ours, theirs = (json.loads((d / "evaluate/metrics.json").read_text()) for d in (tmp_path, finished.directory))
    for split, of in theirs.items():
        for system, by_measure in of["systems"].items():
            for measure, values in by_measure.items():
                for lang, value in values.items():
                    assert ours[split]["systems"][system][measure][lang] == pytest.approx(value, abs=5e-3)


# --- interruptions ---------------------------------------------------------------------------------------------------

TRAINS = """
    import json, pathlib, sys
    from jdmdr import processes
    processes.start()
    import numpy as np
    from conftest import tiny_config
    from jdmdr import parallel
    from jdmdr import train as loop
    from jdmdr.recipe import Recipe

    root, directory, out, steps, every = sys.argv[1:]
    config = tiny_config(root)
    config.train.steps, config.train.checkpoint_every = int(steps), int(every)
    original = parallel.put_batch
    log = open(f"{out}.ids{processes.index()}", "a")

    def put_batch(batch, mesh):
        if isinstance(batch, dict):  # no block of passages to encode
            log.write(json.dumps(batch["query_index_B"].tolist()) + "\\n")
            log.flush()
        return original(batch, mesh)

    loop.parallel.put_batch = put_batch
    print(json.dumps(Recipe(config, pathlib.Path(directory)).train(pathlib.Path(out))))
"""


@pytest.mark.slow
def test_killed_and_gone_on_with_by_another_number_of_processes_no_query_is_repeated_or_skipped(finished, tmp_path):
    arguments = [finished.config.data.root, finished.directory, tmp_path / "train", 60, 10]
    (tmp_path / "train").mkdir()
    killed = start_processes(2, ["-c", textwrap.dedent(TRAINS), *arguments])
    wait_for_lines(tmp_path / "train" / loop.LOG, 25, killed)
    for process in killed:
        process.kill()
    ends(killed)
    before = [json.loads(line) for line in (tmp_path / "train.ids0").read_text().splitlines()]
    (tmp_path / "train.ids0").unlink()
    for process in start_processes(1, ["-c", textwrap.dedent(TRAINS), *arguments]):
        assert process.communicate(timeout=200)[1].count("going on from step") == 1
        assert process.returncode == 0
    after = [json.loads(line) for line in (tmp_path / "train.ids0").read_text().splitlines()]
    first = 60 - len(after)
    assert first % 10 == 0 and 0 < first <= len(before)
    assert before[first:] == after[: len(before) - first]  # steps behind the checkpoint are done again, as they were
    (tmp_path / "straight").mkdir()
    together(2, TRAINS, *[*arguments[:2], tmp_path / "straight", 60, 10])
    straight = [json.loads(line) for line in (tmp_path / "straight.ids0").read_text().splitlines()]
    assert before[:first] + after == straight
    assert (tmp_path / "straight.ids1").read_text() == (tmp_path / "straight.ids0").read_text()
    steps = [json.loads(line)["step"] for line in (tmp_path / "train" / loop.LOG).read_text().splitlines()
             if "loss" in line]  # fmt: skip
    assert steps == list(range(1, 61))


def wait_for_lines(path, lines, started, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists() or path.read_text().count("\n") < lines:
        assert all(process.poll() is None for process in started) and time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def untrained(finished, tmp_path):
    """A copy of the finished working directory that lacks `train` and what follows."""
    shutil.copytree(finished.directory, tmp_path / "w", ignore=shutil.ignore_patterns("train", "embeddings", "export"))
    return tmp_path / "w"


def training(finished, untrained, *more):
    return words(finished.config.data.root, untrained, "--config.train.steps=1000000",
                 "--config.train.checkpoint_every=1000000", *more, module="jdmdr.train")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_one_process_saves_one_checkpoint_of_all(finished, untrained, told):
    started = start_processes(2, training(finished, untrained))
    wait_for_lines(untrained / "train" / loop.LOG, 10, started)
    started[told].terminate()
    for code, _, err in ends(started, 60):
        assert code == EXIT_TERMINATED, err
        assert "Traceback" not in err and err.rstrip().endswith("the same command goes on from here")
    steps = [json.loads(line)["step"] for line in (untrained / "train" / loop.LOG).read_text().splitlines()
             if "loss" in line]  # fmt: skip
    config = tiny_config(finished.config.data.root)
    config.train.steps, config.train.checkpoint_every = steps[-1] + 2, 1000
    code, _, err = ends(start_processes(1, words(
        finished.config.data.root, untrained, f"--config.train.steps={steps[-1] + 2}",
        "--config.train.checkpoint_every=1000000", "--redo", module="jdmdr.train")))[0]  # fmt: skip
    assert steps == list(range(1, steps[-1] + 1))
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_the_others_stop_with_a_sentence_when_one_is_killed(finished, untrained, killed):
    started = start_processes(2, training(finished, untrained, "--config.parallel.heartbeat=10"))
    wait_for_lines(untrained / "train" / loop.LOG, 10, started)
    began = time.monotonic()
    started[killed].kill()
    found = ends(started, 60)
    assert time.monotonic() - began < 45
    assert found[killed][0] == -signal.SIGKILL
    code, _, err = found[1 - killed]
    assert code not in (0, None)
    assert re.search(r"another process of the run is gone.*the same command goes on from here", err), err


@pytest.mark.slow
def test_a_mistake_that_one_process_finds_stops_all_with_its_code(finished, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(finished.config.data.root, root)
    (root / "corpus" / "sw.jsonl").write_bytes(b"{oops\n")
    found = ends(start_processes(2, words(root, tmp_path / "w")), 100)
    assert [code for code, *_ in found] == [2, 2], found
    sentences = [line for *_, err in found for line in err.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1 and "sw.jsonl, line 1" in sentences[0]
    assert any("stopped, because process" in err for *_, err in found)
    assert not any("Traceback" in err for *_, err in found)


def test_a_step_that_stalls_shows_where_every_thread_is(finished, tmp_path, capfd):
    from test_train import small_run

    def slow(step, batch):
        time.sleep(1.0 if step == 3 else 0)
        return batch

    recipe = Recipe(tiny_config(finished.config.data.root), finished.directory)
    small_run(recipe, tmp_path, batch=slow, stall=0.4)
    err = capfd.readouterr().err
    assert "Timeout (0:00:00" in err and "in slow" in err and "in train" in err


def test_parameters_are_split_by_the_first_rule_that_matches():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    tree = {"embedding": np.zeros((300, 64)), "bias": np.zeros(64)}
    assert all(s.is_fully_replicated for s in jax.tree.leaves(parallel.shardings(tree, mesh, 1, (("", "fsdp"),))))
    with pytest.raises(UserError, match="parallel.fsdp is 3, which does not divide the 1 devices"):
        parallel.shardings(tree, mesh, 3)
