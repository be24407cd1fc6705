"""Saves the logits of the model that a tuning run ended with, by google-tunix.

python logits_of_tuning.py BASE WORKDIR/adapter IDS.npy OUT.npy
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from configs import llm_tune
from jdmdr.llm import decoders, tune

base, adapter, ids, out = map(pathlib.Path, sys.argv[1:])
jax.config.update("jax_default_matmul_precision", "highest")
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(-1, 1), ("fsdp", "tp"))
with mesh:
    trainer = tune.make_trainer(llm_tune.get_config("smoke"), base, decoders.read(base), mesh, adapter, 5, 2)
    ids_BxT = jnp.asarray(np.load(ids))
    inputs = tune._inputs({"ids_BxT": ids_BxT})
    logits, _ = trainer.model(ids_BxT, inputs["positions_BxT"], None, inputs["mask_BxTxT"])
assert trainer.train_steps == 5
np.save(out, np.asarray(logits))
