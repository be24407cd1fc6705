import jax
import numpy as np
import pytest

from jdmdr import encoders, parallel, validate
from jdmdr.types import Tokens

LENGTHS = (32, 96)


@pytest.fixture(scope="module")
def model(finished):
    config, params = finished._model("warmup")
    return encoders.build(config), params


@pytest.fixture(scope="module")
def scoring(finished, model):
    return make(finished, model[0])


def make(finished, encoder, training=None, pool=1000, seed=0):
    training = finished.training if training is None else training
    mesh = parallel.data_mesh()
    return validate.make_validation(
        finished.library, training, finished.stores, encoder, mesh, LENGTHS, pool, seed, finished.passages
    )


def embed(model, store, rows, width):
    encoder, params = model
    return np.asarray(encoder.apply(params, Tokens(*store.gather(np.asarray(rows), width))))


def oracle(finished, model):
    """nDCG@10 of a brute-force search over the whole language; every relevance is 1."""
    bases = finished.library.bases
    per_lang = {}
    for query in (q for q in finished.training if q.held_out):
        first, stop = bases[query.lang : query.lang + 2]
        scores_C = (
            embed(model, finished.stores.passages, np.arange(first, stop), LENGTHS[1])
            @ embed(model, finished.stores.queries, [query.row], LENGTHS[0])[0]
        )
        ranked = np.argsort(-scores_C, kind="stable")[:10] + first
        gains = np.isin(ranked, query.positives) / np.log2(np.arange(2, 12))
        ideal = (1 / np.log2(np.arange(2, 12)))[: len(query.positives)].sum()
        per_lang.setdefault(query.lang, []).append(gains.sum() / ideal)
    assert len(per_lang) == 2
    return np.mean([np.mean(values) for values in per_lang.values()])


def test_score_is_ndcg_of_the_held_out_queries_averaged_over_languages(finished, model, scoring):
    assert scoring(model[1]) == pytest.approx(oracle(finished, model), abs=1e-6)


def test_trained_queries_and_dev_queries_have_no_say(finished, model, scoring):
    others = [q if q.held_out else q._replace(positives=q.positives[:0]) for q in finished.training]
    assert make(finished, model[0], others)(model[1]) == scoring(model[1])


def test_nothing_held_out_gives_no_score(finished, model):
    trained = [q for q in finished.training if not q.held_out]
    assert make(finished, model[0], trained)(model[1]) is None


def test_pool_holds_positives_and_judged_and_is_the_same_every_time(finished):
    library = finished.library
    held_out = [q for q in finished.training if q.held_out and q.lang == 1]
    held_out[0] = held_out[0]._replace(judged=np.array([library.bases[1] + 23]))
    pools = [validate._pool(library, 1, held_out, 5, seed) for seed in (0, 0, 1)]
    needed = {row for q in held_out for row in [*q.positives, *q.judged]}
    for pool in pools:
        assert needed <= set(pool) and len(pool) <= 5 + len(needed) < 24
        assert (np.diff(pool) > 0).all() and pool.min() >= library.bases[1] and pool.max() < library.bases[2]
    assert np.array_equal(pools[0], pools[1]) and not np.array_equal(pools[0], pools[2])
    assert len(validate._pool(library, 1, held_out, 24, 0)) == 24


def test_smaller_pool_is_not_harder(finished, model, scoring):
    """Fewer passages to mistake for the positive: no query can rank lower."""
    assert make(finished, model[0], pool=4)(model[1]) >= scoring(model[1]) - 1e-9


def test_fewer_passages_than_ten_are_searched_all(finished, model):
    score = make(finished, model[0], pool=1)(model[1])
    assert 0 < score <= 1 and np.isfinite(score)


def test_perfect_and_useless_encoders_score_one_and_little(finished, model):
    class Oracle:
        """Puts every query and its positive on one axis of their own."""

        config = encoders.EncoderConfig(kind="static", vocab_size=64, width=64)

        def __init__(self, right):
            self.right = right

        def tower(self, params, side):
            return params

        def apply(self, params, tokens):
            shape = tokens.ids_BxT.shape
            return jax.nn.one_hot(tokens.ids_BxT[:, 0] * self.right, 64) * (shape[1] > 0)

    class Marked:
        """A store whose only token is the row of the positive."""

        def __init__(self, marks):
            self.marks = np.asarray(marks)

        def lengths(self, rows):
            return np.ones(len(rows), np.int32)

        def gather(self, rows, width):
            ids = np.zeros((len(rows), width), np.int32)
            ids[:, 0] = self.marks[rows]
            return Tokens(ids, np.ones_like(ids))

    queries = np.zeros(len(finished.stores.queries), int)
    for query in finished.training:
        queries[query.row] = query.positives[0]
    stores = finished.stores._replace(queries=Marked(queries), passages=Marked(range(48)))
    for right, low, high in ((1, 1.0, 1.0), (0, 0.0, 0.6)):
        scoring = validate.make_validation(
            finished.library,
            finished.training,
            stores,
            Oracle(right),
            parallel.data_mesh(),
            LENGTHS,
            1000,
            0,
            stores.passages,
        )
        assert low <= scoring({}) <= high
