"""A checkpoint's layers under a new vocabulary: known pieces keep what they mean, special tokens stay, layers can be cut."""

import jax
import numpy as np
import pytest
import tokenizers

from jdmdr import encoders, export, pipeline, tokenizer
from jdmdr.encoders import vocabulary
from jdmdr.types import Tokens, UserError

ENGLISH = ["the river runs to the sea", "a river is long", "the sea is wide and cold"] * 4
BOTH = [*ENGLISH, *["река течёт к морю", "море широкое и холодное"] * 4]


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    old, new = (tmp_path_factory.mktemp(name) for name in ("old", "new"))
    tokenizer.train_unigram(ENGLISH, 60, old, ("[CLS]", "[SEP]"))
    backend = tokenizers.Tokenizer.from_file(str(old / "tokenizer.json"))
    backend.enable_padding(length=32)  # as some published tokenizers have it
    backend.save(str(old / "tokenizer.json"))
    tokenizer.train_unigram(BOTH, 90, new, vocabulary.around(old))
    return old, new


@pytest.fixture(scope="module")
def checkpoint(homes):
    size = tokenizer.Tokenizer(homes[0], 32).vocab_size
    config = encoders.EncoderConfig("transformer", size, 8, layers=3, heads=2, ffn=16, max_positions=40, type_vocab=2)
    return config, encoders.build(config).init(jax.random.key(0))


def vectors(home, table):
    backend = tokenizers.Tokenizer.from_file(str(home / "tokenizer.json"))
    backend.no_padding()
    return lambda text: table[backend.encode(text, add_special_tokens=False).ids].mean(axis=0), backend.get_vocab()


def test_a_piece_starts_as_what_the_old_tokenizer_makes_of_it(homes, checkpoint):
    config, params = checkpoint
    changed, moved = vocabulary.transplant(config, params, *homes, seed=0)
    before, after = (np.asarray(of["embeddings"]["word"]) for of in (params, moved))
    meaning, old = vectors(homes[0], before)
    _, new = vectors(homes[1], after)
    assert changed.vocab_size == len(new) == len(after)
    shared = [piece for piece in new if piece.strip("\u2581").isascii() and piece.strip("\u2581").isalpha()]
    assert len(shared) > 3
    for piece in shared:
        np.testing.assert_allclose(after[new[piece]], meaning(piece.strip("\u2581")), atol=1e-6)
    for special in ("[CLS]", "[SEP]", "<pad>", "<unk>"):
        np.testing.assert_array_equal(after[new[special]], before[old[special]])
    cyrillic = [row for piece, row in new.items() if any("а" <= c <= "я" for c in piece)]
    assert len({tuple(after[row]) for row in cyrillic}) == len(cyrillic) > 5, "each has a vector of its own"
    for name in moved:
        if name != "embeddings":
            jax.tree.map(np.testing.assert_array_equal, moved[name], params[name])


def test_texts_keep_the_tokens_that_stand_around_them(homes):
    words = tokenizer.Tokenizer(homes[1], 32)
    backend = tokenizers.Tokenizer.from_file(str(homes[1] / "tokenizer.json"))
    for text in ("the river", "море"):
        tokens = [backend.id_to_token(int(i)) for i in words.encode([text])[0]]
        assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and len(tokens) > 2
    assert words.special_tokens == 2 and backend.id_to_token(words.end) == "[SEP]"


def test_cut_layers_are_the_first_ones(checkpoint):
    config, params = checkpoint
    short, kept = vocabulary.keep_layers(config, params, 1)
    assert short.layers == 1 and {name for name in kept if name.startswith("layer_")} == {"layer_0"}
    ids = np.array([[3, 4, 5]], np.int32)
    whole, first = (np.asarray(encoders.build(c).apply(p, Tokens(ids, np.ones_like(ids))))
                    for c, p in ((config, params), (short, kept)))  # fmt: skip
    assert first.shape == whole.shape and not np.allclose(first, whole)
    with pytest.raises(UserError, match="encoder.layers is 4, but the checkpoint has 3"):
        vocabulary.keep_layers(config, params, 4)


def test_a_recipe_builds_such_a_student_from_a_checkpoint_on_disk(finished, tmp_path):
    """The teacher's body, cut, under a tokenizer that the recipe trains; another English checkpoint stands in for it."""
    from conftest import tiny_config

    from jdmdr.recipe import Recipe

    old = tmp_path / "old"
    tokenizer.train_unigram(ENGLISH, 60, old, ("[CLS]", "[SEP]"))
    size = tokenizer.Tokenizer(old, 32).vocab_size
    config = encoders.EncoderConfig("transformer", size, 8, layers=3, heads=2, ffn=16, max_positions=128, type_vocab=2)
    params = encoders.build(config).init(jax.random.key(0))
    export.export(config, params, old, tmp_path / "teacher", prompts={"query": "", "passage": ""}, max_length=96,
                  similarity="cosine", card="")  # fmt: skip
    recipe_config = tiny_config(finished.config.data.root)
    with recipe_config.unlocked():
        recipe_config.encoder.name, recipe_config.encoder.new_vocabulary = str(tmp_path / "teacher"), True
        recipe_config.encoder.layers = 2
        recipe_config.warmup.steps, recipe_config.warmup.learning_rates = 0, ()
    directory = tmp_path / "work"
    pipeline.run(recipe_config, directory, "warmup")
    made, student = Recipe(recipe_config, directory)._model("warmup")
    assert made.layers == 2 and made.vocab_size == Recipe(recipe_config, directory).vocab_size > size
    np.testing.assert_array_equal(student["layer_1"]["ffn_in"]["kernel"], params["layer_1"]["ffn_in"]["kernel"])


def test_what_has_no_layers_or_no_special_tokens_is_refused(homes, checkpoint, tmp_path):
    static = encoders.EncoderConfig("static", 10, 4)
    with pytest.raises(UserError, match="keeps the layers of a transformer"):
        vocabulary.transplant(static, {}, *homes, seed=0)
    tokenizer.train_unigram(ENGLISH, 60, tmp_path)
    with pytest.raises(UserError, match="has no cls token"):
        vocabulary.transplant(*checkpoint, homes[0], tmp_path, seed=0)
