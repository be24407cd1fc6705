"""Tunes a language model on instructions: adapters trained in JAX, then added to its weights.

    python -m jdmdr.llm.tune --config configs/llm_tune.py --workdir runs/llm --config.tune.model=DIR
        --config.tune.instructions=FILE --config.llm.base_url=http://localhost:8000/v1 --config.llm.model=NAME

Needs google-tunix and qwix: `make llm-env`, then `.venv-llm/bin/python -m jdmdr.llm.tune`. Writes `instructions/`,
`adapter/` (the format of Hugging Face's peft) and `merged/`, the tuned model as a Hugging Face directory. With --dry_run it
only tells what translating the instructions would cost.

Source: Huang et al., "Boosting Data Utilization for Multilingual Dense Retrieval" (EMNLP 2025), section 3.4.
"""

from __future__ import annotations

import importlib.util
import json
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from ml_collections import ConfigDict

from jdmdr import cli, peft, pipeline, processes, progress, workdir
from jdmdr.check import check_config
from jdmdr.encoders import huggingface
from jdmdr.llm import chat, decoders, instructions, merged, tunix_models
from jdmdr.types import UserError
from jdmdr.workdir import Stage

ADAPTER, MERGED = "adapter", "merged"
LOG, CHECKPOINTS = "log.jsonl", "checkpoints"
LIBRARIES = ("tunix", "qwix")
# What else decides a tuned model; its weights are known by their sizes, since reading 100 GB to hash them takes minutes.
READ_BY_BYTES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def command(target: str, doc: str) -> None:
    """The main function: brings the stage `target` and what it needs up to date.

    With --dry_run the translation's plan is printed instead.
    """
    flags.DEFINE_boolean("dry_run", False, "Tell calls, tokens, cost and time of the translation, and send nothing.")

    def bring(config: ConfigDict, directory: pathlib.Path, values: flags.FlagValues) -> None:
        check_config(config)
        if processes.count() > 1:
            raise UserError("tuning runs in one process, on all devices of its machine; start it once")
        if values.dry_run:
            print(instructions.plan(config, directory))
            return
        if target == MERGED:
            check_libraries()
        pipeline.bring(stages(config, directory, target), directory, target, values.redo)
        print(directory / target)

    cli.run(bring, doc)


def lacking() -> list[str]:
    """What tuning needs and this Python does not have."""
    return [name for name in LIBRARIES if importlib.util.find_spec(name) is None]


def check_libraries() -> None:
    if names := lacking():
        raise UserError(
            f"tuning needs {' and '.join(names)}, which this Python does not have; run `make llm-env` and then "
            ".venv-llm/bin/python -m jdmdr.llm.tune, or pip install 'jdmdr[llm]'; the data alone: python -m "
            "jdmdr.llm.instructions"
        )


def stages(config: ConfigDict, directory: pathlib.Path, target: str = MERGED) -> list[Stage]:
    """The stages up to `target`; the model is looked at only where that needs it."""
    data = instructions.stage(config, directory)
    if target == instructions.STAGE:
        return [data]
    c = config.tune
    if not c.model:
        raise UserError("tune.model is not set; name a directory that holds a Hugging Face checkpoint")
    base = pathlib.Path(c.model)
    decoder = decoders.read(base)
    about = {"sizes": decoders.weight_sizes(decoder)}
    keys = ("length", "rank", "alpha", "epochs", "steps", "batch_size", "learning_rate", "warmup_share", "clip")
    files = tuple(base / name for name in READ_BY_BYTES if (base / name).is_file())

    def train(out_dir: pathlib.Path) -> dict[str, Any]:
        return tune(config, base, decoder, directory / instructions.STAGE, out_dir)

    def merge(out_dir: pathlib.Path) -> dict[str, Any]:
        adapter = directory / ADAPTER / peft.WEIGHTS
        return merged.write(base, decoder, adapter, c.alpha, out_dir, int(c.shard_gb * 1e9))

    return [
        data,
        Stage(ADAPTER, train, {**about, "dtype": _dtype(c), "seed": config.seed, **{key: c[key] for key in keys}},
              (instructions.STAGE,), files, volatile=(LOG, f"{CHECKPOINTS}/*"), precious=True),
        Stage(MERGED, merge, {**about, "shard_gb": c.shard_gb}, (ADAPTER,), files),
    ]  # fmt: skip


def _dtype(c: ConfigDict) -> str:
    return c.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def tune(
    config: ConfigDict, base: pathlib.Path, decoder: decoders.Decoder, data: pathlib.Path, out_dir: pathlib.Path
) -> dict[str, Any]:  # fmt: skip
    """Trains adapters on the instructions in `data` and writes them to `out_dir`, with `log.jsonl` and checkpoints.

    A run found there is gone on with from its last checkpoint. The loss of a step is the mean over the tokens of the
    answers in its batch, and does not depend on how many devices there are.
    """
    c = config.tune
    # ------------------------------------------------------------------------------------------------ data
    template = chat.Chat(base)
    rows = [json.loads(line) for path in sorted(data.glob("*.jsonl")) if path.stem in instructions.languages(c.langs)
            for line in path.read_text(encoding="utf-8").splitlines()]  # fmt: skip
    found = [template.example(row, c.length) for row in progress.bar(rows, "  tokenising", "examples")]
    examples = [example for example in found if example]
    if not examples:
        raise UserError(f"no instruction has an answer that fits into tune.length={c.length} tokens; raise it")
    if len(examples) < len(found):
        progress.say(f"  {len(found) - len(examples)} of {len(found)} examples are left out: longer than tune.length={c.length} "
                     "without their input")  # fmt: skip
    devices = jax.device_count()
    rows_a_chunk = min(c.chunk_rows, math.ceil(c.batch_size / devices)) * devices
    steps = max(1, math.ceil(c.epochs * len(examples) / c.batch_size)) if c.steps is None else c.steps
    chunks = chat.batches(examples, steps, c.batch_size, rows_a_chunk, c.length, config.seed)

    # ------------------------------------------------------------------------------------------------ model
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(-1, 1), ("fsdp", "tp"))
    with mesh:
        trainer = make_trainer(config, base, decoder, mesh, out_dir, steps, math.ceil(c.batch_size / rows_a_chunk))
        done = trainer.train_steps

        # -------------------------------------------------------------------------------------------- loop
        with progress.bar(None, "  tuning", "steps", total=steps, initial=done) as bar:
            log = _Log(out_dir / LOG, done, bar)
            trainer.on_step = log.step
            trainer.train(chunks)
        log.close()

    # ------------------------------------------------------------------------------------------------ finish
    found_adapters = tunix_models.adapters(trainer.model)
    tensors = {}
    for module, (a, b) in found_adapters.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    huggingface.save_tensors(tensors, out_dir / peft.WEIGHTS)
    kinds = sorted({module.rsplit(".", 1)[-1] for module in found_adapters})
    peft.write_config(out_dir, kinds, c.model, c.rank, c.alpha, 0.0, "CAUSAL_LM")
    return {
        "examples": len(examples),
        "left_out": len(found) - len(examples),
        "steps": steps,
        "adapted": len(found_adapters),
    }


def make_trainer(
    config: ConfigDict, base: pathlib.Path, decoder: decoders.Decoder, mesh: jax.sharding.Mesh, out_dir: pathlib.Path,
    steps: int, chunks: int,
) -> Any:  # fmt: skip
    """tunix's trainer of the model with adapters on all its linear layers, at its last checkpoint under `out_dir`."""
    import orbax.checkpoint as ocp
    import qwix
    from flax import nnx
    from tunix.sft import peft_trainer

    class Trainer(peft_trainer.PeftTrainer):
        """Tells a step's loss before the step is saved; tunix's own tells it a step later."""

        def _write_train_metrics(self) -> None:
            metrics, self._buffered_train_metrics = self._buffered_train_metrics, None
            if metrics:
                self.on_step(metrics.step + 1, float(metrics.loss))

    c = config.tune
    model = tunix_models.load(base, decoder, mesh, _dtype(c), c.remat)
    provider = qwix.LoraProvider(module_path=tunix_models.LINEAR, rank=c.rank, alpha=c.alpha)
    model = qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(config.seed), **model.get_model_input())
    schedule = optax.warmup_cosine_decay_schedule(0.0, c.learning_rate, int(c.warmup_share * steps), steps)
    clip = optax.clip_by_global_norm(c.clip) if c.clip else optax.identity()
    optimizer = in_float32(optax.chain(clip, optax.adam(schedule)))
    settings = peft_trainer.TrainingConfig(
        eval_every_n_steps=steps + 1, gradient_accumulation_steps=chunks,
        checkpoint_root_directory=str((out_dir / CHECKPOINTS).resolve()),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=c.checkpoint_every, max_to_keep=1),
    )  # fmt: skip
    trainer = Trainer(model, optimizer, settings)
    # What another number of devices saved comes back on the first one alone.
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    spread = lambda x: x if len(x.sharding.device_set) == mesh.size else jax.device_put(x, everywhere)
    for module, kind in ((trainer.optimizer, nnx.optimizer.OptState), (trainer.model, nnx.LoRAParam)):
        nnx.update(module, jax.tree.map(spread, nnx.state(module, kind)))
    return trainer.with_gen_model_input_fn(_inputs).with_loss_fn(_loss)


def _inputs(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Padding is on the right, where nothing that counts looks."""
    shape = rows, width = batch["ids_BxT"].shape
    causal = jnp.tril(jnp.ones((width, width), bool))
    return {**batch, "positions_BxT": jnp.broadcast_to(jnp.arange(width), shape),
            "mask_BxTxT": jnp.broadcast_to(causal, (rows, width, width))}  # fmt: skip


def _loss(
    model: Any, ids_BxT: jax.Array, weights_BxT: jax.Array, positions_BxT: jax.Array, mask_BxTxT: jax.Array
) -> jax.Array:
    logits_BxTxV, _ = model(ids_BxT, positions_BxT, None, mask_BxTxT)
    logits_BxTxV = logits_BxTxV[:, :-1].astype(jnp.float32)
    nll_BxT = optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV, ids_BxT[:, 1:])
    return jnp.sum(nll_BxT * weights_BxT[:, 1:])


class InFloat32(NamedTuple):
    master: Any  # the parameters, float32
    inner: Any


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on a float32 copy of the parameters, which follow it: bfloat16 alone loses updates below its precision."""
    float32 = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: Any) -> InFloat32:
        return InFloat32(float32(params), inner.init(float32(params)))

    def update(grads: Any, state: InFloat32, params: Any) -> tuple[Any, InFloat32]:
        updates, inner_state = inner.update(float32(grads), state.inner, state.master)
        master = optax.apply_updates(state.master, updates)
        moved = jax.tree.map(lambda m, p: m.astype(p.dtype).astype(jnp.float32) - p.astype(jnp.float32), master, params)
        return moved, InFloat32(master, inner_state)

    return optax.GradientTransformation(init, update)


class _Log:
    """`log.jsonl`, a line a step, and the bar; lines behind step `last`, which a resumed run repeats, are dropped first."""

    def __init__(self, path: pathlib.Path, last: int, bar: Any):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        # the last line may be half-written
        kept = [line + "\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= last]
        workdir.write_text(path, "".join(kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._bar = bar

    def step(self, step: int, loss: float) -> None:
        if not np.isfinite(loss):
            raise UserError(
                f"step {step}: the loss is not finite; the checkpoint before it is intact; lower tune.learning_rate and add "
                "--redo"
            )
        self._file.write(json.dumps({"step": step, "loss": loss}) + "\n")
        self._file.flush()
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._file.close()


if __name__ == "__main__":
    # By its name: tunix wants its mesh set in a way that jax warns of in a main module.
    from jdmdr.llm import tune as module

    module.command(MERGED, __doc__)
