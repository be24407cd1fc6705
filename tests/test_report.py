import json
import re
import types

import pytest

from jdmdr import pipeline, report, workdir
from jdmdr.recipe import Recipe


@pytest.fixture(scope="module")
def written(finished):
    return (finished.directory / "report" / "report.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def metrics(finished):
    return json.loads((finished.directory / "evaluate" / "metrics.json").read_text())


def section(text, heading):
    return re.search(rf"^## {heading}.*?\n(.*?)(?=^## |\Z)", text, re.S | re.M)[1]


def table(text):
    """The cells of the first table: a header and its rows, without the rule."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]
    return rows[0], [row for row in rows[1:] if not set("".join(row)) <= set("-:")]


@pytest.mark.parametrize("split", ["dev", "test"])
def test_table_holds_the_figures_of_the_metrics(written, metrics, split):
    headers, rows = table(section(written, split))
    assert [row[0] for row in rows] == ["en", "sw", "average", "95 % low", "95 % high"]
    measures = {report.TITLES[measure]: measure for measure in ("ndcg@10", "recall@100")}
    assert headers[1:] == [f"{s} {m}" for m in measures for s in ("bm25", "warmup", "dmdr", "hybrid")]
    for row in rows[:3]:
        for header, cell in zip(headers[1:], row[1:], strict=True):
            system, title = header.split()
            figures = metrics[split]["systems"][system][measures[title]]
            assert cell == f"{figures['avg' if row[0] == 'average' else row[0]]:.3f}"


def test_filter_counts_are_those_of_the_selection(finished, written):
    counts = workdir.counts_of(finished.directory, "negatives")["languages"]
    headers, rows = table(section(written, "Negatives"))
    found = {row[0]: dict(zip(headers[1:], map(int, row[1:]), strict=True)) for row in rows}
    assert sorted(found) == ["all", "en", "sw"]
    for lang, of in counts.items():
        rules = {f"- {rule}": dropped for rule, dropped in of["dropped"]}
        sources = {f"from {name}": kept for name, kept in of["sources"].items()}
        assert found[lang] == {"candidates": of["candidates"], **rules, "kept": of["kept"], **sources}
        assert of["candidates"] - sum(rules.values()) == of["kept"] == sources["from retrieval"]
    assert found["all"] == {name: found["en"][name] + found["sw"][name] for name in found["en"]}


def test_settings_are_all_there_with_the_values_that_ran(finished, written):
    found = dict(table(section(written, "Settings"))[1])
    assert found["train.steps"] == "6" and found["mine.fusion"] == "'rrf'" and found["filters.depth"] == "off"
    assert found["train.objective.temperature"] == repr(finished.config.train.objective.temperature)
    keys = dict(report._flat(finished.config.to_dict()))
    assert set(found) == set(keys) and "data.root" not in found


def test_training_and_data_are_told(finished, written):
    counts = workdir.counts_of(finished.directory, "train")
    rows = {row[0]: row[1:] for row in table(section(written, "Training"))[1]}
    assert rows["train"][:2] == ["6", str(counts["best_step"])]
    headers, rows = table(section(written, "Data"))
    assert headers[:2] == ["lang", "passages"] and [row[:2] for row in rows] == [["en", "24"], ["sw", "24"]]
    weight = workdir.counts_of(finished.directory, "evaluate")["hybrid_weight"]
    assert f"the encoder's score the weight {weight:g} and" in written


def test_nothing_in_report_or_card_names_a_place_on_this_machine(finished, written):
    card = (finished.directory / "export" / "README.md").read_text(encoding="utf-8")
    for text in (written, card):
        assert str(finished.directory) not in text and finished.config.data.root not in text
        assert not re.search(r"(?<![\w.])/(tmp|home|root|work|usr)/", text)


def test_path_of_an_encoder_is_told_by_its_name_alone(finished, tmp_path):
    config = finished.config.copy_and_resolve_references().unlock()
    config.encoder.name, config.tokenizer.name = "/models/deep/minilm", "org/name"
    report.write(Recipe(config, finished.directory), tmp_path)
    found = dict(table(section((tmp_path / "report.md").read_text(), "Settings"))[1])
    assert found["encoder.name"] == "'minilm'" and found["tokenizer.name"] == "'org/name'"


def test_model_card_holds_the_figures_and_how_to_load_the_model(finished, metrics):
    card = (finished.directory / "export" / "README.md").read_text(encoding="utf-8")
    front = card.split("---")[1]
    assert "- en\n" in front and "- sw\n" in front and "library_name: sentence-transformers" in front
    assert f"{metrics['test']['systems']['hybrid']['ndcg@10']['avg']:.3f}" in card
    assert "encode_query" in card and "encode_document" in card


def test_command_prints_the_table_and_where_everything_lies(finished, metrics, capsys):
    flags = types.SimpleNamespace(redo=False)
    pipeline.run_and_print(finished.config, finished.directory, flags)
    out, err = capsys.readouterr()
    assert err.splitlines() == [f"{stage.name}: up to date" for stage in finished.stages()]
    assert f"{metrics['dev']['systems']['bm25']['ndcg@10']['avg']:.3f}" in out
    for name in ("report.md", "metrics.json", "export"):
        assert str(finished.directory / name) in out and (finished.directory / name).exists()
    assert (finished.directory / "metrics.json").read_bytes() == (
        finished.directory / "evaluate" / "metrics.json"
    ).read_bytes()
