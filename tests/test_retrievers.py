import json
import pathlib
import shutil

import numpy as np
import pytest

from configs import default
from jdmdr import mine, pipeline, retrievers
from jdmdr.index.fusion import concat_vectors
from jdmdr.presets import PRESETS
from jdmdr.retrievers import Spec, Vectors, parse
from jdmdr.tokenizer import AS_IN
from jdmdr.types import NO_HIT, UserError

GOLDENS = pathlib.Path(__file__).parent / "goldens"


@pytest.fixture
def collection(finished):
    return finished.library.collections[0]


@pytest.fixture
def qids(finished):
    return finished.library.queries(finished.library.langs[0], "train")[0]


def test_every_kind_of_entry_is_read(tmp_path):
    (tmp_path / "model").mkdir()
    found = parse(
        f"warmup, bm25,me5-small,bge-m3={tmp_path}/model,{tmp_path}/model,own=a/b,run:x/{{lang}}.trec,v=vectors:d,triples:t.tsv"
    )
    assert found == [
        Spec("warmup", "warmup"),
        Spec("bm25", "bm25"),
        Spec("me5-small", "encoder", "intfloat/multilingual-e5-small", "me5-small"),
        Spec("bge-m3", "encoder", f"{tmp_path}/model", "bge-m3"),
        Spec("model", "encoder", f"{tmp_path}/model"),
        Spec("own", "encoder", "a/b"),
        Spec("run", "run", "x/{lang}.trec"),
        Spec("v", "vectors", "d"),
        Spec("triples", "triples", "t.tsv"),
    ]
    assert [spec.dense for spec in found] == [True, False, True, True, True, True, False, True, False]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("warmup,,bm25", "the entry ''"),
        ("bm25,bm25", "two retrievers 'bm25'; give one a name of its own"),
        ("colbert", "'colbert' is neither a retriever nor a directory"),
        ("run:", "names no file; write run:PATH"),
        ("ensemble=a/b", "'ensemble' cannot be the name of a retriever"),
        ("a b=a/b", "'a b' cannot be the name"),
        ("=a/b", "write NAME=ENTRY"),
    ],
)
def test_what_is_no_entry_is_refused(entries, message):
    with pytest.raises(UserError, match=message):
        parse(entries)


def test_a_preset_brings_its_own_recipe_and_a_directory_its_modules_and_prompts(finished, tmp_path):
    section = default.get_config().encoder
    export = tmp_path / "export"
    export.mkdir()
    (export / "config_sentence_transformers.json").write_text('{"prompts": {"query": "q: ", "document": "d: "}}')
    (export / "sentence_bert_config.json").write_text('{"max_seq_length": 48}')
    own = retrievers.encoder_section(parse(f"me5-small={export}")[0], section)
    assert (own.name, own.pooling, own.query_prompt, own.passage_prompt) == (
        str(export),
        "mean",
        "query: ",
        "passage: ",
    )
    own = retrievers.encoder_section(parse(str(export))[0], section)
    assert (own.pooling, own.normalize, own.query_prompt, own.passage_prompt) == ("", None, "q: ", "d: ")
    assert (own.query_length, own.passage_length) == (48, 48)
    assert section.passage_length == 256


def test_presets_name_every_key_that_the_encoder_section_has():
    config = default.get_config()
    for preset in PRESETS.values():
        assert set(preset.encoder()) <= set(config.encoder) and set(preset.words()) <= set(config.tokenizer)
        assert preset.as_in in ("", *AS_IN)
        assert preset.temperature > 0 and preset.pooling in ("cls", "mean")


def test_a_preset_brings_its_tokenizer_and_tells_where_it_is_published(tmp_path):
    spec = parse(f"star={GOLDENS / 'roberta'}")[0]
    section = retrievers.encoder_section(spec, default.get_config().encoder)
    assert retrievers.words(spec, section) == ("roberta-base", "2.8.0") and section.name == str(GOLDENS / "roberta")
    (other,) = parse(f"mine={GOLDENS / 'roberta'}")
    assert retrievers.words(other, section) == (str(GOLDENS / "roberta"), "")
    with pytest.raises(
        UserError, match="'DRhard-star' is published at https://github.com/jingtaozhan/DRhard and not on"
    ):
        retrievers.encoder_section(parse("star")[0], default.get_config().encoder)


# ------------------------------------------------------------------------------------------------------- made elsewhere


def write_run(path, lines):
    path.write_text("".join(f"{qid} Q0 {docid} {rank} {score} t\n" for qid, docid, rank, score in lines))
    return path


def test_an_external_run_is_ranked_by_score_with_ties_by_row(tmp_path, collection, qids):
    docids = collection.docids([3, 1, 2])
    run = write_run(tmp_path / "en.trec", [(qids[0], docids[0], 1, 0.5), (qids[0], docids[1], 2, 0.5),
                                           (qids[0], docids[2], 3, 0.9), ("other", docids[0], 1, 1)])  # fmt: skip
    hits = retrievers.external_run(run, qids, collection).search(np.array([0, 1]), 2)
    assert hits.rows_QxK.tolist() == [[2, 1], [NO_HIT, NO_HIT]]
    np.testing.assert_array_equal(hits.scores_QxK, np.array([[0.9, 0.5], [-np.inf, -np.inf]], np.float32))


@pytest.mark.parametrize(
    ("lines", "message"),
    [([("q", "zz#9", 1, 1.0)], "docid 'zz#9' of query .* is not in the corpus"), ([("x", "d", 1, 1.0)], "has no training query")],
)  # fmt: skip
def test_a_run_of_another_collection_is_refused(tmp_path, collection, qids, lines, message):
    run = write_run(tmp_path / "en.trec", [(qids[0] if qid == "q" else qid, *rest) for qid, *rest in lines])
    with pytest.raises(UserError, match=message):
        retrievers.external_run(run, qids, collection)


def write_vectors(directory, collection, qids, order, width=4):
    rng = np.random.default_rng(0)
    passages, queries = rng.normal(size=(len(collection), width)), rng.normal(size=(len(qids), width))
    for stem, values, ids in (("passages", passages[order], collection.docids(order)), ("queries", queries, qids)):
        np.save(directory / f"en.{stem}.npy", values.astype(np.float16))
        (directory / f"en.{stem}.txt").write_text("".join(f"{name}\n" for name in ids))
    return passages.astype(np.float16), queries.astype(np.float16)


def test_external_vectors_are_matched_by_id_not_by_place(tmp_path, collection, qids):
    order = np.random.default_rng(1).permutation(len(collection))
    passages, queries = write_vectors(tmp_path, collection, qids, order)
    found = retrievers.external_vectors(tmp_path, "en", qids[::-1], collection)
    np.testing.assert_array_equal(np.concatenate(found.blocks), passages)
    np.testing.assert_array_equal(found.queries_QxD, queries[::-1].astype(np.float32))


def test_vectors_in_the_collections_order_stay_mapped(tmp_path, collection, qids):
    write_vectors(tmp_path, collection, qids, np.arange(len(collection)))
    assert isinstance(retrievers.external_vectors(tmp_path, "en", qids, collection).blocks[0], np.memmap)


def spoil(directory, what):
    path = directory / "en.passages.npy"
    values, ids = np.load(path), (directory / "en.passages.txt").read_text().splitlines()
    if what == "rows":
        np.save(path, values[:-1])
    elif what == "nan":
        values[5] = np.nan
        np.save(path, values)
    elif what == "width":
        np.save(path, values[:, :2])
    elif what == "twice":
        (directory / "en.passages.txt").write_text("\n".join([*ids[:-1], ids[0]]) + "\n")
    elif what == "missing":
        np.save(path, values[1:])
        (directory / "en.passages.txt").write_text("\n".join(ids[1:]) + "\n")
    elif what == "text":
        path.write_text("0.1 0.2")
    elif what == "gone":
        path.unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("rows", "one row of floating-point numbers a line"), ("nan", "the vector of docid .* holds NaN"),
        ("width", "is 2 wide and en.queries.npy 4"), ("twice", r"line \d+: docid .* stands there twice"),
        ("missing", "lacks the docid"), ("text", "is no .npy array"), ("gone", "does not exist"),
    ],
)  # fmt: skip
def test_spoilt_vectors_are_refused_by_name(tmp_path, collection, qids, what, message):
    write_vectors(tmp_path, collection, qids, np.arange(len(collection)))
    spoil(tmp_path, what)
    with pytest.raises(UserError, match=message):
        retrievers.external_vectors(tmp_path, "en", qids, collection)


# -------------------------------------------------------------------------------------------------------- concatenation


def vectors(rng, queries, passages, width, scale):
    cut = passages // 3
    p_CxD = (rng.normal(size=(passages, width)) * scale).astype(np.float16)
    return Vectors(rng.normal(size=(queries, width)).astype(np.float32), [p_CxD[:cut], p_CxD[cut:]])


def test_concatenated_vectors_rank_by_the_weighted_sum_of_cosines(tmp_path):
    rng = np.random.default_rng(0)
    members = {"a": vectors(rng, 5, 40, 6, 1.0), "b": vectors(rng, 5, 40, 3, 9.0)}
    queries_QxD = concat_vectors([v.queries_QxD for v in members.values()], [0.3, 0.7])
    passages_CxD = mine.concatenated([v.blocks for v in members.values()], [0.3, 0.7], tmp_path / "passages.npy")
    expected = 0
    for weight, v in zip([0.3, 0.7], members.values(), strict=True):
        p_CxD, q_QxD = np.concatenate(v.blocks).astype(np.float64), v.queries_QxD.astype(np.float64)
        cosine = q_QxD @ p_CxD.T / np.linalg.norm(q_QxD, axis=1)[:, None] / np.linalg.norm(p_CxD, axis=1)
        expected = expected + weight * cosine
    np.testing.assert_allclose(queries_QxD @ passages_CxD.T, expected, atol=1e-5)


def test_the_spread_of_a_retriever_is_that_of_the_cosines_of_its_first_hits(finished):
    rng = np.random.default_rng(0)
    found = vectors(rng, 5, 400, 6, 3.0)
    retriever = retrievers.dense(found, "exact", "Flat", finished.mesh)
    rows = np.array([4, 1])
    (cosines,) = mine._cosines({"a": retriever}, rows)
    p_CxD, q_QxD = np.concatenate(found.blocks).astype(np.float64), found.queries_QxD[rows].astype(np.float64)
    dot = q_QxD @ p_CxD.T
    first = np.argsort(-dot, axis=1, kind="stable")[:, : mine.SIGMA_DEPTH]
    cosine = dot / np.linalg.norm(q_QxD, axis=1)[:, None] / np.linalg.norm(p_CxD, axis=1)
    np.testing.assert_allclose(cosines, np.take_along_axis(cosine, first, 1).ravel(), atol=1e-5)


def test_concat_mines_what_the_weighted_sum_ranks_first(finished, tmp_path):
    library, c = finished.library, finished.config.mine.copy_and_resolve_references().unlock()
    c.update({"retrievers": "a=vectors:A,b=vectors:B", "fusion": "concat", "pool": "corpus", "depth": 7, "weights": ()})
    rng = np.random.default_rng(0)
    opened = {}

    def open_ensemble(lang):
        if lang not in opened:
            index = library.langs.index(lang)
            sizes = len(library.queries(lang, "train")[0]), len(library.collections[index])
            opened[lang] = {
                name: search(vectors(rng, *sizes, width, scale))
                for name, width, scale in (("a", 6, 1.0), ("b", 4, 5.0))
            }
        return opened[lang]

    def search(found):
        return retrievers.dense(found, "exact", "Flat", finished.mesh)

    counts = mine.mine(library, finished.training, open_ensemble, c, tmp_path, search)
    weights = counts["weights"]
    assert sum(weights.values()) == pytest.approx(1)
    lang = library.langs[1]
    mined = mine.read_mined(tmp_path, lang, ["a", "b"])
    queries = [q for q in finished.training if q.lang == 1 and not q.held_out]
    first = len(library.queries(library.langs[0], "train")[0])
    for q, query in enumerate(queries):
        total = 0
        for name, retriever in opened[lang].items():
            p_CxD = np.concatenate(retriever.vectors.blocks).astype(np.float64)
            q_D = retriever.vectors.queries_QxD[query.row - first].astype(np.float64)
            total = total + weights[name] * (p_CxD @ q_D) / np.linalg.norm(p_CxD, axis=1) / np.linalg.norm(q_D)
        total[query.positives - library.bases[1]] = -np.inf
        assert mined.rows_QxK[q].tolist() == np.argsort(-total, kind="stable")[:7].tolist()
    assert not list(tmp_path.glob(".concat.*"))


# -------------------------------------------------------------------------------------------------------- in a pipeline


def written(directory, names):
    return {name: (directory / name / "manifest.json").stat().st_mtime_ns for name in names}


def test_each_encoder_has_its_own_tokens_and_is_encoded_once(finished, tmp_path):
    directory = tmp_path / "workdir"
    shutil.copytree(finished.directory, directory)
    config = finished.config.copy_and_resolve_references().unlock()
    goldens = pathlib.Path(__file__).parent / "goldens"
    config.mine.retrievers = f"bm25,tiny={goldens / 'xlm-roberta'},ours={finished.directory / 'export'},warmup"
    config.mine.depth = 10
    pipeline.run(config, directory, "negatives")
    encoded = [f"{kind}-{name}" for kind in ("tokens", "embeddings") for name in ("tiny", "ours")]
    first = written(directory, ["embeddings-warmup", *encoded])
    assert first["embeddings-warmup"] == written(finished.directory, ["embeddings-warmup"])["embeddings-warmup"]
    for name in ("tiny", "ours"):
        assert (directory / f"tokens-{name}" / "tokenizer" / "tokenizer.json").is_file()
        assert not (directory / f"embeddings-{name}" / "en" / "queries.dev-00000.npy").exists()
    mined = mine.read_mined(directory / "mine", "en", ["bm25", "tiny", "ours", "warmup"])
    there = mined.rows_QxK != NO_HIT
    assert np.isfinite(mined.by_retriever["tiny"][0][there]).all()
    # the export of the trained encoder, read back as a checkpoint, scores as the trained encoder does
    trained = retrievers.stored(
        finished.directory / "embeddings" / "en", "train", [finished.directory / "embeddings" / "en"]
    )
    rows = np.array([q.row for q in finished.training if q.lang == 0 and not q.held_out])
    scores_QxC = trained.queries_QxD[rows] @ np.concatenate(trained.blocks).astype(np.float32).T
    expected = np.take_along_axis(scores_QxC, np.where(there, mined.rows_QxK, 0), 1)[there]
    np.testing.assert_allclose(mined.by_retriever["ours"][0][there], expected, atol=2e-3)

    config.mine.retrievers, config.mine.fusion = (
        "tiny=" + config.mine.retrievers.split("=", 1)[1].split(",")[0] + ",warmup",
        "concat",
    )
    pipeline.run(config, directory, "negatives")
    assert written(directory, first) == first
    weights = json.loads((directory / "mine" / "manifest.json").read_text())["counts"]["weights"]
    assert sum(weights.values()) == pytest.approx(1) and set(weights) == {"tiny", "warmup"}
