"""Publishes versions of a known content, one after another, and kills its writers; no JAX, so that a fork is cheap.

    python version_writer.py kill DIRECTORY TRIALS SEED      forks a writer a trial and kills it at a random moment
    python version_writer.py slowly DIRECTORY COUNT          publishes with a pause before every call that touches the disk

Both read in between, and print what readers saw as JSON.
"""

import json
import os
import pathlib
import random
import signal
import sys
import time

import numpy as np

from jdmdr import versions

ROWS = 300


def content(version):
    return {
        f"{lang}.rows.npy": np.full((ROWS, 20), version * 10 + i, np.int64) for i, lang in enumerate(("en", "sw", "zh"))
    }


def fill(version, directory, pause=lambda: None):
    for name, rows in content(version).items():
        pause()
        with open(directory / name, "wb") as handle:
            np.save(handle, rows[:100])
            pause()
            handle.write(rows[100:].tobytes())


def publish(directory, version):
    versions.publish(directory, version, lambda out: fill(version, out), {"source_step": version, "fingerprint": "f"})


def read(directory):
    """(versions that verify, versions that do not) of what a reader sees at one moment."""
    whole, torn = [], []
    for version in versions.numbers(directory):
        try:
            versions.verify(directory, version, "f")
            for name, rows in content(version).items():
                data = (versions.version_dir(directory, version) / name).read_bytes()[-rows[100:].nbytes :]
                assert data == rows[100:].tobytes()
            whole.append(version)
        except versions.Damaged as error:
            torn.append([version, str(error)])
    return whole, torn


def kill(directory, trials, seed):
    random.seed(seed)
    seen, torn, partials, reads = set(), [], 0, 0
    for _ in range(trials):
        first = versions.next_number(directory)
        child = os.fork()
        if child == 0:
            version = first
            while True:
                publish(directory, version)
                version += 1
        until = time.monotonic() + random.uniform(0.002, 0.12)
        while time.monotonic() < until:
            whole, bad = read(directory)
            reads, seen, torn = reads + 1, seen | set(whole), torn + bad
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        partials += len(list(directory.glob(".v*.partial")))
        whole, bad = read(directory)
        seen, torn = seen | set(whole), torn + bad
        versions.sweep(directory)
        for version in versions.numbers(directory)[:-2]:
            versions.remove(directory, version)
    print(json.dumps({"seen": len(seen), "torn": torn, "partials": partials, "reads": reads}))


def slowly(directory, count):
    real = {name: getattr(os, name) for name in ("open", "fsync", "rename", "close")}

    def slow(name):
        def call(*arguments, **keywords):
            time.sleep(0.004)
            return real[name](*arguments, **keywords)

        return call

    child = os.fork()
    if child == 0:
        for name in real:
            setattr(os, name, slow(name))
        for version in range(1, count + 1):
            versions.publish(
                directory, version, lambda out, version=version: fill(version, out, lambda: time.sleep(0.004)),
                {"source_step": version, "fingerprint": "f"},
            )  # fmt: skip
        os._exit(0)
    seen, torn = set(), []
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        whole, bad = read(directory)
        seen, torn = seen | set(whole), torn + bad
    print(json.dumps({"seen": len(seen | set(read(directory)[0])), "torn": torn}))


if __name__ == "__main__":
    mode, home, number, *seed = sys.argv[1:]
    pathlib.Path(home).mkdir(exist_ok=True)
    {"kill": kill, "slowly": slowly}[mode](pathlib.Path(home), int(number), *map(int, seed))
