import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Source
from hypothesis import given, settings
from hypothesis import strategies as st

from jdmdr import shapes
from jdmdr.encoders import packed
from jdmdr.types import UserError


def random_lengths(steps, rows, high, seed=0):
    return np.random.default_rng(seed).integers(1, high, (steps, rows))


SIDES = shapes.Side(2, 32, packed=False), shapes.Side(4, 100, packed=False)
PACKED_SIDES = shapes.Side(4, 32, packed=True), shapes.Side(4, 100, packed=True)


def profiles_for(query_lengths, passage_lengths, sides=SIDES, **options):
    return shapes.plan_profiles(query_lengths, passage_lengths, sides, **options)


def row_sums(params, tokens, key, widths):
    def mean(ids_BxT, mask_BxT):
        return ((ids_BxT * mask_BxT).sum(1) / mask_BxT.sum(1))[:, None] * params

    return packed.pool(mean, widths, tokens.ids_BxT, tokens.mask_BxT)


@pytest.mark.parametrize(
    "rows, wanted, devices, count",
    [(64, 16, 1, 4), (64, 16, 8, 4), (24, 16, 2, 2), (24, 8, 8, 3), (61, 16, 1, 1), (8, 32, 8, 1), (62, 16, 1, 2)],
)
def test_chunks_are_equal_close_to_the_wanted_size_and_split_over_devices(rows, wanted, devices, count):
    assert shapes.chunk_count(rows, wanted, devices) == count
    assert rows % count == 0 and rows // count % devices == 0


def test_a_batch_that_devices_cannot_share_is_refused():
    with pytest.raises(UserError, match="12 sequences, not a multiple of 8 devices"):
        shapes.chunk_count(12, 4, 8)


def test_profiles_are_few_sorted_by_cost_and_end_in_the_ceiling():
    profiles = profiles_for(random_lengths(40, 8, 30), random_lengths(40, 16, 90), max_profiles=3)
    assert len(profiles) <= 4
    assert profiles[-1] == shapes.Profile((32, 32), (100,) * 4)
    cost = [4 * sum(p.query_widths) + 4 * sum(p.passage_widths) for p in profiles]
    assert cost == sorted(cost)
    for profile in profiles:
        for widths in profile:
            assert list(widths) == sorted(widths, reverse=True)
            assert all(width % 16 == 0 or width == 100 for width in widths)


def test_every_sampled_batch_is_covered_without_the_ceiling():
    query_lengths, passage_lengths = random_lengths(40, 8, 17), random_lengths(40, 16, 60)
    profiles = profiles_for(query_lengths, passage_lengths)
    chosen = {shapes.cheapest(profiles, q, p, SIDES) for q, p in zip(query_lengths, passage_lengths, strict=True)}
    assert profiles[-1] not in chosen and len(chosen) > 1


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), high=st.integers(2, 200))
def test_the_cheapest_covering_profile_truncates_only_beyond_the_maximum(seed, high):
    profiles = profiles_for(random_lengths(20, 8, 20), random_lengths(20, 16, 60))
    query_lengths, passage_lengths = random_lengths(1, 8, 40, seed)[0], random_lengths(1, 16, high, seed)[0]
    profile = shapes.cheapest(profiles, query_lengths, passage_lengths, SIDES)

    def covers(candidate):
        sides = [(candidate.query_widths, query_lengths, 32), (candidate.passage_widths, passage_lengths, 100)]
        return all(
            np.all(np.sort(np.minimum(lengths, most))[::-1] <= np.repeat(widths, len(lengths) // len(widths)))
            for widths, lengths, most in sides
        )

    assert covers(profile)
    assert not any(covers(cheaper) for cheaper in profiles[: profiles.index(profile)])


def test_packing_keeps_every_token_and_the_plan_order():
    lengths = np.array([3, 9, 1, 7, 7, 2, 5, 4])
    rows_N = np.array([7, 1, 1, 0, 3, 2, 5, 6])
    chunks = shapes.pack(Source(lengths), rows_N, (12, 4))
    assert [ids.shape for ids in chunks.ids] == [(4, 12), (4, 4)]
    assert sum(mask.sum() for mask in chunks.mask) == lengths[rows_N].sum()
    assert sorted(chunks.order_N) == list(range(8))
    emb_NxD = shapes.encode_chunks(row_sums, jnp.ones(3), chunks)
    np.testing.assert_allclose(emb_NxD, np.repeat(rows_N[:, None], 3, axis=1))


def test_encoding_in_chunks_equals_encoding_at_full_width_in_value_and_gradient():
    lengths = random_lengths(1, 12, 20)[0]
    source, rows_N = Source(lengths), np.arange(12)

    def loss(params, widths):
        return (jnp.sin(shapes.encode_chunks(row_sums, params, shapes.pack(source, rows_N, widths))) ** 2).sum()

    params = jnp.array([0.3, -0.1])
    for widths in [(20, 20, 16), (20, 20, 20)]:
        value, gradient = jax.value_and_grad(loss)(params, widths)
        expected = jax.value_and_grad(loss)(params, (20,))
        np.testing.assert_allclose(value, expected[0], rtol=1e-6)
        np.testing.assert_allclose(gradient, expected[1], rtol=1e-5)


def test_a_batch_is_encoded_by_one_call_with_a_sequence_of_every_chunk_in_each_row():
    calls = []

    def apply(params, tokens, key, widths):
        calls.append((tokens.ids_BxT.shape, widths))
        return row_sums(params, tokens, key, widths)

    shapes.encode_chunks(apply, jnp.ones(1), shapes.pack(Source([4] * 8), np.arange(8), (8, 4, 4, 4)))
    assert calls == [((2, 20), (8, 4, 4, 4))]


def test_padding_share_counts_empty_token_slots():
    chunks = shapes.pack(Source([2, 4, 4, 2]), np.arange(4), (4, 4))
    assert shapes.padding_share(12, chunks) == pytest.approx(4 / 16)
    assert shapes.padding_share(20, chunks, shapes.pack(Source([4, 4]), np.arange(2), (4,))) == pytest.approx(4 / 24)


@pytest.mark.parametrize("packed_rows", [False, True])
def test_layouts_waste_less_than_half_and_packed_less_than_a_sixth_of_padding_to_the_longest(packed_rows):
    lengths = np.random.default_rng(0).geometric(1 / 30, (50, 64)).clip(1, 128)
    side = shapes.Side(8, 128, packed_rows)
    profiles = shapes.plan_profiles(lengths, lengths, (side, side), width_multiple=8)
    source = Source(lengths.ravel())
    shares, longest_share = [], []
    for step in range(50):
        rows = np.arange(64) + 64 * step
        profile = shapes.cheapest(profiles, lengths[step], lengths[step], (side, side))
        shares.append(shapes.padding_share(lengths[step].sum(), side.pack(source, rows, profile.passage_widths)))
        longest_share.append(1 - lengths[step].mean() / lengths[step].max())
    assert np.mean(shares) < np.mean(longest_share) / (6 if packed_rows else 2)


def test_packed_rows_hold_every_token_once_in_order_with_padding_behind():
    lengths = np.array([3, 9, 1, 7, 7, 2, 5, 4])
    rows_N = np.array([7, 1, 1, 0, 3, 2, 5, 6])
    block = shapes.Side(4, 8, packed=True).pack(Source(lengths), rows_N, (30,))
    assert block.ids_RxT.shape == (2, 30) and block.lengths_RxS.shape == (2, 5)
    assert (block.lengths_RxS.sum(axis=1) == 30).all() and (block.lengths_RxS[:, -1] >= 1).all()
    sequences = [
        part
        for row, ends in zip(block.ids_RxT, block.lengths_RxS.cumsum(1), strict=True)
        for part in np.split(row, ends)[:4]
    ]
    for row, place in zip(rows_N, block.order_N, strict=True):
        assert sequences[place].tolist() == [row] * min(lengths[row], 8)
    assert block.mask_RxT.sum() == np.minimum(lengths[rows_N], 8).sum()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), high=st.integers(2, 200))
def test_the_cheapest_packed_profile_holds_the_batch_and_the_next_cheaper_one_does_not(seed, high):
    profiles = profiles_for(random_lengths(20, 8, 20), random_lengths(20, 16, 60), PACKED_SIDES)
    assert profiles[-1] == shapes.Profile((4 * 32 + 1,), (4 * 100 + 1,))
    lengths = random_lengths(1, 8, 40, seed)[0], random_lengths(1, 16, high, seed)[0]
    profile = shapes.cheapest(profiles, *lengths, PACKED_SIDES)

    def holds(candidate):
        rows = [np.minimum(own, side.max_length)[shapes.balanced_rows(np.minimum(own, side.max_length), 4)].sum(axis=1)
                for own, side in zip(lengths, PACKED_SIDES, strict=True)]  # fmt: skip
        return all((r < widths[0]).all() for r, widths in zip(rows, candidate, strict=True))

    assert holds(profile)
    assert not any(holds(cheaper) for cheaper in profiles[: profiles.index(profile)])
