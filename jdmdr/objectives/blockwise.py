"""What a softmax over all passages of a global batch needs, without ever holding the scores of all of them.

Per query: the score of its target, and of its negatives the log-sum-exp, the highest score and the sum of the weights. Where
one block of scores holds them all, that is a few lines that JAX differentiates. Otherwise every device keeps the rows of
its own queries, the passages go round the devices in a ring, and each is scored block by block; the backward pass
scores the blocks again and sends the passages' gradients along with them. Memory then grows with B, not with B * N.

Source: the online softmax of Milakov and Gimelshein (2018), the ring of Liu et al., "Ring Attention with Blockwise
Transformers" (ICLR 2024), here over a batch's passages instead of a sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

BLOCK = 2**22  # scores of one block on a device
NONE = -1e30  # log-sum-exp and highest score of no negatives: finite, so that differences stay free of NaN


class Columns(NamedTuple):
    """The columns of the score matrix, beside their passages."""

    place_N: jax.Array  # what `target_B` calls them
    ids_N: jax.Array
    first_N: jax.Array  # whether no earlier column holds the same passage
    weight_RxN: jax.Array  # R ways to weigh the negatives


class Rows(NamedTuple):
    """The rows of the score matrix, beside their queries."""

    target_B: jax.Array
    positive_ids_BxM: jax.Array


class Softmax(NamedTuple):
    """What is known of each query's scores s; of the last two there is no gradient."""

    target_B: jax.Array
    log_sum_RxB: jax.Array  # log sum of w_j exp s_j over the negatives
    highest_B: jax.Array  # of the negatives
    weight_RxB: jax.Array  # sum of w_j over the negatives


# How they are split over the devices.
DATA, SECOND = PartitionSpec("data"), PartitionSpec(None, "data")
OF_COLUMNS, OF_SOFTMAX = Columns(DATA, DATA, DATA, SECOND), Softmax(DATA, SECOND, DATA, SECOND)


def of_batch(batch: Mapping[str, Any], weighted: bool = False) -> tuple[Rows, Columns]:
    """Rows and columns of a batch in plan order; the weights are ones, and with `weighted` the batch's too."""
    ids_N = jnp.asarray(batch["passage_ids_N"])
    weights = [jnp.ones(len(ids_N)), *([batch["weight_N"]] if weighted else [])]
    return (
        Rows(jnp.asarray(batch["target_B"]), jnp.asarray(batch["positive_ids_BxM"])),
        Columns(jnp.arange(len(ids_N)), ids_N, jnp.asarray(batch["first_N"]), jnp.stack(weights)),
    )


def reordered(columns: Columns, order_N: jax.Array) -> Columns:
    """The columns with number i of them at place `order_N[i]`."""
    return jax.tree.map(lambda x: jnp.zeros_like(x).at[..., order_N].set(x, unique_indices=True), columns)


def kinds(rows: Rows, columns: Columns) -> tuple[jax.Array, jax.Array]:
    """Which columns are each query's target, and which its negatives, BxN.

    No negative is a known positive of the query, or a passage that stands in an earlier column; both by id.
    """
    is_target_BxN = columns.place_N == rows.target_B[:, None]
    known_BxN = (rows.positive_ids_BxM[:, :, None] == columns.ids_N).any(axis=1)
    return is_target_BxN, columns.first_N & ~known_BxN & ~is_target_BxN


def similarities(q_BxD: jax.Array, p_NxD: jax.Array) -> jax.Array:
    """Inner products BxN in float32 at full precision."""
    return jnp.einsum(
        "bd,nd->bn", q_BxD.astype(jnp.float32), p_NxD.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )


def exceeds_one_block(B: int, N: int, mesh: Mesh | None) -> bool:
    return B // _devices(mesh) * N > BLOCK


def softmax(q_BxD: jax.Array, p_NxD: jax.Array, rows: Rows, columns: Columns, mesh: Mesh | None = None) -> Softmax:
    """The scores q . p of every query against every column, reduced; differentiable in `q_BxD` and `p_NxD`.

    With a mesh, and where one block does not do, queries and passages are split over its axis `data`, which has to divide
    both.
    """
    if not exceeds_one_block(len(q_BxD), len(p_NxD), mesh):
        return _one_block(q_BxD, p_NxD, rows, columns)
    q_BxD, p_NxD = q_BxD.astype(jnp.float32), p_NxD.astype(jnp.float32)
    return _in_blocks(q_BxD, p_NxD, rows, columns, mesh, BLOCK)


def _one_block(q_BxD: jax.Array, p_NxD: jax.Array, rows: Rows, columns: Columns) -> Softmax:
    scores_BxN = similarities(q_BxD, p_NxD)
    is_target_BxN, is_negative_BxN = kinds(rows, columns)
    negative_BxN = jnp.where(is_negative_BxN, scores_BxN, NONE)
    return Softmax(
        jnp.where(is_target_BxN, scores_BxN, 0.0).sum(axis=1),
        jax.nn.logsumexp(negative_BxN + jnp.log(columns.weight_RxN)[:, None, :], axis=2),
        negative_BxN.max(axis=1),
        jnp.matmul(columns.weight_RxN, is_negative_BxN.T.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST),
    )


def _joined(one: Softmax, other: Softmax) -> Softmax:
    """What is known of the columns of both."""
    return Softmax(
        one.target_B + other.target_B,
        jnp.logaddexp(one.log_sum_RxB, other.log_sum_RxB),
        jnp.maximum(one.highest_B, other.highest_B),
        one.weight_RxB + other.weight_RxB,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _in_blocks(q_BxD, p_NxD, rows, columns, mesh, block) -> Softmax:
    def on_device(q_BxD, p_NxD, rows, columns):
        def visit(known, held):
            step = lambda known, of: (_joined(known, _one_block(q_BxD, of[0], rows, of[1])), None)
            return jax.lax.scan(step, known, _split(*held, block // len(q_BxD)))[0], held

        zeros_B, zeros_RxB = jnp.zeros(len(q_BxD)), jnp.zeros((len(columns.weight_RxN), len(q_BxD)))
        nothing = Softmax(zeros_B, zeros_RxB + NONE, zeros_B + NONE, zeros_RxB)
        return _ring(visit, nothing, (p_NxD, columns), _devices(mesh))[0]

    sharded = _on_devices(on_device, mesh, (DATA, DATA, DATA, OF_COLUMNS), OF_SOFTMAX)
    return sharded(q_BxD, p_NxD, rows, columns)


def _forward(q_BxD, p_NxD, rows, columns, mesh, block):
    known = _in_blocks(q_BxD, p_NxD, rows, columns, mesh, block)
    return known, (q_BxD, p_NxD, rows, columns, known)


def _backward(mesh, block, residuals, g: Softmax):
    def on_device(q_BxD, p_NxD, rows, columns, known, g):
        def gradients(dq_BxD, of):
            p_NxD, columns = of
            scores_BxN = similarities(q_BxD, p_NxD)
            is_target_BxN, is_negative_BxN = kinds(rows, columns)
            shares_RxBxN = jnp.exp(scores_BxN - known.log_sum_RxB[:, :, None]) * columns.weight_RxN[:, None, :]
            negative_BxN = (shares_RxBxN * g.log_sum_RxB[:, :, None]).sum(axis=0)
            target_BxN = jnp.where(is_target_BxN, g.target_B[:, None], 0.0)
            d_BxN = jnp.where(is_negative_BxN, negative_BxN, target_BxN)
            exact = jax.lax.Precision.HIGHEST
            return dq_BxD + jnp.matmul(d_BxN, p_NxD, precision=exact), jnp.matmul(d_BxN.T, q_BxD, precision=exact)

        def visit(dq_BxD, held):
            p_NxD, columns, dp_NxD = held
            dq_BxD, more = jax.lax.scan(gradients, dq_BxD, _split(p_NxD, columns, block // len(q_BxD)))
            return dq_BxD, (p_NxD, columns, dp_NxD + more.reshape(-1, dp_NxD.shape[1])[: len(dp_NxD)])

        held = p_NxD, columns, jnp.zeros_like(p_NxD)
        dq_BxD, (*_, dp_NxD) = _ring(visit, jnp.zeros_like(q_BxD), held, _devices(mesh), home=True)
        return dq_BxD, dp_NxD

    sharded = _on_devices(on_device, mesh, (DATA, DATA, DATA, OF_COLUMNS, OF_SOFTMAX, OF_SOFTMAX), (DATA, DATA))
    return *sharded(*residuals, g), None, None


_in_blocks.defvjp(_forward, _backward)


def _split(p_NxD: jax.Array, columns: Columns, wanted: int) -> tuple[jax.Array, Columns]:
    """Passages and columns in blocks of equal width, about `wanted`, along a new first axis; empty columns fill the last."""
    N = len(p_NxD)
    blocks = -(-N // max(wanted, 1))
    width = -(-N // blocks)

    def split(x: jax.Array, axis: int, fill: Any) -> jax.Array:
        padding = [(0, blocks * width - N) if a == axis else (0, 0) for a in range(x.ndim)]
        x = jnp.pad(x, padding, constant_values=fill)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, width, *x.shape[axis + 1 :]), axis, 0)

    place, ids, first, weight = columns
    empty = Columns(split(place, 0, -1), split(ids, 0, -1), split(first, 0, False), split(weight, 1, 1.0))
    return split(p_NxD, 0, 0.0), empty


def _ring(visit: Callable, carry: Any, held: Any, devices: int, home: bool = False) -> tuple[Any, Any]:
    """`carry, held = visit(carry, held)` for what each device holds, passed on from one to the next; with `home` back to it."""

    def passed_on(held: Any) -> Any:
        pairs = [(device, (device + 1) % devices) for device in range(devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, "data", pairs), held) if devices > 1 else held

    def step(state: Any, _: None) -> tuple[Any, None]:
        carry, held = visit(*state)
        return (carry, passed_on(held)), None

    (carry, held), _ = jax.lax.scan(step, (carry, held), None, length=devices - 1)
    carry, held = visit(carry, held)
    return carry, passed_on(held) if home else held


def _devices(mesh: Mesh | None) -> int:
    return mesh.devices.size if mesh else 1


def _on_devices(function: Callable, mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Callable:
    """`function` on the share of every device."""
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
