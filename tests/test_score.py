"""Runs made elsewhere are scored as trec_eval does, from judgments alone."""

import json
import pathlib

import pytest

from jdmdr import score, scores
from jdmdr.types import UserError

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data" / "miracl-dev"
QRELS = {"en": "q1 0 a 1\nq1 0 b 0\nq2 0 c 1\n", "sw": "q1 0 a 1\n"}
RUNS = {"x": {"en": "q1 Q0 b 1 2 x\nq1 Q0 a 2 1 x\n", "sw": "q1 Q0 y 1 2 x\n"},
        "y": {"en": "q1 Q0 a 1 2 y\nq2 Q0 c 1 2 y\n", "sw": "q1 Q0 a 1 2 y\n"}}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    for lang, text in QRELS.items():
        (tmp_path / f"{lang}.dev.tsv").write_text(text)
        for name, of in RUNS.items():
            (tmp_path / f"{name}.{lang}.trec").write_text(of[lang])
    return tmp_path


def test_runs_are_found_by_language_and_scored(files):
    made, judged, spare = score.read({"x": f"{files}/x.{{lang}}.trec"}, f"{files}/{{lang}}.dev.tsv")
    assert made.qids == {"en": ["q1", "q2"], "sw": ["q1"]} and spare == [] and judged["sw"] == {"q1": {"a": 1}}
    assert made.table()["x"]["mrr@10"] == {"en": 0.25, "sw": 0.0, "avg": 0.125}
    assert made.unjudged_table()["x"]["hole@10"] == {"en": 0.0, "sw": 1.0, "avg": 0.5}


def test_a_path_without_a_language_is_one_collection(files):
    made, _, _ = score.read({"y": f"{files}/y.en.trec"}, f"{files}/en.dev.tsv")
    assert made.table()["y"]["ndcg@10"] == {"all": 1.0, "avg": 1.0}


def test_the_command_prints_writes_and_tests_against_the_first(command, files):
    result = command("jdmdr.score", f"{files}/x.{{lang}}.trec", f"best={files}/y.{{lang}}.trec",
                     f"--qrels={files}/{{lang}}.dev.tsv", f"--out={files}/out", "--split=dev")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if line in ("x", "best")] == ["x", "best"]
    table = json.loads((files / "out" / "metrics.json").read_text())["dev"]["systems"]
    assert table["best"]["ndcg@10"]["avg"] == 1 and (files / "out" / "dev.sw.qrels").read_text() == "q1 Q0 a 1\n"
    tests = json.loads((files / "out" / "significance.json").read_text())["dev"]["ndcg@10"]
    assert tests["best"]["x"]["avg"]["difference"] == pytest.approx(1 - table["x"]["ndcg@10"]["avg"], abs=1e-6)
    assert scores.read_queries(files / "out" / "dev.queries.tsv").qids == {"en": ["q1", "q2"], "sw": ["q1"]}


def test_a_run_in_msmarco_form_is_scored_by_the_ranks_it_gives(command, files):
    (files / "m.en.tsv").write_text("q1\tb\t1\nq1\ta\t3\nq1\ta\t4\n")
    result = command("jdmdr.score", f"{files}/m.en.tsv", f"{files}/x.en.trec", f"--qrels={files}/en.dev.tsv",
                     f"--out={files}/out", "--measures=msmarco_mrr@10,recall@1000")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "m.en.tsv: 1 ranks repeat a passage of their query" in result.stderr
    of = json.loads((files / "out" / "metrics.json").read_text())["runs"]["systems"]["m.en"]
    assert of["msmarco_mrr@10"]["all"] == pytest.approx(1 / 3 / 2, abs=1e-6)  # two queries are judged
    assert of["mrr@10"]["all"] == 0.25 and of["recall@1000"]["all"] == 0.5  # trec_eval knows the order alone
    result = command("jdmdr.compare", files / "out", files / "out", "--system=m.en,x.en", "--measure=msmarco_mrr@10")
    assert result.returncode == 0 and "runs, msmarco_mrr@10" in result.stdout
    result = command("jdmdr.compare", files / "out", files / "out", "--system=m.en,x.en", "--measure=ndcg@5")
    assert (
        result.returncode == 2
        and "'ndcg@5' is none of ndcg@10, recall@100, mrr@10, map, msmarco_mrr@10" in result.stderr
    )


@pytest.mark.parametrize("runs, qrels, says", [
    (["nope.{lang}"], "{lang}.dev.tsv", "no file has such a name"),
    (["nope"], "{lang}.dev.tsv", "there is no such file"),
    (["x.en.trec", "y.{lang}.trec"], "{lang}.dev.tsv", "differ in their languages .*all, en, sw"),
    (["x.{lang}.trec"], "e{lang}.dev.tsv", "there are none of en, sw"),
    (["x.en.trec"], "odd.tsv", "answers no query of .*odd.tsv .*'q1', the judgments' 'q7'"),
    (["x.en.trec"], "empty.tsv", "holds no judgment"),
])  # fmt: skip
def test_what_cannot_be_meant_is_told(files, runs, qrels, says):
    (files / "odd.tsv").write_text("q7 0 a 1\n")
    (files / "empty.tsv").write_text("")
    with pytest.raises(UserError, match=says):
        score.read({str(i): f"{files}/{run}" for i, run in enumerate(runs)}, f"{files}/{qrels}")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the MIRACL topics and qrels")
def test_the_published_judgments_of_miracl_are_found_in_every_language():
    found = score.find(f"{SHARED}/qrels/qrels.miracl-v1.0-{{lang}}-dev.tsv")
    assert len(found) == 18 and {"de", "yo", "sw"} < found.keys()
