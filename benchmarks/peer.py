"""Talks to benchmarks/torch_side.py, which runs in an environment of its own."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
from collections.abc import Mapping
from typing import Any

import numpy as np

from jdmdr.types import UserError
from jdmdr.workdir import write_json

SCRIPT = pathlib.Path(__file__).with_name("torch_side.py")
TORCH_PYTHON = SCRIPT.parents[1] / ".venv-torch" / "bin" / "python"


def find_torch(python: pathlib.Path) -> str:
    """The versions of the libraries there.

    Raises:
      UserError: no such interpreter, or one without the libraries.
    """
    program = (
        "import datasets, accelerate, importlib.metadata as m;"
        "print(', '.join(f'{n} {m.version(n)}' for n in ('sentence-transformers', 'torch', 'transformers')))"
    )
    try:
        return subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"{python} is no Python with sentence-transformers and what its trainer needs; `make torch-env` makes one, or "
            "name yours with --torch-python"
        ) from error


class Peer:
    """A process that holds one sentence-transformers model; `job` is described by its keys in torch_side.py."""

    def __init__(self, python: pathlib.Path, directory: pathlib.Path, job: Mapping[str, Any], env: Mapping[str, str]):
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "job.json", dict(job))
        self._directory = directory
        self._errors = open(directory / "stderr.txt", "w", encoding="utf-8")  # noqa: SIM115 - closed by close()
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "OMP_NUM_THREADS": str(job["threads"])}
        self._process = subprocess.Popen(
            [python, SCRIPT, directory / "job.json"], env={**os.environ, **quiet, **env},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        self.greeting = self._answer()

    def encode(self, name: str) -> tuple[float, np.ndarray]:
        """Seconds and embeddings of the texts in `directory/name.json`."""
        out = self._directory / f"{name}.npy"
        found = self._ask({"encode": str(self._directory / f"{name}.json"), "out": str(out)})
        return found["seconds"], np.load(out)

    def write_texts(self, name: str, texts: list[str]) -> None:
        write_json(self._directory / f"{name}.json", texts)

    def train(self, steps: int) -> tuple[float, list[float]]:
        """Seconds and losses of the next steps."""
        found = self._ask({"train": steps})
        return found["seconds"], found["losses"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._errors.close()

    def _ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            last = pathlib.Path(self._errors.name).read_text(encoding="utf-8").strip().splitlines() or ["silently"]
            raise RuntimeError(f"sentence-transformers' process ended: {last[-1]} ({self._errors.name})")
        return json.loads(line)
