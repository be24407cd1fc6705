"""Bi-text accuracy: how often a sentence's nearest neighbour among all translations is its own, both ways.

    python -m jdmdr.bitext --config configs/dmdr.py --workdir runs/dmdr --data=DIR

    --data PATH      a file of lines `sentence TAB translation`, or a directory of files NAME.SPLIT.tsv, such as sw-en.test.tsv
    --split NAME     of the directory's files; "test" by default; "" puts all splits of a name together
    --encoder NAME   "train" (the default) and "warmup" are the working directory's; else an encoder as in mine.retrievers: a
                     preset, PRESET=DIR, a directory, HUB/NAME; with its own prompts and lengths

The task and its measure are those of Artetxe and Schwenk (TACL 2019) on Tatoeba. Sentences are encoded as queries, prompt
included, and compared by cosine. A neighbour counts as right when its text is the translation's: sentences repeat. Prints
a table and writes bitext.json to the working directory.
"""

from __future__ import annotations

import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from tabulate import tabulate

from jdmdr import cli, processes, progress
from jdmdr.metrics import AVERAGE, macro_average
from jdmdr.reading import bad_line, lines
from jdmdr.scores import rounded
from jdmdr.types import UserError
from jdmdr.workdir import MANIFEST, write_json

STAGES = ("train", "warmup")

Embed = Callable[[Sequence[str]], np.ndarray]  # N texts -> float32 NxD
Search = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (q_QxD, p_CxD) -> the best row of p for each query


def find(data: pathlib.Path, split: str) -> dict[str, list[pathlib.Path]]:
    """`{name: files}`: the file itself, or those of a directory that belong to the split."""
    if data.is_file():
        return {re.sub(r"\.tsv(\.gz)?$", "", data.name): [data]}
    if not data.is_dir():
        raise UserError(f"--data {data}: there is no such file or directory")
    found: dict[str, list[pathlib.Path]] = {}
    names = {path: re.fullmatch(r"([^.]+)\.([^.]+)\.tsv(\.gz)?", path.name) for path in sorted(data.iterdir())}
    for path, match in names.items():
        if match and match[2] == (split or match[2]):
            found.setdefault(match[1], []).append(path)
    if not found:
        there = sorted({match[2] for match in names.values() if match})
        raise UserError(
            f"--data {data} holds no file NAME.{split or 'SPLIT'}.tsv; its splits are: {', '.join(there) or 'none'}"
        )
    return found


def pairs(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Streams sentence and translation; raises UserError with file and line for what is no pair."""
    for number, line in lines(path):
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) != 2 or not all(fields):
            raise bad_line(path, number, f"{len([f for f in fields if f])} sentences separated by TABs where 2 are expected: "
                                         "sentence TAB translation")  # fmt: skip
        yield fields[0], fields[1]


def read(paths: Sequence[pathlib.Path]) -> tuple[list[str], list[str]]:
    """The sentences of both sides, line by line."""
    found = [pair for path in paths for pair in pairs(path)]
    if not found:
        raise UserError(f"{paths[0]} holds no pair; give lines of sentence TAB translation")
    return [one for one, _ in found], [other for _, other in found]


def accuracy(sides: tuple[Sequence[str], Sequence[str]], embed: Embed, search: Search) -> tuple[float, float]:
    """Accuracy at 1 from the first side to the second, and back."""
    vectors = [_unit(embed(side)) for side in sides]
    found = []
    for here in (0, 1):
        there = sides[1 - here]
        best_Q = search(vectors[here], vectors[1 - here])
        found.append(float(np.mean([there[best] == there[row] for row, best in enumerate(best_Q)])))
    return found[0], found[1]


def _unit(vectors_NxD: np.ndarray) -> np.ndarray:
    norms_Nx1 = np.linalg.norm(vectors_NxD, axis=1, keepdims=True)
    return vectors_NxD / np.where(norms_Nx1 > 0, norms_Nx1, 1)


def open_encoder(config: ConfigDict, directory: pathlib.Path, name: str, scratch: pathlib.Path) -> tuple[Embed, Search]:
    """The named encoder as it encodes queries, and an exact search; texts pass through token stores under `scratch`."""
    from jdmdr import (  # late: a mistake on the command line needs no jax
        encoders,
        models,
        parallel,
        retrievers,
        tokenizer,
    )
    from jdmdr.encode import Embedder
    from jdmdr.index.exact import ExactSearcher

    section, home = config.encoder, directory / "tokenizer"
    if name in STAGES and not (directory / name / MANIFEST).exists():
        raise UserError(f"{directory} holds no finished {name} run; run jdmdr.train with the same flags first")
    if name not in STAGES:
        spec = _spec(name)
        section, home = retrievers.encoder_section(spec, section), scratch / "tokenizer"
        source, as_in = retrievers.words(spec, section)
        tokenizer.copy_pretrained(source, home, as_in or config.tokenizer.as_in)
    words = tokenizer.Tokenizer(home, section.query_length, section.query_prompt)
    mesh = parallel.own_mesh()
    if name in STAGES:
        encoder_config, params = models.load(directory / name)
        if name == "train" and config.encode.dimensions:
            encoder_config, params = encoders.truncate(encoder_config, params, config.encode.dimensions)
    else:
        encoder_config, params = models.start(section, words.vocab_size, None, config.seed)
    embedder = Embedder(encoders.build(encoder_config), mesh, section.query_length, "query")

    def embed(texts: Sequence[str]) -> np.ndarray:
        with tempfile.TemporaryDirectory(dir=scratch) as store:
            tokenizer.write_tokens(words, texts, pathlib.Path(store), "side")
            tokens = tokenizer.TokenStore(pathlib.Path(store), ["side"], words.vocab_size)
            return embedder.embed(params, tokens, np.arange(len(texts)))

    return embed, lambda q_QxD, p_CxD: ExactSearcher([p_CxD], mesh).search(q_QxD, 1).rows_QxK[:, 0]


def _spec(name: str) -> Any:
    from jdmdr import retrievers

    spec = retrievers.parse(name, "--encoder")[0]
    if spec.kind != retrievers.ENCODER:
        raise UserError(f"--encoder is {name!r}; it is train, warmup, a preset, PRESET=DIR, a directory or HUB/NAME")
    return spec


def evaluate(data: dict[str, list[pathlib.Path]], embed: Embed, search: Search) -> dict[str, dict[str, float]]:
    """`{name: {"pairs", "there", "back"}}` and the averages of both accuracies over the names."""
    found: dict[str, dict[str, float]] = {}
    for name, paths in progress.bar(data.items(), "  encoding", "files", total=len(data)):
        sides = read(paths)
        there, back = accuracy(sides, embed, search)
        found[name] = {"pairs": len(sides[0]), "there": there, "back": back}
    means = {way: macro_average({name: of[way] for name, of in found.items()}) for way in ("there", "back")}
    return {**found, AVERAGE: {"pairs": sum(of["pairs"] for of in found.values()), **means}}


def table(found: dict[str, dict[str, float]]) -> str:
    rows = [[name, str(of["pairs"]), f"{of['there']:.3f}", f"{of['back']:.3f}"] for name, of in found.items()]
    return tabulate(rows, ["file", "pairs", "accuracy ->", "<-"], disable_numparse=True, stralign="right")


def main() -> None:
    flags.DEFINE_string("data", "", "A file of sentence pairs, or a directory of them.")
    flags.DEFINE_string("split", "test", "Of a directory's files; empty: all.")
    flags.DEFINE_string("encoder", "train", "train, warmup, or an encoder as in mine.retrievers.")
    cli.run(_command, __doc__)


def _command(config: ConfigDict, directory: pathlib.Path, values: flags.FlagValues) -> None:
    if not values.data:
        raise UserError("--data is missing; name a file of sentence TAB translation, or a directory of NAME.SPLIT.tsv")
    data = find(pathlib.Path(values.data), values.split)

    def measure() -> None:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".bitext-") as scratch:
            found = evaluate(data, *open_encoder(config, directory, values.encoder, pathlib.Path(scratch)))
        write_json(
            directory / "bitext.json", {"encoder": values.encoder, "split": values.split, "accuracy": rounded(found)}
        )
        print(table(found))

    processes.from_first(measure)


if __name__ == "__main__":
    main()
