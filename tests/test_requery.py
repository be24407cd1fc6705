import functools

import numpy as np
import pytest

from jdmdr import mine, requery, retrievers, workdir
from jdmdr.index import dense_searcher
from jdmdr.library import TRAIN
from jdmdr.types import NO_HIT, UserError


def index(finished):
    return functools.partial(dense_searcher, "exact", mesh=finished.mesh)


def test_the_text_of_a_training_query_finds_what_mining_found_for_it(finished, tmp_path):
    """The new query's vector is made on the spot, by the encoder, tokenizer and prompt of the retriever."""
    c, library = finished.config.mine, finished.library
    ensemble = retrievers.parse(c.retrievers)
    assert {spec.kind for spec in ensemble} == {"warmup", "bm25"}
    embedders = {spec.name: finished._query_embedder(spec) for spec in ensemble}
    weights = workdir.counts_of(finished.directory, "mine")["weights"]
    for lang in library.langs:
        members = {spec.name: finished._asked_member(spec, lang, embedders[spec.name]) for spec in ensemble}
        qids, texts = library.queries(lang, TRAIN)
        with requery.opened(members, weights, c.fusion, index(finished), tmp_path) as search:
            hits = search(texts, 50)  # all of the collection, as mining lists it
        docids = library.collections[library.langs.index(lang)].docids
        listed = {}
        for line in (finished.directory / "mine" / f"{lang}.ensemble.trec").read_text().splitlines():
            qid, _, docid, *_ = line.split()
            listed.setdefault(qid, []).append(docid)
        found = {qid: docids(rows_K[rows_K != NO_HIT]) for qid, rows_K in zip(qids, hits.rows_QxK, strict=True)}
        assert len(listed) > 5 and listed == {qid: list(found[qid]) for qid in listed}


def test_concatenated_encoders_rank_by_the_weighted_sum_of_cosines(finished, tmp_path):
    rng = np.random.default_rng(0)
    passages = {"a": rng.normal(size=(40, 6)), "b": rng.normal(size=(40, 3)) * 7}
    queries = {"a": rng.normal(size=(5, 6)), "b": rng.normal(size=(5, 3))}
    members = {
        name: requery.Encoded(
            [v[:15].astype(np.float32), v[15:].astype(np.float32)], lambda texts, name=name: queries[name].astype(np.float32)
        )
        for name, v in passages.items()
    }  # fmt: skip
    weights = {"a": 0.3, "b": 0.7}
    with requery.opened(members, weights, mine.CONCAT, index(finished), tmp_path) as search:
        hits = search(["?"] * 5, 7)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    expected_QxC = sum(w * unit(queries[name]) @ unit(passages[name]).T for name, w in weights.items())
    np.testing.assert_array_equal(hits.rows_QxK, np.argsort(-expected_QxC, axis=1)[:, :7])
    assert not list(tmp_path.iterdir())


def test_an_ensemble_of_lists_made_elsewhere_cannot_be_asked():
    ensemble = retrievers.parse("run:a.trec,bm25,vectors:dir")
    assert [spec.name for spec in requery.askable(ensemble)] == ["bm25"]
    with pytest.raises(UserError, match="add bm25 or an encoder"):
        requery.askable(ensemble[:1])
