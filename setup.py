"""Packaging. `make quickstart` and `make test` install this into .venv with a constraints file per Python version."""

import pathlib
import re

from setuptools import find_packages, setup

here = pathlib.Path(__file__).parent
version = re.search(r'__version__ = "(.+?)"', (here / "jdmdr/__init__.py").read_text()).group(1)

setup(
    name="jdmdr",
    version=version,
    description="Multilingual dense retrievers in JAX, trained on better data",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["jdmdr", "jdmdr.*"]),
    package_data={"jdmdr": ["templates/*"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py",
        "aiolimiter",
        "bm25s",
        "faiss-cpu",
        "flax>=0.12",
        "grain>=0.2.15",
        "httpx2",
        "huggingface-hub",
        "jinja2",
        "jax>=0.10,<0.13",
        "langcodes[data]>=3.4",
        "matplotlib",
        "ml-collections>=1.0",
        "numpy",
        "openai>=3.57,<4",
        "optax",
        "orbax-checkpoint>=0.11",
        "pytrec-eval-terrier",
        "regex",
        "safetensors",
        "scikit-learn",
        "scipy",
        "sentencepiece",
        "tabulate",
        "tensorboardX",
        "tokenizers",
        "tqdm",
        "transformers>=5.12,<6",
    ],
    extras_require={
        "cuda": ["jax[cuda12]", "faiss-gpu-cu12"],
        "tpu": ["jax[tpu]"],
        "data": ["importlib-resources", "tensorflow-datasets"],  # the second imports the first without asking for it
        "llm": ["google-tunix==0.1.7", "qwix==0.1.8"],  # in an environment of its own: older safetensors
        "fasttext": ["fasttext-wheel"],
        "wikipedia": ["mwparserfromhell", "mwxml"],
        "test": [
            "fasttext-wheel",
            "hypothesis",
            "importlib-resources",
            "pytest",
            "ruff",
            "selenium",
            "tensorflow-datasets",
        ],
    },
)
