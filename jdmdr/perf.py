"""What a device can do, measured, and how much of it a computation uses.

FLOPs are those of the model: two for a multiplication and addition, of real tokens alone. Padding, recomputed activations
and a second pass of the grad cache do not count, so a share of the peak tells how well the device is used for the work
that had to be done (MFU; Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdmdr.encoders import EncoderConfig

# Of the matrix product and the array whose times are taken; large enough to fill the devices.
MATRIX = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
BYTES = {"cpu": 2**28, "gpu": 2**32, "tpu": 2**31}


def forward_flops(config: EncoderConfig, lengths: np.ndarray) -> float:
    """FLOPs of encoding texts of these lengths in tokens: the layers' matmuls and attention; a lookup has none."""
    weights = config.layers * (4 * config.width**2 + 2 * config.width * config.ffn)
    lengths = np.asarray(lengths, np.float64)
    seen = np.minimum(lengths, config.window + 1) if config.window else lengths
    return float(2 * weights * lengths.sum() + 4 * config.width * config.layers * (lengths * seen).sum())


def seconds(function: Callable[[], Any], calls: int = 10, rounds: int = 5) -> float:
    """Of one call: the median over rounds of `calls`, which the device works through without waiting for the host."""
    jax.block_until_ready(function())
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            out = function()
        jax.block_until_ready(out)
        taken.append((time.perf_counter() - began) / calls)
    return float(np.median(taken))


def matmul_peak(dtype: str) -> float:
    """FLOP/s of one device for a square product of random matrices (zeros would be faster than data)."""
    size = MATRIX[jax.default_backend()]
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    multiply = jax.jit(jnp.matmul)
    return 2 * size**3 / seconds(lambda: multiply(a, b))


def bandwidth() -> dict[str, float]:
    """Bytes/s of one device's memory: `copy` counts what is read and written, `read` what a sum reads."""
    x = jax.random.normal(jax.random.key(0), (BYTES[jax.default_backend()] // 4,), jnp.float32)
    copy, total = jax.jit(lambda x: x * 1.5), jax.jit(jnp.sum)
    return {"copy": 2 * x.nbytes / seconds(lambda: copy(x)), "read": x.nbytes / seconds(lambda: total(x))}
