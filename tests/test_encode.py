import jax
import numpy as np
import pytest
from conftest import tiny_config

from jdmdr import encode, encoders, parallel, pipeline
from jdmdr.encoders import attention
from jdmdr.types import Tokens

VOCABULARY, WIDTH, MAX_LENGTH = 50, 16, 40


class Source:
    """Random token sequences of the given lengths."""

    def __init__(self, lengths, seed=0):
        rng = np.random.default_rng(seed)
        self.sequences = [rng.integers(0, VOCABULARY, n).astype(np.int32) for n in lengths]

    def lengths(self, rows):
        return np.array([len(self.sequences[row]) for row in rows], np.int32)

    def gather(self, rows, width):
        ids, mask = np.zeros((2, len(rows), width), np.int32)
        for i, row in enumerate(rows):
            kept = self.sequences[row][:width]
            ids[i, : len(kept)], mask[i, : len(kept)] = kept, 1
        return Tokens(ids, mask)


@pytest.fixture(scope="module")
def encoder():
    return encoders.build(encoders.EncoderConfig(kind="static", vocab_size=VOCABULARY, width=WIDTH, pooling="mean"))


@pytest.fixture(scope="module")
def params(encoder):
    return encoder.init(jax.random.key(0))


@pytest.fixture(scope="module")
def embedder(encoder):
    return encode.Embedder(encoder, parallel.data_mesh(), MAX_LENGTH, "passage")


# Empty, one token, around the widths, beyond the maximum; more of one length than a block holds.
LENGTHS = [0, 1, 15, 16, 17, 39, 40, 41, 500, *np.random.default_rng(1).integers(1, 60, 8), *[3] * 1500]


def one_by_one(encoder, params, source, rows):
    rows_1x = [source.gather([row], max(1, min(len(source.sequences[row]), MAX_LENGTH))) for row in rows]
    return np.concatenate([np.asarray(encoder.apply(params, Tokens(*row))) for row in rows_1x])


def test_embeddings_do_not_depend_on_company_order_or_padding(encoder, params, embedder):
    source = Source(LENGTHS)
    rows = np.random.default_rng(2).permutation(len(LENGTHS))
    embeddings = embedder.embed(params, source, rows)
    assert embeddings.dtype == np.float32 and embeddings.shape == (len(rows), WIDTH)
    some = np.flatnonzero(rows < 20)
    np.testing.assert_allclose(embeddings[some], one_by_one(encoder, params, source, rows[some]), atol=1e-6)
    np.testing.assert_array_equal(embedder.embed(params, source, rows[:30]), embeddings[:30])


def test_no_rows_give_an_empty_matrix_of_the_right_width(params, embedder):
    assert embedder.embed(params, Source([3]), np.empty(0, np.int64)).shape == (0, WIDTH)


def test_few_shapes_are_compiled_whatever_the_lengths(encoder, params):
    embedder = encode.Embedder(encoder, parallel.data_mesh(), MAX_LENGTH, "passage")
    for longest in (8, 16, 30, 35, 60, 100):
        lengths = np.random.default_rng(longest).integers(0, longest + 1, 300)
        embedder.embed(params, Source(lengths), np.arange(300))
    assert embedder._apply._cache_size() == len([w for w in encode.WIDTHS if w < MAX_LENGTH]) + 1


def test_every_row_stands_in_one_block_that_is_wide_enough(embedder):
    lengths = np.random.default_rng(3).integers(0, 100, 5000)
    blocks = list(embedder.blocks(lengths))
    assert sorted(np.concatenate([positions for positions, _, _ in blocks])) == list(range(5000))
    for positions, width, rows in blocks:
        assert len(positions) <= rows and width * rows <= encode.TOKENS_PER_BLOCK["cpu"]
        assert width >= min(lengths[positions].max(), MAX_LENGTH)


def test_packed_sequences_have_the_embeddings_of_each_alone_and_few_shapes(monkeypatch):
    config = encoders.EncoderConfig(
        kind="transformer", vocab_size=VOCABULARY, width=WIDTH, layers=1, heads=2, ffn=16, max_positions=MAX_LENGTH
    )
    encoder = encoders.build(config)
    params = encoder.init(jax.random.key(0))
    monkeypatch.setattr(attention, "packs", lambda config: True)
    embedder = encode.Embedder(encoder, parallel.data_mesh(), MAX_LENGTH, "passage")
    source = Source(np.random.default_rng(5).integers(1, 60, 300))
    rows = np.random.default_rng(6).permutation(300)
    blocks = embedder.packed_blocks(source.lengths(rows))
    assert len({len(block) for block in blocks}) == 1 and len(blocks) > 1
    assert set(np.concatenate(blocks)) == set(range(300))
    embeddings = embedder.embed(params, source, rows)
    assert encode._compiled_packed(encoder)._cache_size() == 1
    np.testing.assert_allclose(embeddings[:8], one_by_one(encoder, params, source, rows[:8]), atol=1e-6)


@pytest.fixture
def store(params, embedder, tmp_path):
    source = Source(np.random.default_rng(4).integers(1, 40, 37))

    def fill(dtype="float32", directory=tmp_path):
        shards = encode.shards_of(5, 37, directory, "passages", 10)
        return sum(encode.encode_shard(embedder, params, source, shard, dtype) for shard in shards)

    fill.expected = embedder.embed(params, source, np.arange(5, 37))
    fill.directory = tmp_path
    return fill


def test_restart_makes_the_missing_shards_and_leaves_the_others_alone(store):
    assert store() == 4
    paths = sorted(store.directory.glob("*.npy"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
    for path in (paths[1], paths[3]):
        path.unlink()
    paths[3].with_name(f".{paths[3].name}.partial").write_bytes(b"half")
    assert store() == 2
    assert sorted(store.directory.iterdir()) == paths
    for path, (content, modified) in before.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == modified) == (path not in (paths[1], paths[3]))
    assert store() == 0


def test_shards_hold_the_rows_in_order(store):
    store()
    blocks = encode.shards(store.directory, "passages")
    assert [len(block) for block in blocks] == [10, 10, 10, 2]
    np.testing.assert_allclose(np.concatenate(blocks), store.expected, atol=1e-6)
    rows = np.array([31, 0, 10, 9, 10, 29, 30])
    gathered = encode.gather_rows(blocks, rows)
    assert gathered.dtype == np.float32
    np.testing.assert_array_equal(gathered, np.concatenate(blocks)[rows])


def test_float16_store_is_close_to_float32(store):
    store("float16")
    blocks = encode.shards(store.directory, "passages")
    assert all(block.dtype == np.float16 for block in blocks)
    np.testing.assert_allclose(np.concatenate(blocks).astype(np.float32), store.expected, atol=5e-4)


def test_no_texts_make_one_empty_shard(params, embedder, tmp_path):
    (shard,) = encode.shards_of(3, 3, tmp_path, "queries.dev", 10)
    assert encode.encode_shard(embedder, params, Source([]), shard, "float16")
    assert [block.shape for block in encode.shards(tmp_path, "queries.dev")] == [(0, WIDTH)]


def test_eight_devices_embed_as_one_does(encoder, params, embedder, on_devices, tmp_path):
    program = """
        import sys
        import jax, numpy as np
        from jdmdr import encode, encoders, parallel
        from test_encode import LENGTHS, MAX_LENGTH, Source, VOCABULARY, WIDTH
        config = encoders.EncoderConfig(kind="static", vocab_size=VOCABULARY, width=WIDTH, pooling="mean")
        encoder = encoders.build(config)
        embedder = encode.Embedder(encoder, parallel.data_mesh(), MAX_LENGTH, "passage")
        rows = np.arange(200)
        np.save(sys.argv[1], embedder.embed(encoder.init(jax.random.key(0)), Source(LENGTHS), rows))
        print(jax.device_count())
    """
    assert on_devices(8, program, tmp_path / "eight.npy").split() == ["8"]
    one = embedder.embed(params, Source(LENGTHS), np.arange(200))
    np.testing.assert_allclose(np.load(tmp_path / "eight.npy"), one, atol=1e-6)


def test_a_checkpoint_is_encoded_with_and_nothing_is_mined_where_nothing_trains(finished, tmp_path):
    """ANCE's inference alone, of the encoder that a run exported: its vectors again."""
    config = tiny_config(finished.config.data.root)
    config.encoder.name = str(finished.directory / "export")
    config.tokenizer.vocab_size, config.warmup.steps, config.train.steps = finished.config.tokenizer.vocab_size, 0, 0
    recipe = pipeline.run(config, tmp_path, "embeddings")
    stages = {"corpus", "tokenizer", "tokens", "warmup", "embeddings-warmup", "train", "embeddings"}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} - {"status"} == stages
    assert "negatives" in {stage.name for stage in recipe.stages()}, "what mines is there for who asks"
    for lang in recipe.library.langs:
        for name in ("passages", "queries.dev"):
            ours, theirs = (
                np.concatenate(encode.shards(home / "embeddings" / lang, name))
                for home in (tmp_path, finished.directory)
            )
            np.testing.assert_allclose(ours, theirs, atol=2e-3)
