"""Devices that a plan is made for: published figures of some, and what this machine has."""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jdmdr.types import UserError


class Device(NamedTuple):
    """One accelerator; a bandwidth is what it sends in a ring over all devices, bytes/s."""

    name: str
    flops: float | None  # bfloat16 matmul peak, FLOP/s, dense; None: not known
    memory: float  # bytes
    within_host: float | None
    between_hosts: float | None
    per_host: int
    source: str

    def bandwidth(self, devices: int) -> float | None:
        return self.within_host if devices <= self.per_host else self.between_hosts


GB, GIB = 1e9, 2**30
NVIDIA = "data sheet of NVIDIA's {} SXM: dense bfloat16, NVLink one way; between hosts 400 Gbit/s InfiniBand a GPU, as in DGX"
GOOGLE = "Google Cloud's page on TPU {}: bfloat16; of its torus one axis, in both directions"

NAMED = {
    "h100": Device("NVIDIA H100", 989e12, 80 * GB, 450 * GB, 50 * GB, 8, NVIDIA.format("H100")),
    "h200": Device("NVIDIA H200", 989e12, 141 * GB, 450 * GB, 50 * GB, 8, NVIDIA.format("H200")),
    # 400 and 1200 GB/s of a chip, there and back, over 2 and 3 axes
    "v5e": Device("TPU v5e", 197e12, 16 * GB, 100 * GB, 100 * GB, 8, GOOGLE.format("v5e")),
    "v5p": Device("TPU v5p", 459e12, 95 * GIB, 200 * GB, 200 * GB, 4, GOOGLE.format("v5p")),
}

# Slices by their number of chips, as libtpu names them.
TOPOLOGIES = {
    "v5e": {1: "1x1", 2: "1x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v5p": {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"},
}


def tpu_mesh(name: str, devices: int) -> Mesh | None:
    """A slice that XLA compiles for without having it; None where there is no such slice, or no libtpu to compile with."""
    shape = TOPOLOGIES.get(name, {}).get(devices)
    if not (shape and importlib.util.find_spec("libtpu")):
        return None
    os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1"}  # else libtpu looks for its host
    one = {"chips_per_host_bounds": (1, 1, 1)} if devices == 1 else {}
    return Mesh(topologies.get_topology_desc(f"{name}:{shape}", "tpu", **one).devices, ("data",))


def find(name: str) -> Device:
    """The device of that name; the empty name is what this machine has.

    Raises:
      UserError: there is no such name.
    """
    if name and name not in NAMED:
        raise UserError(
            f"--hardware {name}: there are figures of {', '.join(NAMED)}; without the flag: of this machine"
        )
    return NAMED[name] if name else _here()


def _here() -> Device:
    first = jax.local_devices()[0]
    limit = (first.memory_stats() or {}).get("bytes_limit")
    memory = limit or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()
    same = next((device for device in NAMED.values() if device.name in first.device_kind), None)
    if same:
        return same._replace(memory=memory, per_host=jax.local_device_count())
    return Device(first.device_kind, None, memory, None, None, jax.local_device_count(), "this machine")
