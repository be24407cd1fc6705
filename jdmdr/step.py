"""One training step on the global batch, compiled by `jax.jit` over sharded arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jdmdr import parallel, trainable
from jdmdr.encoders import SIDES
from jdmdr.gradcache import Shares
from jdmdr.objectives import Objective
from jdmdr.optim import path_name
from jdmdr.shapes import encode_rows
from jdmdr.types import Tokens

State = dict[str, Any]  # params, opt_state, step, skipped, skipped_in_a_row; frozen where not all parameters train


def init_state(params: Any, optimiser: optax.GradientTransformation, frozen: Any = None) -> State:
    """The state before the first step; `params` train and `frozen` do not (`trainable.split`)."""
    # three arrays, not one: the state is donated, and a buffer can be donated once
    step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    return {
        "params": params,
        "opt_state": optimiser.init(params),
        "step": step,
        "skipped": skipped,
        "skipped_in_a_row": in_a_row,
        **({"frozen": frozen} if frozen else {}),
    }


def make_step(
    encoder: Any,
    objective: Objective,
    optimiser: optax.GradientTransformation,
    seed: int,
    lora: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    grad_cache: int = 0,
    shardings: Any = None,
) -> Callable:
    """`step(state, batch) -> (state, metrics)`, jitted, the state donated; `lora` are the recipe's keys of that name.

    With a mesh every device encodes its share; with `grad_cache`, which needs one, so many sequences at a time.
    `shardings` are the state's (`parallel.shardings`): where they split a parameter over devices, it is gathered whole for
    the step, and its gradient, its moments and its update stay split.

    The objective sees the global batch (design: global view), so its gradient needs no world-size factor. An update
    whose loss or gradient norm is not finite is skipped and counted; the parameters stay as they were.
    """

    everywhere = mesh and parallel.replicated(mesh)
    divided = shardings is not None and not all(s.is_fully_replicated for s in jax.tree.leaves(shardings))

    @jax.custom_vjp
    def whole(trained):
        return jax.lax.with_sharding_constraint(trained, everywhere)

    def split(_, gradient):
        return (jax.lax.with_sharding_constraint(gradient, shardings["params"]),)

    whole.defvjp(lambda trained: (whole(trained), None), split)
    shares = Shares(mesh, grad_cache) if grad_cache or (mesh and mesh.devices.size > 1) else None

    def step(state: State, batch: dict) -> tuple[State, dict]:
        rng = jax.random.fold_in(jax.random.key(seed), state["step"])
        # Texts read together are one block of Tokens, which the compiler spreads over the devices.
        leaves = jax.tree.leaves(batch, is_leaf=lambda block: isinstance(block, Tokens))
        here = None if any(isinstance(block, Tokens) for block in leaves) else shares

        def encode(params, block, side: str, output: str = "pooled"):
            side_rng = jax.random.fold_in(rng, SIDES.index(side))
            tower = encoder.tower(params, side)
            if isinstance(block, Tokens):
                return encoder.apply(tower, block, output, side_rng)
            encode_side = here.encode if here else encode_rows
            return encode_side(
                lambda p, tokens, key, widths: encoder.apply(p, tokens, output, key, widths), tower, block, side_rng
            )

        def loss(trained):
            lora_rng = jax.random.fold_in(rng, len(SIDES))
            params, own = trainable.assemble(
                whole(trained) if divided else trained, state.get("frozen", {}), lora, lora_rng
            )
            params = here.copies(params) if here else params
            return objective.loss(params, own, batch, encode, rng, state["step"])

        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"])
        norm = optax.global_norm(gradient)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = optimiser.update(gradient, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)

        # Without a gradient Adam would go on by its memory.
        idle = [f"{trainable.OBJECTIVE}/{name}/" for name in objective.idle(batch)]

        def keep(new, old):
            def of_leaf(path, n, o):
                return o if any(name in f"{path_name(path)}/" for name in idle) else jnp.where(finite, n, o)

            return jax.tree_util.tree_map_with_path(of_leaf, new, old)

        state = {
            **state,
            "params": keep(params, state["params"]),
            "opt_state": keep(opt_state, state["opt_state"]),
            "step": state["step"] + 1,
            "skipped": state["skipped"] + ~finite,
            "skipped_in_a_row": jnp.where(finite, 0, state["skipped_in_a_row"] + 1),
        }
        metrics = {**metrics, "gradient_norm": norm, "skipped": state["skipped"],
                   "skipped_in_a_row": state["skipped_in_a_row"]}  # fmt: skip
        return state, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere) if shardings is not None else None)
