"""What an encoder is: its configuration, and the three members that the rest of the project calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax

from jdmdr.types import Tokens, UserError

Params = Any  # nested dict of float32 arrays

CHOICES = {
    "kind": ("transformer", "static"),
    "family": ("bert", "roberta", "xlm-roberta", "longformer"),
    "activation": ("gelu", "gelu_tanh", "relu"),
    "pooling": ("cls", "mean", "last"),
    "dtype": ("float32", "bfloat16"),
    "towers": ("tied", "untied"),
    "projection_activation": ("identity", "tanh"),
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Everything that decides an encoder's function but its parameters; plain JSON values.

    A `static` encoder has token vectors and token weights and no layers; of the fields between `pooling` and
    `attention_dropout` it uses `normalize`, `towers` and the projection's alone, and its pooling is the mean. `dtype` is that of the matmuls: parameters, softmax, LayerNorm statistics and
    outputs are always float32.

    Raises:
      UserError: a value that no encoder has.
    """

    kind: str
    vocab_size: int
    width: int  # of the token vectors
    pooling: str = "mean"
    normalize: bool = True
    towers: str = "tied"  # untied: parameters of its own for each side
    projection: int = 0  # width of the linear head behind the pooling; 0: none
    projection_bias: bool = False
    projection_activation: str = "identity"
    projection_norm: bool = False  # a LayerNorm behind it
    dtype: str = "float32"
    remat: bool = False  # recompute each layer in the backward pass
    family: str = "bert"
    layers: int = 0
    heads: int = 1
    ffn: int = 0  # width of the feed-forward layer
    max_positions: int = 0  # rows of the position table
    window: int = 0  # longformer: neighbours that a token sees, half on each side (encoders/long_attention.py)
    type_vocab: int = 1
    activation: str = "gelu"
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    # config.json of the checkpoint that this encoder came from; an export keeps what is in it.
    original: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self):
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise UserError(f"encoder.{key} is {getattr(self, key)!r}; choose one of {', '.join(choices)}")
        if self.kind == "static" and self.pooling != "mean":
            raise UserError(f"encoder.pooling is {self.pooling!r}, but a static encoder takes the mean; leave it empty")
        if self.kind == "transformer" and self.width % self.heads:
            raise UserError(
                f"encoder.width is {self.width}, which {self.heads} heads do not divide; change one of them"
            )

        if (self.window > 0) != (self.family == "longformer") or self.window % 2:
            raise UserError(
                f"encoder.window is {self.window} with family {self.family}; an even number of neighbours goes with longformer, "
                "and 0 with the others"
            )

    @property
    def untied(self) -> bool:
        return self.towers == "untied"

    @property
    def embedding_width(self) -> int:
        return self.projection or self.width

    @property
    def first_position(self) -> int:
        """Row of the position table that the first token uses: RoBERTa's tables start behind the padding id."""
        return 0 if self.family == "bert" else self.pad_token_id + 1

    @property
    def usable_positions(self) -> int | None:
        """The longest text in tokens; None where there is no limit."""
        return None if self.kind == "static" else self.max_positions - self.first_position

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderConfig:
        """The inverse of `to_dict`.

        Raises:
          UserError: a key that there is not, or a missing one.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"the encoder's configuration does not fit this version ({error}); train again") from error


class Encoder(Protocol):
    """A kind of encoder: a function from token sequences to vectors, with its parameters kept outside."""

    config: EncoderConfig

    def init(self, rng: jax.Array) -> Params:
        """Random parameters, float32."""

    def apply(
        self,
        params: Params,
        tokens: Tokens,
        output: str = "pooled",
        rng: jax.Array | None = None,
        widths: tuple[int, ...] | None = None,
    ) -> jax.Array:
        """Pooled vectors, float32 BxD (`output='pooled'`), or token vectors, float32 BxTxD (`'tokens'`).

        Where rows hold several sequences (`Tokens.lengths_BxS`), B counts sequences in the pooled vectors: those of the
        first row, then those of the next. Sequence s of every row is padded to `widths[s]` for attention and the like
        (`packed.by_sequence`); None where attention takes them as they lie.

        Head and normalisation are not its concern (`BiEncoder`). Dropout is on where `rng` is given. A row without any
        real token gives finite numbers.
        """
