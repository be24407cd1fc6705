"""A trained encoder on disk: `encoder.json` and its parameters as an orbax checkpoint; and where encoders start from."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy

from jdmdr import checkpoint, encoders, parallel, processes
from jdmdr.encoders import huggingface, pretrained, static, vocabulary
from jdmdr.encoders.lengthen import lengthen
from jdmdr.optim import named_leaves
from jdmdr.tokenizer import TokenStore
from jdmdr.types import UserError
from jdmdr.workdir import read_json, write_json

PARAMETERS = "parameters"


def start(
    section: Any, vocab_size: int, passages: TokenStore, seed: int, tokenizer_dir: pathlib.Path | None = None
) -> tuple[encoders.EncoderConfig, Any]:  # fmt: skip
    """The encoder before any training: a Hugging Face checkpoint, or token vectors whose weights start at idf; with the
    head and the towers that the recipe asks for.

    Args:
      section: the recipe's `encoder` keys.
      tokenizer_dir: of the vocabulary that `section.new_vocabulary` puts under the checkpoint's layers.
      passages: what the inverse document frequencies of the from-scratch encoder are counted on.
    """
    if section.name:
        config, params = _checkpoint(section, vocab_size, seed, tokenizer_dir)
    else:
        if section.window:
            raise UserError(
                f"encoder.window is {section.window}, but the from-scratch encoder has no attention; leave it 0"
            )
        config = encoders.EncoderConfig(
            kind="static", vocab_size=vocab_size, width=section.width, pooling="mean", normalize=section.normalize
        )
        params = static.init_from_idf(jax.random.key(seed), config, _idf(passages, vocab_size))
    if section.projection and section.projection != config.projection:
        if config.projection:
            raise UserError(
                f"encoder.projection is {section.projection}, but {section.name} has a head of width "
                f"{config.projection}; leave it 0"
            )
        rng = jax.random.fold_in(jax.random.key(seed), 1)
        head = section.projection, section.projection_bias, section.projection_norm
        config, params = encoders.add_head(rng, config, params, *head)
    if section.towers == "untied" and not config.untied:
        config, params = dataclasses.replace(config, towers="untied"), encoders.untie(params)
    if section.towers == "tied" and config.untied:
        raise UserError(f"encoder.towers is 'tied', but {section.name} has a tower for each side; leave it empty")
    return config, params


def _checkpoint(
    section: Any, vocab_size: int, seed: int, tokenizer_dir: pathlib.Path | None
) -> tuple[encoders.EncoderConfig, Any]:  # fmt: skip
    config, params = encoders.load_pretrained(
        section.name, pooling=section.pooling or None, normalize=section.normalize
    )
    if section.passage_name:
        other, passage_params = encoders.load_pretrained(
            section.passage_name, pooling=section.pooling or None, normalize=section.normalize
        )
        if other != config or config.untied:
            raise UserError(
                f"encoder.passage_name: {section.passage_name} and {section.name} are not two encoders of one shape with one "
                "tower each; leave it empty"
            )
        config, params = dataclasses.replace(config, towers="untied"), {"query": params, "passage": passage_params}
    if section.layers:
        config, params = vocabulary.keep_layers(config, params, section.layers)
    if section.new_vocabulary:
        old = pathlib.Path(pretrained.tokenizer_place(str(pretrained.find_checkpoint(section.name))))
        config, params = vocabulary.transplant(config, params, old, tokenizer_dir, seed)
    longest = max(section.query_length, section.passage_length)
    if section.window:
        config, params = lengthen(config, params, longest, section.window)
    if config.kind == "transformer" and longest > config.usable_positions:
        raise UserError(
            f"encoder.passage_length is {longest}, but {section.name} has room for {config.usable_positions} tokens; "
            "lower encoder.query_length and encoder.passage_length, or set encoder.window"
        )
    if vocab_size > config.vocab_size:
        raise UserError(
            f"tokenizer.name has {vocab_size} tokens, but {section.name} has vectors for {config.vocab_size}; leave "
            "tokenizer.name empty to use the checkpoint's own tokenizer"
        )
    own = {} if section.attention_dropout is None else {"attention_dropout": section.attention_dropout}
    return dataclasses.replace(config, dtype=matmul_dtype(section.dtype), remat=section.remat, **own), params


def matmul_dtype(wanted: str) -> str:
    """The dtype of matmuls: as wanted, or what the devices are fast at."""
    return wanted or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def _idf(passages: TokenStore, vocab_size: int) -> np.ndarray:
    """BM25's inverse document frequency; a token counts as common as it is in the language that uses it most."""
    frequency_LxV = passages.document_frequency(vocab_size)
    rows_Lx1 = np.diff(passages.bases)[:, None]
    return np.log1p((rows_Lx1 - frequency_LxV + 0.5) / (frequency_LxV + 0.5)).min(axis=0)


def save(directory: pathlib.Path, config: encoders.EncoderConfig, params: Any) -> str:
    """Writes the encoder to `directory`; returns the fingerprint of its parameters.

    Of several processes, which all call it, the first writes.
    """
    params = parallel.to_host(params)
    if processes.leads():
        target = (directory / PARAMETERS).resolve()
        for stale in directory.glob(f"{PARAMETERS}*"):  # a killed run's half-written ones too
            shutil.rmtree(stale)
        with _checkpointer() as checkpointer:
            checkpointer.save(target, params)
        write_json(directory / "encoder.json", config.to_dict())
    return fingerprint(params)


def save_tree(path: pathlib.Path, tree: Any) -> None:
    """Writes arrays in nested dicts to one safetensors file; of several processes, which all call it, the first does."""
    tree = parallel.to_host(tree)
    if processes.leads():
        huggingface.save_tensors(dict(named_leaves(tree)), path)


def load_tree(path: pathlib.Path) -> Any:
    """What `save_tree` wrote."""
    return huggingface.nest({name: jnp.array(leaf) for name, leaf in safetensors.numpy.load_file(path).items()})


def _checkpointer() -> ocp.StandardCheckpointer:
    with processes.alone():
        return ocp.StandardCheckpointer(multiprocessing_options=checkpoint.together())


def fingerprint(params: Any) -> str:
    """SHA-256 of parameters, by name, shape and bytes."""
    digest = hashlib.sha256()
    for name, leaf in named_leaves(parallel.to_host(params)):
        digest.update(f"{name} {leaf.shape} {leaf.dtype}\n".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def load(directory: pathlib.Path) -> tuple[encoders.EncoderConfig, Any]:
    """Reads what `save` wrote, onto the devices of this process; it may have been saved on any number of devices."""
    config = encoders.EncoderConfig.from_dict(read_json(directory / "encoder.json"))
    everywhere = parallel.replicated(parallel.own_mesh())
    shapes = jax.eval_shape(encoders.build(config).init, jax.random.key(0))
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)
    path = (directory / PARAMETERS).resolve()
    try:
        with _checkpointer() as checkpointer:
            return config, checkpointer.restore(path, target)
    except Exception as error:  # orbax and tensorstore raise many kinds; all mean the same to the user
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path} is not a readable checkpoint ({reason}); delete {directory / 'manifest.json'} and run the training "
            "command again: it goes on from its own checkpoints"
        ) from error
