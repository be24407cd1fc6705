"""What a plan starts from: the sizes of the data and the shape of the encoder, each with how it is known."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
from ml_collections import ConfigDict

from jdmdr import datasets, reading, workdir
from jdmdr.corpus import parse_fields, passage_text
from jdmdr.encoders import EncoderConfig, huggingface, pretrained
from jdmdr.library import TRAIN
from jdmdr.types import UserError
from jdmdr.workspace import Workspace

CHARACTERS_PER_TOKEN = 4.0
SAMPLE = 20_000  # passages of a file, or tokenised texts, that are looked at

# As their config.json says.
_ROBERTA = {
    "family": "xlm-roberta",
    "vocab_size": 250_002,
    "max_positions": 514,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-5,
}
SHAPES = {
    "xlm-roberta-base": {"layers": 12, "width": 768, "heads": 12, "ffn": 3072, **_ROBERTA},
    "xlm-roberta-large": {"layers": 24, "width": 1024, "heads": 16, "ffn": 4096, **_ROBERTA},
    "mbert": {"layers": 12, "width": 768, "heads": 12, "ffn": 3072, "vocab_size": 119_547, "max_positions": 512, "type_vocab": 2},
    "minilm": {"layers": 6, "width": 384, "heads": 12, "ffn": 1536, "vocab_size": 30_522, "max_positions": 512, "type_vocab": 2},
}  # fmt: skip


class Known(NamedTuple):
    """A figure and how it is known."""

    value: float
    how: str


class Data(NamedTuple):
    """Sizes of the data; means are over all languages."""

    passages: Known
    passage_tokens: Known
    passage_bytes: Known  # of a passage's text
    queries: Known  # that train
    query_tokens: Known


def find_data(config: ConfigDict, directory: pathlib.Path | None, given: dict[str, float]) -> Data:
    """Sizes as given, else as counted in a working directory whose texts are tokenised, else in the data root.

    Raises:
      UserError: there is no data root, and not both `passages` and `queries` are given.
    """
    if directory and (directory / "tokens" / workdir.MANIFEST).is_file():
        sizes = _of_workdir(config, directory)
    elif {"passages", "queries"} <= given.keys():
        sizes = {"passage_tokens": Known(128, "assumed"), "query_tokens": Known(16, "assumed")}
    else:
        sizes = _of_root(config)
    sizes |= {name: Known(value, "given") for name, value in given.items()}
    tokens, known = sizes["passage_tokens"]
    sizes.setdefault("passage_bytes", Known(tokens * CHARACTERS_PER_TOKEN, "assumed"))
    if tokens > config.encoder.passage_length:
        sizes["passage_tokens"] = Known(config.encoder.passage_length, "encoder.passage_length")
    return Data(**sizes)


def _of_workdir(config: ConfigDict, directory: pathlib.Path) -> dict[str, Known]:
    space = Workspace(config, directory)
    count = len(space.stores.passages)
    size = sum(path.stat().st_size for path in (directory / "corpus").glob("*/passages.jsonl"))
    lengths = [store.lengths(np.linspace(0, len(store) - 1, SAMPLE).astype(np.int64)) for store in space.stores]
    figures = {
        "passages": count, "passage_bytes": size / count, "queries": sum(not q.held_out for q in space.training),
        "passage_tokens": lengths[0].mean(), "query_tokens": lengths[1].mean(),
    }  # fmt: skip
    return {name: Known(float(figure), "counted") for name, figure in figures.items()}


def _of_root(config: ConfigDict) -> dict[str, Known]:
    files = datasets.discover(pathlib.Path(config.data.root), config.data.langs)
    fields = parse_fields(config.data.fields)
    passages = [_sampled(path, fields, config.data.separator) for of in files.values() for path in of.corpus]
    count = sum(number for number, *_ in passages)
    text_bytes, characters = (sum(number * found[i] for number, *found in passages) / count for i in (0, 1))
    asked = [of.train or of.topics.get(TRAIN) for of in files.values()]
    queries = [len(line) for path in filter(None, asked) for _, line in reading.lines(path)]
    how = "counted" if all(whole for *_, whole in passages) else "from a sample"
    return {
        "passages": Known(count, how),
        "passage_bytes": Known(text_bytes, how),
        "passage_tokens": Known(
            characters / CHARACTERS_PER_TOKEN, f"{CHARACTERS_PER_TOKEN:g} characters a token assumed"
        ),
        "queries": Known(len(queries) * (1 - config.data.valid_share), "counted"),
        "query_tokens": Known(16, "assumed"),
    }


def _sampled(path: pathlib.Path, fields: Any, separator: str) -> tuple[float, float, float, bool]:
    """(passages, mean bytes and characters of a text, whether all were read) of a corpus file."""
    read = 0

    def note(position: int) -> None:
        nonlocal read
        read = position

    rows = reading.numbered_passages(path, on_bytes=note, fields=fields, separator=separator)
    texts = [passage_text(passage) for _, passage in itertools.islice(rows, SAMPLE)]
    whole = len(texts) < SAMPLE
    number = len(texts) if whole else len(texts) * path.stat().st_size / read
    mean = lambda sizes: sum(sizes) / max(len(texts), 1)
    return number, mean(len(text.encode()) for text in texts), mean(map(len, texts)), whole


def find_encoder(config: ConfigDict, shape: str, dtype: str) -> tuple[EncoderConfig, str]:
    """The encoder that the recipe trains, without its weights, and how it is known.

    Args:
      shape: one of SHAPES instead of what `encoder.name` is; "" reads the checkpoint's config.json.
      dtype: of the matmuls where the recipe leaves it open.

    Raises:
      UserError: the configuration cannot be fetched, or no shape has that name.
    """
    c = config.encoder
    own = {"normalize": c.normalize, "dtype": c.dtype or dtype, "remat": c.remat, "projection": c.projection}
    own["towers"] = c.towers or "tied"
    if shape and shape not in SHAPES:
        raise UserError(f"--shape {shape}: there are {', '.join(SHAPES)}")
    if shape:
        dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
        return EncoderConfig("transformer", **SHAPES[shape], **dropout, pooling=c.pooling or "mean", **own), "--shape"
    if not c.name:
        width = config.encoder.width
        return EncoderConfig("static", config.tokenizer.vocab_size, width, **own), "tokenizer.vocab_size, encoder.width"
    found = _config_json(c.name)
    read = huggingface.read_config(found, c.pooling or "mean", c.normalize)
    return dataclasses.replace(read, **{key: value for key, value in own.items() if value}), str(found.name)


def _config_json(name: str) -> pathlib.Path:
    directory = pathlib.Path(name).expanduser()
    if directory.is_dir():
        return pretrained.read_modules(directory)["query"].get("Transformer", directory) / "config.json"
    huggingface_hub.logging.set_verbosity_error()  # what it warns of is told below
    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(name, "config.json"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"encoder.name {name!r} is no directory here and its config.json cannot be fetched from the Hugging Face hub; "
            f"say with --shape what it is like: {', '.join(SHAPES)}"
        ) from error
