"""Stable randomness: every random choice derives from (root seed, purpose, ids), on any machine and Python version."""

from __future__ import annotations

import hashlib

import numpy as np


def stable_hash(*parts: str | int) -> int:
    """64-bit hash of a sequence of strings and integers, the same in every process.

    `("a", "bc")`, `("ab", "c")`, `(1,)` and `("1",)` all differ.
    """
    return int.from_bytes(_digest(parts, 8), "little")


def rng(seed: int, purpose: str, *ids: str | int) -> np.random.Generator:
    """Counter-based generator (Philox) that belongs to (seed, purpose, ids) alone."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest((seed, purpose, *ids), 16), "little")))


def hash_array(seed: int, purpose: str, ints_N: np.ndarray) -> np.ndarray:
    """Stable 64-bit hash of each integer (uint64, same shape); distinct integers never collide.

    Sorting by it is a shuffle that does not depend on the NumPy version.
    """
    return mix64(mix64(np.asarray(ints_N).astype(np.uint64)) ^ np.uint64(stable_hash(seed, purpose)))


def mix64(x_N: np.ndarray) -> np.ndarray:
    """The splitmix64 bijection of uint64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x_N = x_N + np.uint64(0x9E3779B97F4A7C15)
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))


def _digest(parts: tuple[str | int, ...], size: int) -> bytes:
    digest = hashlib.blake2b(digest_size=size)
    for part in parts:
        kind, value = ("s", part) if isinstance(part, str) else ("i", str(int(part)))
        encoded = value.encode()
        digest.update(f"{kind}{len(encoded)}:".encode() + encoded)
    return digest.digest()
