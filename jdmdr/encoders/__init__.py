"""Text encoders: BERT-like transformers from Hugging Face checkpoints, and static token vectors from scratch.

A new kind of encoder is one file with the members of `Encoder`, and one line in `ENCODERS`.
"""

from __future__ import annotations

from collections.abc import Callable

from jdmdr.encoders.bi_encoder import SIDES, BiEncoder, add_head, truncate, untie
from jdmdr.encoders.config import Encoder, EncoderConfig, Params
from jdmdr.encoders.cross_encoder import CrossEncoder, load_cross_encoder
from jdmdr.encoders.pretrained import load_pretrained
from jdmdr.encoders.static import StaticEncoder
from jdmdr.encoders.transformer import TransformerEncoder

ENCODERS: dict[str, Callable[[EncoderConfig], Encoder]] = {
    "static": StaticEncoder,
    "transformer": TransformerEncoder,
}

__all__ = ["ENCODERS", "SIDES", "BiEncoder", "CrossEncoder", "Encoder", "EncoderConfig", "Params", "add_head", "build",
           "load_cross_encoder", "load_pretrained", "truncate", "untie"]  # fmt: skip


def build(config: EncoderConfig) -> BiEncoder:
    """The encoder that `config` describes."""
    return BiEncoder(config, ENCODERS[config.kind](config))
