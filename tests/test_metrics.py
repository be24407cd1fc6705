import gzip
import math

import numpy as np
import pytest

from jdmdr.metrics import (
    bootstrap_interval,
    evaluate_run,
    macro_average,
    parse_measures,
    read_ranks,
    read_run,
    unjudged_share,
    write_run,
)
from jdmdr.types import NO_HIT, Hits, UserError

QRELS = {"q1": {"a": 1, "b": 1, "x": 0}, "q2": {"c": 2, "d": 1}, "q3": {"e": 1}, "q4": {"f": 0}}
RUN = {"q1": {"x": 3.0, "a": 2.0, "y": 1.0, "b": 0.5}, "q2": {"d": 9.0, "c": 8.0}, "q4": {"f": 1.0}, "q9": {"a": 1.0}}


def test_ndcg_equals_the_hand_worked_values():
    values = evaluate_run(QRELS, RUN, ["ndcg@10", "ndcg@2"])
    ideal = 1 + 1 / math.log2(3)
    assert values["ndcg@10"]["q1"] == pytest.approx((1 / math.log2(3) + 1 / math.log2(5)) / ideal)
    assert values["ndcg@2"]["q1"] == pytest.approx((1 / math.log2(3)) / ideal)
    assert values["ndcg@10"]["q2"] == pytest.approx((1 + 2 / math.log2(3)) / (2 + 1 / math.log2(3)))


def test_recall_reciprocal_rank_and_average_precision_equal_the_hand_worked_values():
    values = evaluate_run(QRELS, RUN, ["recall@2", "recall@100", "mrr@1", "mrr@10", "map"])
    assert {measure: values[measure]["q1"] for measure in values} == pytest.approx(
        {"recall@2": 0.5, "recall@100": 1.0, "mrr@1": 0.0, "mrr@10": 0.5, "map": (1 / 2 + 2 / 4) / 2}
    )


def test_every_query_of_the_qrels_counts_and_no_other():
    for by_query in evaluate_run(QRELS, RUN).values():
        assert set(by_query) == set(QRELS)
        assert by_query["q3"] == 0 and by_query["q4"] == 0  # not in the run; nothing relevant


def test_equal_scores_are_ordered_by_docid_from_the_top_as_in_trec_eval():
    qrels = {"q": {"a": 1}}
    for score in (1.0, 1.0 + 1e-12):  # the second is equal in float32
        values = evaluate_run(qrels, {"q": {"a": score, "b": 1.0}}, ["mrr@10", "mrr@1"])
        assert values == {"mrr@10": {"q": 0.5}, "mrr@1": {"q": 0.0}}


def test_unknown_measures_are_named():
    for measure in ("ndcg", "ndcg@0", "precision@5", "map@0"):
        with pytest.raises(UserError, match=repr(measure)):
            evaluate_run(QRELS, RUN, [measure])


def test_the_macro_average_weights_languages_equally():
    assert macro_average({"en": 0.2, "sw": 0.6}) == pytest.approx(0.4)


def test_the_bootstrap_interval_agrees_with_the_normal_approximation():
    rng = np.random.default_rng(0)
    per_query = {"en": rng.random(400), "sw": rng.random(100) ** 2}
    low, high = bootstrap_interval(per_query, seed=1, samples=4000)
    centre = macro_average({lang: values.mean() for lang, values in per_query.items()})
    error = math.sqrt(sum(values.var() / len(values) for values in per_query.values())) / 2
    assert (low, high) == pytest.approx((centre - 1.96 * error, centre + 1.96 * error), abs=0.1 * error)
    assert (low, high) == bootstrap_interval(dict(reversed(per_query.items())), seed=1, samples=4000)


def test_a_bootstrap_over_constant_values_has_no_width():
    assert bootstrap_interval({"en": np.full(5, 0.25), "sw": np.full(3, 0.75)}, seed=0) == (0.5, 0.5)


def test_a_run_file_keeps_float32_scores_and_their_order(tmp_path):
    near = np.float32(0.7)
    scores = np.array([[np.nextafter(near, np.float32(1)), near, -np.inf], [3e-9, -np.inf, -np.inf]], np.float32)
    hits = Hits(np.array([[2, 0, NO_HIT], [1, NO_HIT, NO_HIT]]), scores)
    write_run(tmp_path / "run", ["q1", "q2"], hits, ["0#0", "0#1", "1#0"].__getitem__, "bm25")
    assert [line.split()[:4] for line in (tmp_path / "run").read_text().splitlines()] == [
        ["q1", "Q0", "1#0", "1"],
        ["q1", "Q0", "0#0", "2"],
        ["q2", "Q0", "0#1", "1"],
    ]
    run = read_run(tmp_path / "run")
    assert {qid: list(found) for qid, found in run.items()} == {"q1": ["1#0", "0#0"], "q2": ["0#1"]}
    assert [np.float32(score) for score in run["q1"].values()] == scores[0, :2].tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_ids_with_blanks_cannot_go_into_a_run(tmp_path):
    hits = Hits(np.array([[0]]), np.ones((1, 1), np.float32))
    with pytest.raises(UserError, match="'my doc'"):
        write_run(tmp_path / "run", ["q1"], hits, ["my doc"].__getitem__, "tag")
    assert not (tmp_path / "run").exists()


def test_a_run_made_elsewhere_may_be_gzipped_and_have_blank_lines_but_is_utf_8(tmp_path):
    path = tmp_path / "run"
    path.write_bytes(gzip.compress(b"q1 Q0 d1 1 0.9 tag\r\n\nq1\tQ0\td2\t2\t0.5\ttag\n"))
    assert read_run(path) == {"q1": {"d1": 0.9, "d2": 0.5}}
    path.write_bytes(b"q1 Q0 d\xff 1 0.9 tag\n")
    with pytest.raises(UserError, match="line 1: byte 0xff .* not UTF-8"):
        read_run(path)


@pytest.mark.parametrize(
    "line, message",
    [
        ("q1 Q0 d2 2 0.5", "line 2: found 5 fields"),
        ("q1 Q0 d2 2 high tag", "line 2: the score is 'high'"),
        ("q1 Q0 d2 2 nan tag", "line 2: the score is 'nan'"),
        ("q1 Q0 d1 2 0.5 tag", "line 2: docid 'd1' stands twice"),
    ],
)
def test_a_malformed_run_is_refused_with_its_line(tmp_path, line, message):
    path = tmp_path / "run"
    path.write_text(f"q1 Q0 d1 1 0.9 tag\n{line}\n")
    with pytest.raises(UserError, match=message):
        read_run(path)


# --------------------------------------------------------------------------------------------------------- MS MARCO


def msmarco_script(reference, candidates, cut):
    """MS MARCO's evaluation as its script goes about it: a list of 1000 places a query, 0 where nothing stands."""
    relevant, places, total = {}, {}, 0.0
    for qid, docid in reference:
        relevant.setdefault(qid, []).append(docid)
    for qid, docid, rank in candidates:
        places.setdefault(qid, [0] * 1000)[rank - 1] = docid
    for qid in places.keys() & relevant.keys():
        for place in range(cut):
            if places[qid][place] in relevant[qid]:
                total += 1 / (place + 1)
                break
    return total / len(relevant)


@pytest.mark.parametrize("cut", [10, 100])
def test_msmarco_mrr_is_the_scripts_with_gaps_repeated_passages_and_ranks_given_twice(tmp_path, cut):
    rng = np.random.default_rng(cut)
    reference = [(f"{q}", f"D{d}") for q in range(40) for d in rng.choice(60, rng.integers(1, 4), replace=False)]
    candidates = [
        (f"{q}", f"D{d}", int(rank))
        for q in range(3, 45)  # three queries lack a run, five a judgment
        for d, rank in zip(rng.integers(0, 60, 80), rng.integers(1, 121, 80), strict=True)
    ]
    path = tmp_path / "run.tsv"
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in candidates))
    qrels = {}
    for qid, docid in reference:
        qrels.setdefault(qid, {})[docid] = 1
    ranks, repeated = read_ranks(path)
    assert repeated > 0
    values = evaluate_run(qrels, read_run(path), [f"msmarco_mrr@{cut}"], ranks)[f"msmarco_mrr@{cut}"]
    expected = msmarco_script(reference, candidates, cut)
    assert sum(values.values()) / len(qrels) == pytest.approx(expected, abs=1e-12) and 0 < expected < 1


def test_msmarco_mrr_of_a_run_with_scores_ranks_equal_ones_as_they_stand():
    run = {"q": {"b": 1.0, "c": 1.0, "a": 2.0}}
    values = evaluate_run({"q": {"c": 1}, "p": {"a": 1}}, run, ["msmarco_mrr@10", "msmarco_mrr@2", "mrr@10"])
    assert values == {
        "msmarco_mrr@10": {"q": 1 / 3, "p": 0}, "msmarco_mrr@2": {"q": 0, "p": 0}, "mrr@10": {"q": 1 / 2, "p": 0}
    }  # fmt: skip


def test_relevance_counts_from_the_grade_that_a_measure_names():
    qrels, run = {"q": {"a": 1, "b": 2, "c": 3, "d": 0}}, {"q": {"a": 3.0, "d": 2.0, "b": 1.0}}
    measures = "recall@10, recall(rel=2)@10,mrr(rel=2)@10,map(rel=3),ndcg@10,recall@10"
    values = {m: of["q"] for m, of in evaluate_run(qrels, run, parse_measures(measures)).items()}
    ideal = 3 + 2 / np.log2(3) + 1 / 2
    assert values == pytest.approx({"recall@10": 2 / 3, "recall(rel=2)@10": 1 / 2, "mrr(rel=2)@10": 1 / 3, "map(rel=3)": 0,
                                    "ndcg@10": (1 + 2 / 2) / ideal})  # fmt: skip


@pytest.mark.parametrize("line, says", [
    ("q d", "found 2 fields instead of the 3"), ("q\td\t0", "rank is '0'"), ("q\td\t1.0", "rank is '1.0'"),
    ("q\td\t1001", "rank is '1001'; ranks are whole numbers from 1 to 1000"),
])  # fmt: skip
def test_a_malformed_or_too_long_msmarco_run_is_refused_with_its_line(tmp_path, line, says):
    path = tmp_path / "run.tsv"
    path.write_text(f"q\te\t1\n{line}\n")
    with pytest.raises(UserError, match=rf"line 2: .*{says}"):
        read_run(path)


# -------------------------------------------------------------------------------------------------- hand-made rankings


def by_hand(qrels, ranking, depth):
    """ANCE's measures of one language, from lists of docids, best first."""
    total = dict.fromkeys(("msmarco_mrr", "map", "ndcg", "recall"), 0.0)
    holes = {depth: [], None: []}
    for qid, judged in qrels.items():
        hits = ranking.get(qid, [])
        relevant = [docid for docid, rel in judged.items() if rel > 0]
        found = [rank for rank, docid in enumerate(hits[:depth], 1) if docid in relevant]
        total["msmarco_mrr"] += 1 / found[0] if found else 0
        total["map"] += sum(n / rank for n, rank in enumerate(found, 1)) / max(len(relevant), 1)
        gains = [max(judged.get(docid, 0), 0) / math.log2(rank + 1) for rank, docid in enumerate(hits[:depth], 1)]
        best = sorted((rel for rel in judged.values() if rel > 0), reverse=True)[:depth]
        ideal = sum(rel / math.log2(rank + 1) for rank, rel in enumerate(best, 1))
        total["ndcg"] += sum(gains) / ideal if ideal else 0
        total["recall"] += len(set(hits[:1000]) & set(relevant)) / max(len(relevant), 1)
        for cut, of in holes.items():
            if hits:
                of.append(sum(docid not in judged for docid in hits[:cut]) / len(hits[:cut]))
    return {name: value / len(qrels) for name, value in total.items()} | {
        "hole": {c: np.mean(of) for c, of in holes.items()}
    }


def test_ances_measures_equal_hand_made_ones_over_all_reference_queries_and_0_is_an_ordinary_id():
    rng = np.random.default_rng(5)
    qrels, ranking = {}, {}
    for q in range(30):
        judged = rng.choice(40, rng.integers(1, 12), replace=False)
        qrels[str(q)] = {str(d): int(rel) for d, rel in zip(judged, rng.integers(0, 4, len(judged)), strict=True)}
        if q % 6:
            ranking[str(q)] = [str(d) for d in rng.permutation(40)[: rng.integers(5, 30)]]
    qrels["0"], ranking["0"] = {"0": 3, "5": 0}, ["7", "0", "5"]  # of the query 0 the passage 0
    run = {qid: {docid: 100.0 - rank for rank, docid in enumerate(hits)} for qid, hits in ranking.items()}
    expected = by_hand(qrels, ranking, 10)
    measures = {"msmarco_mrr@10": "msmarco_mrr", "map@10": "map", "ndcg@10": "ndcg", "recall@1000": "recall"}
    found = evaluate_run(qrels, run, parse_measures(",".join(measures)))
    for measure, name in measures.items():
        assert sum(found[measure].values()) / len(qrels) == pytest.approx(expected[name], abs=1e-6), measure
    assert found["msmarco_mrr@10"]["0"] == 1 / 2 and found["ndcg@10"]["0"] == pytest.approx(1 / math.log2(3))
    for depth, share in expected["hole"].items():
        assert np.mean(list(unjudged_share(qrels, run, depth).values())) == pytest.approx(share)
    assert unjudged_share(qrels, run, 1)["0"] == 1 and unjudged_share(qrels, run, None)["0"] == pytest.approx(1 / 3)


def test_candidates_of_msmarco_are_read_as_a_run(tmp_path):
    path = tmp_path / "top1000.dev"
    path.write_text(
        "7\t0\twho is it\tsome passage\n7\t12\twho is it\tanother\n8\t0\twhy\tsome passage\n7\t0\twho is it\tagain\n"
    )
    assert read_run(path) == {"7": {"0": 1.0, "12": 0.5}, "8": {"0": 1.0}}
    path.write_text("7\t0\twho\tsome\n7\t1\twho\n")
    with pytest.raises(UserError, match="line 2: found 3 fields instead of the 4 of MS MARCO's candidates"):
        read_run(path)
