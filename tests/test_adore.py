from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdmdr import parallel
from jdmdr.objectives import OBJECTIVES, Collections
from jdmdr.objectives.adore import METRICS, MISSING, SCOPES, lambda_loss
from jdmdr.types import NO_HIT, UserError


def oracle(scores, rows, K, cut, metric, missing):
    """Query by query and pair by pair, float64."""
    losses = []
    for s, r in zip(np.asarray(scores, np.float64), np.asarray(rows), strict=True):
        positives = {int(x) for x in r[K:] if x != NO_HIT}
        hits = [i for i in range(K) if int(r[i]) in positives]
        ranked = [(i + 1, s[i], int(r[i]) in positives) for i in range(K) if r[i] != NO_HIT]
        if not hits or missing == "append_all":
            place = K
            for j in range(K, len(r)):
                if r[j] != NO_HIT and r[j] not in r[:K]:
                    place += 1
                    ranked.append((place, s[j], True))

        def gain(rank):
            if rank > cut:
                return 0.0
            return 1 / rank if metric == "mrr" else 1 / np.log2(1 + rank)

        pairs = [
            abs(gain(ra) - gain(rb)) * np.logaddexp(0, sb - sa)
            for ra, sa, ya in ranked if ya for rb, sb, yb in ranked if not yb
        ]  # fmt: skip
        losses.append(sum(pairs) / max(len(pairs), 1))
    return np.mean(losses)


def test_golden_values():
    loss, _ = lambda_loss(jnp.array([[3, 2.5, 2, 1, 2.5]]), jnp.array([[7, 8, 9, 10, 8]]), 4, metric_cut=4)
    assert float(loss) == pytest.approx(0.205468, abs=1e-6)
    loss, metrics = lambda_loss(jnp.array([[3, 2.5, 2, 1, 0.5]]), jnp.array([[7, 8, 9, 10, 11]]), 4, metric_cut=4)
    assert float(loss) == pytest.approx(1.113253, abs=1e-6)
    assert float(metrics["retrieved_mrr"]) == 0 and float(metrics["retrieved_recall"]) == 0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("missing", MISSING)
def test_equals_the_formula_whatever_is_retrieved(metric, missing):
    rng = np.random.default_rng(0)
    K, M = 6, 3
    rows = np.stack([rng.permutation(40)[:K] for _ in range(5)])
    positives = np.full((5, M), NO_HIT)
    positives[0, :2] = rows[0, 1], 99  # one of two retrieved
    positives[1, :3] = rows[1, [0, 3, 5]]  # all three retrieved
    positives[2, :2] = 90, 91  # none retrieved
    positives[3, 0] = rows[3, 0]  # first already
    rows[3, 4:] = NO_HIT  # a small collection
    positives[4, 0] = 95
    rows[4] = NO_HIT  # nothing retrieved at all
    all_rows = np.concatenate([rows, positives], axis=1)
    scores = -np.sort(-rng.normal(size=all_rows.shape), axis=1).astype(np.float32)
    for cut in (1, 3, K, 100):
        loss, _ = lambda_loss(scores, jnp.asarray(all_rows), K, metric_cut=cut, metric=metric, missing=missing)
        assert float(loss) == pytest.approx(oracle(scores, all_rows, K, cut, metric, missing), rel=1e-5, abs=1e-7)


def test_ties_at_equal_scores_count_log_two():
    loss, _ = lambda_loss(jnp.zeros((1, 3)), jnp.array([[4, 5, 5]]), 2, metric_cut=2)
    assert float(loss) == pytest.approx(0.5 * np.log(2), rel=1e-6)


def test_is_finite_at_score_gaps_of_hundreds():
    rows = jnp.array([[1, 2, 3, 9]])

    def value(scores):
        return lambda_loss(scores, rows, 3, metric_cut=3)[0]

    loss, gradient = jax.value_and_grad(value)(jnp.array([[500.0, 0.0, -500.0, -500.0]]))
    assert np.isfinite(loss) and np.isfinite(gradient).all()


BASES = np.array([0, 100, 300])


def make_config(**changes):
    keys = dict(top_k=10, metric_cut=10, metric="mrr", missing="append_if_none", scope="own", index_dtype="float32",
                temperature=1.0, learn_temperature=False)  # fmt: skip
    return SimpleNamespace(**{**keys, **changes})


def make_step_case(scope="own", dtype="float32", rows=300, width=8, queries=4):
    rng = np.random.default_rng(0)
    corpus = rng.normal(size=(rows, width)).astype(np.float32)
    config = make_config(scope=scope, index_dtype=dtype)
    objective = OBJECTIVES["adore"](config, parallel.data_mesh(), Collections([corpus[:100], corpus[100:]], BASES))
    batch = {
        "queries": None,
        "positive_ids_BxM": np.array([[3, NO_HIT], [250, 117], [299, NO_HIT], [50, NO_HIT]], np.int32),
        "lang_B": np.array([0, 1, 1, 0], np.int32),
        **objective.arrays,
    }
    q_BxD = rng.normal(size=(queries, width)).astype(np.float32)

    @jax.jit
    def loss(q_BxD, batch):
        return objective.loss(None, {}, batch, lambda *_: q_BxD, None, None)[0]

    return loss, corpus, q_BxD, batch


def brute_force(q_BxD, corpus, batch, scope="own"):
    scores, rows = [], []
    for i, q in enumerate(q_BxD.astype(np.float64)):
        lang = batch["lang_B"][i]
        own = np.arange(BASES[lang], BASES[lang + 1]) if scope == "own" else np.arange(BASES[-1])
        found = own[np.argsort(-(corpus[own].astype(np.float64) @ q), kind="stable")[:10]]
        all_rows = np.concatenate([found, batch["positive_ids_BxM"][i]])
        rows.append(all_rows)
        scores.append(np.where(all_rows == NO_HIT, 0, corpus[all_rows].astype(np.float64) @ q))
    return oracle(np.array(scores), np.array(rows), 10, 10, "mrr", "append_if_none")


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_step_searches_with_the_query_vectors_of_now(scope, dtype):
    loss, corpus, q_BxD, batch = make_step_case(scope, dtype)
    for moved in (q_BxD, -q_BxD, q_BxD[::-1].copy()):
        assert float(loss(moved, batch)) == pytest.approx(brute_force(moved, corpus, batch, scope), rel=1e-4)


def test_the_gradient_reaches_the_queries_and_matches_finite_differences():
    loss, corpus, q_BxD, batch = make_step_case()
    gradient = jax.jit(jax.grad(loss))(q_BxD, batch)
    direction = np.random.default_rng(2).normal(size=q_BxD.shape).astype(np.float32)
    h = 1e-4  # small enough that the retrieved lists stay as they are
    ahead, behind = (brute_force(q_BxD + s * h * direction, corpus, batch) for s in (1, -1))
    assert float((gradient * direction).sum()) == pytest.approx((ahead - behind) / (2 * h), rel=1e-2)


def test_no_host_round_trip_and_one_compilation():
    loss, _, q_BxD, batch = make_step_case()
    vectors = [jax.device_put(q_BxD * scale) for scale in (1, 2, 3)]
    batch = jax.device_put(batch)
    loss(vectors[0], batch)
    with jax.transfer_guard("disallow"):
        for moved in vectors:
            loss(moved, batch)
    assert loss._cache_size() == 1


def test_training_on_what_is_retrieved_raises_the_rank_of_held_out_queries_too():
    """A linear query encoder, off the right map by noise, finds back towards it from 200 labelled queries."""
    rng = np.random.default_rng(0)
    corpus = rng.normal(size=(2000, 16)).astype(np.float32)
    rotation = np.linalg.qr(rng.normal(size=(16, 16)))[0].astype(np.float32)
    positives = rng.permutation(2000)[:300]
    seen = (corpus[positives] + 0.6 * rng.normal(size=(300, 16))).astype(np.float32) @ rotation
    config = make_config(top_k=50, metric_cut=50, scope="all")
    objective = OBJECTIVES["adore"](config, parallel.data_mesh(), Collections([corpus], np.array([0, 2000])))

    @jax.jit
    def step(weights, rows):
        batch = {"positive_ids_BxM": jnp.asarray(positives, jnp.int32)[rows][:, None], "queries": rows,
                 "lang_B": jnp.zeros(len(rows), jnp.int32), **objective.arrays}  # fmt: skip
        loss = lambda w: objective.loss(w, {}, batch, lambda w, rows, side: jnp.asarray(seen)[rows] @ w, None, None)
        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(weights)
        return weights - 0.5 * gradient, metrics["retrieved_mrr"]

    def mrr(weights, rows):
        scores = seen[rows] @ np.asarray(weights) @ corpus.T
        ranks = (scores >= np.take_along_axis(scores, positives[rows][:, None], 1)).sum(1)
        return np.where(ranks <= 10, 1 / ranks, 0).mean()

    held_out = np.arange(200, 300)
    weights = jnp.asarray(rotation.T + 0.3 * rng.normal(size=(16, 16)).astype(np.float32))
    before, seen_first = mrr(weights, held_out), None
    for number in range(200):
        weights, retrieved = step(weights, np.arange(number * 40, number * 40 + 40) % 200)
        seen_first = retrieved if seen_first is None else seen_first
    assert mrr(weights, held_out) > before + 0.2
    assert retrieved > seen_first + 0.2  # on what it trains on, as it is logged


def test_a_metric_cut_beyond_the_smallest_collection_is_refused():
    collections = Collections([np.zeros((300, 4), np.float32)], BASES)
    OBJECTIVES["adore"](make_config(metric_cut=300, scope="all"), parallel.data_mesh(), collections)
    with pytest.raises(UserError, match="metric_cut is 101, but the smallest collection that is searched has 100"):
        OBJECTIVES["adore"](make_config(metric_cut=101), parallel.data_mesh(), collections)
