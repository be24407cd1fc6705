import subprocess
import sys

import numpy as np

from jdmdr.hashing import hash_array, rng, stable_hash


def test_parts_do_not_run_into_each_other():
    hashes = {
        stable_hash(*parts) for parts in [("a", "bc"), ("ab", "c"), ("abc",), (1, 2), (12,), ("12",), ("1", "2"), ()]
    }
    assert len(hashes) == 8


def test_values_are_frozen():
    """A change of these values changes every plan, split and mined set of existing runs."""
    assert stable_hash("split", 3) == 10834199688748110042
    assert hash_array(0, "split", np.arange(2)).tolist() == [6790547114126250549, 9021346822499278102]


def test_another_process_gives_the_same_values():
    program = "from jdmdr.hashing import *; print(stable_hash('ü', 7), rng(1, 'x', 'q').integers(1 << 40))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.split() == [str(stable_hash("ü", 7)), str(rng(1, "x", "q").integers(1 << 40))]


def test_streams_of_different_ids_differ():
    draws = {tuple(rng(0, *key).integers(1 << 40, size=2)) for key in [("a",), ("b",), ("a", 1), ("a", "1")]}
    assert len(draws) == 4


def test_hash_array_is_elementwise_and_without_collisions():
    ints = np.arange(-500, 100_000)
    hashed = hash_array(3, "x", ints)
    assert len(np.unique(hashed)) == len(ints)
    assert np.array_equal(hash_array(3, "x", ints[7:9]), hashed[7:9])
    assert not np.any(hash_array(4, "x", ints) == hashed)


def test_hash_array_bits_are_balanced():
    hashed = hash_array(0, "bits", np.arange(20_000))
    ones = [np.mean(hashed >> np.uint64(bit) & np.uint64(1)) for bit in range(64)]
    np.testing.assert_allclose(ones, 0.5, atol=0.02)
