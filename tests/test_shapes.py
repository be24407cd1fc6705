import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Source
from hypothesis import given, settings
from hypothesis import strategies as st

from jdmdr import shapes
from jdmdr.encoders.packed import Places, by_sequence, pool
from jdmdr.types import UserError


def random_lengths(steps, rows, high, seed=0):
    return np.random.default_rng(seed).integers(1, high, (steps, rows))


SIDES = shapes.Side(4, 32, runs=2), shapes.Side(4, 100, runs=4)
AS_THEY_LIE = tuple(side._replace(runs=0) for side in SIDES)


def profiles_for(query_lengths, passage_lengths, sides=SIDES, **options):
    return shapes.plan_profiles(query_lengths, passage_lengths, sides, **options)


@pytest.mark.parametrize(
    "rows, wanted, devices, count",
    [(64, 16, 1, 4), (64, 16, 8, 4), (24, 16, 2, 2), (24, 8, 8, 3), (61, 16, 1, 1), (8, 32, 8, 1), (62, 16, 1, 2)],
)
def test_parts_are_equal_close_to_the_wanted_size_and_split_over_devices(rows, wanted, devices, count):
    assert shapes.part_count(rows, wanted, devices) == count
    assert rows % count == 0 and rows // count % devices == 0


def test_a_batch_that_devices_cannot_share_is_refused():
    with pytest.raises(UserError, match="12 sequences, not a multiple of 8 devices"):
        shapes.part_count(12, 4, 8)


@pytest.mark.parametrize(
    "rows, options, per_row, runs",
    [
        (512, {}, 16, 16),  # 32 rows, so that 32 sequences are the least of a run
        (32, {}, 16, 2),
        (16, {}, 16, 1),
        (4, {}, 4, 1),
        (32, {"pads": False}, 16, 0),
        (32, {"grad_cache": 4}, 4, 2),
        (64, {"devices": 8}, 8, 4),
    ],
)
def test_a_row_holds_up_to_sixteen_sequences_and_no_more_than_the_grad_cache(rows, options, per_row, runs):
    options = {"chunk_rows": 16, "grad_cache": 0, "devices": 1, "pads": True, **options}
    assert shapes.make_side(rows, 100, **options) == shapes.Side(per_row, 100, runs)


def test_profiles_are_few_sorted_by_cost_and_end_in_the_ceiling():
    profiles = profiles_for(random_lengths(40, 8, 30), random_lengths(40, 16, 90), max_profiles=3)
    assert len(profiles) <= 4
    assert profiles[-1] == shapes.Profile((4 * 32 + 1, 32, 32), (4 * 100 + 1, 100, 100, 100, 100))
    cost = [2 * p.query_widths[0] + 4 * p.passage_widths[0] for p in profiles]
    assert cost == sorted(cost)
    for profile in profiles[:-1]:
        for row, *widths in profile:
            assert row % 16 == 0 and widths == sorted(widths, reverse=True)
            assert all(width % 16 == 0 or width == 100 for width in widths)


def test_every_sampled_batch_is_covered_without_the_ceiling():
    query_lengths, passage_lengths = random_lengths(40, 8, 17), random_lengths(40, 16, 60)
    profiles = profiles_for(query_lengths, passage_lengths)
    chosen = {shapes.cheapest(profiles, q, p, SIDES) for q, p in zip(query_lengths, passage_lengths, strict=True)}
    assert profiles[-1] not in chosen and len(chosen) > 1


@pytest.mark.parametrize("sides", [SIDES, AS_THEY_LIE])
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), high=st.integers(2, 200))
def test_the_cheapest_profile_holds_the_batch_and_no_cheaper_one_does(sides, seed, high):
    profiles = profiles_for(random_lengths(20, 8, 20), random_lengths(20, 16, 60), sides)
    lengths = random_lengths(1, 8, 40, seed)[0], random_lengths(1, 16, high, seed)[0]
    profile = shapes.cheapest(profiles, *lengths, sides)

    def holds(candidate):
        for own, side, (row, *widths) in zip(lengths, sides, candidate, strict=True):
            lengths_RxS = np.minimum(own, side.max_length)[shapes.balanced_rows(np.minimum(own, side.max_length), 4)]
            if (lengths_RxS.sum(axis=1) >= row).any():
                return False
            if side.runs and (lengths_RxS.max(axis=0) > side.of_sequences(widths)).any():
                return False
        return True

    assert holds(profile)
    assert not any(holds(cheaper) for cheaper in profiles[: profiles.index(profile)])


def test_neighbours_of_a_run_share_the_width_of_its_longest():
    assert shapes.Side(5, 99, runs=2).of_sequences([30, 20]) == (30, 30, 20, 20, 20)
    assert shapes.Side(5, 99, runs=0).of_sequences([]) is None


def token_sums(params, tokens, key, widths):
    del key
    sums = lambda ids_BxW, mask_BxW: (ids_BxW * mask_BxW).sum(1)[:, None] * params
    return pool(sums, widths, tokens.lengths_BxS, tokens.ids_BxT)


def test_a_batch_is_encoded_by_one_call_and_comes_in_the_order_of_the_plan():
    lengths, rows_N = np.array([3, 9, 1, 7, 7, 2, 5, 4]), np.array([7, 1, 1, 0, 3, 2, 5, 6])
    block = shapes.Side(4, 8, runs=2).pack(Source(lengths), rows_N, (30, 8, 8))
    found_NxD = shapes.encode_rows(token_sums, jnp.array([1.0, 2.0]), block)
    expected_N = rows_N * np.minimum(lengths[rows_N], 8)
    np.testing.assert_allclose(found_NxD, np.stack([expected_N, 2 * expected_N], axis=1))
    as_they_lie = shapes.encode_rows(token_sums, jnp.ones(1), dataclasses.replace(block, order_N=None))
    np.testing.assert_allclose(as_they_lie[block.order_N, 0], expected_N)


def test_no_sequences_are_no_block():
    assert shapes.Side(0, 8, runs=0).pack(Source([]), np.empty(0, np.int64), ()) is None


def test_padding_share_counts_empty_token_slots():
    side = shapes.Side(2, 4, runs=0)
    block = side.pack(Source([2, 4, 4, 2]), np.arange(4), (8,))
    assert shapes.padding_share(12, block) == pytest.approx(4 / 16)
    assert shapes.padding_share(12, block, None) == pytest.approx(4 / 16)
    assert shapes.padding_share(20, block, side.pack(Source([4, 4]), np.arange(2), (9,))) == pytest.approx(5 / 25)


def test_batches_waste_less_than_a_sixth_of_padding_to_the_longest():
    lengths = np.random.default_rng(0).geometric(1 / 30, (50, 64)).clip(1, 128)
    side = shapes.Side(8, 128, runs=4)
    profiles = shapes.plan_profiles(lengths, lengths, (side, side), width_multiple=8)
    source = Source(lengths.ravel())
    shares, longest_share = [], []
    for step in range(50):
        rows = np.arange(64) + 64 * step
        profile = shapes.cheapest(profiles, lengths[step], lengths[step], (side, side))
        shares.append(shapes.padding_share(lengths[step].sum(), side.pack(source, rows, profile.passage_widths)))
        longest_share.append(1 - lengths[step].mean() / lengths[step].max())
    assert np.mean(shares) < np.mean(longest_share) / 6


def test_packed_rows_hold_every_token_once_in_order_with_padding_behind():
    lengths = np.array([3, 9, 1, 7, 7, 2, 5, 4])
    rows_N = np.array([7, 1, 1, 0, 3, 2, 5, 6])
    block = shapes.Side(4, 8, runs=0).pack(Source(lengths), rows_N, (30,))
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


LENGTHS_RxS, WIDTHS, T = np.array([[5, 3, 1, 2], [4, 4, 2, 1]]), (6, 4, 2), 11


def test_tokens_spread_into_padded_blocks_and_collected_are_what_they_were():
    x_RxTxD = jnp.asarray(np.random.default_rng(0).normal(size=(2, T, 3)).astype(np.float32))
    where = Places.of(jnp.asarray(LENGTHS_RxS), T, WIDTHS)
    spread_RxPxD = where.spread(x_RxTxD)
    for row, lengths in enumerate(LENGTHS_RxS):
        begin, place = 0, 0
        for length, width in zip(lengths[:-1], WIDTHS, strict=True):
            np.testing.assert_array_equal(
                spread_RxPxD[row, place : place + length], x_RxTxD[row, begin : begin + length]
            )
            assert not spread_RxPxD[row, place + length : place + width].any()
            begin, place = begin + length, place + width
    expected = np.where(np.arange(T)[:, None] < LENGTHS_RxS[:, :-1].sum(axis=1)[:, None, None], x_RxTxD, 0)
    np.testing.assert_array_equal(where.collect(spread_RxPxD), expected)


def test_a_function_of_sequences_sees_each_with_its_mask_and_has_the_gradient_of_plain_loops():
    rng = np.random.default_rng(1)
    x_RxTxD, weight_RxTxD = (jnp.asarray(rng.normal(size=(2, T, 3)).astype(np.float32)) for _ in range(2))

    def centred(x_BxWxD, mask_BxW):
        real = mask_BxW[:, :, None]
        return jnp.sin(x_BxWxD - (x_BxWxD * real).sum(1, keepdims=True) / real.sum(1, keepdims=True))

    def together(x):
        return (weight_RxTxD * by_sequence(centred, WIDTHS, jnp.asarray(LENGTHS_RxS), x)).sum()

    def alone(x):
        total = 0.0
        for row, lengths in enumerate(LENGTHS_RxS):
            begin = 0
            for length in lengths[:-1]:
                own = x[row, begin : begin + length]
                total += (weight_RxTxD[row, begin : begin + length] * jnp.sin(own - own.mean(0))).sum()
                begin += length
        return total

    (value, gradient), (expected, expected_gradient) = (jax.value_and_grad(f)(x_RxTxD) for f in (together, alone))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)
