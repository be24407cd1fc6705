"""A teacher's vectors are made once and found by text; translations are read and kept without leaks; both stages run."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import tiny_config
from llm_servers import MODEL, serve

from configs import default, kdr_stage1, kdr_stage2
from jdmdr import distill, llm, parallel_text, pipeline, sources, teacher, translate, workdir
from jdmdr.corpus import article
from jdmdr.recipe import Recipe
from jdmdr.types import UserError

# ----------------------------------------------------------------------------------------------------------- the teacher


def counting(seen):
    def embed(texts):
        seen.extend(texts)
        return np.array([[len(text), text.count("a")] for text in texts], np.float16)

    return embed


def test_a_text_is_encoded_once_whatever_list_it_comes_in(tmp_path):
    seen, first, second = [], ["a", "bb", "a", "ccc", "dddd"], ["bb", "aaaaa", "a"]
    for texts in (first, second, second):
        rows = teacher.fill(tmp_path, counting(seen), texts.__getitem__, len(texts), shard_rows=2)
        teacher.write(tmp_path / "out", "x", rows, tmp_path)
        found = teacher.read(tmp_path / "out" / "x")(np.arange(len(texts)))
        np.testing.assert_array_equal(found, [[len(text), text.count("a")] for text in texts])
    assert seen == ["a", "bb", "ccc", "dddd", "aaaaa"]


def test_a_shard_that_a_killed_run_left_without_its_hashes_is_made_again(tmp_path):
    seen = []
    teacher.fill(tmp_path, counting(seen), ["a", "bb", "ccc"].__getitem__, 3, shard_rows=2)
    (tmp_path / "hashes-00001.npy").unlink()
    rows = teacher.fill(tmp_path, counting(seen), ["ccc", "a"].__getitem__, 2, shard_rows=2)
    assert seen == ["a", "bb", "ccc", "ccc"] and rows.tolist() == [2, 0]


def teach(recipe, cache, scratch, **changes):
    config = recipe.config.copy_and_resolve_references()
    with config.unlocked():
        config.distill.cache = str(cache)
        for key, value in changes.items():
            config.encoder[key] = value
    spec = teacher.parse(str(recipe.directory / "export"))
    return teacher.Teacher(spec, config, recipe.mesh, cache, scratch)


def test_another_encoder_or_length_never_gets_these_vectors_and_a_false_note_is_refused(finished, tmp_path):
    texts = finished.library.queries("en", "test")[1][:8]
    teaching = teach(finished, tmp_path / "cache", tmp_path)
    rows, home = teaching.vectors("passage", texts.__getitem__, len(texts))
    stamp = {path: path.stat().st_mtime_ns for path in home.iterdir()}
    again, same = teaching.vectors("passage", texts.__getitem__, len(texts))
    assert same == home and again.tolist() == rows.tolist()
    assert {path: path.stat().st_mtime_ns for path in home.glob("*.npy")}.items() <= stamp.items()
    shorter = teach(finished, tmp_path / "cache", tmp_path, passage_length=4)
    _, other = shorter.vectors("passage", texts.__getitem__, len(texts))
    assert other != home and len(list((tmp_path / "cache").iterdir())) == 2
    meta = workdir.read_json(home / "meta.json")
    workdir.write_json(home / "meta.json", {**meta, "passage_prompt": "another: "})
    with pytest.raises(UserError, match="tells of another encoder .passage_prompt is 'another: ' there"):
        teaching.vectors("passage", texts.__getitem__, len(texts))


def test_half_precision_moves_scores_by_less_than_a_thousandth(finished, tmp_path):
    texts = finished.library.queries("en", "test")[1][:16]
    found = {}
    for dtype in ("float16", "float32"):
        config = finished.config.copy_and_resolve_references()
        config.encode.dtype = dtype
        recipe = SimpleNamespace(config=config, directory=finished.directory, mesh=finished.mesh)
        rows, home = teach(recipe, tmp_path / "cache", tmp_path).vectors("passage", texts.__getitem__, len(texts))
        teacher.write(tmp_path / dtype, "x", rows, home)
        found[dtype] = teacher.read(tmp_path / dtype / "x")(np.arange(len(texts)))
    assert home.name.startswith("passage-") and len(list((tmp_path / "cache").iterdir())) == 2
    difference = found["float16"] @ found["float16"].T - found["float32"] @ found["float32"].T
    assert 0 < np.abs(difference).max() < 1e-3


@pytest.mark.parametrize("entry, says", [
    ("", "distill.teacher is empty"), ("bm25", "one encoder"), ("minilm,me5-small", "one encoder"),
    ("nowhere", "distill.teacher: 'nowhere' is neither"),
])  # fmt: skip
def test_what_cannot_teach_is_refused(entry, says):
    with pytest.raises(UserError, match=says):
        teacher.parse(entry)


# ------------------------------------------------------------------------------------------------------ the translations


def test_translations_are_read_from_every_form(tmp_path):
    (tmp_path / "ko-en.train.tsv").write_text("안녕\tHello\n모자\tHat\n", encoding="utf-8")
    (tmp_path / "ko-en.test.tsv").write_text("하나\tOne\n", encoding="utf-8")
    (tmp_path / "more.csv").write_text('en,ko,ja\n"Hello, you",안녕,\nHat,모자,帽子\n', encoding="utf-8")
    (tmp_path / "more.jsonl").write_text('{"en": "Sea", "sw": "Bahari", "ko": null}\n', encoding="utf-8")
    found = parallel_text.files(f"{tmp_path},{tmp_path / 'more.csv'}, {tmp_path / 'more.jsonl'}", "train")
    assert [path.name for path in found] == ["ko-en.train.tsv", "more.csv", "more.jsonl"]
    read = [tuple(pair) for path in found for pair in parallel_text.read(path, "en")]
    assert read == [("ko", "안녕", "Hello"), ("ko", "모자", "Hat"), ("ko", "안녕", "Hello, you"), ("ko", "모자", "Hat"),
                    ("ja", "帽子", "Hat"), ("sw", "Bahari", "Sea")]  # fmt: skip
    counts = parallel_text.write(iter([parallel_text.Translated(*pair) for pair in read]), tmp_path / "out")
    assert counts == {"sources": 4, "ja": 1, "ko": 2, "sw": 1}
    assert list(parallel_text.sources(tmp_path / "out")) == ["Hello", "Hat", "Hello, you", "Sea"]
    assert dict(parallel_text.texts(tmp_path / "out", "ko")) == {"안녕": [0, 2], "모자": [1]}


@pytest.mark.parametrize("name, text, says", [
    ("x.csv", "en,ko\n,안녕\n", "line 2: no text under 'en'"), ("x.csv", "de,ko\na,b\n", "there are: de, ko"),
    ("x.csv", "en,ko\na,b,c\n", "line 2: more cells"), ("x.jsonl", "{\n", "line 1"), ("x.txt", "a", "no .tsv, .csv or .jsonl"),
    ("pairs.tsv", "a\tb\n", "tells no language"), ("ko-en.tsv", "a\n", "line 1: 1 sentences"),
])  # fmt: skip
def test_what_is_no_translation_is_told_with_its_line(tmp_path, name, text, says):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=says):
        list(parallel_text.read(tmp_path / name, "en"))
    with pytest.raises(UserError, match="no file or directory"):
        parallel_text.files(str(tmp_path / "nope.tsv"), "train")


def test_a_parallel_data_root_gives_nothing_of_articles_that_are_not_trained_on(finished):
    training = finished.training
    pairs = list(parallel_text.of_library(finished.library, training, "en"))
    own, theirs = finished.library.collections
    allowed = {article(own.docid(int(row))) for q in training if q.lang == 0 and not q.held_out for row in q.positives}
    passages = {f"{p.title} {p.text}": p.docid for p in map(theirs.passage, range(len(theirs)))}
    of_passages = {article(passages[pair.text]) for pair in pairs if pair.text in passages}
    assert of_passages == allowed and 0 < len(allowed) < 8
    queries = {pair.source for pair in pairs} - {f"{p.title} {p.text}" for p in map(own.passage, range(len(own)))}
    assert queries == {q.text for q in training if q.lang == 0 and not q.held_out}
    assert {pair.lang for pair in pairs} == {"sw"}


def query_of(qid, text):
    return SimpleNamespace(qid=qid, text=text)


def test_queries_come_from_files_then_the_model_then_the_data_root(finished, tmp_path):
    queries = distill.used(finished.training, finished.library, "en")
    config = default.get_config()
    given, written = tmp_path / "given", tmp_path / "written"
    for home, lang, text in ((given, "ko", "질문"), (written, "ko", "다른"), (written, "fi", "kysymys")):
        home.mkdir(exist_ok=True)
        (home / f"{lang}.tsv").write_text(f"{queries[1].qid}\t{text}\nunknown\t{text}\n", encoding="utf-8")
    config.distill.translations, config.distill.translate = str(given), "ko,fi"
    found = distill.translations(config, finished.library, queries, written)
    assert found["en"] == {i: q.text for i, q in enumerate(queries)}
    assert found["ko"] == {1: "질문"} and found["fi"] == {1: "kysymys"}
    assert set(found) == {"en", "ko", "fi", "sw"} and len(found["sw"]) == len(queries)
    config.distill.langs = "en,de"
    with pytest.raises(UserError, match="distill.langs names 'de', and no query"):
        distill.translations(config, finished.library, queries, written)
    with pytest.raises(UserError, match="distill.source is 'de'"):
        distill.used(finished.training, finished.library, "de")


def test_a_model_translates_and_its_slips_are_told(tmp_path):
    queries = [
        query_of("1", "Where is the sea?"),
        query_of("2", "What is tea?"),
        query_of("3", "Why?"),
        query_of("4", "Is it so?"),
    ]
    replies = {
        "1": "바다는 어디에 있나요?",
        "2": "Wo ist der Tee, den ich gestern trank?",
        "3": "왜 " * 30,
        "4": "정말인가요?",
    }

    def answer(request, number):
        query = next(q for q in queries if q.text == request.messages[-1]["content"])
        assert "into Korean" in request.messages[0]["content"]
        return json.dumps({"query": replies[query.qid]}) if query.qid != "4" else "I think so."

    config = default.get_config()
    config.distill.translate, config.llm.model = "ko", MODEL
    with serve(answer) as server:
        config.llm.base_url = server.base_url
        for _ in range(2):  # the second time from the log
            with llm.open_client(config.llm, tmp_path) as client:
                counts = translate.translate(client, config.distill, queries, tmp_path)
                assert translate.plan(client, config.distill, queries).upper.calls == 0
        assert len(server.requests) == 4
    assert counts == {"translated": {"ko": 1}, "failed": 3}
    assert (tmp_path / "ko.tsv").read_text(encoding="utf-8") == "1\t바다는 어디에 있나요?\n"
    reasons = dict(line.split("\t")[1:] for line in (tmp_path / "failed").read_text(encoding="utf-8").splitlines())
    assert (
        reasons["2"].startswith("it is written in Latin")
        and "times as long" in reasons["3"]
        and "no object" in reasons["4"]
    )
    assert translate.fault("Is it so?", "is it SO?", "en") == "it is still the query"
    config.distill.translate = "en"
    with pytest.raises(UserError, match="'en' is no language to translate to"):
        translate.languages(config.distill)


# ------------------------------------------------------------------------------------------------------------ the stages


def tiny(finished, module, arg="smoke"):
    """The recipe of a stage on the small data root, taught by the small export."""
    base = tiny_config(finished.config.data.root)
    config = module.get_config(arg)
    with config.unlocked():
        config.data, config.tokenizer = base.data, base.tokenizer
        config.data.splits = "test,to_en=test:test:en"
        config.distill.teacher, config.encoder.width = str(finished.directory / "export"), base.encoder.width
    return config


@pytest.fixture(scope="module")
def second(finished, tmp_path_factory):
    """Stage 2 with replay, run to its report."""
    config = tiny(finished, kdr_stage2)
    with config.unlocked():
        config.train.replay_share, config.distill.langs = 0.4, ""
    directory = tmp_path_factory.mktemp("second")
    pipeline.run(config, directory, "report")
    return Recipe(config, directory)


def test_batches_bring_the_teachers_vectors_of_what_they_hold(second):
    found, langs = second._distilling_sources()
    section, lengths = second.config.train, (32, 96)
    make, _, _ = sources.batch_maker(found, section, second.config.weights, lengths, 1, 0, 2, 1)
    batches = [make(step)[0] for step in range(6)]
    asked = [batch for batch in batches if "teacher_q_BxE" in batch]
    assert langs == ["sw"] and 1 <= len(asked) < 6
    spec = teacher.parse(second.config.distill.teacher)
    home = second.directory / "again"
    with workdir.locked(home):
        teaching = teacher.Teacher(spec, second.config, second.mesh, home / "cache", home)
    queries, texts = second._source_queries, list(parallel_text.sources(second.directory / "bitext"))

    def vector(side, text):
        rows, place = teaching.vectors(side, [text].__getitem__, 1)
        teacher.write(home, side, rows, place)
        return teacher.read(home / side)(np.array([0]))[0]

    batch = asked[0]
    numbers = np.concatenate([np.load(second.directory / "queries" / f"{lang}.numbers.npy") for lang in ("en", "sw")])
    query = queries[numbers[batch["query_index_B"][0]]]
    np.testing.assert_allclose(batch["teacher_q_BxE"][0], vector("query", query.text), atol=1e-3)
    row = int(batch["passage_ids_N"][0])
    assert row in query.positives
    passage = second.library.collections[0].passage(row)
    np.testing.assert_allclose(
        batch["teacher_p_NxE"][0], vector("passage", f"{passage.title} {passage.text}"), atol=1e-3
    )
    pairs = next(batch for batch in batches if "teacher_q_BxE" not in batch)
    text = texts[int(pairs["passage_ids_N"][3])]
    np.testing.assert_allclose(pairs["teacher_p_NxE"][3], vector("passage", text), atol=1e-3)


def test_stage_2_trains_reports_and_is_up_to_date_the_second_time(second, capsys):
    counts = workdir.counts_of(second.directory, "train")
    assert counts["steps"] == 6 and counts["skipped_updates"] == 0
    lines = [json.loads(line) for line in (second.directory / "train" / "log.jsonl").read_text().splitlines()]
    assert {"cross", "self", "translation_accuracy"} <= set().union(*lines) and any("kl" in line for line in lines)
    pipeline.run(second.config, second.directory, "report")
    done = [line.strip() for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert done and all(line.endswith("up to date") for line in done)
    metrics = workdir.read_json(second.directory / "evaluate" / "metrics.json")
    assert list(metrics["to_en"]["systems"]["kdr"]["ndcg@10"]) == ["avg", "sw"]
    card = (second.directory / "export" / "README.md").read_text()
    assert "distill_bitext, anchor 1, self 0.5, cross 1" in card and "teacher export" in card


def test_what_the_teacher_left_for_translations_alone_is_not_taken_for_queries_too(second, tmp_path):
    alone = second.config.copy_and_resolve_references()
    alone.train.replay_share = 0.0
    of = lambda config: next(s for s in Recipe(config, tmp_path).stages() if s.name == "teacher")
    assert of(alone).settings != of(second.config).settings


def test_stage_1_mines_the_source_languages_negatives_and_goes_on_to_stage_2(finished, tmp_path):
    config = tiny(finished, kdr_stage1)
    with config.unlocked():
        config.train.passages_per_query, config.mine.depth = 3, 8
        config.distill.cache = str(tmp_path / "cache")
    pipeline.run(config, tmp_path / "first", "export")
    recipe = Recipe(config, tmp_path / "first")
    found, langs = recipe._distilling_sources()
    assert langs == ["en", "sw"] and found[0].passages_per_query == 3
    of = found[0].training_set
    assert (of.positives.values < recipe.library.bases[1]).all() and (
        of.negatives.values < recipe.library.bases[1]
    ).all()
    assert np.isfinite(of.taught.passages(of.negatives.values)).all()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    after = tiny(finished, kdr_stage2)
    with after.unlocked():
        after.encoder.name, after.distill.cache = str(tmp_path / "first" / "export"), config.distill.cache
    pipeline.run(after, tmp_path / "then", "train")
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps, "what stage 1 encoded is not encoded again"
    start = np.load(next((tmp_path / "first" / "embeddings" / "en").glob("queries.test-*.npy")))
    pipeline.run(after, tmp_path / "then", "embeddings-warmup")
    np.testing.assert_allclose(
        np.load(next((tmp_path / "then" / "embeddings-warmup" / "en").glob("queries.test-*.npy"))), start, atol=1e-3
    )


def test_vectors_made_elsewhere_teach_and_a_missing_one_is_named(finished, second, tmp_path):
    config = second.config.copy_and_resolve_references()
    home = tmp_path / "vectors"
    home.mkdir()
    library, rng = second.library, np.random.default_rng(0)
    ids = {"en.queries": library.queries("en", "train")[0], "en.passages": library.collections[0].docids(np.arange(24)),
           "bitext": list(parallel_text.sources(second.directory / "bitext"))}  # fmt: skip
    for stem, names in ids.items():
        np.save(home / f"{stem}.npy", rng.normal(size=(len(names), 7)).astype(np.float32))
        (home / f"{stem}.txt").write_text("\n".join(names), encoding="utf-8")
    with config.unlocked():
        config.distill.teacher = f"vectors:{home}"
    recipe = Recipe(config, second.directory)
    assert recipe.teach(tmp_path / "out")["width"] == 7
    number = 5
    np.testing.assert_array_equal(teacher.read(tmp_path / "out" / "bitext")(np.array([number]))[0], np.load(home / "bitext.npy")[number])  # fmt: skip
    (home / "bitext.txt").write_text("\n".join(["another", *ids["bitext"][1:]]), encoding="utf-8")
    with pytest.raises(UserError, match="lacks the sentence"):
        recipe.teach(tmp_path / "other")


@pytest.mark.parametrize("changes, says", [
    ({"distill.teacher": ""}, "distill.teacher is empty"),
    ({"distill.parallel": False}, "distill.bitext is empty"),
    ({"train.cloze_share": 0.5}, "cloze_share is 0.5; the teacher"),
    ({"train.objective.teacher_temperature": 0.0}, "teacher_temperature divides"),
    ({"distill.translate": "ko"}, "llm.base_url is empty"),
    ({"warmup.objective.name": "distill_bitext"}, "warmup.objective.name is 'distill_bitext'"),
    ({"train.objective.name": "contrastive"}, "replay_share is 0.1; the objective contrastive"),
    ({"train.objective.self_weight": -1.0}, "self_weight is -1.0; it is at least 0"),
    ({"train.objective.form": "mse"}, "'kl', 'margin_mse'"),
])  # fmt: skip
def test_a_slip_in_the_recipe_is_told_before_any_work(finished, changes, says):
    config = tiny(finished, kdr_stage2)
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    from jdmdr.check import check_config

    with pytest.raises(UserError, match=says):
        check_config(config)
