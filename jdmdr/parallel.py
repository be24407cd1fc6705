"""Devices: the mesh, and how batches and parameters lie on it. All sharding decisions stand here.

Everything runs under `jax.jit` over arrays with a NamedSharding (what used to be pjit): the program is written for the
global batch and XLA inserts the collectives.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh() -> Mesh:
    """All devices along one axis, `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """The first axis split over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays of one batch to the devices: token blocks (2 axes or more) by rows, the small rest replicated."""

    def put(leaf: np.ndarray) -> jax.Array:
        return jax.device_put(leaf, rows(mesh) if np.ndim(leaf) >= 2 else replicated(mesh))

    return jax.tree.map(put, batch)


def by_rows(array: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Inside a compiled function: the first axis split over the devices; without a mesh as it is."""
    return array if mesh is None else jax.lax.with_sharding_constraint(array, rows(mesh))


def whole(array: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Inside a compiled function: all of it on every device; without a mesh as it is."""
    return array if mesh is None else jax.lax.with_sharding_constraint(array, replicated(mesh))
