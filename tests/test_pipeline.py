import concurrent.futures
import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPO

from jdmdr import pipeline, workdir
from jdmdr.cli import EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_USER_ERROR
from jdmdr.recipe import Recipe

STAGES = ["corpus", "tokenizer", "tokens", "cloze", "warmup", "bm25", "embeddings-warmup", "mine", "negatives",
          "topics", "train", "embeddings", "evaluate", "export", "report"]  # fmt: skip


def words(root, directory, *more):
    return [
        "--config", "configs/quickstart.py:smoke", "--workdir", str(directory), f"--config.data.root={root}",
        "--config.data.langs=", "--config.tokenizer.vocab_size=600", *more,
    ]  # fmt: skip


def start(root, directory, *more, module="jdmdr.pipeline"):
    return subprocess.Popen(
        [sys.executable, "-m", module, *words(root, directory, *more)],
        cwd=REPO,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(root, directory, *more, module="jdmdr.pipeline"):
    """(exit code, stdout, stderr)"""
    process = start(root, directory, *more, module=module)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for_stage(process, stage):
    """Reads the process's stderr until the stage begins."""
    for line in process.stderr:
        if line.rstrip("\n") in (stage, f"{stage}: going on with unfinished work"):
            return
    raise AssertionError(f"the run ended before {stage}")


@pytest.fixture(scope="module")
def root(finished):
    return finished.config.data.root


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory):
    """(working directory, stdout, stderr, seconds)"""
    directory = tmp_path_factory.mktemp("undisturbed")
    began = time.monotonic()
    code, out, err = run(root, directory)
    assert code == 0, err
    return directory, out, err, time.monotonic() - began


def assert_same_artefacts(directory, expected):
    assert (directory / "metrics.json").read_bytes() == (expected / "metrics.json").read_bytes()
    for stage in STAGES:
        ours, theirs = (workdir.read_json(d / stage / workdir.MANIFEST) for d in (directory, expected))
        assert ours == theirs, stage


# --- a run and the run after it --------------------------------------------------------------------------------------


def test_run_writes_metrics_report_and_model(undisturbed):
    directory, out, err, _ = undisturbed
    table = json.loads((directory / "metrics.json").read_text())
    assert sorted(table) == ["dev", "test"]
    for of_split in table.values():
        assert list(of_split) == ["systems"] and sorted(of_split["systems"]) == ["bm25", "dmdr", "hybrid", "warmup"]
        for of_system in of_split["systems"].values():
            for measure in ("ndcg@10", "recall@100"):
                values = of_system[measure]
                assert sorted(values) == ["avg", "en", "sw"] and all(0 <= v <= 1 for v in values.values())
    assert (directory / "report.md").read_text(encoding="utf-8").startswith("# dmdr: report")
    for name in ("model.safetensors", "modules.json", "tokenizer.json", "README.md"):
        assert (directory / "export" / name).is_file()
    assert [line for line in err.splitlines() if line in STAGES] == STAGES
    assert "error" not in err.lower() and "warning" not in err.lower()
    assert f"metrics: {directory / 'metrics.json'}" in out


def test_in_process_and_as_a_command_the_artefacts_are_equal_byte_for_byte(finished, undisturbed):
    for stage in STAGES:
        paths = [directory / stage / workdir.MANIFEST for directory in (finished.directory, undisturbed[0])]
        assert paths[0].read_bytes() == paths[1].read_bytes(), stage


def test_second_run_does_nothing_and_is_much_faster(root, undisturbed):
    directory, out, _, seconds = undisturbed
    before = {path: path.stat().st_mtime_ns for path in directory.glob("*/*")}
    began = time.monotonic()
    code, again, err = run(root, directory)
    assert code == 0 and err.splitlines() == [f"{stage}: up to date" for stage in STAGES]
    assert again == out and time.monotonic() - began < seconds / 2
    assert before == {path: path.stat().st_mtime_ns for path in directory.glob("*/*")}


def test_stage_brings_up_what_it_needs_and_no_more(root, undisturbed):
    code, _, err = run(root, undisturbed[0], module="jdmdr.mine")
    assert code == 0
    needed = pipeline.needed({s.name: s for s in Recipe(*_recipe(root, undisturbed[0])).stages()}, "mine")
    assert err.splitlines() == [f"{stage}: up to date" for stage in needed]
    assert "mine" in needed and not {"train", "evaluate", "topics"} & set(needed)


def _recipe(root, directory):
    from conftest import tiny_config

    return tiny_config(root), directory


# --- interruptions ---------------------------------------------------------------------------------------------------


def kill_at(root, directory, stage, delay=0.0):
    process = start(root, directory)
    wait_for_stage(process, stage)
    time.sleep(delay)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_run_killed_three_times_ends_as_one_that_never_was(root, undisturbed, tmp_path):
    for stage in ("cloze", "mine", "evaluate"):
        kill_at(root, tmp_path, stage)
    code, _, err = run(root, tmp_path)
    assert code == 0 and "cloze: up to date" in err and "train: up to date" in err
    assert_same_artefacts(tmp_path, undisturbed[0])


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.4])
def test_run_killed_in_every_stage_ends_as_one_that_never_was(root, undisturbed, tmp_path, delay):
    for stage in STAGES:
        with contextlib.suppress(AssertionError):  # a short stage may be over, and the next run is past it
            kill_at(root, tmp_path, stage, delay)
    code, _, err = run(root, tmp_path)
    assert code == 0, err
    assert_same_artefacts(tmp_path, undisturbed[0])


def test_signals_stop_with_their_codes_a_second_run_is_refused_and_the_same_command_goes_on(
    root, undisturbed, tmp_path
):
    process = start(root, tmp_path)
    wait_for_stage(process, "tokens")
    process.send_signal(signal.SIGSTOP)
    code, out, err = run(root, tmp_path)
    assert code == EXIT_USER_ERROR and out == ""
    assert re.fullmatch(rf"error: --workdir {tmp_path} is in use by the process with pid {process.pid};.*\n", err)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    assert_stopped(process, EXIT_TERMINATED)

    process = start(root, tmp_path)
    wait_for_stage(process, "bm25")
    process.send_signal(signal.SIGINT)
    assert_stopped(process, EXIT_INTERRUPTED)

    code, _, err = run(root, tmp_path)
    assert code == 0 and "warmup: up to date" in err, err
    assert_same_artefacts(tmp_path, undisturbed[0])


def assert_stopped(process, code):
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err and err.endswith("; the same command goes on from here\n")


@pytest.mark.slow
def test_damaged_checkpoint_is_told_and_deleting_it_is_enough(root, undisturbed, tmp_path):
    directory = tmp_path / "w"
    shutil.copytree(undisturbed[0], directory)
    (directory / "train" / "manifest.json").unlink()
    checkpoints = sorted((directory / "train" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    for path in checkpoints[-1].rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    code, _, err = run(root, directory, module="jdmdr.train")
    assert_one_sentence(code, err, f"{checkpoints[-1]} cannot be read")
    shutil.rmtree(checkpoints[-1])
    code, _, err = run(root, directory)
    assert code == 0 and "embeddings: up to date" in err, err
    assert_same_artefacts(directory, undisturbed[0])


@pytest.mark.slow
def test_full_disk_is_told_and_room_is_enough_to_go_on(root, undisturbed, tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir()
    if shutil.which("mount") is None or not _mounted(mount, "size=48k"):
        pytest.skip("mounting a small tmpfs needs root and is not allowed here")
    try:
        reached = []
        for size in ("48k", "400k", "1m", "2m"):
            assert _mounted(mount, f"remount,size={size}")
            code, _, err = run(root, mount / "w")
            # threads of orbax and tensorstore may print of their own before and after the sentence
            assert code == EXIT_USER_ERROR, err
            told = f"error: the disk of --workdir {mount / 'w'} is full"
            assert [line.startswith(told) for line in err.splitlines()].count(True) == 1, err
            reached.append(
                [line for line in err.splitlines() if line.partition(":")[0] in STAGES][-1].partition(":")[0]
            )
        assert len(set(reached)) > 1, reached
        assert _mounted(mount, "remount,size=200m")
        code, _, err = run(root, mount / "w")
        assert code == 0, err
        assert_same_artefacts(mount / "w", undisturbed[0])
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def _mounted(path, options):
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", path], capture_output=True).returncode == 0


# --- bad input -------------------------------------------------------------------------------------------------------


def assert_one_sentence(code, err, sentence):
    assert code == EXIT_USER_ERROR, err
    assert "Traceback" not in err
    lines = err.splitlines()
    assert [line.startswith("error: ") for line in lines].count(True) == 1, err
    assert lines[-1].startswith("error: ") and sentence in lines[-1], err


def truncated_gzip(root):
    path = root / "corpus" / "en.jsonl"
    whole = gzip.compress(path.read_bytes())
    path.write_bytes(whole[: len(whole) // 2])


def edit(path, change):
    path.write_bytes(change(path.read_bytes()))


def remove_field(data):
    rows = [json.loads(line) for line in data.splitlines()]
    del rows[3]["text"]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def no_training(root):
    shutil.rmtree(root / "train")
    for kind in ("topics", "qrels"):
        for path in (root / kind).glob("*.train.tsv"):
            path.unlink()


BAD = {
    "truncated gzip": (truncated_gzip, "corpus/en.jsonl: the gzip data is cut off or damaged after line"),
    "invalid JSON": (
        lambda root: edit(root / "corpus/sw.jsonl", lambda data: data.replace(b"\n", b"\n{oops\n", 1)),
        "corpus/sw.jsonl, line 2: not valid JSON",
    ),
    "not UTF-8": (
        lambda root: edit(root / "topics/sw.dev.tsv", lambda data: data + b"9-9\t\xff\xfe\n"),
        "topics/sw.dev.tsv, line",
    ),
    "missing field": (
        lambda root: edit(root / "corpus/en.jsonl", remove_field),
        "corpus/en.jsonl, line 4: the field 'text' is missing",
    ),
    "duplicate docid": (
        lambda root: edit(root / "corpus/en.jsonl", lambda data: data + data.splitlines()[4] + b"\n"),
        "corpus/en.jsonl, line 25: the docid '1#1' was used before, in",
    ),
    "empty corpus": (lambda root: edit(root / "corpus/en.jsonl", lambda data: b"\n\n"), "the corpus of en holds no passages"),
    "strange qrels": (
        lambda root: edit(root / "qrels/en.dev.tsv", lambda data: re.sub(rb"\d+#", b"zz#", data)),
        "qrels/en.dev.tsv judges no passage of the corpus",
    ),
    "no training queries": (no_training, "no language has a training query with a positive in its corpus"),
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(root, tmp_path_factory):
    """What the command says to each bad input, two at a time."""

    def ask(spoil):
        directory = tmp_path_factory.mktemp("bad")
        shutil.copytree(root, directory / "data")
        spoil(directory / "data")
        return run(directory / "data", directory / "w")

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(BAD, pool.map(ask, [spoil for spoil, _ in BAD.values()]), strict=True))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence_and_exit_code_2(answers, name):
    code, out, err = answers[name]
    assert out == ""
    assert_one_sentence(code, err, BAD[name][1])


# --- odd input that is right -----------------------------------------------------------------------------------------


def passage(docid, text, title=""):
    return (json.dumps({"docid": docid, "title": title, "text": text}, ensure_ascii=False) + "\n").encode()


def test_odd_input_that_is_right_runs_through(data_root, tmp_path):
    """Also: depths above the corpus size, which 24 passages a language make the defaults."""
    edit(data_root / "corpus/en.jsonl", lambda data: b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n\r\n"))
    extra = [
        passage("emoji#0", "🦩🦩🦩 👩‍👩‍👧"),
        passage("empty#0", ""),
        passage("long#0", "supercali" * 20_000),
        passage("nul#0", "a\0b"),
    ]
    edit(data_root / "corpus/sw.jsonl", lambda data: gzip.compress(data[:500].partition(b"\n")[0] + b"\n") + gzip.compress(
        data.partition(b"\n")[2] + b"".join(extra)))  # fmt: skip
    edit(data_root / "topics/sw.dev.tsv", lambda data: data + "e-1\t🦩\ne-2\t \n".encode())
    edit(data_root / "qrels/sw.dev.tsv", lambda data: data + b"e-1 0 emoji#0 1\ne-2 0 empty#0 1\n")
    # a language that is evaluated only, one that is trained on only, and one that has nothing but a corpus
    for kind in ("topics", "qrels"):
        shutil.copy(data_root / kind / "en.dev.tsv", data_root / kind / "de.dev.tsv")
    shutil.copy(data_root / "train/en.jsonl", data_root / "train/fi.jsonl")
    for lang in ("de", "fi"):
        shutil.copy(data_root / "corpus/en.jsonl", data_root / "corpus" / f"{lang}.jsonl")
    (data_root / "corpus/ko.jsonl").write_bytes(passage("0#0", "비행기"))

    code, _, err = run(data_root, tmp_path / "w")
    assert code == 0, err
    table = json.loads((tmp_path / "w/metrics.json").read_text())
    for of_system in table["dev"]["systems"].values():
        assert sorted(of_system["ndcg@10"]) == ["avg", "de", "en", "sw"]
    assert sorted(table["test"]["systems"]["dmdr"]["ndcg@10"]) == ["avg", "en", "sw"]
    assert "sw: 1 passages have an empty text" in err and "fi has no judged dev query: left out" in err
    assert sorted(workdir.counts_of(tmp_path / "w", "mine")["languages"]) == ["en", "fi", "sw"]


@pytest.mark.slow
def test_training_data_alone_gives_a_model_without_metrics(data_root, tmp_path):
    for kind in ("topics", "qrels"):
        shutil.rmtree(data_root / kind)
    code, _, err = run(data_root, tmp_path / "w")
    assert code == 0, err
    assert json.loads((tmp_path / "w/metrics.json").read_text()) == {}
    assert (tmp_path / "w/export/model.safetensors").is_file() and (tmp_path / "w/report.md").is_file()
