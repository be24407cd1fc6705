import json

import jax
import numpy as np
import pytest
from conftest import REPO, tiny_config

from jdmdr import check, encode, encoders, maxp, parallel, pipeline, retrievers, validate
from jdmdr.index.exact import ExactSearcher
from jdmdr.objectives.pairwise import pairwise_loss
from jdmdr.recipe import Recipe
from jdmdr.tokenizer import Tokenizer, TokenStore, write_tokens
from jdmdr.types import UserError
from tests.test_contrastive import TEMPERATURE, make_case
from tests.test_pairwise import oracle as pairwise_oracle

LENGTH, CHUNKS = 5, 3


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert():
    """A tokenizer directory with special tokens around a text, and the texts of 0 to 20 words."""
    directory = REPO / "tests" / "goldens" / "bert"
    words = [f"{['the', 'a', 'of', 'in', 'to'][i % 5]}" for i in range(20)]
    return directory, [" ".join(words[:count]) for count in (0, 1, 3, 4, 7, 9, 20)]


@pytest.mark.parametrize("specials", [True, False])
def test_chunks_lie_behind_one_another_each_with_its_special_tokens_or_cut_out_of_one_sequence(
    bert, tmp_path, specials
):
    directory, texts = bert
    whole = [ids.tolist() for ids in Tokenizer(directory, 1000).encode(texts)]
    tokenizer = Tokenizer(directory, LENGTH, "", CHUNKS, specials)
    write_tokens(tokenizer, texts, tmp_path, "en")
    store = TokenStore(tmp_path, ["en"], tokenizer.vocab_size)
    chunked, rows = maxp.Chunked(store, LENGTH, CHUNKS), np.arange(len(texts))
    tokens = chunked.gather(chunked.of(rows).ravel(), LENGTH)
    lengths = chunked.lengths(chunked.of(rows).ravel())
    assert tokens.mask_BxT.sum(axis=1).tolist() == lengths.tolist()
    found = [ids[:n].tolist() for ids, n in zip(tokens.ids_BxT, lengths, strict=True)]
    for row, ids in enumerate(whole):
        first, content, last = ids[:1], ids[1:-1], ids[-1:]
        if specials:
            size = LENGTH - 2
            parts = [content[i : i + size] for i in range(0, max(len(content), 1), size)][:CHUNKS]
            expected = [first + part + last for part in parts]
        else:
            cut = ids if len(ids) <= LENGTH * CHUNKS else [*ids[: LENGTH * CHUNKS - 1], *last]
            expected = [cut[i : i + LENGTH] for i in range(0, len(cut), LENGTH)]
        assert found[row * CHUNKS : row * CHUNKS + len(expected)] == expected
        assert chunked.has_text(rows)[row].tolist() == [c < len(expected) for c in range(CHUNKS)]


# --- search ----------------------------------------------------------------------------------------------------------


def many(passages, longest, width=8, queries=6, seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, longest + 1, passages)
    vectors = rng.standard_normal((counts.sum(), width), np.float32)
    return np.concatenate([[0], np.cumsum(counts)]), vectors, rng.standard_normal((queries, width), np.float32)


def scores_by_hand(first_C, vectors, queries):
    scores = queries @ vectors.T
    return np.stack([scores[:, a:b].max(axis=1) for a, b in zip(first_C, first_C[1:], strict=False)], axis=1)


@pytest.mark.parametrize("passages, longest, k", [(40, 3, 7), (5, 4, 9), (30, 1, 30)])
def test_the_search_finds_the_passages_of_the_best_chunks(passages, longest, k):
    first_C, vectors, queries = many(passages, longest)
    vectors_ = retrievers.Vectors(queries, [vectors[:3], vectors[3:]], first_C)
    found = retrievers.dense(vectors_, "exact", "Flat", parallel.own_mesh())
    hits, by_hand = found.search(np.arange(len(queries)), k), scores_by_hand(first_C, vectors, queries)
    best = np.argsort(-by_hand, axis=1, kind="stable")[:, : min(k, passages)]
    np.testing.assert_array_equal(hits.rows_QxK, best)
    np.testing.assert_allclose(hits.scores_QxK, np.take_along_axis(by_hand, best, 1), rtol=1e-5, atol=1e-6)
    query_N, row_N = np.array([3, 0, 3, 2]), np.array([4, 1, 0, passages - 1])
    np.testing.assert_allclose(
        found.rescore(np.arange(len(queries)))(query_N, row_N), by_hand[query_N, row_N], rtol=1e-5
    )


def test_a_passage_whose_chunks_fill_the_list_does_not_hide_the_others():
    # 100 chunks of passage 0 are ahead of everything: the first look finds it alone
    first_C = np.array([0, 100, 101, 102, 103])
    vectors = np.concatenate([np.full((100, 1), 5.0), [[1.0], [3.0], [2.0]]]).astype(np.float32)
    searcher = maxp.BestChunkSearcher(ExactSearcher([vectors], parallel.own_mesh()), first_C)
    hits = searcher.search(np.ones((2, 1), np.float32), 3)
    assert hits.rows_QxK.tolist() == [[0, 2, 3]] * 2 and hits.scores_QxK.tolist() == [[5, 3, 2]] * 2


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", ["query", "all", "own"])
def test_loss_and_gradient_are_those_of_each_querys_best_chunks(negatives):
    q_BxD, p_NxD, batch = make_case()
    N, D = p_NxD.shape
    rng = np.random.default_rng(1)
    has_text_NxC = np.arange(CHUNKS) < rng.integers(1, CHUNKS + 1, N)[:, None]
    chunks_NxCxD = rng.standard_normal((N, CHUNKS, D)).astype(np.float32)
    chunks_NxCxD[~has_text_NxC] = 1e3  # would win, had they text

    def value(q_BxD, chunks_MxD):
        given = {**batch, maxp.BATCH_KEY: has_text_NxC}
        return pairwise_loss(q_BxD, chunks_MxD, given, temperature=TEMPERATURE, negatives=negatives)[0]

    def by_hand(q_BxD, chunks_NxCxD):
        scores = np.where(has_text_NxC, np.einsum("bd,ncd->bnc", q_BxD.astype(np.float64), chunks_NxCxD), -np.inf).max(
            -1
        )
        # the oracle multiplies: rows of the identity give it these scores
        return pairwise_oracle(scores, np.eye(N), batch, negatives)

    loss, (_, gradient_MxD) = jax.value_and_grad(value, argnums=(0, 1))(q_BxD, chunks_NxCxD.reshape(-1, D))
    assert float(loss) == pytest.approx(by_hand(q_BxD, chunks_NxCxD), rel=1e-5)
    gradient = np.asarray(gradient_MxD).reshape(N, CHUNKS, D)
    assert np.all(gradient[~has_text_NxC] == 0) and np.any(gradient != 0)
    n, c = np.argwhere(np.abs(gradient).sum(axis=-1) > 0)[0]
    step = np.zeros_like(chunks_NxCxD)
    step[n, c, 0] = 1e-3
    slope = (by_hand(q_BxD, chunks_NxCxD + step) - by_hand(q_BxD, chunks_NxCxD - step)) / 2e-3
    assert gradient[n, c, 0] == pytest.approx(slope, rel=1e-2, abs=1e-5)


# --- end to end ------------------------------------------------------------------------------------------------------


def in_chunks(root):
    config = tiny_config(root)
    with config.unlocked():
        config.encoder.passage_length, config.encoder.chunks = 12, CHUNKS
        t = config.train
        t.objective.name, t.objective.negatives, t.passages_per_query, t.cloze_share = "pairwise", "query", 2, 0.0
        config.refresh.mode, config.mine.retrievers, config.mine.sample = "inline", "warmup", "uniform"
    return config


@pytest.fixture(scope="module")
def trained(finished, tmp_path_factory):
    """The recipe of a finished pipeline in which passages are up to three chunks of twelve tokens."""
    directory = tmp_path_factory.mktemp("maxp")
    config = in_chunks(finished.config.data.root)
    pipeline.run(config, directory, "report")
    return Recipe(config, directory)


def test_the_index_holds_each_chunk_with_text_and_no_other(trained):
    store, several = trained.stores.passages, 0
    for index, lang in enumerate(trained.library.langs):
        rows = np.arange(*trained.library.bases[index : index + 2])
        counts = np.maximum(-(-store.lengths(rows) // 12), 1)
        several += int((counts > 1).sum())
        for stage in ("embeddings-warmup", "embeddings"):
            home = trained.directory / stage / lang
            assert np.diff(encode.first_chunks(home)).tolist() == counts.tolist()
            assert sum(map(len, encode.shards(home, "passages"))) == counts.sum()
    assert several


def test_metrics_are_those_of_a_brute_force_maximum_over_chunks(trained):
    found = json.loads((trained.directory / "evaluate" / "metrics.json").read_text())["dev"]["systems"]["dmdr"][
        "recall@100"
    ]
    run = retrievers.stored(trained.directory / "embeddings" / "en", "dev", [trained.directory / "embeddings" / "en"])
    by_hand = scores_by_hand(run.first_C, np.concatenate(run.blocks).astype(np.float32), run.queries_QxD)
    hits = trained._retriever("dmdr", "en", "dev").search(np.arange(len(by_hand)), 10)
    expected = -np.sort(-by_hand, axis=1)[:, : hits.scores_QxK.shape[1]]
    np.testing.assert_allclose(hits.scores_QxK, expected, rtol=1e-4, atol=1e-5)
    assert 0 < found["en"] <= 1


def test_a_refresh_mines_passages_by_their_best_chunks(trained):
    lines = [json.loads(x) for x in (trained.directory / "train" / "refresh" / "taken.jsonl").read_text().splitlines()]
    assert max(line["version"] for line in lines) >= 1


def test_validation_scores_a_passage_by_its_best_chunk(trained):
    config, params = trained._model("train")
    arguments = (
        trained.library,
        trained.training,
        trained.stores,
        encoders.build(config),
        trained.mesh,
        (32, 12),
        1000,
        0,
    )
    whole = validate.make_validation(*arguments, trained.passages)(params)
    first = validate.make_validation(*arguments, trained.stores.passages)(params)
    assert whole != first and 0 < whole <= 1


LOSS = """
import pathlib, sys, jax, optax
from jdmdr import encoders, objectives, parallel, sources
from jdmdr.recipe import Recipe
from jdmdr.step import init_state, make_step
from test_maxp import in_chunks

recipe = Recipe(in_chunks(sys.argv[1]), pathlib.Path(sys.argv[2]))
section, mesh = recipe.config.train, parallel.data_mesh()
with recipe.config.unlocked():
    section.passages_per_query, section.objective.negatives = 1, "all"
found = sources.pairs(recipe.training, recipe.stores)._replace(passages=recipe.passages)
make, _, _ = sources.batch_maker([sources.Source(found, 1.0, 1)], section, recipe.config.weights, (32, 12), mesh.devices.size, 0, 2, 1)
config, params = recipe._model("warmup")
optimiser = optax.sgd(0.1)
objective = objectives.build(section.objective, config, mesh)
step = make_step(encoders.build(config), objective, optimiser, 0, None, mesh)
state = parallel.put(init_state(params, optimiser), parallel.replicated(mesh))
_, metrics = step(state, parallel.put_batch(make(0)[0], mesh))
print(float(metrics["loss"]), float(metrics["gradient_norm"]))
"""


def test_eight_devices_compute_the_loss_and_gradient_of_one(trained, on_devices):
    one, eight = (
        list(map(float, on_devices(devices, LOSS, trained.config.data.root, trained.directory).split()))
        for devices in (1, 8)
    )
    assert len(one) == 2 and eight == pytest.approx(one, rel=1e-5)


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key, value, sentence", [
    ("train.objective.name", "contrastive", "train.objective.name is 'contrastive'; it is pairwise"),
    ("train.cloze_share", 0.5, "train.cloze_share is above 0"),
    ("mine.fusion", "concat", "mine.fusion is 'concat'"),
    ("encode.passages", "somewhere", "encode.passages names vectors"),
    ("llm.base_url", "http://localhost:1/v1", "llm.base_url names a server"),
])  # fmt: skip
def test_what_passages_in_chunks_cannot_do_is_told_by_key(finished, key, value, sentence):
    config = in_chunks(finished.config.data.root)
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict({"llm.model": "x", key: value})
    with pytest.raises(UserError, match=f"encoder.chunks is {CHUNKS}, and {sentence}"):
        check.check_config(config)
