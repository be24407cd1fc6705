"""Devices: the mesh, and how batches and parameters lie on it. All sharding decisions stand here.

Everything runs under `jax.jit` over arrays with a NamedSharding (what used to be pjit): the program is written for the
global batch and XLA inserts the collectives. Rows (of a batch, of a collection) lie over all devices, the one axis `data`.
Parameters are replicated, or split over groups of `parallel.fsdp` devices: theirs is a mesh of the same devices with a second
axis, `fsdp` (Rajbhandari et al. 2020, ZeRO; Zhao et al. 2023, FSDP).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jdmdr import processes
from jdmdr.optim import path_name
from jdmdr.types import UserError

DATA, FSDP = "data", "fsdp"
SMALLEST = 1 << 14  # numbers of a parameter that is worth splitting


def data_mesh() -> Mesh:
    """All devices of the run, of all processes, along one axis; those of this one while it works alone."""
    return _mesh(jax.devices() if processes.count() > 1 else jax.local_devices())


def own_mesh() -> Mesh:
    """The devices of this process, for work that it does by itself."""
    return _mesh(jax.local_devices())


def _mesh(devices: Sequence[jax.Device]) -> Mesh:
    return jax.make_mesh((len(devices),), (DATA,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def own_rows(mesh: Mesh) -> Callable[[int], np.ndarray] | None:
    """number of rows -> which of them lie on devices of this process, ascending; None where all do."""
    if not mesh.is_multi_process:
        return None

    def own(count: int) -> np.ndarray:
        slices = rows(mesh).addressable_devices_indices_map((count,)).values()
        return np.unique(np.concatenate([np.arange(count)[of] for (of,) in slices]))

    return own


def shardings(tree: Any, mesh: Mesh, fsdp: int = 1, rules: Sequence[tuple[str, str]] = ()) -> Any:
    """How the leaves of `tree` lie on the devices of `mesh`: for each the first of `rules`, (regex on its path, replicate |
    fsdp), that matches; replicated without one.

    `fsdp` splits the longest axis that can be split over so many devices; a leaf without one, or of fewer than SMALLEST
    numbers, is replicated. The path of an optimiser's copy of a parameter ends with the parameter's own.

    Raises:
      UserError: the devices cannot be divided into groups of `fsdp`.
    """
    if mesh.size % fsdp:
        raise UserError(f"parallel.fsdp is {fsdp}, which does not divide the {mesh.size} devices")
    groups = Mesh(mesh.devices.reshape(-1, fsdp), (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)

    def of(path: tuple, leaf: Any) -> NamedSharding:
        name, shape = path_name(path), np.shape(leaf)
        split = next((how for pattern, how in rules if re.search(pattern, name)), "replicate") == FSDP
        axes = [axis for axis in range(len(shape)) if shape[axis] % fsdp == 0]
        if fsdp == 1 or not split or not axes or np.prod(shape) < SMALLEST:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: shape[axis])
        return NamedSharding(groups, PartitionSpec(*(FSDP if axis == longest else None for axis in range(len(shape)))))

    return jax.tree_util.tree_map_with_path(of, tree)


def put(tree: Any, sharding: Any) -> Any:
    """Host values, the same in every process, to the devices; `sharding` is one for all leaves, or a tree of them."""
    if isinstance(sharding, NamedSharding):
        sharding = jax.tree.map(lambda _: sharding, tree)

    def one(leaf: Any, how: NamedSharding) -> jax.Array:
        if not how.mesh.is_multi_process:
            return jax.device_put(leaf, how)
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, how, lambda index: values[index])

    return jax.tree.map(one, tree, sharding)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays of one batch to the devices: token blocks (2 axes or more) by rows, the small rest replicated.

    Of what lies by rows a process reads only its `own_rows`.
    """
    return put(batch, jax.tree.map(lambda leaf: rows(mesh) if np.ndim(leaf) >= 2 else replicated(mesh), batch))


def by_rows(array: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Inside a compiled function: the first axis split over the devices; without a mesh as it is."""
    return array if mesh is None else jax.lax.with_sharding_constraint(array, rows(mesh))


def whole(array: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Inside a compiled function: all of it on every device; without a mesh as it is."""
    return array if mesh is None else jax.lax.with_sharding_constraint(array, replicated(mesh))


def to_host(tree: Any) -> Any:
    """The tree as NumPy arrays, whole; every process calls it where the arrays lie over several."""

    def one(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(one, tree)


def anywhere(flag: bool, mesh: Mesh) -> Callable[[], bool]:
    """Starts finding out whether `flag` is set in any process; the answer, the same in all, waits for the devices."""
    if processes.count() == 1:
        return lambda: flag
    values = np.full(mesh.devices.size, flag)
    found = _any(jax.make_array_from_callback(values.shape, rows(mesh), lambda index: values[index]))
    return lambda: bool(found)


_any = jax.jit(lambda flags: flags.any())
