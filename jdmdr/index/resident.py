"""A collection that stays on the devices, for exact search inside a jitted step.

The rows lie over the mesh's axis "data"; nothing leaves the devices but the k best rows of each. `top_k` gives the rows
that an exact search over float32 vectors finds, up to the rounding of the stored numbers; `scores` is differentiable in
the queries and moves one float a pair instead of a vector.

Sources: Zhan et al. (SIGIR 2021), section 5, for the use; Jegou et al. (2011) for searching in few bits and rescoring.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jdmdr.index.searcher import check_blocks
from jdmdr.types import NO_HIT, UserError

DTYPES = ("bfloat16", "float32", "int8")
GROUP = 128  # rows whose maximum decides whether they are looked at one by one
MOST_SCORES = 2**30  # that a device holds at a time: 4 GB, and below what 32-bit offsets can tell apart
RESCORED = 2  # times k rows are found in int8 and scored again in float32


class Resident(NamedTuple):
    """C rows padded to a multiple of devices x GROUP; rows from `C` on are zero and never found (a pytree).

    `search_CxD` is what is searched; int8 rows have a scale each, and `exact_CxD` gives the scores. bfloat16 and float32 rows
    have neither: they give the scores themselves.
    """

    search_CxD: jax.Array
    exact_CxD: jax.Array | None
    scale_C: jax.Array | None


def place(blocks: Sequence[np.ndarray], mesh: Mesh, dtype: str) -> Resident:
    """Puts the rows of `blocks` (CixD, memory-mapped as a rule) on the mesh; each device's rows are read for it alone.

    `dtype` is one of DTYPES. int8 rows are scaled by their largest magnitude and stand beside a float32 copy.

    Raises:
      UserError: no rows, several widths, or a row that is not finite.
    """
    rows, width = check_blocks(blocks)
    unit = mesh.shape["data"] * GROUP
    padded = -(-rows // unit) * unit
    firsts = np.cumsum([0, *(len(block) for block in blocks)])

    def read(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(padded)
        part_CxD = np.zeros((stop - start, width), np.float32)
        for block, first in zip(blocks, firsts[:-1].tolist(), strict=True):
            low, high = max(start, first), min(stop, first + len(block))
            if low < high:
                part_CxD[low - start : high - start] = block[low - first : high - first]
        if not np.isfinite(part_CxD).all():
            row = start + int(np.flatnonzero(~np.isfinite(part_CxD).all(axis=1))[0])
            raise UserError(f"row {row} of the embeddings holds NaN or infinity: encode the collection again")
        return part_CxD

    def array(make, shape: tuple[int, ...]) -> jax.Array:
        return jax.make_array_from_callback(shape, NamedSharding(mesh, P("data")), lambda index: make(read(index)))

    wide = (padded, width)
    if dtype != "int8":
        return Resident(array(lambda part: part.astype(jnp.dtype(dtype)), wide), None, None)
    return Resident(
        array(lambda part: np.rint(part / _scale(part)[:, None]).astype(np.int8), wide),
        array(lambda part: part, wide),
        array(_scale, (padded,)),
    )


def _scale(part_CxD: np.ndarray) -> np.ndarray:
    largest_C = np.abs(part_CxD).max(axis=1)
    return np.where(largest_C > 0, largest_C / 127, 1).astype(np.float32)


def top_k(
    resident: Resident, q_BxD: jax.Array, k: int, first_B: jax.Array, end_B: jax.Array, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """The best k rows of [first_i, end_i) for each query and their scores, BxK int32 and float32, best first.

    Ties go to the lower row. Where there are fewer than k rows the rest is `NO_HIT` and -inf. To be called under jit;
    no gradient flows.
    """
    q_BxD = jax.lax.stop_gradient(q_BxD).astype(jnp.float32)
    depth = k * RESCORED if resident.scale_C is not None else k

    def on_device(search_CxD, scale_C, q_BxD, first_B, end_B):
        rows = search_CxD.shape[0]
        base = jax.lax.axis_index("data") * rows

        def best(q_BxD, first_B, end_B):
            scores_BxC = _products(q_BxD, search_CxD)
            if scale_C is not None:
                scores_BxC *= scale_C
            row_C = base + jnp.arange(rows)
            inside_BxC = (row_C >= first_B[:, None]) & (row_C < end_B[:, None])
            return _group_top_k(jnp.where(inside_BxC, scores_BxC, -jnp.inf), depth)

        scores_BxK, places_BxK = _in_parts(best, max(1, MOST_SCORES // rows), q_BxD, first_B, end_B)
        gather = functools.partial(jax.lax.all_gather, axis_name="data", axis=1, tiled=True)
        return _best(gather(scores_BxK), gather(base + places_BxK), depth)

    specs = (P("data"), None if resident.scale_C is None else P("data"), P(), P(), P())
    # Every device ends with the same gathered result, which the replication check cannot see.
    search = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    scores_BxK, rows_BxK = search(resident.search_CxD, resident.scale_C, q_BxD, first_B, end_B)
    if resident.scale_C is not None:
        exact_BxK = jnp.where(jnp.isfinite(scores_BxK), scores(resident, q_BxD, rows_BxK, mesh), -jnp.inf)
        by_row_BxK = jnp.argsort(rows_BxK, axis=1)  # so that ties go to the lower row again
        scores_BxK, rows_BxK = _best(*(jnp.take_along_axis(x, by_row_BxK, 1) for x in (exact_BxK, rows_BxK)), k)
    return jnp.where(jnp.isfinite(scores_BxK), rows_BxK, NO_HIT), scores_BxK


def scores(resident: Resident, q_BxD: jax.Array, rows_BxM: jax.Array, mesh: Mesh) -> jax.Array:
    """q_i . row_ij, BxM float32, differentiable in `q_BxD`; 0 where the row is `NO_HIT`. To be called under jit."""

    def on_device(exact_CxD, q_BxD, rows_BxM):
        rows = exact_CxD.shape[0]
        place_BxM = rows_BxM - jax.lax.axis_index("data") * rows
        own_BxM = (rows_BxM >= 0) & (place_BxM >= 0) & (place_BxM < rows)
        vectors_BxMxD = exact_CxD[jnp.clip(place_BxM, 0, rows - 1)].astype(jnp.float32)
        scores_BxM = jnp.einsum("bd,bmd->bm", q_BxD, vectors_BxMxD, precision=jax.lax.Precision.HIGHEST)
        return jax.lax.psum(jnp.where(own_BxM, scores_BxM, 0.0), "data")

    score = jax.shard_map(on_device, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P())
    exact_CxD = resident.search_CxD if resident.exact_CxD is None else resident.exact_CxD
    return score(exact_CxD, q_BxD.astype(jnp.float32), rows_BxM)


def _in_parts(function: Callable, most: int, *arrays_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`function` on at most `most` rows at a time, and what it gives one after another."""
    B = len(arrays_B[0])
    if most >= B:
        return function(*arrays_B)
    parts = -(-B // most)
    padded = [jnp.pad(x, [(0, parts * most - B)] + [(0, 0)] * (x.ndim - 1)) for x in arrays_B]
    found = jax.lax.map(lambda xs: function(*xs), tuple(x.reshape(parts, most, *x.shape[1:]) for x in padded))
    return tuple(x.reshape(parts * most, *x.shape[2:])[:B] for x in found)


def _products(q_BxD: jax.Array, rows_CxD: jax.Array) -> jax.Array:
    """Inner products in float32; in bfloat16 the operands are rounded, and the products are not."""
    if rows_CxD.dtype == jnp.bfloat16:
        return jnp.matmul(q_BxD.astype(jnp.bfloat16), rows_CxD.T, preferred_element_type=jnp.float32)
    return jnp.matmul(q_BxD, rows_CxD.T.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _group_top_k(scores_BxC: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The best min(k, C) scores and their places, exactly, looking at few of the C.

    Only the k groups with the highest maxima can hold one of the best k: k groups each have an element as good as the
    maximum of any other.
    """
    B, C = scores_BxC.shape
    groups = min(k, C // GROUP)
    scores_BxGxI = scores_BxC.reshape(B, C // GROUP, GROUP)
    _, chosen_BxG = jax.lax.top_k(scores_BxGxI.max(axis=2), groups)
    chosen_BxG = jnp.sort(chosen_BxG, axis=1)  # ties then go to the lower place
    candidates_BxN = jnp.take_along_axis(scores_BxGxI, chosen_BxG[:, :, None], axis=1).reshape(B, groups * GROUP)
    places_BxN = (chosen_BxG[:, :, None] * GROUP + jnp.arange(GROUP)).reshape(B, groups * GROUP)
    return _best(candidates_BxN, places_BxN, min(k, C))


def _best(scores_BxN: jax.Array, labels_BxN: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The best k scores with their labels, padded where there are fewer; ties go to the earlier column."""
    found_BxK, places_BxK = jax.lax.top_k(scores_BxN, min(k, scores_BxN.shape[1]))
    missing = ((0, 0), (0, k - found_BxK.shape[1]))
    labels_BxK = jnp.take_along_axis(labels_BxN, places_BxK, axis=1)
    return jnp.pad(found_BxK, missing, constant_values=-jnp.inf), jnp.pad(labels_BxK, missing, constant_values=NO_HIT)
