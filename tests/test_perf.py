import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdmdr import encoders, perf
from jdmdr.shapes import Packed
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


def _mask(*lengths):
    return (np.arange(8) < np.array(lengths)[:, None]).astype(np.int32)


BATCH = {
    "queries": Packed(_mask(7, 1), _mask(7, 1), np.array([[5, 2, 1], [1, 0, 7]], np.int32), np.arange(4), (8, 8)),
    "passages": Packed(_mask(7, 7), _mask(7, 7), np.array([[3, 4, 1], [2, 5, 1]], np.int32), np.arange(4), None),
    "pairs": Tokens(_mask(6), _mask(6)),
    "target_B": np.arange(2),
}
LENGTHS = [0, 1, 2, 2, 3, 4, 5, 5, 6]


def test_texts_of_a_batch_are_as_long_as_their_tokens_without_padding():
    assert sorted(perf.lengths(BATCH)) == LENGTHS


def test_the_meter_tells_where_each_second_went_and_what_the_computing_ones_gave(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(perf.time, "perf_counter", lambda: now[0])

    def passing(seconds, value=None):
        now[0] += seconds
        return value

    meter = perf.Meter(CONFIG)
    for batch in meter.waits(passing(2, BATCH) for _ in range(2)):
        meter.count(batch)
        passing(10)
        with meter.timed("saving"):
            passing(3)
    found = meter.figures()
    assert found["seconds"] == {perf.COMPUTING: 20, perf.WAITING: 4, "saving": 6} and found["total"] == 30
    assert (
        found["steps"] == 2 and found["tokens"] == 2 * sum(LENGTHS) and found["tokens_per_second"] == sum(LENGTHS) / 10
    )
    assert found["flops_per_second"] == pytest.approx(3 * perf.forward_flops(CONFIG, np.array(LENGTHS)) / 10)
    peak = 2 * found["flops_per_second"]
    assert perf.sentence(found, peak) == (
        "2 steps in 30 s: 67 % computing, 20 % saving, 13 % waiting for batches; 3 tokens/s, 0.50 of the matmul peak"
    )
