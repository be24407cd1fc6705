"""Query language modelling and relevance ranking: losses against NumPy, masking and negatives against their rules."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from configs import default
from jdmdr import encoders, optim, parallel
from jdmdr.encoders import huggingface
from jdmdr.encoders.cross_encoder import classify
from jdmdr.objectives import qlm_rr
from jdmdr.pair_batches import choose_negatives, mask_tokens
from jdmdr.step import init_state, make_step
from jdmdr.trainable import split
from jdmdr.types import Tokens, UserError

GOLDENS = pathlib.Path(__file__).parent / "goldens"
B, T, P, K = 4, 12, 5, 2


def bert(tied=True):
    """A small BERT of one layer with random heads; parameters large enough to tell."""
    config, params = encoders.load_pretrained(GOLDENS / "bert", pooling="cls", normalize=False)
    config = dataclasses.replace(config, layers=1, activation="gelu", hidden_dropout=0.0, attention_dropout=0.0)
    heads = jax.tree.map(lambda x: x * 5 + 0.01, qlm_rr.init_heads(jax.random.key(0), config, tied))
    return config, {name: params[name] for name in ("embeddings", "layer_0")}, heads


def some_batch(seed=0, parts=("qlm", "rr")):
    random = np.random.default_rng(seed)
    block = lambda rows: Tokens(random.integers(5, 190, (rows, T)).astype(np.int32), np.ones((rows, T), np.int32),
                                np.repeat([[0] * 5 + [1] * (T - 5)], rows, 0).astype(np.int32), np.full((rows, 1), 5, np.int32))  # fmt: skip
    masks = {
        "mask_pos_BxP": random.integers(0, T, (B, P)).astype(np.int32),
        "mask_tgt_BxP": random.integers(5, 190, (B, P)).astype(np.int32),
        "mask_w_BxP": (random.random((B, P)) < 0.6).astype(np.float32),
    }
    batch = {"qlm": block(B), "rr": block(B * (1 + K)), **masks}
    return {key: value for key, value in batch.items() if key in parts or (key[:4] == "mask" and "qlm" in parts)}


def objective_keys(**changes):
    keys = default.get_config().pretrain.objective.copy_and_resolve_references()
    keys.update(changes)
    return keys


@pytest.mark.parametrize("tied", [True, False])
def test_the_qlm_loss_is_the_mean_over_masked_tokens(tied):
    config, params, heads = bert(tied=tied)
    head = jax.tree.map(np.asarray, heads["lm_head"])
    batch = some_batch()
    hidden = np.random.default_rng(1).normal(size=(B, T, config.width))
    word = np.asarray(params["embeddings"]["word"])
    total = right = 0.0
    for b in range(B):
        for p in range(P):
            x = hidden[b, batch["mask_pos_BxP"][b, p]] @ head["dense"]["kernel"] + head["dense"]["bias"]
            x = 0.5 * x * (1 + erf(x / np.sqrt(2)))
            x = (x - x.mean()) / np.sqrt(x.var() + config.layer_norm_eps) * head["norm"]["scale"] + head["norm"]["bias"]
            logits = (word if tied else head["decoder"]) @ x + head["bias"]
            target, weight = batch["mask_tgt_BxP"][b, p], batch["mask_w_BxP"][b, p]
            total += weight * (np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target])
            right += weight * (logits.argmax() == target)
    loss, metrics = qlm_rr.qlm_loss(
        heads["lm_head"], params["embeddings"]["word"], jnp.asarray(hidden, jnp.float32), batch, config
    )
    count = batch["mask_w_BxP"].sum()
    np.testing.assert_allclose(loss, total / count, rtol=1e-5)
    np.testing.assert_allclose(metrics["qlm_accuracy"], right / count, rtol=1e-6)


def test_the_rr_losses():
    s = np.random.default_rng(0).normal(size=(6, 4)) * 3
    softplus = lambda x: np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)
    two = lambda x, y: -np.log(np.exp(x * y) / (1 + np.exp(x)))  # softmax over (0, x), the label's place
    expected = {
        "pointwise": np.mean([two(x, float(k == 0)) for row in s for k, x in enumerate(row)]),
        "pairwise_logistic": softplus(s[:, 1:] - s[:, :1]).mean(),
        "pairwise_hinge": np.maximum(0, 0.7 - s[:, :1] + s[:, 1:]).mean(),
        "listwise": np.mean(np.log(np.exp(s).sum(axis=1)) - s[:, 0]),
    }
    assert expected.keys() == {*qlm_rr.RR_LOSSES}
    for name, value in expected.items():
        loss, metrics = qlm_rr.rr_loss(jnp.asarray(s), name, 0.7)
        np.testing.assert_allclose(loss, value, rtol=1e-5)
        np.testing.assert_allclose(metrics["rr_accuracy"], (s[:, :1] > s[:, 1:]).all(axis=1).mean())


class WordVectors:
    """A stand-in for an encoder that costs nothing to compile: token vectors are the words'."""

    def tower(self, params, side):
        return params

    def apply(self, params, tokens, output="pooled", rng=None, widths=None):
        hidden_BxTxD = params["embeddings"]["word"][tokens.ids_BxT]
        return hidden_BxTxD if output == "tokens" else hidden_BxTxD.mean(axis=1)


def word_vectors(params, tokens, side, output="pooled"):
    return WordVectors().apply(params, tokens, output)


def test_logits_are_of_masked_positions_alone_and_a_tied_head_trains_the_word_vectors():
    batch = some_batch(parts=("qlm",))
    absent = np.setdiff1d(np.arange(190), batch["qlm"].ids_BxT)[:5]  # these get a gradient through the decoder alone
    for tied in (True, False):
        config, params, heads = bert(tied=tied)
        objective = qlm_rr.make_objective(objective_keys(), config, heads, 1 + K)
        loss = lambda p, o=objective, h=heads: o.loss(p, h, batch, word_vectors, None, 0)[0]
        gradient = jax.jit(jax.grad(loss))
        lowered = gradient.lower(params).as_text()
        assert f"{B}x{P}x{config.vocab_size}x" in lowered and f"{B}x{T}x{config.vocab_size}x" not in lowered
        moved = np.abs(gradient(params)["embeddings"]["word"][absent]).max(axis=1)
        assert (moved > 0).all() if tied else (moved == 0).all()


def run_steps(batches, keys, learning_rate=1e-3, encoder=None):
    config, params, heads = bert()
    objective = qlm_rr.make_objective(keys, config, heads, 1 + K)
    section = default.training()
    section.steps, section.learning_rate, section.decay, section.warmup_share = 20, learning_rate, "constant", 0.0
    trained, frozen = split(section, params, objective.parameters, 0)
    optimiser = optim.make_optimiser(section, trained)
    mesh = parallel.data_mesh()
    step = make_step(encoder or encoders.build(config), objective, optimiser, 0, section.lora, mesh)
    state = jax.device_put(init_state(trained, optimiser, frozen), parallel.replicated(mesh))
    seen = []
    for batch in batches:
        state, metrics = step(state, batch)
        seen.append((jax.device_get(state["params"]), jax.device_get(metrics)))
    return seen


def test_a_head_without_a_gradient_stays_where_it_is():
    """Adam's memory would go on moving it; the encoder trains in every step."""
    turns = [("qlm",), ("rr",), ("qlm",)]
    batches = [some_batch(i, parts) for i, parts in enumerate(turns)]
    seen = [params for params, _ in run_steps(batches, objective_keys(), encoder=WordVectors())]
    own = [params["objective"] for params in seen]
    jax.tree.map(np.testing.assert_array_equal, own[1]["lm_head"], own[0]["lm_head"])
    jax.tree.map(np.testing.assert_array_equal, own[2]["rank_head"], own[1]["rank_head"])
    for head, before, after in (("rank_head", 0, 1), ("lm_head", 1, 2)):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), own[before][head], own[after][head])
        assert min(jax.tree.leaves(moved)) > 0
    assert np.abs(seen[1]["embeddings"]["word"] - seen[0]["embeddings"]["word"]).max() > 0


def test_the_sum_is_of_both_parts_by_their_weights():
    config, params, heads = bert()
    both = some_batch()

    def loss(batch, **weights):
        objective = qlm_rr.make_objective(objective_keys(**weights), config, heads, 1 + K)
        return jax.jit(lambda b: objective.loss(params, heads, b, word_vectors, None, 0))(batch)

    value, joint = loss(both, qlm_weight=0.5, rr_weight=2.0)
    np.testing.assert_allclose(value, 0.5 * joint["qlm_loss"] + 2 * joint["rr_loss"], rtol=1e-6)
    for part in ("qlm", "rr"):
        alone, metrics = loss(
            {key: x for key, x in both.items() if key == part or (part == "qlm" and key[:4] == "mask")}
        )
        np.testing.assert_allclose(alone, joint[f"{part}_loss"], rtol=1e-6)
        assert {"qlm_loss", "rr_loss"} & metrics.keys() == {f"{part}_loss"}
    first = word_vectors(params, both["rr"], "passage")
    expected, _ = qlm_rr.rr_loss(classify(heads["rank_head"], first)[:, 0].reshape(B, 1 + K), "pointwise", 1.0)
    np.testing.assert_allclose(joint["rr_loss"], expected, rtol=1e-5)


def test_masks_fall_where_they_may_at_their_rate():
    random = np.random.default_rng(0)
    rows, width, rate, mask_id = 3000, 30, 0.3, 4
    ids = random.integers(10, 100, (rows, width)).astype(np.int32)
    before = ids.copy()
    allowed = np.arange(3, 23)
    found = mask_tokens(random, ids, [allowed] * rows, rate, 20, mask_id, np.arange(10, 100))
    used = found["mask_w_BxP"] > 0
    assert used.any(axis=1).all() and set(found["mask_pos_BxP"][used]) == set(allowed)
    changed = np.zeros_like(ids, bool)
    np.put_along_axis(changed, np.where(used, found["mask_pos_BxP"], 0), True, axis=1)
    changed[:, 0] = False
    assert (ids == before)[~changed].all()
    n = rows * len(allowed)
    assert abs(used.sum() - rate * n) < 3 * np.sqrt(n * rate * (1 - rate))
    at = np.take_along_axis(ids, found["mask_pos_BxP"], 1)[used]
    target = found["mask_tgt_BxP"][used]
    assert (target == np.take_along_axis(before, found["mask_pos_BxP"], 1)[used]).all()
    count = used.sum()
    for share, expected in ((at == mask_id, 0.8), ((at != mask_id) & (at != target), 0.1 * 89 / 90), (at == target, 0.1 + 0.1 / 90)):  # fmt: skip
        assert abs(share.sum() - expected * count) < 4 * np.sqrt(count * expected * (1 - expected))


def test_what_finds_no_slot_is_not_masked_and_one_token_always_is():
    random = np.random.default_rng(0)
    ids = np.full((2, 10), 50, np.int32)
    found = mask_tokens(random, ids, [np.arange(10), np.array([4])], 0.999, 3, 4, np.array([50]))
    assert found["mask_w_BxP"].sum(axis=1).tolist() == [3, 1] and (ids[0] != 50).sum() <= 3
    found = mask_tokens(random, ids, [np.arange(10), np.arange(2)], 1e-9, 3, 4, np.array([50]))
    assert found["mask_w_BxP"].sum(axis=1).tolist() == [1, 1]


@pytest.mark.parametrize("h", [0, 1, 3, 5])
def test_a_negative_is_hard_with_probability_1_minus_three_quarters_to_the_h(h):
    random = np.random.default_rng(h)
    hard, easy, draws = (
        np.arange(100, 100 + h),
        np.concatenate([np.arange(90), [7, 200], np.arange(100, 100 + h)]),
        4000,
    )
    found = np.array(choose_negatives(random, draws, 200, hard, easy))
    p = 1 - 0.75**h
    assert 200 not in found and np.isin(found, [*range(90), *hard]).all()
    assert abs(np.isin(found, hard).sum() - p * draws) <= 3 * np.sqrt(draws * p * (1 - p))


def test_a_section_without_others_is_told():
    with pytest.raises(UserError, match="no other of its language"):
        choose_negatives(np.random.default_rng(0), 1, 3, np.array([], int), np.array([3]))
    assert choose_negatives(np.random.default_rng(0), 2, 3, np.array([9]), np.array([3, 9])) == [9, 9]


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_masked_lm_and_a_classifier_come_back_from_disk(family, tied, tmp_path):
    config, params = encoders.load_pretrained(GOLDENS / family)
    heads = jax.tree.map(lambda x: x + 0.1, qlm_rr.init_heads(jax.random.key(0), config, tied))
    huggingface.write_masked_lm(config, params, heads["lm_head"], tmp_path)
    found = huggingface.read_lm_head(tmp_path, config, tied)
    jax.tree.map(np.testing.assert_array_equal, found, heads["lm_head"])
    untied = huggingface.read_lm_head(tmp_path, config, tied=False)
    expected = params["embeddings"]["word"] if tied else heads["lm_head"]["decoder"]
    np.testing.assert_array_equal(untied["decoder"], expected)
    huggingface.write_classifier(config, {**params, "head": heads["rank_head"]}, tmp_path)
    again = huggingface.read_classifier(tmp_path, config)
    jax.tree.map(np.testing.assert_array_equal, again, {**params, "head": heads["rank_head"]})
    assert huggingface.read_lm_head(tmp_path, config, tied=True) is None


@pytest.mark.slow
def test_eight_pairs_are_learnt_by_heart():
    keys = objective_keys()
    batch = some_batch()
    batch["mask_w_BxP"] = np.ones_like(batch["mask_w_BxP"])
    batch["mask_pos_BxP"] = np.tile(np.arange(P, dtype=np.int32), (B, 1))
    seen = run_steps([batch] * 150, keys, learning_rate=3e-3)
    assert seen[-1][1]["qlm_loss"] < 0.1 and seen[-1][1]["rr_accuracy"] == 1


@pytest.mark.slow
def test_eight_devices_give_the_loss_and_step_of_one(on_devices):
    program = """
        import test_qlm_rr as t, jax, numpy as np
        from jdmdr import parallel
        mesh = parallel.data_mesh()
        t.B = 8
        batch = parallel.put_batch(t.some_batch(), mesh)
        (params, metrics), = t.run_steps([batch], t.objective_keys())
        print(jax.device_count(), *(float(metrics[k]) for k in ("qlm_loss", "rr_loss", "gradient_norm")),
              float(np.abs(params["layer_0"]["ffn_in"]["kernel"]).sum()))
    """
    found = [list(map(float, on_devices(n, program).split())) for n in (1, 8)]
    assert [row[0] for row in found] == [1, 8]
    np.testing.assert_allclose(found[1][1:], found[0][1:], rtol=1e-5)


def test_the_loss_of_texts_read_apart_skips_documents_of_one_section():
    random = np.random.default_rng(0)
    q, x = random.normal(size=(2, 5, 3))
    ids = np.array([3, 1, 3, 2, 4])
    expected = []
    for i in range(5):
        negatives = [np.exp(q[i] @ x[j] / 0.5) for j in range(5) if j == i or ids[j] != ids[i]]
        expected.append(np.log(sum(negatives)) - q[i] @ x[i] / 0.5)
    loss, _ = qlm_rr.bi_loss(jnp.asarray(q, jnp.float32), jnp.asarray(x, jnp.float32), jnp.asarray(ids), 0.5)
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)
