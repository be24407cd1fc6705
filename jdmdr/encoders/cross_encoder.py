"""Cross-encoders: a transformer that reads a query and a passage together and says how relevant the passage is.

A sequence classifier of Hugging Face (`BertForSequenceClassification` and those of RoBERTa and XLM-R), as
sentence-transformers' CrossEncoder and the BGE re-rankers are.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jdmdr.encoders import huggingface
from jdmdr.encoders.config import EncoderConfig, Params
from jdmdr.encoders.pretrained import find_checkpoint
from jdmdr.encoders.transformer import TransformerEncoder
from jdmdr.types import Tokens, UserError

EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class CrossEncoder:
    """Parameters: those of the transformer, and `head/dense` DxD and `head/out` DxL over the first token's vector.

    `relevant` is the place among L = `labels` of the one whose probability is the score.
    """

    config: EncoderConfig
    labels: int = 1
    relevant: int = 0

    def init(self, rng: jax.Array) -> Params:
        """Random parameters, float32."""
        D, normal = self.config.width, jax.nn.initializers.normal(0.02)
        widths = {"dense": D, "out": self.labels}
        keys = jax.random.split(jax.random.fold_in(rng, 1), len(widths))
        head = {
            name: {"kernel": normal(key, (D, width), jnp.float32), "bias": jnp.zeros(width, jnp.float32)}
            for key, (name, width) in zip(keys, widths.items(), strict=True)
        }
        return {**TransformerEncoder(self.config).init(rng), "head": head}

    def logits(self, params: Params, tokens: Tokens) -> jax.Array:
        """What the classifier gives each label, float32 BxL; without dropout."""
        return classify(params["head"], TransformerEncoder(self.config).apply(params, tokens))

    def apply(self, params: Params, tokens: Tokens) -> jax.Array:
        """The log-odds of being relevant, float32 B.

        Of one label that is its logit, of several log p / (1 - p) for the p that softmax gives the relevant one; with two
        labels the difference of their logits.
        """
        logits_BxL = self.logits(params, tokens)
        if self.labels == 1:
            return logits_BxL[:, 0]
        others_BxL = jnp.delete(logits_BxL, self.relevant, axis=1)
        return logits_BxL[:, self.relevant] - jax.nn.logsumexp(others_BxL, axis=1)


def classify(head: Params, first_BxD: jax.Array) -> jax.Array:
    """What a head `dense`, `out` gives each label, float32 BxL, from the first tokens' vectors."""
    return _linear(head["out"], jnp.tanh(_linear(head["dense"], first_BxD)))


def _linear(layer: Params, x_BxD: jax.Array) -> jax.Array:
    return jnp.matmul(x_BxD, layer["kernel"], precision=EXACT) + layer["bias"]


def load_cross_encoder(name_or_dir: str | pathlib.Path, label: str, dtype: str) -> tuple[CrossEncoder, Params]:
    """Loads a BERT, RoBERTa or XLM-R sequence classifier: a local directory, or a name on the Hugging Face hub.

    Args:
      label: the name that config.json gives the label "relevant"; empty where there is but one.
      dtype: of the matmuls.

    Raises:
      UserError: a checkpoint that is none, or an architecture that jdmdr does not have; several labels and none chosen.
    """
    directory = find_checkpoint(name_or_dir)
    config = huggingface.read_config(directory / "config.json", pooling="cls", normalize=False)
    params = huggingface.read_classifier(directory, config)
    labels = len(params["head"]["out"]["bias"])
    relevant = _relevant(directory, config.original.get("id2label") or {}, labels, label)
    return CrossEncoder(dataclasses.replace(config, dtype=dtype), labels, relevant), params


def _relevant(directory: pathlib.Path, id2label: Mapping[str, Any], labels: int, wanted: str) -> int:
    names = [str(id2label.get(str(place), f"LABEL_{place}")) for place in range(labels)]
    if wanted in names:
        return names.index(wanted)
    if wanted:
        raise UserError(f"the cross-encoder in {directory} has no label {wanted!r}; its labels are {', '.join(names)}")
    if labels > 1:
        raise UserError(
            f"the cross-encoder in {directory} has {labels} labels ({', '.join(names)}); name the one that means relevant by "
            "--label, or in a recipe by cross_encoder.label"
        )
    return 0
