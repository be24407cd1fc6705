"""The recipes of cross-lingual pretraining run end to end, and each takes what the one before left."""

import json
import re

import numpy as np
import pytest
from conftest import REPO, TINYPEDIA

from configs import clir_pretrain, clir_rerank, mlqa
from jdmdr import encoders, metrics, models, pipeline, pretrain, rerank_folds, spans
from jdmdr.pairs import PairTokenizer
from jdmdr.types import UserError


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A finished working directory of `configs/clir_pretrain.py:smoke`."""
    directory = tmp_path_factory.mktemp("clir") / "workdir"
    pipeline.bring(pretrain.stages(clir_pretrain.get_config("smoke"), directory), directory, pretrain.TARGET)
    return directory


def test_pretraining_leaves_an_encoder_a_reranker_and_a_masked_lm(pretrained, capsys):
    config, params = encoders.load_pretrained(pretrained / "export" / "encoder")
    trained, own = models.load(pretrained / "pretrain")
    assert (config.layers, config.width) == (trained.layers, trained.width)
    np.testing.assert_array_equal(params["layer_0"]["ffn_in"]["kernel"], own["layer_0"]["ffn_in"]["kernel"])
    encoder, params = encoders.load_cross_encoder(pretrained / "export" / "reranker", "", "float32")
    heads = models.load_tree(pretrained / "pretrain" / "objective.safetensors")
    np.testing.assert_array_equal(params["head"]["out"]["kernel"], heads["rank_head"]["out"]["kernel"])
    tokenizer = PairTokenizer(str(pretrained / "export" / "masked_lm"), 32)
    assert tokenizer.vocab_size == config.vocab_size and tokenizer.mask_id is not None and tokenizer.uses_segments
    lines = [json.loads(line) for line in (pretrained / "pretrain" / "log.jsonl").read_text().splitlines()]
    assert {"qlm_loss", "rr_loss", "qlm_accuracy", "rr_accuracy"} <= lines[1].keys()
    found = json.loads((pretrained / "alignment" / "alignment.json").read_text())
    assert found["after"]["mean"].keys() == {"en-es", "en-sw", "es-sw", "average"}
    assert lines[-1]["valid_alignment"] == pytest.approx(found["after"]["mean"]["average"])
    pipeline.bring(pretrain.stages(clir_pretrain.get_config("smoke"), pretrained), pretrained, pretrain.TARGET)
    assert capsys.readouterr().err.count("up to date") == 7
    assert re.search(r"average +0\.\d+ +0\.\d+ +0\.\d+ +0\.\d+", pretrain.table(pretrained))


def test_other_settings_do_not_overwrite_a_trained_encoder(pretrained):
    config = clir_pretrain.get_config("smoke")
    config.pretrain.mask_rate = 0.2
    with pytest.raises(UserError, match="pretrain.mask_rate was 0.3, now 0.2.*--redo"):
        pipeline.bring(pretrain.stages(config, pretrained), pretrained, pretrain.TARGET)


@pytest.mark.parametrize("key, value, sentence", [
    ("mask_mode", "words", "pretrain.mask_mode is 'words'; it is one of 'query', 'document', 'mixed'"),
    ("mask_rate", 1.0, "pretrain.mask_rate is 1.0; it is a share"),
    ("negatives", 0, "pretrain.negatives is 0; it is at least 1"),
])  # fmt: skip
def test_values_that_no_stage_could_use_are_told_first(key, value, sentence, tmp_path):
    config = clir_pretrain.get_config("smoke")
    config.pretrain[key] = value
    with pytest.raises(UserError, match=sentence):
        pipeline.bring(pretrain.stages(config, tmp_path), tmp_path, pretrain.TARGET)
    assert not list(tmp_path.iterdir())


def test_alignment_is_the_share_of_nearest_neighbours_both_ways():
    one, two = np.eye(4)[[0, 1, 2, 3]], np.eye(4)[[0, 1, 3, 3]] + 0.01
    # there: 0, 1 right, 2 finds none of its own, 3 ties with the first of equals; back: rows 2 and 3 both find 3
    there = [0, 1, (one @ two.T)[2].argmax(), (one @ two.T)[3].argmax()]
    back = (one @ two.T).argmax(axis=0)
    expected = np.mean([there == np.arange(4), back == np.arange(4)])
    assert pretrain.precision_at_1(one, two) == expected < 1


@pytest.mark.slow
def test_the_long_model_is_pretrained_from_a_checkpoint_and_ranks_a_run(pretrained, tmp_path, command):
    """What was pretrained short goes on with a window, over longer documents; its re-ranker takes any run."""
    config = clir_pretrain.get_config("smoke")
    config.encoder.name, config.encoder.window = str(pretrained / "export" / "encoder"), 16
    config.pretrain.length, config.pretrain.objective.schedule, config.pretrain.steps = 192, "alternate", 4
    pipeline.bring(pretrain.stages(config, tmp_path / "w"), tmp_path / "w", pretrain.TARGET)
    found, _ = encoders.load_pretrained(tmp_path / "w" / "export" / "encoder")
    assert (found.family, found.window, found.usable_positions) == ("longformer", 16, 192)
    run = "".join(f"7-0-0 Q0 {d} {r} {9 - r} bm25\n" for r, d in enumerate(["7#1", "0#0", "7#0"]))
    (tmp_path / "en.trec").write_text(run)
    done = command("jdmdr.rerank", tmp_path / "{lang}.trec", f"--model={tmp_path / 'w' / 'export' / 'reranker'}",
                   f"--data={TINYPEDIA}", f"--out={tmp_path / 'out'}", "--length=128")  # fmt: skip
    assert done.returncode == 0, done.stderr
    ranked = [line.split()[2] for line in (tmp_path / "out" / "en.trec").read_text().splitlines()]
    assert sorted(ranked) == ["0#0", "7#0", "7#1"]


@pytest.mark.slow
def test_the_reranker_is_tuned_and_measured_on_folds(pretrained, tmp_path):
    config = clir_rerank.get_config("smoke")
    config.encoder.name = str(pretrained / "export" / "reranker")
    pipeline.bring(rerank_folds.stages(config, tmp_path / "w"), tmp_path / "w", rerank_folds.TARGET)
    found = json.loads((tmp_path / "w" / "ranking" / "folds.json").read_text())["en-en"]
    assert found.keys() == {"run", "untuned", "tuned"}
    runs = {name: metrics.read_run(tmp_path / "w" / "ranking" / f"en-en.{name}.trec") for name in found}
    assert {qid: set(hits) for qid, hits in runs["tuned"].items()} == {
        qid: set(hits) for qid, hits in runs["run"].items()
    }
    # each query once, by the fold that holds it
    parts = [metrics.read_run(tmp_path / "w" / f"fold-en-en-{k}" / "test.trec") for k in range(1, 6)]
    assert sum(map(len, parts)) == len(runs["tuned"]) == 192 and set().union(*parts) == set(runs["tuned"])
    # frozen below the last layer
    _, start = encoders.load_cross_encoder(pretrained / "export" / "reranker", "", "float32")
    log = [json.loads(line) for line in (tmp_path / "w" / "fold-en-en-1" / "log.jsonl").read_text().splitlines()]
    assert {"valid_map"} <= log[0].keys() and "rr_accuracy" in log[1] and start["layer_0"]
    assert "en-en" in rerank_folds.table(tmp_path / "w")


@pytest.mark.slow
def test_spans_are_learnt_and_measured_on_every_pair_of_languages(pretrained, tmp_path):
    config = mlqa.get_config("smoke")
    config.encoder.name = str(pretrained / "export" / "encoder")
    pipeline.bring(spans.stages(config, tmp_path / "w"), tmp_path / "w", spans.TARGET)
    found = json.loads((tmp_path / "w" / "answers" / "f1.json").read_text())
    assert found.keys() == {"en-en", "en-es", "es-en", "es-es"} and all(of["questions"] == 192 for of in found.values())
    answers = json.loads((tmp_path / "w" / "answers" / "en-es.json").read_text())
    contexts = {
        q.id: q.context for q in spans.squad.read(tmp_path / "w" / "squad" / "test-context-en-question-es.json")
    }
    assert all(text in contexts[qid] for qid, text in answers.items()) and any(answers.values())
    assert "average F1 (EM)" in spans.table(tmp_path / "w")


def test_folds_take_turns_and_queries_of_one_number_stay_together():
    rounds = [rerank_folds.roles(k) for k in range(5)]
    assert sorted(dev for _, dev, _ in rounds) == sorted(test for _, _, test in rounds) == list(range(5))
    assert all(len(train | {dev, test}) == 5 for train, dev, test in rounds)
    qids = [f"{lang}-{i}" for lang in ("en", "de") for i in range(53)]
    fold = rerank_folds.folds(qids, 0)
    assert (fold[:53] == fold[53:]).all() and np.bincount(fold).min() >= 20


def test_folds_of_a_file(tmp_path):
    (tmp_path / "f.json").write_text(json.dumps({f"f{k + 1}": [str(k), str(k + 5)] for k in range(5)}))
    found = rerank_folds.folds([str(i) for i in range(10)], 0, str(tmp_path / "f.json"))
    assert found.tolist() == [*range(5), *range(5)]
    with pytest.raises(UserError, match="lacks 1 queries, the first '10'"):
        rerank_folds.folds(["3", "10"], 0, str(tmp_path / "f.json"))


def write_task(home, qrels, run=None):
    home.mkdir()
    (home / "topics.tsv").write_text("".join(f"q{i}\tquery {i}\n" for i in range(3)))
    (home / "qrels").write_text(qrels)
    (home / "corpus.jsonl").write_text(
        "".join(json.dumps({"docid": f"d{i}", "title": "", "text": f"text {i}"}) + "\n" for i in range(5))
    )
    if run:
        (home / "run").write_text(run)
    c = clir_rerank.get_config()
    r = c.rerank
    r.topics, r.qrels, r.corpus, r.run = (
        str(home / n) for n in ("topics.tsv", "qrels", "corpus.jsonl", "run" if run else "none")
    )
    r.run = r.run if run else ""
    return rerank_folds.tasks(r)[0]


def test_candidates_are_the_judged_or_those_of_a_run(tmp_path):
    qrels = "q0 0 d0 1\nq0 0 d1 0\nq1 0 d2 1\nq1 0 elsewhere 1\nq2 0 d3 0\n"
    found = rerank_folds.read(write_task(tmp_path / "a", qrels), 10, ("title", "text"))
    # q2 has nothing relevant; what the corpus lacks is no candidate and is not missed
    assert found.qids == ["q0", "q1"] and found.docids == ["d0", "d1", "d2", "d3"]
    assert [c.tolist() for c in found.candidates] == [[0, 1], [2]] and [r.tolist() for r in found.relevant] == [
        [0],
        [2],
    ]
    assert found.qrels == {"q0": {"d0": 1, "d1": 0}, "q1": {"d2": 1}}
    run = "".join(
        f"{q} Q0 {d} {r} {9 - r} x\n"
        for q, d, r in [("q0", "d4", 1), ("q0", "d0", 2), ("q0", "d1", 3), ("q1", "d4", 1)]
    )
    found = rerank_folds.read(write_task(tmp_path / "b", qrels, run), 2, ("title", "text"))
    names = [[found.docids[i] for i in of] for of in found.candidates]
    assert names == [["d0", "d4"], ["d4"]] and [len(r) for r in found.relevant] == [1, 0]  # a miss of the run counts
    task = write_task(tmp_path / "d", "q0 0 a#1 1\nq1 0 b#0 1\n")
    docids = ("a#0", "a#1", "b#0", "c#0")
    task.corpus.write_text("".join(json.dumps({"docid": d, "title": "", "text": d}) + "\n" for d in docids))
    found = rerank_folds.read(task._replace(pool="article"), 10, ("title", "text"))
    assert [[found.docids[i] for i in of] for of in found.candidates] == [["a#0", "a#1"], ["b#0"]]
    with pytest.raises(UserError, match="no query of .* has a relevant document"):
        rerank_folds.read(write_task(tmp_path / "c", "q0 0 d0 0\n"), 10, ("title", "text"))


def test_tasks_go_through_the_languages_of_both_sides(tmp_path):
    r = clir_rerank.get_config("smoke").rerank
    r.query_langs, r.document_langs, r.monolingual = "en,es", "es,sw", False
    r.topics, r.qrels = (
        str(REPO / "third_party/tinypedia" / p) for p in ("topics/{query}.test.tsv", "qrels/{document}.test.tsv")
    )
    assert [task.name for task in rerank_folds.tasks(r)] == ["en-es", "en-sw", "es-sw"]
    r.query_langs = "xx"
    with pytest.raises(UserError, match="rerank.topics: there is no file .*xx.test.tsv"):
        rerank_folds.tasks(r)
    r.topics = ""
    with pytest.raises(UserError, match="rerank.topics is empty"):
        rerank_folds.tasks(r)
