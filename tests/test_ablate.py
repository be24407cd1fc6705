import json
import os
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import ablation, quickstart
from jdmdr import ablate, scores, significance, workdir
from jdmdr.ablate import Row
from jdmdr.types import UserError
from jdmdr.workdir import Stage

QUERIES = {"en": 12, "sw": 5}


def write_cell(cells, slug, seed, shift):
    found = scores.Scores()
    rng = np.random.default_rng(seed)
    for lang, n in QUERIES.items():
        found.qids[lang] = [f"{lang}{i}" for i in range(n)]
        for measure in scores.MEASURES:
            values = np.clip(rng.uniform(0, 0.5, n).round(3) + shift, 0, 1)
            found.values.setdefault("dmdr", {}).setdefault(measure, {})[lang] = values
    directory = cells / f"{slug}-{seed}" / "evaluate"
    directory.mkdir(parents=True)
    scores.write_queries(directory / scores.queries_file("dev"), found)
    return {lang: found.values["dmdr"]["ndcg@10"][lang] for lang in QUERIES}


ROWS = [Row("Table", "full", {}), Row("Table", "Without it", {}), Row("Table", "judged", {}, True)]


def test_rows_are_means_over_languages_and_seeds_tested_against_the_reference(tmp_path):
    values = {
        (slug, seed): write_cell(tmp_path, slug, seed, shift)
        for slug, shift in (("full", 0.3), ("without-it", 0.1))
        for seed in (0, 1)
    }
    found = ablate.results(ROWS, ROWS[:2], (0, 1), "full", "dmdr", tmp_path)["dev"]["ndcg@10"]
    for line, slug in zip(found, ("full", "without-it"), strict=False):
        means = [np.mean([v.mean() for v in values[slug, seed].values()]) for seed in (0, 1)]
        assert line["seeds"] == pytest.approx(means, abs=1e-6)
        assert (line["mean"], line["low"], line["high"]) == pytest.approx(
            (np.mean(means), min(means), max(means)), abs=1e-6
        )
    pooled = [{lang: (values[s, 0][lang] + values[s, 1][lang]) / 2 for lang in QUERIES} for s in ("without-it", "full")]
    expected = significance.compare(*pooled, seed=0)["avg"]
    assert found[1]["difference"] == pytest.approx(expected.difference, abs=1e-5)
    assert found[1]["p_corrected"] == pytest.approx(expected.p, abs=1e-5)  # one comparison: nothing to correct
    assert "difference" not in found[0] and "mean" not in found[2]


def test_a_row_without_a_server_says_so_in_the_table(tmp_path):
    for slug in ("full", "without-it"):
        write_cell(tmp_path, slug, 0, 0.1)
    page = ablate.page(ablate.results(ROWS, ROWS[:2], (0,), "full", "dmdr", tmp_path), "github")
    line = next(line for line in page.splitlines() if "judged" in line)
    assert ablate.SERVER in line and page.startswith("**Table, dev**")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": (("T", "a b", {}), ("T", "A-B", {}))}, "two rows called 'a-b'"),
        ({"reference": "DMDR: judged by an LLM, topped up"}, "is no row of ablation.rows that runs"),
        ({"seeds": ()}, "ablation.seeds is empty"),
        ({"rows": (("T", "full", {"train.no_such": 1}),), "reference": "full"}, "ablation.rows, full: .*no_such"),
        ({"rows": (("T", "full", {}), ("T", "x", {"train.policy": "any"})), "reference": "full"},
         "ablation.rows, x: train.policy is 'any'"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_before_any_cell(tmp_path, changes, message):
    config = ablation.get_config("smoke")
    with config.unlocked():
        config.ablation.update(changes)
        if "rows" in changes and "reference" not in changes:
            config.ablation.reference = "a b"
    with pytest.raises(UserError, match=message):
        ablate.ablate(config, tmp_path, None)
    assert not (tmp_path / "cells").exists()


def test_a_recipe_without_rows_is_told_what_to_name(tmp_path):
    with pytest.raises(
        UserError, match="has no ablation.rows; name one that has, such as --config configs/ablation.py"
    ):
        ablate.ablate(quickstart.get_config(), tmp_path, None)


def test_every_row_of_the_recipe_overrides_keys_that_there_are(tmp_path):
    config = ablation.get_config()
    for row in ablation.ROWS:
        cell = ablate.cell_config(config, Row(*row), 1, tmp_path / "cells")
        assert cell.seed == 1 and "ablation" not in cell
        for key, value in row[2].items():
            part = cell
            for name in key.split("."):
                part = part[name]
            assert part == value


def test_only_the_rows_of_a_model_have_one_and_all_share_its_answers(tmp_path):
    config = ablation.get_config()
    config.llm.base_url, config.llm.model = "http://localhost:8000/v1", "m"
    cells = {row[1]: ablate.cell_config(config, Row(*row), 0, tmp_path / "cells") for row in ablation.ROWS}
    assert {name for name, cell in cells.items() if cell.llm.base_url} == {row[1] for row in ablation.ROWS if row[3:]}
    assert {cell.llm.cache for cell in cells.values()} == {str(tmp_path / "llm")}
    assert cells["no LLM judging"].filters.percent_of_positive is None
    config.llm.cache = "answers"
    assert ablate.cell_config(config, Row(*ablation.ROWS[0]), 0, tmp_path / "cells").llm.cache == "answers"


# ------------------------------------------------------------------------------------------------------ shared stages


def stage(settings, needs=()):
    def run(out_dir):
        (out_dir / "deep").mkdir()
        (out_dir / "deep" / "values.txt").write_text(json.dumps(settings))
        return {"runs": 1}

    return Stage("work", run, settings, needs)


def make(directory, settings):
    directory.mkdir(exist_ok=True)
    workdir.bring_up_to_date(stage(settings), directory, False, lambda line: None)


def test_a_finished_stage_is_taken_over_from_a_directory_that_did_the_same_work(tmp_path):
    for name, value in (("other", 1), ("same", 2)):
        make(tmp_path / name, {"value": (value,)})
    (tmp_path / "new").mkdir()
    workdir.adopt(stage({"value": (2,)}), tmp_path / "new", [tmp_path / "other", tmp_path / "same"])
    source, taken = (tmp_path / name / "work" / "deep" / "values.txt" for name in ("same", "new"))
    assert os.path.samefile(source, taken)
    said = []
    workdir.bring_up_to_date(stage({"value": (2,)}), tmp_path / "new", False, said.append)
    assert said == ["work: up to date"]


def test_nothing_is_taken_over_that_differs_or_is_unfinished_or_damaged(tmp_path):
    for name, value in (("other", 1), ("same", 2), ("damaged", 2)):
        make(tmp_path / name, {"value": value})
    (tmp_path / "same" / "work" / "manifest.json").unlink()
    (tmp_path / "damaged" / "work" / "deep" / "values.txt").unlink()
    (tmp_path / "new").mkdir()
    workdir.adopt(stage({"value": 2}), tmp_path / "new", [tmp_path / name for name in ("other", "same", "damaged")])
    assert not (tmp_path / "new" / "work").exists()


def test_begun_work_goes_on_but_work_for_other_settings_gives_way(tmp_path):
    for name, value in (("donor", 2), ("begun", 2), ("old", 1)):
        make(tmp_path / name, {"value": value})
    (tmp_path / "begun" / "work" / "manifest.json").unlink()
    for name in ("begun", "old"):
        workdir.adopt(stage({"value": 2}), tmp_path / name, [tmp_path / "donor"])
    assert not (tmp_path / "begun" / "work" / "manifest.json").exists()
    values = [tmp_path / name / "work" / "deep" / "values.txt" for name in ("donor", "begun", "old")]
    assert os.path.samefile(values[0], values[2]) and not os.path.samefile(values[0], values[1])


def test_without_hard_links_the_files_are_copied(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    make(tmp_path / "donor", {"value": 2})
    (tmp_path / "new").mkdir()
    workdir.adopt(stage({"value": 2}), tmp_path / "new", [tmp_path / "donor"])
    source, taken = (tmp_path / name / "work" / "deep" / "values.txt" for name in ("donor", "new"))
    assert source.read_bytes() == taken.read_bytes() and not os.path.samefile(source, taken)


@pytest.mark.slow
def test_a_killed_ablation_goes_on_and_a_second_run_does_nothing(tmp_path, data_root, command, monkeypatch, capsys):
    from tests.conftest import tiny_config

    config = tiny_config(data_root)
    with config.unlocked():
        config.ablation = ConfigDict(
            {
                "rows": (("T", "full", {}), ("T", "no weights", {"train.objective.mode": "none"})),
                "seeds": (0, 1),
                "reference": "full",
            }
        )
    run_cell, done = ablate.run_cell, []

    def dies_after_two(config, cells, name, target):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(name)
        run_cell(config, cells, name, target)

    monkeypatch.setattr(ablate, "run_cell", dies_after_two)
    with pytest.raises(KeyboardInterrupt):
        ablate.ablate(config, tmp_path / "a", None)
    monkeypatch.setattr(ablate, "run_cell", run_cell)
    ablate.ablate(config, tmp_path / "a", None)
    table = json.loads((tmp_path / "a" / "ablation.json").read_text())
    assert set(table) == {"dev", "test"} and all("mean" in line for line in table["dev"]["ndcg@10"])
    cells = tmp_path / "a" / "cells"
    shared = [(cells / name / "warmup" / "encoder.json") for name in ("full-0", "no-weights-0")]
    assert os.path.samefile(*shared)
    before = {path: path.stat().st_mtime_ns for path in cells.rglob("manifest.json")}
    ablate.ablate(config, tmp_path / "a", None)
    assert {path: path.stat().st_mtime_ns for path in cells.rglob("manifest.json")} == before
    shutil.rmtree(cells / "full-1" / "evaluate")  # a seed that has gone is made again, never left out of the mean
    ablate.ablate(config, tmp_path / "a", None)
    assert json.loads((tmp_path / "a" / "ablation.json").read_text()) == table
