"""What several tests share: a small data root on disk, and the commands run as a user runs them."""

import dataclasses
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from jdmdr.types import Tokens

REPO = pathlib.Path(__file__).parents[1]
TINYPEDIA = REPO / "third_party" / "tinypedia"
SHARED = REPO.parent / "shared" / "data"

# What one test compiled, the processes that others start need not compile again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


@pytest.fixture(scope="session", autouse=True)
def heed_ctrl_c():
    """Tests run in the background of a script, and so what they start, would else inherit that Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def command():
    """Runs `python -m MODULE ...` in a process of its own; `env` adds to the environment."""

    def run(module, *arguments, env=None, timeout=300):
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=REPO,
            env={**os.environ, "JAX_PLATFORMS": "cpu", **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def on_devices():
    """Runs a program in a process with so many virtual devices; returns what it printed."""

    def run(devices, program, *arguments):
        flags = f"--xla_force_host_platform_device_count={devices}"
        path = os.pathsep.join([str(REPO), str(REPO / "tests"), os.environ.get("PYTHONPATH", "")])
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
            cwd=REPO,
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.fixture
def data_root(tmp_path):
    """A writable copy of two languages of tinypedia, the first 8 articles each."""
    return _data_root(tmp_path / "data")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The recipe of a whole pipeline that ran on such a copy; to be read only."""
    from jdmdr import pipeline
    from jdmdr.recipe import Recipe

    directory = tmp_path_factory.mktemp("finished")
    config = tiny_config(_data_root(directory / "data"))
    pipeline.run(config, directory / "workdir", "report")
    return Recipe(config, directory / "workdir")


def tiny_config(root):
    """The quickstart recipe shrunk to a few seconds, over the data under `root`."""
    config = runpy.run_path(REPO / "configs" / "quickstart.py")["get_config"]("smoke")
    config.data.root, config.data.langs = str(root), ""
    config.tokenizer.vocab_size = 600
    return config


def _data_root(root):
    for lang in ("en", "sw"):
        _copy(TINYPEDIA / "corpus" / f"{lang}.jsonl", root / "corpus" / f"{lang}.jsonl", "docid")
        _copy(TINYPEDIA / "train" / f"{lang}.jsonl", root / "train" / f"{lang}.jsonl", "query_id")
        for kind in ("topics", "qrels"):
            for split in ("train", "dev", "test"):
                _copy(TINYPEDIA / kind / f"{lang}.{split}.tsv", root / kind / f"{lang}.{split}.tsv", None)
    return root


def _copy(source, target, key):
    """Keeps the lines of articles 0 to 7: ids are article#passage and article-passage-k."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(source, encoding="utf-8") as lines, open(target, "w", encoding="utf-8") as out:
        for line in lines:
            name = json.loads(line)[key] if key else line
            if int(name.replace("#", "-").split("-")[0]) < 8:
                out.write(line)


@pytest.fixture
def library(data_root, tmp_path):
    """The data root, ingested."""
    from jdmdr import corpus, datasets
    from jdmdr.library import Library

    for lang, files in datasets.discover(data_root, "").items():
        corpus.ingest(lang, files, tmp_path / "corpus" / lang)
    return Library(tmp_path / "corpus")


def labels(counts_LxC, seed=0):
    """Language and topic labels with this many queries of each pair, in random order."""
    counts = np.asarray(counts_LxC)
    lang, topic = np.nonzero(counts)
    order = np.random.default_rng(seed).permutation(counts.sum())
    repeats = counts[lang, topic]
    return np.repeat(lang, repeats)[order].astype(np.int32), np.repeat(topic, repeats)[order].astype(np.int32)


class Source:
    """A token source whose sequence i is (i, i, ...), as long as `lengths[i]`."""

    def __init__(self, lengths):
        self._lengths = np.asarray(lengths, np.int32)

    def lengths(self, rows):
        return self._lengths[rows]

    def gather(self, rows, width):
        mask = (np.arange(width) < self._lengths[rows][:, None]).astype(np.int32)
        return Tokens(np.asarray(rows, np.int32)[:, None] * mask, mask)


def block_of(rng, rows, longest, vocabulary, per_row=1, runs=0, shortest=1):
    """Random texts as a side of a batch holds them, in random order."""
    from jdmdr.shapes import Side

    source = Source(rng.integers(shortest, longest + 1, rows))
    widths = [per_row * longest + 1] + [longest] * runs
    block = Side(per_row, longest, runs).pack(source, rng.permutation(rows), widths)
    ids = rng.integers(1, vocabulary, block.ids_RxT.shape).astype(np.int32)
    return dataclasses.replace(block, ids_RxT=ids * block.mask_RxT)
