"""Encoding inside a step: every device its share of a batch, all of it at once or a few sequences at a time (grad cache).

With the grad cache a device encodes a few sequences and keeps their embeddings alone; the backward pass encodes them again,
with the same dropout, and adds up the gradients. That is the gradient of the whole batch, for the memory of a few sequences
and one more forward pass: at least 4/3 of the time. Either way the devices add their gradients up once a step.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (RepL4NLP 2021), written
as a scan over rematerialised pieces, from which JAX derives the two passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdmdr.shapes import Packed, part_count
from jdmdr.types import Tokens

DATA, EVERYWHERE = PartitionSpec("data"), PartitionSpec()


class Shares(NamedTuple):
    """Encodes on each device of a mesh its share of the rows of a batch."""

    mesh: Mesh
    rows: int  # wanted sequences a piece on each device, encoded again in the backward pass; 0: all at once, and once

    def copies(self, params: Any) -> Any:
        """A copy of the parameters for each device, along a new first axis: what `encode` takes.

        Its gradient is the sum over the devices: one reduction for both sides of a batch and all their pieces.
        """

        def copy(leaf: jax.Array) -> jax.Array:
            stacked = jnp.broadcast_to(leaf, (self.mesh.devices.size, *leaf.shape))
            return jax.lax.with_sharding_constraint(stacked, NamedSharding(self.mesh, DATA))

        return jax.tree.map(copy, params)

    def encode(
        self,
        apply: Callable[[Any, Tokens, jax.Array | None, tuple[int, ...] | None], jax.Array],
        copies: Any,
        block: Packed,
        rng: jax.Array,
    ) -> jax.Array:
        """As `shapes.encode_rows`, for `copies` of the parameters; dropout differs between devices, and between pieces.

        Embeddings in plan order are on every device; as encoded they stay where they were encoded.
        """

        def on_device(copies: Any, block: Packed, rng: jax.Array) -> jax.Array:
            params = jax.tree.map(lambda leaf: leaf[0], copies)
            rng = jax.random.fold_in(rng, jax.lax.axis_index("data"))
            if not self.rows:
                return apply(params, block.tokens, rng, block.widths)
            rows, per_row = len(block.ids_RxT), block.lengths_RxS.shape[1] - 1
            pieces = part_count(rows, max(self.rows / per_row, 1), 1)
            split = jax.tree.map(lambda x: x.reshape(pieces, rows // pieces, *x.shape[1:]), block.tokens)
            encode_piece = jax.checkpoint(lambda xs: apply(params, *xs, block.widths))
            out = jax.lax.map(encode_piece, (split, jax.random.split(rng, pieces)))
            return out.reshape(rows * per_row, *out.shape[2:])

        encode = jax.shard_map(on_device, mesh=self.mesh, in_specs=(DATA, DATA, EVERYWHERE), out_specs=DATA)
        embeddings = encode(copies, dataclasses.replace(block, order_N=None), rng)
        if block.order_N is None:
            return embeddings
        gathered = jax.lax.with_sharding_constraint(embeddings, NamedSharding(self.mesh, EVERYWHERE))
        return jnp.take(gathered, block.order_N, axis=0)
