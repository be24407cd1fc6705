"""What a run trains: the encoder's parameters, or some of them by name; low-rank adapters; the objective's own.

The trained parameters are one tree: the encoder's, with `lora/...` and `objective/...` beside them. What does not train
is a tree of its own, which the optimiser and the checkpoints leave out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jdmdr import lora
from jdmdr.encoders import EncoderConfig
from jdmdr.optim import named_leaves
from jdmdr.types import UserError

LORA, OBJECTIVE = "lora", "objective"
HEAD = "(^|/)projection/"  # a new head cannot stay as it is


def split(section: Any, params: Any, own: Mapping[str, jax.Array], seed: int) -> tuple[Any, Any]:
    """(what trains, what stays) of the encoder's parameters and the objective's `own`.

    `section.trainable` is a regex on the paths of the encoder's parameters. Empty means all of them, or with adapters
    (`section.lora.rank` > 0) the projection head alone. Adapters and the objective's own parameters always train.

    Raises:
      UserError: the regex matches no parameter.
    """
    adapting = section.lora.rank > 0
    pattern = section.trainable or (HEAD if adapting else "")
    trained = _select(params, lambda name: bool(re.search(pattern, name)))
    if not trained and section.trainable:
        names = ", ".join(name for name, _ in named_leaves(params)[:8])
        raise UserError(f"trainable: {section.trainable!r} matches no parameter; there are {names} ...")
    frozen = _select(params, lambda name: not re.search(pattern, name))
    if adapting:
        trained[LORA] = lora.init(section.lora, params, seed)
    if own:
        trained[OBJECTIVE] = dict(own)
    return trained, frozen


def require_frozen_passages(section: Any, config: EncoderConfig, params: Any) -> None:
    """Refuses a run that would train the passages' tower while its objective searches vectors that stay as they are.

    Raises:
      UserError: one tower embeds both sides, or a parameter of the passages' tower trains.
    """
    if not config.untied:
        raise UserError(
            f"objective {section.objective.name} trains the queries' encoder alone, and here one tower embeds both sides; "
            "set encoder.towers to 'untied'"
        )
    trained, _ = split(section, params, {}, 0)
    own = trained.pop(LORA, {})
    if "passage" in trained or any("passage/" in name for name in own):
        raise UserError(
            f"objective {section.objective.name} leaves the passages' tower as it is; train the queries' alone: trainable "
            "'^query/', or with adapters lora.target '^query/...'"
        )


def assemble(trained: Any, frozen: Any, section: Any = None, rng: jax.Array | None = None) -> tuple[Any, Any]:
    """The encoder's plain parameters, adapters merged into them, and the objective's own.

    `section` are the recipe's `lora` keys; dropout of the adapters is on where `rng` is given.
    """
    params = _union({k: v for k, v in trained.items() if k not in (LORA, OBJECTIVE)}, frozen)
    if LORA in trained:
        params = lora.merge(params, trained[LORA], section, rng)
    return params, trained.get(OBJECTIVE, {})


def _select(tree: Mapping, wanted: Callable[[str], bool], prefix: str = "") -> dict[str, Any]:
    """The tree with the leaves whose path is wanted; branches without one are left out."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            if branch := _select(value, wanted, f"{prefix}{key}/"):
                out[key] = branch
        elif wanted(prefix + key):
            out[key] = value
    return out


def _union(one: Mapping, other: Mapping) -> dict[str, Any]:
    """Two trees without a common leaf as one, in the order of the keys."""
    out = {}
    for key in sorted({*one, *other}):
        if key in one and key in other:
            out[key] = _union(one[key], other[key])
        else:
            out[key] = one[key] if key in one else other[key]
    return out
