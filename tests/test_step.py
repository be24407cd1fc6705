import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import block_of

from jdmdr import encoders, objectives, parallel, sources, topics, trainable
from jdmdr.negatives import version_dir
from jdmdr.optim import make_optimiser, named_leaves
from jdmdr.step import init_state, make_step

ROWS, WIDTH, TEMPERATURE = 40, 8, 0.1


@pytest.fixture(scope="module")
def encoder():
    return encoders.build(encoders.EncoderConfig(kind="static", vocab_size=ROWS, width=WIDTH, pooling="mean"))


@pytest.fixture(scope="module")
def section(finished):
    return finished.config.train.copy_and_resolve_references().unlock()


@pytest.fixture
def parts(encoder, section):
    """(step, state) of the recipe on an encoder small enough to write the formula out."""
    section.objective.mode, section.objective.temperature = "none", TEMPERATURE
    section.learning_rates, section.learning_rate = (), 1e-2
    params = encoder.init(jax.random.key(0))
    optimiser = make_optimiser(section, params)
    objective = objectives.OBJECTIVES["contrastive"](section.objective)
    return make_step(encoder, objective, optimiser, 0), init_state(params, optimiser)


def batch_of(rng, queries=4, passages_per_query=2, width=5):
    """A text a row; every passage distinct, one known positive a query."""
    n = queries * passages_per_query
    blocks = {name: block_of(rng, rows, width, ROWS, runs=1) for name, rows in (("queries", queries), ("passages", n))}
    target_B = np.arange(queries, dtype=np.int32) * passages_per_query
    return {
        **blocks, "target_B": target_B, "passage_ids_N": np.arange(n, dtype=np.int32), "first_N": np.ones(n, bool),
        "positive_ids_BxM": target_B[:, None], "weight_N": np.ones(n, np.float32),
        "query_weight_B": np.ones(queries, np.float32), "query_index_B": np.arange(queries, dtype=np.int32),
    }  # fmt: skip


def oracle_loss(params, batch):
    """The formula with plain loops over texts, traceable so that optax can be given its gradient."""

    def embed(block):
        rows = []
        for ids, mask in zip(block.ids_RxT, block.mask_RxT, strict=True):
            ids = ids[: mask.sum()]
            vector = (jnp.log1p(jnp.exp(params["weight"][ids]))[:, None] * params["embedding"][ids]).sum(0) / len(ids)
            rows.append(vector / jnp.linalg.norm(vector))
        return jnp.stack(rows)[block.order_N]

    scores_BxN = embed(batch["queries"]) @ embed(batch["passages"]).T / TEMPERATURE
    losses = [jnp.log(jnp.exp(row).sum()) - row[t] for row, t in zip(scores_BxN, batch["target_B"], strict=True)]
    return sum(losses) / len(losses)


def test_one_step_is_the_gradient_of_the_formula_through_adam(parts):
    step, state = parts
    batch = batch_of(np.random.default_rng(0))
    before = jax.device_get(state["params"])
    value, gradient = jax.value_and_grad(oracle_loss)(before, batch)
    plain = optax.adam(1e-2)  # the recipe: no rise, no decay of weights, no clipping
    updates, _ = plain.update(gradient, plain.init(before))
    state, metrics = step(state, batch)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics["gradient_norm"]) == pytest.approx(float(optax.global_norm(gradient)), rel=1e-4)
    for name, expected in optax.apply_updates(before, updates).items():
        large = np.abs(gradient[name]) > 1e-5  # Adam turns the sign of rounding errors into whole steps
        np.testing.assert_allclose(np.asarray(state["params"][name])[large], expected[large], atol=2e-5)


def test_update_that_is_not_finite_is_skipped_and_counted(parts):
    step, state = parts
    batch = batch_of(np.random.default_rng(1))
    state, _ = step(state, batch)
    row = int(batch["queries"].ids_RxT[0, 0])
    state["params"]["embedding"] = state["params"]["embedding"].at[row].set(np.nan)
    poisoned = jax.tree.map(np.array, state)
    for count in (1, 2):
        state, metrics = step(state, batch)
        assert not np.isfinite(metrics["loss"])
        assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == count
    for name in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, state[name], poisoned[name])
    assert int(state["step"]) == 3
    state["params"]["embedding"] = state["params"]["embedding"].at[row].set(0.1)
    before = np.array(state["params"]["weight"])
    state, metrics = step(state, batch)
    assert int(metrics["skipped"]) == 2 and int(metrics["skipped_in_a_row"]) == 0
    assert not np.array_equal(state["params"]["weight"], before)


def test_step_is_compiled_once_a_shape(parts):
    step, state = parts
    rng = np.random.default_rng(2)
    for width in (5, 7, 5, 7, 5):
        state, _ = step(state, batch_of(rng, width=width))
    assert step._cache_size() == 2


def run_steps(directory, root, kind, steps=3, fsdp=1):
    """The real parts on whatever devices and processes there are: batches with mined negatives, the objective, the mesh.

    Returns of each step the loss, the gradient's norm, the queries and how many tokens this process read; and what is
    trained in the end.

    `kind` is plain (weighted contrastive), everything (untied towers, a head, adapters, Matryoshka, a learned
    temperature and the grad cache too), star or adore.
    """
    from conftest import tiny_config

    from jdmdr.recipe import Recipe

    recipe = Recipe(tiny_config(root), directory)
    c, mesh = recipe.config, recipe.mesh
    section = c.train
    if kind == "everything":
        c.encoder.towers, c.encoder.projection = "untied", 32
        section.objective.learn_temperature, section.objective.dimensions = True, (8, 16)
        section.lora.rank, section.trainable, section.grad_cache = 2, "projection|/weight$", 4
    if kind == "star":
        section.objective.name, section.optimiser = "pairwise", "lamb"
    version, collections = version_dir(directory / "negatives", 0), None
    if kind == "adore":
        section.objective.name, section.objective.metric_cut, section.objective.index_dtype = "adore", 10, "float32"
        c.encoder.towers, section.trainable, section.passages_per_query = "untied", "^query/", 0
        vectors = [np.load(directory / "embeddings-warmup" / lang / "passages-00000.npy") for lang in ("en", "sw")]
        version, collections = None, objectives.Collections(vectors, recipe.library.bases)
    labels = topics.read_topics(directory / "topics", recipe.library)
    mined = sources.labelled(recipe.training, recipe.stores, recipe.library, version, labels, False)
    found = [sources.Source(mined, 1.0, section.passages_per_query)]
    section.chunk_rows = 16
    own = parallel.own_rows(mesh)
    make_batch, shapes, _ = sources.batch_maker(
        found, section, c.weights, (32, 96), 8, 0, 2, c.topics.clusters, own=own
    )
    config, params = recipe._first_encoder()
    objective = objectives.build(section.objective, config, mesh, collections)
    trained, frozen = trainable.split(section, params, objective.parameters, 0)
    optimiser = make_optimiser(section, trained, frozen)
    state = init_state(trained, optimiser, frozen)
    shardings = parallel.shardings(state, mesh, fsdp, (("", "fsdp"),))
    assert (fsdp > 1) == any("fsdp" in str(s.spec) for s in jax.tree.leaves(shardings))
    state = parallel.put(state, shardings)
    step = make_step(encoders.build(config), objective, optimiser, 0, section.lora, mesh, section.grad_cache, shardings)
    losses, norms, ids, read = [], [], [], []
    for number in range(steps):
        batch = make_batch(number)[0]
        state, metrics = step(state, {**parallel.put_batch(batch, mesh), **objective.arrays})
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["gradient_norm"]))
        ids.append(batch["query_index_B"].tolist())
        read.append(sum(int((batch[side].ids_RxT > 0).sum()) for side in ("queries", "passages") if batch[side]))
    assert step._cache_size() <= shapes
    return losses, norms, ids, read, dict(named_leaves(parallel.to_host(state["params"])))


@pytest.mark.parametrize(("kind", "fsdp"), [("plain", 1), ("everything", 2), ("star", 8), ("adore", 4)])
def test_eight_devices_train_as_one_does(finished, on_devices, tmp_path, kind, fsdp):
    root = finished.config.data.root
    program = """
        import json, pathlib, sys
        import numpy as np
        from test_step import run_steps
        losses, *_, params = run_steps(pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[4], fsdp=int(sys.argv[5]))
        np.savez(sys.argv[3], **params)
        print(json.dumps(losses))
    """
    eight = json.loads(on_devices(8, program, finished.directory, root, tmp_path / "eight.npz", kind, fsdp))
    losses, *_, params = run_steps(finished.directory, root, kind)
    assert ("objective/log_temperature" in params) == ("lora/query/embedding/a" in params) == (kind == "everything")
    if kind == "adore":
        assert set(params) == {"query/embedding", "query/weight"}
    np.testing.assert_allclose(eight, losses, rtol=1e-6)
    with np.load(tmp_path / "eight.npz") as saved:
        for name, expected in params.items():
            np.testing.assert_allclose(saved[name], expected, atol=1e-6, err_msg=name)
