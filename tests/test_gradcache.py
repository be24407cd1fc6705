import json
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import Source, block_of
from test_contrastive import make_case

from jdmdr import encoders, parallel, shapes
from jdmdr.costs import sent_bytes
from jdmdr.encoders.pooling import PACKED_POOLINGS
from jdmdr.objectives import OBJECTIVES, blockwise
from jdmdr.step import init_state, make_step

VOCABULARY, WIDTH, P, QUERIES = 60, 16, 4, 48


class Encoder:
    """One layer over tokens, with dropout: little to compile."""

    def __init__(self, dropout=0.0):
        self.dropout = dropout

    def init(self, rng):
        one, two = jax.random.split(rng)
        return {
            "embedding": jax.random.normal(one, (VOCABULARY, WIDTH)),
            "kernel": jax.random.normal(two, (WIDTH, WIDTH)),
        }

    def tower(self, params, side):
        return params

    def apply(self, params, tokens, output, rng, widths):
        x_BxTxD = params["embedding"][tokens.ids_BxT]
        x_BxTxD *= jax.random.bernoulli(rng, 1 - self.dropout, x_BxTxD.shape) / (1 - self.dropout)
        x_BxTxD = jnp.tanh(x_BxTxD @ params["kernel"])
        return PACKED_POOLINGS["mean"](x_BxTxD, tokens.lengths_BxS).reshape(-1, WIDTH)


def transformer(**changes):
    config = encoders.EncoderConfig(
        kind="transformer", vocab_size=VOCABULARY, width=WIDTH, layers=2, heads=2, ffn=32, max_positions=64, **changes
    )
    return encoders.build(config)


def batch_of(B, longest=12, seed=0, shortest=1):
    """B queries and B * P passages."""
    _, _, batch = make_case(B, P)
    rng = np.random.default_rng(seed)
    sides = {"queries": B, "passages": B * P}
    return batch | {
        side: block_of(rng, rows, longest, VOCABULARY, shortest=shortest, runs=1) for side, rows in sides.items()
    }


def step_of(encoder, mesh, grad_cache):
    """A step of plain descent at rate 1, so that what it takes off the parameters is the gradient; and its first state."""
    section = SimpleNamespace(mode="example", temperature=0.2, learn_temperature=False)
    objective = OBJECTIVES["contrastive"](section, mesh)
    optimiser = optax.sgd(1.0)
    step = make_step(encoder, objective, optimiser, 0, None, mesh, grad_cache)
    return step, lambda params: jax.device_put(init_state(params, optimiser), parallel.replicated(mesh))


def gradient_of(encoder, batch, grad_cache):
    """params, number of the step -> (loss, gradient); compiled once."""
    mesh = parallel.data_mesh()
    step, start = step_of(encoder, mesh, grad_cache)
    on_devices = parallel.put_batch(batch, mesh)

    def evaluate(params, number=0):
        # copies: the state is given away
        state = {**start(jax.tree.map(jnp.copy, params)), "step": jnp.int32(number)}
        state, metrics = step(state, on_devices)
        return float(metrics["loss"]), jax.tree.map(lambda before, after: before - after, params, state["params"])

    return evaluate


@pytest.mark.parametrize(
    "encoder",
    [
        Encoder(),
        pytest.param(transformer(), marks=pytest.mark.slow),
        pytest.param(transformer(towers="untied", remat=True), marks=pytest.mark.slow),
    ],
)
def test_the_gradient_is_that_of_the_whole_batch_at_once(encoder):
    batch = batch_of(12)
    params = encoder.init(jax.random.key(1))
    loss, gradient = gradient_of(encoder, batch, 0)(params)
    cached_loss, cached = gradient_of(encoder, batch, 3)(params)
    assert cached_loss == pytest.approx(loss, rel=1e-6)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(cached), strict=True):
        np.testing.assert_allclose(other, one, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("grad_cache", [0, 6])
@pytest.mark.parametrize("runs", [0, 2])
def test_how_many_sequences_share_a_row_and_a_width_does_not_change_the_gradient(grad_cache, runs):
    encoder, rng = transformer(), np.random.default_rng(2)
    params = encoder.init(jax.random.key(1))
    alone, packed = batch_of(12), batch_of(12)
    for side, rows in (("queries", 12), ("passages", 12 * P)):
        source, numbers = Source(rng.integers(1, 20, rows)), np.arange(rows)
        alone[side] = shapes.Side(1, 20, 1).pack(source, numbers, (21, 20))
        layout = shapes.Side(3, 20, runs)
        packed[side] = layout.pack(source, numbers, layout.needed(source.lengths(numbers)[None], 1)[0].tolist())
    loss, gradient = gradient_of(encoder, alone, 0)(params)
    packed_loss, packed_gradient = gradient_of(encoder, packed, grad_cache)(params)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(packed_gradient), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5)


def test_both_passes_have_the_same_dropout():
    encoder = Encoder(dropout=0.3)
    params, evaluate = encoder.init(jax.random.key(1)), gradient_of(encoder, batch_of(12), 3)
    loss, gradient = evaluate(params)
    assert abs(loss - evaluate(params, number=1)[0]) > 1e-3, "each step drops others"
    # Along the gradient the loss changes by its squared norm; if the second pass dropped others, it would not.
    squared = float(sum(jnp.vdot(x, x) for x in jax.tree.leaves(gradient)))
    shift = 0.02 / squared
    ends = [evaluate(jax.tree.map(lambda x, g, by=by: x + by * g, params, gradient))[0] for by in (shift, -shift)]
    assert ends[0] - ends[1] == pytest.approx(2 * shift * squared, rel=0.02)


def scratch_bytes(encoder, grad_cache, B):
    mesh = parallel.data_mesh()
    step, start = step_of(encoder, mesh, grad_cache)
    arguments = jax.eval_shape(lambda: start(encoder.init(jax.random.key(0)))), batch_of(B, 128, shortest=128)
    return step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_memory_hardly_grows_with_the_batch():
    small, large, plain = (scratch_bytes(Encoder(), *of) for of in ((16, 16), (16, 64), (0, 64)))
    assert large < 1.6 * small and large < plain / 4


COLLECTIVES = "all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute"


def collectives(text):
    """[(operation, bytes of the arrays that it gives on each device, whether it stands in a loop)] of a compiled program."""
    found, loops, computation = [], set(re.findall(r"body=%?([\w.-]+)", text)), ""
    for line in text.splitlines():
        if match := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computation = match[1]
        if match := re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line):
            arrays = re.findall(r"(f32|s32|u32|pred)\[([\d,]*)\]", match[1])
            sizes = [
                (1 if kind == "pred" else 4) * math.prod(map(int, filter(None, shape.split(","))))
                for kind, shape in arrays
            ]
            found.append((match[2], sum(sizes), computation in loops))
    return found


def compiled(grad_cache, block):
    """Of a step on the devices there are: the collectives, the bytes of the parameters, loss, gradient norm and accuracy."""
    encoder, mesh = Encoder(), parallel.data_mesh()
    step, start = step_of(encoder, mesh, grad_cache)
    params = encoder.init(jax.random.key(0))
    state, batch = start(params), parallel.put_batch(batch_of(QUERIES), mesh)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "BLOCK", block)
        program = step.lower(state, batch).compile()
    _, metrics = program(state, batch)
    return collectives(program.as_text()), size, *(float(metrics[name]) for name in METRICS)


METRICS = "loss", "gradient_norm", "accuracy_at_1"


@pytest.fixture(scope="module")
def on_eight(on_devices):
    """{kind of step: what `compiled` gives on eight devices}."""
    program = """
        import json
        from test_gradcache import QUERIES, compiled
        whole, few = 2**22, QUERIES // 8 * 5
        steps = {"plain": (0, whole), "cached": (2, whole), "cached, in blocks": (2, few)}
        print(json.dumps({name: compiled(*of) for name, of in steps.items()}))
    """
    return json.loads(on_devices(8, program))


@pytest.mark.parametrize("kind", ["plain", "cached", "cached, in blocks"])
def test_devices_send_each_other_what_the_formula_says(on_eight, kind):
    found, parameters, *_ = on_eight[kind]
    # of n devices in a ring each sends (n - 1) / n of the bytes; what stands in a loop goes round n - 1 times
    times = {"all-gather": 7 / 8, "all-reduce": 2 * 7 / 8, "collective-permute": 1}
    assert all(name == "collective-permute" for name, _, looped in found if looped), (
        "no sum of gradients for each piece"
    )
    sent = sum(times[name] * size * (7 if looped else 1) for name, size, looped in found)
    formula = sum(sent_bytes(parameters, QUERIES, QUERIES * P, WIDTH, 8, in_blocks="blocks" in kind).values())
    assert formula <= sent < formula + 100, "beside it a few sums for the metrics"


def test_all_kinds_of_steps_agree_with_one_device(on_eight):
    one = compiled(0, 2**22)[2:]
    for kind, found in on_eight.items():
        assert found[2:] == pytest.approx(one, rel=1e-5), kind
