import numpy as np
import pytest
from conftest import tiny_config

from jdmdr import encoders, fit, parallel


def tried(bytes_of, *arguments):
    """(what `largest_batch` finds, the batch sizes that it tried)."""
    sizes = []

    def noted(size):
        sizes.append(size)
        return bytes_of(size)

    return fit.largest_batch(noted, *arguments), sizes


def test_memory_on_a_line_takes_three_tries():
    found, sizes = tried(lambda size: 900 + 3 * size, 24, 8, 8000)
    assert found == (2360, 900 + 3 * 2360) and sizes == [24, 48, 2360]


def test_a_batch_that_does_not_fit_leads_to_a_smaller_one_or_to_none():
    assert tried(lambda size: 900 + 3 * size, 24, 8, 950) == ((16, 948), [24, 8, 16])
    assert tried(lambda size: 900 + 3 * size, 24, 8, 100)[0] == (0, 924)


@pytest.mark.parametrize("curve", [0.004, -0.0001])
def test_the_result_was_tried_fits_and_is_close_where_memory_is_no_line(curve):
    bytes_of = lambda size: 900 + 3 * size + curve * size**2
    (size, found), sizes = tried(bytes_of, 24, 8, 8000)
    assert size in sizes and found == bytes_of(size) <= 8000 and len(sizes) <= 5
    assert bytes_of(size * 1.25) > 8000


def test_bytes_of_a_step_hold_parameters_moments_and_what_grows_with_the_batch():
    section = tiny_config("").train.copy_and_resolve_references()
    with section.unlocked():
        section.steps = 10
    config = encoders.EncoderConfig("static", vocab_size=3000, width=32)
    mesh = parallel.data_mesh()
    small, large = (fit.step_bytes(config, section, (8, 24), B, mesh) for B in (8, 64))
    parameters = 3000 * 33 * 4
    assert small > 3 * parameters, "the parameters and two moments of Adam"
    texts = 56 * (8 + section.passages_per_query * 24)  # more tokens in the larger batch
    assert large - small > texts * 32 * 4, "and a vector for each token"


def test_an_abstract_batch_has_the_shapes_of_a_real_one(finished):
    from jdmdr import sources, topics
    from jdmdr.negatives import version_dir

    c = finished.config
    labels = topics.read_topics(finished.directory / "topics", finished.library)
    version = version_dir(finished.directory / "negatives", 0)
    mined = sources.labelled(finished.training, finished.stores, finished.library, version, labels, False)
    found = [sources.Source(mined, 1.0, c.train.passages_per_query)]
    real = sources.batch_maker(found, c.train, c.weights, (32, 96), 1, 0, 2, c.topics.clusters)[0](0)[0]
    ours = fit.abstract_batch(c.train, c.train.batch_size, (32, 96), finished.mesh, pads=True)
    assert ours.keys() == real.keys()
    for name in real.keys() - {"queries", "passages", "positive_ids_BxM"}:
        assert (ours[name].shape, ours[name].dtype) == (real[name].shape, real[name].dtype), name
    assert all(np.shape(ours[name].order_N) == real[name].order_N.shape for name in ("queries", "passages"))
