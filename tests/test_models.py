"""Where encoders start from: one checkpoint or two, with the head that a recipe asks for."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import default
from jdmdr import encoders, models
from jdmdr.types import UserError

GOLDENS = pathlib.Path(__file__).parent / "goldens"


def section(**changes):
    keys = default.get_config().encoder.copy_and_resolve_references().unlock()
    keys.update(name=str(GOLDENS / "roberta"), query_length=16, passage_length=32, **changes)
    return keys


@pytest.fixture
def other(tmp_path):
    """The same checkpoint with other weights."""
    directory = pathlib.Path(shutil.copytree(GOLDENS / "roberta", tmp_path / "other"))
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    safetensors.numpy.save_file({k: v + np.float32(0.5) for k, v in tensors.items()}, directory / "model.safetensors")
    return directory


def test_two_checkpoints_are_the_two_towers(other):
    config, params = models.start(section(passage_name=str(other)), 200, None, 0)
    assert config.untied
    for side, source in (("query", GOLDENS / "roberta"), ("passage", other)):
        jax.tree.map(np.testing.assert_array_equal, params[side], encoders.load_pretrained(source)[1])


def test_dropout_of_attention_is_the_checkpoints_unless_the_recipe_sets_it():
    theirs, _ = models.start(section(), 200, None, 0)
    ours, _ = models.start(section(attention_dropout=0.25), 200, None, 0)
    assert (theirs.attention_dropout, ours.attention_dropout) == (0.1, 0.25)
    assert dataclasses.replace(ours, attention_dropout=0.1) == theirs


def test_towers_of_two_shapes_are_refused():
    with pytest.raises(UserError, match="encoder.passage_name: .*bert and .*roberta are not two encoders of one shape"):
        models.start(section(passage_name=str(GOLDENS / "bert")), 200, None, 0)


def test_a_new_head_may_end_in_a_layer_norm():
    config, params = models.start(section(projection=6, projection_bias=True, projection_norm=True), 200, None, 0)
    assert (config.projection, config.projection_norm) == (6, True) and "norm" in params["projection"]
    plain, _ = models.start(section(projection=6), 200, None, 0)
    assert dataclasses.replace(config, projection_bias=False, projection_norm=False) == plain
