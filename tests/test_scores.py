import json

import numpy as np
import pytest

from jdmdr import scores, significance
from jdmdr.scores import Scores
from jdmdr.types import UserError

QRELS = {"en": {"q1": {"a": 1, "b": 0}, "q2": {"c": 1}}, "sw": {"q1": {"a": 1}}}
RUNS = {
    "x": {"en": {"q1": {"b": 2.0, "a": 1.0, "z": 0.5}, "q2": {"c": 1.0}}, "sw": {"q1": {"y": 2.0, "z": 1.0}}},
    "y": {"en": {"q1": {"a": 1.0}, "q2": {}}, "sw": {"q1": {"a": 2.0, "z": 1.0}}},
}


@pytest.fixture
def found():
    made = Scores()
    for lang, qrels in QRELS.items():
        made.add(lang, qrels, {system: RUNS[system][lang] for system in RUNS})
    return made


def test_averages_are_of_queries_and_then_of_languages(found):
    table = found.table()
    half = 1 / np.log2(3)
    assert table["x"]["ndcg@10"] == pytest.approx({"en": (half + 1) / 2, "sw": 0, "avg": (half + 1) / 4})
    assert table["y"]["mrr@10"] == {"en": 0.5, "sw": 1.0, "avg": 0.75}


def test_unjudged_shares_are_over_the_hits_that_there_are(found):
    table = found.unjudged_table()
    assert table["x"]["hole@10"] == pytest.approx({"en": (1 / 3 + 0) / 2, "sw": 1.0, "avg": (1 / 6 + 1) / 2})
    assert table["y"]["unjudged@100"] == pytest.approx({"en": 0.0, "sw": 0.5, "avg": 0.25})  # q2 finds nothing


def test_the_files_hold_the_tables(found, tmp_path):
    scores.write({"test": found}, tmp_path, seed=3, samples=200)
    written = {path.name: path for path in tmp_path.iterdir()}
    assert sorted(written) == ["intervals.json", "judged.json", "metrics.json", "significance.json", "test.queries.tsv"]
    tests = json.loads(written["significance.json"].read_text())["test"]
    assert list(tests) == ["ndcg@10", "recall@100"] and list(tests["ndcg@10"]) == ["y"]
    values = found.values
    expected = significance.compare(values["y"]["ndcg@10"], values["x"]["ndcg@10"], seed=3)
    for lang, of in tests["ndcg@10"]["y"]["x"].items():
        assert of["difference"] == pytest.approx(expected[lang].difference, abs=1e-6)
        assert of["p"] == pytest.approx(expected[lang].p, abs=1e-6)
        assert of["p_corrected"] >= of["p"] and of["queries"] == {"en": 2, "sw": 1, "avg": 3}[lang]


def test_values_per_query_are_read_as_they_were_written(found, tmp_path):
    path = tmp_path / scores.queries_file("test")
    scores.write_queries(path, found)
    assert path.read_text().splitlines()[:2] == [
        "lang\tqid\tsystem\tndcg@10\trecall@100\tmrr@10\tmap", "en\tq1\tx\t0.630930\t1.000000\t0.500000\t0.500000"
    ]  # fmt: skip
    again = scores.read_queries(path)
    assert again.qids == found.qids and list(again.values) == list(found.values)
    for system, of in found.values.items():
        for measure, by_lang in of.items():
            for lang, values in by_lang.items():
                assert again.values[system][measure][lang] == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize("line, says", [
    ("lang\tqid", "the first line is not lang qid system"),
    ("lang\tqid\tsystem\tndcg@10\trecall@100\tmrr@10\tmap\nen\tq1\tx\t1", "line 2: found .*'q1'"),
    ("lang\tqid\tsystem\tndcg@10\trecall@100\tmrr@10\tmap\nen\tq1\tx\t1\t1\t1\t1\nen\tq2\ty\t1\t1\t1\t1", "other queries"),
])  # fmt: skip
def test_a_file_of_another_form_is_told(tmp_path, line, says):
    (tmp_path / "t.tsv").write_text(line + "\n")
    with pytest.raises(UserError, match=says):
        scores.read_queries(tmp_path / "t.tsv")
