import json
import math

import numpy as np
import pytest

from jdmdr import evaluate, metrics
from jdmdr.corpus import passage_text
from jdmdr.index.fusion import fuse
from jdmdr.library import Library
from jdmdr.mine import Retriever
from jdmdr.splits import TRAINING
from jdmdr.types import Hits

SYSTEMS = ("bm25", "warmup", "dmdr")


def retriever(finished):
    return lambda system, lang, split: finished._retriever(system, lang, split.topics, split.corpus)


def run(finished, out_dir, library=None, training=None, retrievers=None, splits=None, **changes):
    keys = finished.config.evaluate.copy_and_resolve_references().unlock()
    keys.update(changes)
    out_dir.mkdir(exist_ok=True)
    return evaluate.evaluate(
        library or finished.library, finished.training if training is None else training,
        finished.splits if splits is None else splits, SYSTEMS,
        retrievers or retriever(finished), keys, 0, out_dir,
    )  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(finished, tmp_path_factory):
    """(counts, directory, metrics.json)"""
    out_dir = tmp_path_factory.mktemp("evaluated")
    counts = run(finished, out_dir)
    return counts, out_dir, json.loads((out_dir / "metrics.json").read_text())


def ndcg_and_recall(qrels, ranking):
    """Of one query, from its docids in order; relevance counts linearly, as in trec_eval."""
    gains = [qrels.get(docid, 0) for docid in ranking[:10]]
    ideal = sorted(qrels.values(), reverse=True)[:10]
    dcg, best = (sum(g / math.log2(i + 2) for i, g in enumerate(gs)) for gs in (gains, ideal))
    relevant = {docid for docid, rel in qrels.items() if rel > 0}
    return dcg / best if best else 0.0, len(relevant & set(ranking[:100])) / len(relevant) if relevant else 0.0


def rankings(path):
    """qid -> docids by descending float32 score, docid descending among equals, read without the library."""
    hits = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        qid, _, docid, _, score, _ = line.split()
        hits.setdefault(qid, []).append((np.float32(score), docid))
    return {qid: [docid for _, docid in sorted(found, reverse=True)] for qid, found in hits.items()}


def test_metrics_are_those_computed_by_hand_from_the_runs(finished, evaluated):
    _, out_dir, table = evaluated
    assert sorted(table) == ["dev", "test"]
    for split, of_split in table.items():
        assert sorted(of_split) == ["systems"] and sorted(of_split["systems"]) == ["bm25", "dmdr", "hybrid", "warmup"]
        for system, of_system in of_split["systems"].items():
            means = {}
            for lang in ("en", "sw"):
                qrels = finished.library.qrels(lang, split)
                found = rankings(out_dir / f"{split}.{system}.{lang}.trec")
                values = np.array([ndcg_and_recall(qrels[qid], found.get(qid, [])) for qid in qrels])
                means[lang] = values.mean(axis=0)
            for column, measure in enumerate(("ndcg@10", "recall@100")):
                assert sorted(of_system[measure]) == ["avg", "en", "sw"]
                for lang, mean in means.items():
                    assert of_system[measure][lang] == pytest.approx(mean[column], abs=1e-6)
                average = (means["en"][column] + means["sw"][column]) / 2
                assert of_system[measure]["avg"] == pytest.approx(average, abs=1e-6)


def test_bm25_run_is_the_ranking_of_its_searcher(finished, evaluated):
    from jdmdr.index.bm25 import Bm25Searcher

    collection = finished.library.collections[1]
    searcher = Bm25Searcher([passage_text(collection.passage(row)) for row in range(len(collection))])
    qids, texts = finished.library.queries("sw", "test")
    written = metrics.read_run(evaluated[1] / "test.bm25.sw.trec")
    for qid, rows_K, scores_K in zip(qids, *searcher.search(texts, 24), strict=True):
        hits = {collection.docid(row): score for row, score in zip(rows_K, scores_K, strict=True) if row >= 0}
        assert written.get(qid, {}) == pytest.approx(hits)


def test_intervals_hold_their_averages(evaluated):
    intervals = json.loads((evaluated[1] / "intervals.json").read_text())
    for split, of_split in evaluated[2].items():
        for system, of_system in of_split["systems"].items():
            for measure in ("ndcg@10", "recall@100"):
                low, high = intervals[split][system][measure]
                assert 0 <= low <= of_system[measure]["avg"] <= high <= 1


def test_same_input_gives_the_same_bytes(finished, evaluated, tmp_path):
    assert run(finished, tmp_path) == evaluated[0]
    for path in evaluated[1].iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


# --- the weight of the hybrid ----------------------------------------------------------------------------------------


def test_weight_is_chosen_on_the_held_out_queries_by_the_one_standard_error_rule(finished, evaluated):
    """Searched here language by language, and judged by hand."""

    def score(weight):
        means, variance = [], 0
        for index, lang in enumerate(("en", "sw")):
            queries = [q for q in finished.training if q.held_out and q.lang == index]
            first = sum(len(finished.library.queries(before, "train")[0]) for before in ("en", "sw")[:index])
            rows = np.array([q.row - first for q in queries])
            dense, lexical = (retriever(finished)(s, lang, TRAINING).search(rows, 24) for s in ("dmdr", "bm25"))
            fused = fuse([dense, lexical], finished.config.evaluate.hybrid, [weight, 1 - weight], 24)
            values = []
            for query, found in zip(queries, fused.rows_QxK, strict=True):
                qrels = {str(row - finished.library.bases[index]): 1 for row in query.positives}
                values.append(ndcg_and_recall(qrels, [str(row) for row in found if row >= 0])[0])
            means.append(np.mean(values))
            variance += np.var(values) / len(values)
        return np.mean(means), np.sqrt(variance) / 2

    scores = {weight: score(weight) for weight in np.round(np.arange(0, 1.01, 0.05), 2)}
    best, error = max(scores.values())
    good = [weight for weight, (mean, _) in scores.items() if mean >= best - error]
    distance = min(abs(weight - 0.5) for weight in good)
    assert evaluated[0]["hybrid_weight"] in [w for w in good if abs(w - 0.5) == pytest.approx(distance)]


def test_dev_and_test_judgments_have_no_say_in_the_weight(finished, evaluated, tmp_path):
    class Scrambled(Library):
        def qrels(self, lang, split):
            found = super().qrels(lang, split)
            if split == "train":
                return found
            return dict(zip(found, reversed(found.values()), strict=True))

    counts = run(finished, tmp_path, Scrambled(finished.library.directory))
    assert counts["hybrid_weight"] == evaluated[0]["hybrid_weight"]
    assert json.loads((tmp_path / "metrics.json").read_text()) != evaluated[2]


def test_held_out_queries_decide_the_weight(finished, tmp_path):
    """A retriever that is right about them, and wrong about all others, gets all of it."""
    positives = {}
    for query in finished.training:
        positives[finished.library.langs[query.lang], query.qid] = query.positives - finished.library.bases[query.lang]

    def retrievers(system, lang, split):
        qids, _ = finished.library.queries(lang, split.topics)

        def search(rows, k):
            if split != TRAINING or system != "dmdr":
                right = np.full((len(rows), 1), 23)
            else:
                right = np.array([positives[lang, qids[row]][:1] for row in rows])
            return Hits(right, np.ones(right.shape, np.float32))

        return Retriever(search, None)

    assert run(finished, tmp_path, retrievers=retrievers, hybrid="rrf")["hybrid_weight"] > 0.5


def test_weight_is_a_half_where_nothing_is_held_out(finished, tmp_path):
    assert run(finished, tmp_path, training=[q for q in finished.training if not q.held_out])["hybrid_weight"] == 0.5


def test_language_without_judged_queries_is_left_out_of_the_average(finished, evaluated, tmp_path, capsys):
    class Unjudged(Library):
        def qrels(self, lang, split):
            return {} if (lang, split) == ("sw", "dev") else super().qrels(lang, split)

    run(finished, tmp_path, Unjudged(finished.library.directory))
    table = json.loads((tmp_path / "metrics.json").read_text())
    for system, of_system in table["dev"]["systems"].items():
        for measure, values in of_system.items():
            english = evaluated[2]["dev"]["systems"][system][measure]["en"]
            assert values == {"avg": english, "en": english}
    assert table["test"] == evaluated[2]["test"]
    assert "sw has no judged dev query: left out" in capsys.readouterr().err


# --- splits over other corpora, and the files beside metrics.json ----------------------------------------------------

SPLITS = "test,en=test:test:en,pool=test:test:pool,parallel=test:test:parallel"


@pytest.fixture(scope="module")
def modes(finished, tmp_path_factory):
    """The directory of an evaluation over every kind of corpus."""
    from jdmdr.recipe import Recipe

    config = finished.config.copy_and_resolve_references().unlock()
    config.data.splits = SPLITS
    recipe = Recipe(config, tmp_path_factory.mktemp("modes"))
    for stage in ("corpus", "bm25", "embeddings", "embeddings-warmup"):
        (recipe.directory / stage).symlink_to(finished.directory / stage)
    recipe.index_bm25_pool(recipe.directory / "bm25-pool")
    out_dir = recipe.directory / "evaluate"
    run(recipe, out_dir, splits=recipe.splits)
    return out_dir


def test_an_own_corpus_gives_the_figures_it_gives_alone(evaluated, modes):
    table = json.loads((modes / "metrics.json").read_text())
    assert list(table) == ["en", "parallel", "pool", "test"] and table["test"] == evaluated[2]["test"]


def test_a_cross_lingual_split_searches_the_named_language_for_the_others(finished, modes):
    table = json.loads((modes / "metrics.json").read_text())["en"]["systems"]
    assert sorted(table["dmdr"]["ndcg@10"]) == ["avg", "sw"]
    english = finished.library.collections[0]
    found = metrics.read_run(modes / "en.dmdr.sw.trec")
    assert {docid for hits in found.values() for docid in hits} == set(english.docids(range(24)))
    embeddings = finished.directory / "embeddings"
    q_QxD, p_CxD = (np.load(embeddings / name).astype(np.float32)
                    for name in ("sw/queries.test-00000.npy", "en/passages-00000.npy"))  # fmt: skip
    qids = finished.library.queries("sw", "test")[0]
    for qid, scores in zip(qids, q_QxD @ p_CxD.T, strict=True):
        assert max(found[qid], key=found[qid].get) == english.docid(int(scores.argmax()))


def test_a_pool_ranks_all_languages_together(finished, modes):
    found = rankings(modes / "pool.dmdr.sw.trec")
    embeddings = finished.directory / "embeddings"
    q_QxD = np.load(embeddings / "sw/queries.test-00000.npy").astype(np.float32)
    p_CxD = np.concatenate([np.load(embeddings / lang / "passages-00000.npy") for lang in ("en", "sw")])
    names = [f"{lang}:{d}" for i, lang in enumerate(("en", "sw"))
             for d in finished.library.collections[i].docids(range(24))]  # fmt: skip
    for qid, scores in zip(finished.library.queries("sw", "test")[0], q_QxD @ p_CxD.T.astype(np.float32), strict=True):
        best = {names[i] for i in np.argsort(-scores)[:5]}
        assert len(best & set(found[qid][:5])) >= 4  # ties and rounding may swap the fifth
        assert len(found[qid]) == 48
    for name, relevant in (("pool", 1), ("parallel", 2)):
        lines = (modes / f"{name}.sw.qrels").read_text().split("\n")[:-1]
        assert len(lines) == relevant * len(found)
    mixed = json.loads((modes / "metrics.json").read_text())
    assert mixed["pool"]["systems"]["bm25"]["ndcg@10"]["avg"] > 0.2


def test_bias_is_told_for_the_pools_alone(modes):
    bias = json.loads((modes / "language_bias.json").read_text())
    assert sorted(bias) == ["parallel", "pool"]
    for split, own in (("pool", 1.0), ("parallel", 0.5)):
        for system in ("bm25", "warmup", "dmdr", "hybrid"):
            assert bias[split][system].keys() == {"en", "sw", "avg"}
            for lang in ("en", "sw"):
                figures = bias[split][system][lang]
                assert figures["expected"][lang] == own and sum(figures["shares"].values()) == pytest.approx(
                    1, abs=1e-5
                )
    # words are of one language: BM25 prefers its own
    assert bias["parallel"]["bm25"]["sw"]["own_excess"] > 0.1


def test_runs_that_are_there_are_not_searched_again(finished, evaluated, tmp_path):
    run(finished, tmp_path)
    for path in tmp_path.glob("dev.*.sw.trec"):
        path.unlink()

    def retrievers(system, lang, split):
        assert (lang, split.name) == ("sw", "dev") or split == TRAINING
        return retriever(finished)(system, lang, split)

    run(finished, tmp_path, retrievers=retrievers)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        p.name: p.read_bytes() for p in evaluated[1].iterdir()
    }


def test_measures_that_are_added_are_written_and_tested_and_unjudged_queries_have_runs_alone(
    finished, evaluated, tmp_path
):
    from jdmdr import scores, splits

    asked = splits.resolve("test,lead=dev:none:own", finished.files)
    counts = run(finished, tmp_path, splits=asked, measures="msmarco_mrr@10,recall(rel=2)@10")
    assert counts["splits"] == ["test"]
    for lang in ("en", "sw"):
        lead, dev = (
            metrics.read_run(where / f"{split}.bm25.{lang}.trec")
            for where, split in ((tmp_path, "lead"), (evaluated[1], "dev"))
        )
        assert list(lead) == finished.library.queries(lang, "dev")[0] and {q: lead[q] for q in dev} == dev
        assert not (tmp_path / scores.qrels_file("lead", lang)).exists()
    table = json.loads((tmp_path / "metrics.json").read_text())
    assert list(table) == ["test"]
    for of in table["test"]["systems"].values():
        assert of["msmarco_mrr@10"] == pytest.approx(of["mrr@10"], abs=0.02) and of["recall(rel=2)@10"]["avg"] == 0
    tests, intervals = (
        json.loads((tmp_path / f"{name}.json").read_text())["test"] for name in ("significance", "intervals")
    )
    assert {*tests} == {*intervals["bm25"]} == {"ndcg@10", "recall@100", "msmarco_mrr@10", "recall(rel=2)@10"}
    again = scores.read_queries(tmp_path / scores.queries_file("test"))
    assert again.measures == (*scores.MEASURES, "msmarco_mrr@10", "recall(rel=2)@10")
    assert scores.averages(tmp_path).split("\n")[0].split()[-1] == "recall(rel=2)@10"


# --- an evaluation without training ----------------------------------------------------------------------------------


def test_an_encoder_is_evaluated_as_it_is_where_there_is_nothing_to_train_on(finished, command, tmp_path):
    """XQuAD-R and its like have no training queries; a trained encoder is brought to them by name."""
    import shutil

    source = finished.config.data.root
    for kind in ("corpus", "topics", "qrels"):
        shutil.copytree(f"{source}/{kind}", tmp_path / kind, ignore=shutil.ignore_patterns("*.train.*"))
    flags = ("--config", "configs/quickstart.py:smoke", "--workdir", tmp_path / "work", f"--config.data.root={tmp_path}",
             f"--config.encoder.name={finished.directory / 'export'}", "--config.encoder.query_length=32")  # fmt: skip
    untrained = (*flags, "--config.warmup.steps=0", "--config.train.steps=0")
    result = command("jdmdr.evaluate", *untrained, "--config.data.splits=test,pool=test:test:pool")
    assert result.returncode == 0, result.stderr
    lines = [line.split()[:2] for line in result.stdout.splitlines()[2:]]
    assert lines == [[split, system] for split in ("pool", "test") for system in ("bm25", "dmdr", "hybrid")]
    table = json.loads((tmp_path / "work" / "evaluate" / "metrics.json").read_text())
    trained = json.loads((finished.directory / "evaluate" / "metrics.json").read_text())
    for lang in ("en", "sw"):
        assert table["test"]["systems"]["dmdr"]["ndcg@10"][lang] == pytest.approx(
            trained["test"]["systems"]["dmdr"]["ndcg@10"][lang], abs=0.02
        )
    result = command("jdmdr.pipeline", *untrained)
    assert result.returncode == 2 and "there is no report stage" in result.stderr and "Traceback" not in result.stderr
