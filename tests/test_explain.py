import csv
import json
import shutil

import numpy as np
import pytest

from jdmdr import pipeline
from jdmdr.filters import KEPT, Candidates, audit, explain, rules_from_config
from jdmdr.filters.explain import ALL, Scored
from jdmdr.types import NO_HIT

NAN = np.nan


@pytest.fixture
def scored():
    rng = np.random.default_rng(0)
    found = {}
    for lang, queries in (("en", 30), ("sw", 12)):
        positives = rng.normal(0.6, 0.1, (queries, 3))
        positives[rng.random((queries, 3)) < 0.5] = NAN
        positives[:, 0] = rng.normal(0.6, 0.1, queries)
        candidates = rng.normal(0.3, 0.2, (queries, 8))
        candidates[:, 6:] = NAN
        found[lang] = Scored(candidates, positives, candidates < 0.4)
    return found


def test_score_table_is_numpys_over_each_language_and_over_all(scored):
    table = explain.score_table({"warmup": scored})["warmup"]
    assert set(table) == {"en", "sw", ALL}
    for lang, parts in (("en", [scored["en"]]), (ALL, list(scored.values()))):
        differences = np.concatenate(
            [(np.nanmin(s.positives_QxM, axis=1)[:, None] - s.candidates_QxK)[:, :6].ravel() for s in parts]
        )
        expected = {
            "positive": np.concatenate([s.positives_QxM[np.isfinite(s.positives_QxM)] for s in parts]),
            "candidate": np.concatenate([s.candidates_QxK[:, :6].ravel() for s in parts]),
            "kept": np.concatenate([s.candidates_QxK[s.kept_QxK] for s in parts]),
            "difference": differences,
        }
        for kind, values in expected.items():
            found = table[lang][kind]
            assert found["count"] == len(values)
            assert found["mean"] == pytest.approx(values.mean(), abs=1e-6)
            assert found["quantiles"] == pytest.approx(np.quantile(values, explain.QUANTILES).tolist(), abs=1e-6)


def test_margins_count_what_the_rules_would_keep(scored):
    found = explain.margins(scored, {"absolute_margin": 0.1, "percent_of_positive": 0.9, "near_duplicate": 0.9})
    left_out = []
    for s in scored.values():
        for known in s.positives_QxM:
            known = known[np.isfinite(known)]
            if len(known) > 1:
                left_out += [(value, np.delete(known, i).min()) for i, value in enumerate(known)]
    assert found["left_out_positives"] == len(left_out)
    entry = next(e for e in found["grid"] if (e["rule"], e["value"]) == ("absolute_margin", 0.1))
    kept = [np.nanmin(s.positives_QxM, axis=1)[:, None] - 0.1 > s.candidates_QxK[:, :6] for s in scored.values()]
    assert entry["candidates_kept"] == pytest.approx(np.concatenate([k.ravel() for k in kept]).mean(), abs=1e-4)
    assert entry["left_out_kept"] == pytest.approx(np.mean([v < ref - 0.1 for v, ref in left_out]), abs=1e-4)
    both = [v < ref - 0.1 and v < ref - 0.1 * abs(ref) for v, ref in left_out]
    assert found["in_force"]["left_out_kept"] == pytest.approx(np.mean(both), abs=1e-4)


def test_the_suggestion_is_the_loosest_margin_that_drops_nine_in_ten(scored):
    found = explain.margins(scored, {})
    assert found["suggested"]
    for rule, value in found["suggested"].items():
        values = explain.GRID[rule]
        rows = {e["value"]: e["left_out_kept"] for e in found["grid"] if e["rule"] == rule}
        assert rows[value] <= 1 - explain.CAUGHT
        assert all(rows[looser] > 1 - explain.CAUGHT for looser in values[: values.index(value)])


def test_too_few_left_out_positives_suggest_nothing(scored):
    single = {lang: s._replace(positives_QxM=s.positives_QxM[:, :1]) for lang, s in scored.items()}
    found = explain.margins(single, {})
    assert found["left_out_positives"] == 0 and found["suggested"] == {}
    assert all(entry["left_out_kept"] is None for entry in found["grid"])


def test_everything_is_written_and_the_same_input_gives_the_same_bytes(scored, tmp_path):
    unknown = {
        lang: s._replace(
            candidates_QxK=np.full_like(s.candidates_QxK, NAN), positives_QxM=np.full_like(s.positives_QxM, NAN)
        )
        for lang, s in scored.items()
    }
    shown = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shown.append(explain.explain({"warmup": scored, "bm25": unknown}, "warmup", {}, tmp_path / name))
        assert (tmp_path / name / "histogram.png").read_bytes()[:4] == b"\x89PNG"
    assert shown[0] == shown[1] and "left-out positives kept" in shown[0]
    for file in ("scores.json", "scores.md", "histogram.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_every_drop_is_told_with_its_rule_score_and_threshold(tmp_path):
    rows = np.array([[3, 4, NO_HIT], [5, 6, 7]])
    scores = np.array([[0.9, 0.2, NAN], [0.8, 0.5, 0.1]], np.float32)
    candidates = Candidates(rows, scores, scores, np.array([1.0, 0.6], np.float32))
    filters = rules_from_config({"absolute_margin": 0.2})
    reasons = np.array([[1, KEPT, -2], [1, 0, KEPT]])
    audit.write_drops(tmp_path / "d.tsv", ["a", "b"], candidates, reasons, filters, str)
    assert (tmp_path / "d.tsv").read_text().splitlines() == [
        "qid\tdocid\trule\tscore\tthreshold",
        "a\t3\tabsolute_margin\t0.9\t0.8",
        "b\t5\tabsolute_margin\t0.8\t0.4",
        "b\t6\tpositive\t\t",
    ]


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_a_cell_of_the_sheet_is_never_a_formula(tmp_path, cell):
    audit.write_sheet(tmp_path / "s.csv", audit.SHEET, [[cell, "plain", 'with "quotes", commas']])
    content = (tmp_path / "s.csv").read_bytes()
    assert content.startswith(b"\xef\xbb\xbf")
    rows = list(csv.reader(content.decode("utf-8-sig").splitlines()))
    assert rows[1][0].startswith("'") and rows[1][1:] == ["plain", 'with "quotes", commas']


def test_the_pipelines_sheet_has_as_many_rows_a_language_as_asked(finished):
    with open(finished.directory / "negatives" / "audit.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    collection = dict(zip(finished.library.langs, finished.library.collections, strict=True))
    by_lang = {lang: [row for row in rows if row["lang"] == lang] for lang in collection}
    assert all(len(found) == finished.config.audit.rows for found in by_lang.values())
    for row in rows:
        passage = collection[row["lang"]].passage(collection[row["lang"]].rows([row["docid"]])[0])
        assert row["candidate"].lstrip("'").endswith(passage.text)
        assert row["verdict"] == "" and row["outcome"].split(":")[0] in ("kept", "dropped")


def test_another_margin_redoes_the_filters_alone(finished, tmp_path):
    directory = tmp_path / "workdir"
    shutil.copytree(finished.directory, directory)
    before = {path.parent.name: path.read_bytes() for path in directory.glob("*/manifest.json")}
    times = {path.parent.name: path.stat().st_mtime_ns for path in directory.glob("*/manifest.json")}
    config = finished.config.copy_and_resolve_references().unlock()
    config.filters.percent_of_positive = 0.5
    pipeline.run(config, directory, "negatives")
    after = {path.parent.name: path.stat().st_mtime_ns for path in directory.glob("*/manifest.json")}
    assert {name for name in times if after[name] != times[name]} == {"negatives"}
    assert json.loads(before["negatives"])["settings"]["filters"]["percent_of_positive"] == 0.95
