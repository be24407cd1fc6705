import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdmdr import parallel
from jdmdr.checkpoint import UNMEASURED, Checkpoints
from jdmdr.types import UserError


def state_at(step):
    return {"params": {"w": jnp.full((8, 2), step, jnp.float32)}, "step": jnp.asarray(step, jnp.int32)}


def save_all(directory, scores):
    checkpoints = Checkpoints(directory)
    for step, score in scores.items():
        checkpoints.save(step, state_at(step), score)
    checkpoints.close()


def kept(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


@pytest.mark.parametrize(
    ("scores", "best", "left"),
    [
        ({0: 0.1, 3: 0.5, 6: 0.4, 9: 0.3}, 3, [3, 9]),
        ({0: 0.1, 3: 0.5, 6: 0.5, 9: 0.4}, 6, [6, 9]),  # the latest of equals
        ({0: 0.1, 3: 0.2, 6: 0.3}, 6, [6]),
        ({0: 0.0, 2: UNMEASURED}, 0, [0, 2]),  # a measured 0 beats what nobody measured
        ({0: UNMEASURED, 3: 0.2, 5: UNMEASURED}, 3, [3, 5]),
    ],
)
def test_best_and_latest_are_kept_and_nothing_else(tmp_path, scores, best, left):
    save_all(tmp_path, scores)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.best() == best and checkpoints.latest() == max(scores)
    assert checkpoints.score(best) == scores[best]
    state, next_step = checkpoints.restore(best, state_at(-1))
    checkpoints.close()
    assert next_step == best and (np.asarray(state["params"]["w"]) == best).all()
    assert kept(tmp_path) == left


def test_latest_is_the_best_where_nothing_was_measured(tmp_path):
    save_all(tmp_path, {0: UNMEASURED, 3: UNMEASURED, 6: UNMEASURED})
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.best() == 6
    checkpoints.close()


def test_half_written_checkpoint_is_ignored_and_can_be_saved_again(tmp_path):
    save_all(tmp_path, {3: 0.5})
    save_all(tmp_path / "other", {6: 0.9})
    os.rename(tmp_path / "other" / "6", tmp_path / "6.orbax-checkpoint-tmp")
    shutil.rmtree(tmp_path / "6.orbax-checkpoint-tmp" / "metrics")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == checkpoints.best() == 3
    checkpoints.save(6, state_at(6), 0.7)
    checkpoints.close()
    assert kept(tmp_path) == [6]
    assert not list(tmp_path.glob("*tmp*"))


def truncate(directory):
    for path in directory.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)


def truncate_arrays(directory):
    for path in (directory / "state").rglob("d/*"):
        os.truncate(path, path.stat().st_size // 2)


def empty(directory):
    shutil.rmtree(directory)
    directory.mkdir()


@pytest.mark.parametrize("damage", [truncate, truncate_arrays, empty])
def test_damaged_checkpoint_is_told_in_a_sentence_whose_advice_works(tmp_path, damage):
    save_all(tmp_path, {3: 0.5, 6: 0.4})
    damage(tmp_path / "6")
    with pytest.raises(UserError, match=rf"{tmp_path}/6 cannot be read \(.*delete that directory") as error:
        checkpoints = Checkpoints(tmp_path)
        checkpoints.restore(checkpoints.latest(), state_at(-1))
    assert "\n" not in str(error.value)
    shutil.rmtree(tmp_path / "6")
    checkpoints = Checkpoints(tmp_path)
    state, next_step = checkpoints.restore(checkpoints.latest(), state_at(-1))
    checkpoints.close()
    assert next_step == 3 and (np.asarray(state["params"]["w"]) == 3).all()


SAVE_ON_8 = """
    import pathlib, sys
    import jax, jax.numpy as jnp
    from jdmdr import parallel
    from jdmdr.checkpoint import Checkpoints
    mesh = parallel.data_mesh()
    state = {"params": {"w": jnp.arange(16.0).reshape(8, 2)}, "step": jnp.asarray(7, jnp.int32)}
    state = jax.device_put(state, parallel.replicated(mesh))
    state["params"]["w"] = jax.device_put(state["params"]["w"], parallel.rows(mesh))
    checkpoints = Checkpoints(pathlib.Path(sys.argv[1]))
    checkpoints.save(7, state, 0.5)
    checkpoints.close()
    print(len(state["params"]["w"].sharding.device_set))
"""
RESTORE = """
    import pathlib, sys
    import jax, jax.numpy as jnp
    from jdmdr import parallel
    from jdmdr.checkpoint import Checkpoints
    like = {"params": {"w": jnp.zeros((8, 2))}, "step": jnp.asarray(0, jnp.int32)}
    like = jax.device_put(like, parallel.replicated(parallel.data_mesh()))
    state, next_step = Checkpoints(pathlib.Path(sys.argv[1])).restore(7, like)
    w = state["params"]["w"]
    print(len(w.sharding.device_set), (w == jnp.arange(16.0).reshape(8, 2)).all(), next_step, state["step"])
"""


def test_checkpoint_of_8_devices_is_read_on_2_and_on_1(tmp_path, on_devices):
    assert on_devices(8, SAVE_ON_8, tmp_path).split() == ["8"]
    assert on_devices(2, RESTORE, tmp_path).split() == ["2", "True", "7", "7"]
    like = jax.device_put({**state_at(0)}, parallel.replicated(parallel.data_mesh()))
    checkpoints = Checkpoints(tmp_path)
    state, _ = checkpoints.restore(7, like)
    checkpoints.close()
    np.testing.assert_array_equal(state["params"]["w"], np.arange(16.0).reshape(8, 2))
