"""Instructions as token ids in a model's chat template, and the batches that tuning sees."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdmdr import hashing
from jdmdr.types import UserError

SHORTEST = 128  # tokens of the narrowest batch; wider ones double it


class Example(NamedTuple):
    ids: list[int]
    prompt: int  # so many of the ids, the first, are given and not learned


class Chat:
    """The tokenizer and chat template of a checkpoint directory.

    Raises:
      UserError: no tokenizer, or none with a chat template.
    """

    def __init__(self, directory: pathlib.Path):
        import transformers

        transformers.logging.set_verbosity_error()
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"tune.model: {directory} has no tokenizer that can be loaded ({' '.join(str(error).split())[:200]}); add its "
                "tokenizer files"
            ) from error
        if not self._tokenizer.chat_template:
            raise UserError(
                f"tune.model: the tokenizer in {directory} has no chat template, by which servers pose questions; take an "
                "instruction-tuned checkpoint, or add its chat_template.jinja"
            )
        self._directory = directory

    def example(self, row: Mapping[str, str], length: int) -> Example | None:
        """The instruction and its input as the user's turn, the output as the answer; at most `length` tokens.

        A longer one has the end of its input cut off; None where that is not enough.
        """
        text = row["input"]
        while True:
            user = {"role": "user", "content": f"{row['instruction']}\n\n{text}"}
            prompt = self._ids([user], add_generation_prompt=True)
            ids = self._ids([user, {"role": "assistant", "content": row["output"]}])
            if ids[: len(prompt)] != prompt:
                raise UserError(
                    f"tune.model: the chat template in {self._directory} writes an answered question otherwise than an open one, "
                    "so that the answer cannot be told apart; take another model"
                )
            excess = len(ids) - length
            if excess <= 0:
                return Example(ids, len(prompt))
            starts = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            if excess >= len(starts):
                return None
            text = text[: starts[-excess][0]]

    def _ids(self, turns: list[dict[str, str]], **settings: Any) -> list[int]:
        text = self._tokenizer.apply_chat_template(turns, tokenize=False, **settings)
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def batches(
    examples: Sequence[Example], steps: int, batch_size: int, rows: int, length: int, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """`steps` batches, each as chunks of `rows` examples of like length, the same number in every step.

    `ids_BxT` (int32) is padded by 0. `weights_BxT` (float32) is 0 on prompts and padding, else one over the learned tokens
    of the batch times its chunks: the mean of the chunks' sums is the mean over the batch's tokens.
    """
    chunks = math.ceil(batch_size / rows)
    order = _order(len(examples), seed)
    for _ in range(steps):
        batch = sorted((examples[next(order)] for _ in range(batch_size)), key=lambda e: len(e.ids))
        learned = sum(len(e.ids) - e.prompt for e in batch)
        for start in range(0, chunks * rows, rows):
            chunk = batch[start : start + rows]
            width = SHORTEST
            while width < max(len(e.ids) for e in chunk):
                width *= 2
            ids_BxT = np.zeros((rows, min(width, max(length, SHORTEST))), np.int32)
            weights_BxT = np.zeros(ids_BxT.shape, np.float32)
            for row, e in enumerate(chunk):
                ids_BxT[row, : len(e.ids)] = e.ids
                weights_BxT[row, e.prompt : len(e.ids)] = chunks / learned
            yield {"ids_BxT": ids_BxT, "weights_BxT": weights_BxT}


def _order(count: int, seed: int) -> Iterator[int]:
    """All examples in an order of their own, epoch by epoch."""
    epoch = 0
    while True:
        yield from hashing.rng(seed, "tune", epoch).permutation(count).tolist()
        epoch += 1
