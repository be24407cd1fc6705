import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_contrastive import make_case, oracle

from jdmdr.objectives import blockwise
from jdmdr.objectives.contrastive import MODES, contrastive_loss

B, P = 16, 5  # 80 columns
TEMPERATURE = 0.7


def shuffled(p_NxD, seed=1):
    """(passages in another order, the new row of each)."""
    order_N = np.random.default_rng(seed).permutation(len(p_NxD)).astype(np.int32)
    out = np.empty_like(p_NxD)
    out[order_N] = p_NxD
    return out, order_N


def value_and_gradients(q_BxD, p_NxD, batch, mode, order_N=None, mesh=None):
    """((loss, metrics), gradients of queries, passages in their order, and temperature)."""

    def loss(q_BxD, p_NxD, temperature):
        return contrastive_loss(q_BxD, p_NxD, batch, temperature=temperature, mode=mode, order_N=order_N, mesh=mesh)

    found, (dq, dp, dt) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q_BxD, p_NxD, TEMPERATURE)
    return found, (dq, dp if order_N is None else dp[order_N], dt)


def assert_blocks_equal_one(monkeypatch, block, mode, mesh=None):
    q_BxD, p_NxD, batch = make_case(B, P)
    whole = value_and_gradients(q_BxD, p_NxD, batch, mode)
    monkeypatch.setattr(blockwise, "BLOCK", block)
    rows_NxD, order_N = shuffled(p_NxD)
    parts = value_and_gradients(q_BxD, rows_NxD, batch, mode, order_N, mesh)
    np.testing.assert_allclose(parts[0][0], oracle(q_BxD, p_NxD, batch, mode, TEMPERATURE), rtol=1e-6)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("columns", [7, 1])  # of a block; 7 leaves a block that is not full
def test_blocks_give_the_loss_the_gradient_and_the_metrics_of_the_whole(monkeypatch, mode, columns):
    assert_blocks_equal_one(monkeypatch, columns * B, mode)


def test_passages_that_go_round_eight_devices_give_them_too(on_devices):
    program = """
        import pytest
        from jdmdr import parallel
        from jdmdr.objectives.contrastive import MODES
        from test_blockwise import B, assert_blocks_equal_one
        for mode in MODES:
            with pytest.MonkeyPatch.context() as patch:
                assert_blocks_equal_one(patch, B // 8 * 3, mode, parallel.data_mesh())
        print("equal")
    """
    assert on_devices(8, program).endswith("equal\n")


def test_queries_without_negatives_lose_nothing_in_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 8)
    q_BxD, p_NxD, batch = make_case(B, 1, repeats=False)
    batch |= {"passage_ids_N": np.full(B, 9), "first_N": np.arange(B) == 0, "positive_ids_BxM": np.full((B, 1), 9)}
    for mode in MODES:
        (loss, metrics), gradients = value_and_gradients(q_BxD, p_NxD, batch, mode)
        assert loss == 0 and metrics["accuracy_at_1"] == 1 and metrics["masked_fraction"] == 1
        assert not any(np.any(gradient) for gradient in gradients)


def bytes_needed(B, P=8, D=64):
    """Of the compiled loss with its gradient at the real block size: arguments, results and scratch; nothing runs."""
    N, f32, i32 = B * P, jnp.float32, jnp.int32
    shapes = {
        "target_B": ((B,), i32), "passage_ids_N": ((N,), i32), "first_N": ((N,), bool), "positive_ids_BxM": ((B, 4), i32),
        "weight_N": ((N,), f32), "query_weight_B": ((B,), f32),
    }  # fmt: skip
    batch = {name: jax.ShapeDtypeStruct(*of) for name, of in shapes.items()}
    loss = lambda q, p, batch: contrastive_loss(q, p, batch, temperature=0.05, mode="negative")
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    q_BxD, p_NxD = (jax.ShapeDtypeStruct((rows, D), f32) for rows in (B, N))
    found = step.lower(q_BxD, p_NxD, batch).compile().memory_analysis()
    return found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes


def test_memory_grows_with_the_queries_and_not_with_their_square():
    one, four, sixteen = (bytes_needed(B * 1024) for B in (1, 4, 16))
    assert four < 4 * one and sixteen < 4 * four
    assert sixteen < 0.05 * (16_384 * 16_384 * 8 * 4), "the scores alone would take"


def test_small_batches_are_one_block_and_large_ones_are_not():
    assert not blockwise.exceeds_one_block(512, 4096, None)
    assert blockwise.exceeds_one_block(1024, 8192, None)
