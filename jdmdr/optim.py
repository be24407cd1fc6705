"""The optimiser: AdamW or LAMB with linear warm-up and decay, gradient clipping, and learning rates by parameter name."""

from __future__ import annotations

import re
from typing import Any

import jax
import optax

from jdmdr.lamb import lamb
from jdmdr.types import UserError

OPTIMISERS = {"adamw": optax.adamw, "lamb": lamb}
OWN = "objective/"  # the path of the parameters that an objective brings


def schedule(section: Any, peak: float) -> optax.Schedule:
    """Linear rise over `warmup_share` of the steps, then linear decay to 0 or constant (`decay`).

    A run may be shorter than the `horizon`, of which both are then counted.
    """
    steps = section.horizon or section.steps
    rise = round(section.warmup_share * steps)
    end = 0.0 if section.decay == "linear" else peak
    fall = optax.linear_schedule(peak, end, max(1, steps - rise))
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(rise, 1)), fall], [rise])


def make_optimiser(section: Any, params: Any, frozen: Any = None) -> optax.GradientTransformation:
    """`section.optimiser` over `params`; `learning_rates` maps a regex on the parameter's path to another peak rate.

    The first regex that matches wins; a parameter that none matches gets `learning_rate`. A regex that matches nothing,
    not among the `frozen` parameters either, is refused. What `no_decay` matches and the objective's own parameters do not
    decay.
    """
    if section.decay not in ("linear", "constant"):
        raise UserError(f"decay is {section.decay!r}; it is one of linear, constant")
    patterns = dict(section.learning_rates)
    paths = [name for tree in (params, frozen) for name, _ in named_leaves(tree)]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in paths):
            raise UserError(f"learning_rates: {pattern!r} matches no parameter; there are {', '.join(paths[:8])} ...")

    def label(path, _):
        return next((p for p in patterns if re.search(p, path_name(path))), "")

    def decays(path, _) -> bool:
        name = path_name(path)
        return not name.startswith(OWN) and not (section.no_decay and re.search(section.no_decay, name))

    def group(peak: float) -> optax.GradientTransformation:
        return OPTIMISERS[section.optimiser](
            schedule(section, peak), b1=0.9, b2=0.999, eps=1e-8, weight_decay=section.weight_decay,
            mask=lambda tree: jax.tree_util.tree_map_with_path(decays, tree),
        )  # fmt: skip

    groups = {"": group(section.learning_rate), **{p: group(rate) for p, rate in patterns.items()}}
    clip = optax.clip_by_global_norm(section.clip) if section.clip else optax.identity()
    return optax.chain(clip, optax.multi_transform(groups, jax.tree_util.tree_map_with_path(label, params)))


def path_name(path: tuple) -> str:
    """A parameter's path as a slash-joined name, e.g. `layer_0/attention/query/kernel`."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


def named_leaves(tree: Any) -> list[tuple[str, jax.Array]]:
    """(slash-joined path, array) of every parameter."""
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
