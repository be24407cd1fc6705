"""Makes a checkpoint for long texts of one for short ones: tiled positions, sliding-window attention.

    python -m jdmdr.lengthen NAME --length=1024 --window=64 --out=DIR

    NAME             a BERT, RoBERTa or XLM-R checkpoint: a Hugging Face name or directory
    --length N       tokens of a text, special tokens included
    --window N       neighbours that a token sees, half of them on each side; an even number
    --out DIR        a new directory, with the checkpoint as a Longformer of Hugging Face's and its tokenizer

A recipe needs no such step: --config.encoder.window=64 makes the same of encoder.name.
"""

from __future__ import annotations

import pathlib
import shutil

from absl import flags

from jdmdr import cli, tokenizer
from jdmdr.types import UserError
from jdmdr.workdir import read_json, write_json


def lengthen(name: str, length: int, window: int, out: pathlib.Path) -> None:
    """Writes the lengthened checkpoint; nothing is there until all of it is."""
    from jdmdr import encoders  # late: a mistake on the command line needs no jax
    from jdmdr.encoders import huggingface
    from jdmdr.encoders.lengthen import lengthen as lengthened

    config, params = lengthened(*encoders.load_pretrained(name), length, window)
    if config.untied or config.projection:
        raise UserError(
            f"{name} has a head or two towers, which a bare checkpoint cannot hold; set encoder.window in a recipe"
        )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        tokenizer.copy_pretrained(name, partial)
        path = partial / "tokenizer_config.json"
        write_json(path, {**read_json(path), "model_max_length": length})
        huggingface.write_checkpoint(config, params, partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> None:
    flags.DEFINE_integer("length", 1024, "Tokens of a text.", lower_bound=2)
    flags.DEFINE_integer("window", 64, "Neighbours that a token sees.", lower_bound=2)
    flags.DEFINE_string("out", "", "Directory to write.")
    cli.run_tool(_command, __doc__)


def _command(words: list[str], values: flags.FlagValues) -> int:
    if len(words) != 1 or not values.out:
        raise UserError("one checkpoint and --out are needed; write python -m jdmdr.lengthen NAME --out=DIR")
    out = pathlib.Path(values.out)
    if out.exists():
        raise UserError(f"--out {out} is there already; name a new directory")
    lengthen(words[0], values.length, values.window, out)
    print(f"{out}: encoder.name and --model take it, and so does transformers' AutoModel")
    return 0


if __name__ == "__main__":
    main()
