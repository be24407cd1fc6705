"""What a device can do, measured, and how much of it a computation uses.

FLOPs are those of the model: two for a multiplication and addition, of real tokens alone. Padding, recomputed activations
and a second pass of the grad cache do not count, so a share of the peak tells how well the device is used for the work
that had to be done (MFU; Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jdmdr.encoders import EncoderConfig
from jdmdr.shapes import Packed
from jdmdr.types import Tokens

T = TypeVar("T")

TRAINING = 3  # times the forward pass: the backward pass has two products for each of its own
COMPUTING, WAITING, COMPILING = "computing", "waiting for batches", "compiling"

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


@functools.cache
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


def lengths(batch: Any) -> np.ndarray:
    """Tokens of each text of a batch on the host, int64, in the order that they lie."""

    def is_block(node: Any) -> bool:
        return isinstance(node, (Packed, Tokens))

    found = [np.empty(0, np.int64)]
    for block in filter(is_block, jax.tree.leaves(batch, is_leaf=is_block)):
        if isinstance(block, Packed):
            found.append(block.lengths_RxS[:, :-1].ravel())
        else:
            found.append(block.mask_BxT.sum(axis=1))
    return np.concatenate(found, dtype=np.int64)


class Meter:
    """Where the time of a training run goes, and how much of the devices its steps use.

    `seconds` are by activity; what no other took, the steps computed.
    """

    def __init__(self, config: EncoderConfig):
        self._config, self._began = config, time.perf_counter()
        self.steps = self.tokens = 0
        self.flops = 0.0
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[activity] = self._seconds.get(activity, 0.0) + time.perf_counter() - began

    def waits(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches; the time until each is there counts as waiting."""
        iterator = iter(batches)
        while True:
            with self.timed(WAITING):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def count(self, batch: Any) -> None:
        """A step on this batch; of several processes each counts its own texts."""
        tokens_N = lengths(batch)
        self.steps += 1
        self.tokens += int(tokens_N.sum())
        self.flops += TRAINING * forward_flops(self._config, tokens_N)

    def figures(self) -> dict[str, Any]:
        """`seconds` by activity, their sum `total`, and of the computing ones tokens and useful FLOP/s of this process."""
        total = time.perf_counter() - self._began
        seconds = {COMPUTING: total - sum(self._seconds.values()), **self._seconds}
        computing = max(seconds[COMPUTING], 1e-9)
        return {
            "steps": self.steps, "total": total, "seconds": seconds, "tokens": self.tokens,
            "tokens_per_second": self.tokens / computing, "flops_per_second": self.flops / computing,
        }  # fmt: skip


def sentence(found: dict[str, Any], peak: float | None) -> str:
    """`Meter.figures` in a sentence; `peak` is that of the devices they were taken on, None where nothing is multiplied."""
    shares = sorted(found["seconds"].items(), key=lambda item: -item[1])
    parts = ", ".join(f"{100 * seconds / found['total']:.0f} % {name}" for name, seconds in shares)
    used = f", {found['flops_per_second'] / peak:.2f} of the matmul peak" if peak else ""
    return (
        f"{found['steps']} steps in {found['total']:.3g} s: {parts}; {found['tokens_per_second']:,.0f} tokens/s{used}"
    )
