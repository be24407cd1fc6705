"""Two evaluations are compared over the same queries and judgments, or refused by the name of what differs."""

import numpy as np
import pytest

from jdmdr import metrics, scores, significance
from jdmdr.compare import compare, lines
from jdmdr.types import UserError

QRELS = {lang: {f"q{i}": {f"d{i}": 1, "x": 0} for i in range(12)} for lang in ("en", "sw")}


def evaluation(directory, seed, qrels=QRELS, systems=("bm25", "dmdr"), split="test"):
    """Random runs of two systems and the files of their evaluation."""
    rng = np.random.default_rng(seed)
    made = scores.Scores()
    directory.mkdir(parents=True, exist_ok=True)
    for lang, judged in qrels.items():
        docids = sorted({docid for of_query in judged.values() for docid in of_query})
        runs = {
            s: {qid: dict(zip(docids, rng.normal(size=len(docids)), strict=True)) for qid in judged} for s in systems
        }
        made.add(lang, judged, runs)
        metrics.write_qrels(directory / scores.qrels_file(split, lang), judged)
    scores.write({split: made}, directory, 0, 100)
    return directory, made


def test_the_difference_is_the_second_less_the_first_per_language_and_on_average(tmp_path):
    a, of_a = evaluation(tmp_path / "a", 0)
    b, of_b = evaluation(tmp_path / "b", 1)
    rows = compare(a, b, ("bm25", "dmdr"), ["ndcg@10", "map"], seed=4)["test"]
    for measure in ("ndcg@10", "map"):
        first, second = of_a.values["bm25"][measure], of_b.values["dmdr"][measure]
        expected = significance.compare(second, first, seed=4)
        for lang in ("en", "sw"):
            mean_a, mean_b, found = rows[measure][lang]
            assert (mean_a, mean_b) == pytest.approx((first[lang].mean(), second[lang].mean()), abs=1e-6)
            assert found.difference == pytest.approx(mean_b - mean_a, abs=1e-6)
            assert found.p == pytest.approx(expected[lang].p, abs=0.01)
        smallest = min(rows[measure][lang][2].p for lang in ("en", "sw"))
        assert min(rows[measure][lang][2].p_corrected for lang in ("en", "sw")) == pytest.approx(min(1, 2 * smallest))
        assert rows[measure]["avg"][2].p_corrected == rows[measure]["avg"][2].p


def test_working_directories_are_compared_by_what_they_trained(finished):
    found = compare(finished.directory, finished.directory, None, ["ndcg@10"], seed=0)
    assert list(found) == ["dev", "test"]
    for by_measure in found.values():
        for mean_a, mean_b, row in by_measure["ndcg@10"].values():
            assert mean_a == mean_b and (row.difference, row.p) == (0, 1)
    assert "**" not in "\n".join(lines(found, ("dmdr", "dmdr")))


def other(lang, change):
    qrels = {name: {qid: dict(of) for qid, of in judged.items()} for name, judged in QRELS.items()}
    change(qrels[lang])
    return qrels


@pytest.mark.parametrize("change, says", [
    (lambda judged: judged.pop("q3"), "split test of sw has 12 queries in .*a and 11 in .*b, such as 'q3'"),
    (lambda judged: judged["q5"].update(x=1), "test.sw.qrels and .*test.sw.qrels judge query 'q5' differently"),
])  # fmt: skip
def test_other_queries_and_other_judgments_are_refused_by_name(tmp_path, change, says):
    a, _ = evaluation(tmp_path / "a", 0)
    b, _ = evaluation(tmp_path / "b", 0, other("sw", change))
    with pytest.raises(UserError, match=says):
        compare(a, b, ("dmdr", "dmdr"), ["ndcg@10"], seed=0)


@pytest.mark.parametrize("b, systems, says", [
    ("nowhere", None, r"nowhere holds no evaluation \(SPLIT.queries.tsv\)"),
    ("a", None, "add --system=NAME"),
    ("a", ("bm25", "nope"), "no system 'nope'; there are: bm25, dmdr"),
    ("b", ("bm25", "bm25"), "the splits test and .* dev"),
    ("unfinished", ("bm25", "bm25"), "unfinished/evaluate is unfinished"),
])  # fmt: skip
def test_what_cannot_be_compared_is_told(tmp_path, b, systems, says):
    evaluation(tmp_path / "a", 0)
    evaluation(tmp_path / "b", 0, split="dev")
    (tmp_path / "unfinished" / "evaluate").mkdir(parents=True)
    with pytest.raises(UserError, match=says):
        compare(tmp_path / "a", tmp_path / b, systems, ["ndcg@10"], seed=0)


@pytest.mark.parametrize("flags, says", [
    (("--system=a,b,c",), "--system is 'a,b,c'"), (("--measure=ndcg",), "measure is 'ndcg'"), (("C",), "3 directories"),
])  # fmt: skip
def test_a_wrong_command_line_gets_one_sentence_and_exit_code_2(command, tmp_path, flags, says):
    result = command("jdmdr.compare", tmp_path, tmp_path, *flags)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and says in result.stderr


def test_the_command_prints_a_table_with_marks(command, tmp_path):
    sure = {lang: {qid: {f"d{qid}": 1} for qid in judged} for lang, judged in QRELS.items()}
    a, made = evaluation(tmp_path / "a", 0, sure)
    for by_lang in made.values["bm25"].values():
        for values in by_lang.values():
            values[:] = 0
    scores.write({"test": made}, a, 0, 100)
    result = command("jdmdr.compare", str(a), str(a), "--system=bm25,dmdr", "--measure=ndcg@10,mrr@10")
    assert result.returncode == 0, result.stderr
    row = next(line for line in result.stdout.splitlines() if line.split()[:1] == ["avg"])
    assert row.split()[1] == "24" and row.split()[-1] in ("*", "**")
    assert [line for line in result.stdout.splitlines() if line.startswith("test, ")] == [
        "test, ndcg@10",
        "test, mrr@10",
    ]
