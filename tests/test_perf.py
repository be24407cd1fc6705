import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdmdr import encoders, perf
from jdmdr.types import Tokens

CONFIG = encoders.EncoderConfig(
    kind="transformer", vocab_size=50, width=128, layers=2, heads=2, ffn=512, max_positions=64, activation="relu"
)


def test_flops_of_a_text_are_those_of_its_matmuls_and_attention():
    by_hand = 0
    for length in (5, 9):
        by_hand += 2 * 2 * length * (4 * 128 * 128 + 2 * 128 * 512)  # projections and the feed-forward layer
        by_hand += 2 * 2 * (2 * length * length * 128)  # scores, and the weighted sum of values
    assert perf.forward_flops(CONFIG, np.array([5, 9])) == by_hand


@pytest.mark.parametrize("passes", [1, 3], ids=["forward", "forward and backward"])
def test_the_compiled_encoder_does_hardly_more_than_the_model_asks_for(passes):
    encoder = encoders.build(CONFIG)
    params = jax.eval_shape(encoder.init, jax.random.key(0))
    block = jax.ShapeDtypeStruct((16, 48), jnp.int32)
    loss = lambda params, ids, mask: encoder.apply(params, Tokens(ids, mask)).sum()
    function = loss if passes == 1 else jax.grad(loss)
    flops = jax.jit(function).lower(params, block, block).compile().cost_analysis()["flops"]
    assert 0.95 < flops / (passes * perf.forward_flops(CONFIG, np.full(16, 48))) < 1.05
