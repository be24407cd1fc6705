"""The teacher of a distillation: its vectors, made once and kept by text.

`distill.teacher` is an encoder, as in `mine.retrievers` (a preset, PRESET=DIR, a directory, HUB/NAME), or `vectors:DIR`,
vectors made elsewhere: SOURCE.queries and SOURCE.passages (.npy and .txt, docs/data.md) and `bitext.npy`, `bitext.txt` with a
source sentence a line.

What an encoder makes lies in a cache that runs may share, `distill.cache`: a directory for every encoder and side, named by a
fingerprint of all that its vectors depend on, with shards of vectors and of the 64-bit hashes of their texts. A text that is
there is not encoded again; what a killed run finished of a shard's size stays.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jdmdr import embeddings, encode, encoders, models, progress, retrievers, tokenizer, workdir
from jdmdr.corpus import hash64
from jdmdr.types import UserError

KEY = "distill.teacher"
META = "meta.json"
VECTORS, HASHES = "vectors", "hashes"
MISSING = -1

TextOf = Callable[[int], str]


def parse(entry: str) -> retrievers.Spec:
    """Raises UserError for what is neither an encoder nor vectors."""
    if not entry:
        raise UserError(f"{KEY} is empty; name the encoder that teaches, as in mine.retrievers, or vectors:DIR")
    specs = retrievers.parse(entry, KEY)
    if len(specs) != 1 or specs[0].kind not in (retrievers.ENCODER, retrievers.VECTORS):
        raise UserError(f"{KEY} is {entry!r}; it is one encoder (a preset, a directory, HUB/NAME) or vectors:DIR")
    return specs[0]


def files(spec: retrievers.Spec, source: str) -> tuple[pathlib.Path, ...]:
    """The files that tell whether the teacher has changed."""
    home = pathlib.Path(spec.source).expanduser()
    if spec.kind == retrievers.VECTORS:
        stems = (f"{source}.queries", f"{source}.passages", "bitext")
        found = [home / f"{stem}.{suffix}" for stem in stems for suffix in ("npy", "txt")]
    else:  # weights too; a hub name stands for itself
        found = [p for pattern in ("*.json", "*.safetensors", "*.bin") for p in sorted(home.glob(pattern))]
    return tuple(path for path in found if path.is_file())


class Teacher:
    """An encoder that teaches, with its cache under `cache`."""

    def __init__(self, spec: retrievers.Spec, config: Any, mesh: Any, cache: pathlib.Path, scratch: pathlib.Path):
        self._section = retrievers.encoder_section(spec, config.encoder)
        name, as_in = retrievers.words(spec, self._section)
        self._home = scratch / "tokenizer"
        tokenizer.copy_pretrained(name, self._home, as_in)
        vocab_size = tokenizer.Tokenizer(self._home, 8).vocab_size
        self._config, self._params = models.start(self._section, vocab_size, None, config.seed)
        self._mesh, self._cache, self._stored = mesh, cache, config.encode
        self.width = self._config.embedding_width

    def vectors(self, side: str, text_of: TextOf, count: int) -> tuple[np.ndarray, pathlib.Path]:
        """The cache's row of each of `count` texts, and its directory; encodes what is not there."""
        origin = embeddings.origin(self._config, self._params, self._section, self._home, side)
        origin["dtype"] = self._stored.dtype
        words = tokenizer.Tokenizer(self._home, self._section[f"{side}_length"], self._section[f"{side}_prompt"])
        embedder = encode.Embedder(encoders.build(self._config), self._mesh, self._section[f"{side}_length"], side)

        def embed(texts: Sequence[str]) -> np.ndarray:
            return encode.embed_texts(embedder, self._params, words, texts).astype(self._stored.dtype)

        home = self._cache / f"{side}-{workdir.digest(origin)[:16]}"
        with workdir.locked(home, "distill.cache"):
            _check_meta(home / META, origin)
            rows_N = fill(home, embed, text_of, count, self._stored.shard_rows)
        return rows_N, home


def _check_meta(path: pathlib.Path, origin: Mapping[str, Any]) -> None:
    known = workdir.read_json(path)
    if known is None:
        workdir.write_json(path, origin)
    elif known != workdir.as_json(origin):
        different = next(key for key in origin if known.get(key) != origin[key])
        raise UserError(
            f"distill.cache: {path} tells of another encoder ({different} is {known.get(different)!r} there and "
            f"{origin[different]!r} here), though its directory has this one's name; delete that directory"
        )


def fill(home: pathlib.Path, embed: Callable[[Sequence[str]], np.ndarray], text_of: TextOf, count: int, shard_rows: int) -> np.ndarray:  # fmt: skip
    """The rows, int64, of `count` texts among the vectors under `home`; those that are not there are embedded first."""
    wanted_N = np.frombuffer(b"".join(hash64(text_of(i)) for i in range(count)), "<u8")
    known = [np.load(path) for path in sorted(home.glob(f"{HASHES}-*.npy"))]
    new_N, first_N = np.unique(wanted_N, return_index=True)
    missing = np.sort(first_N[~np.isin(new_N, np.concatenate([*known, np.empty(0, "<u8")]))])
    with progress.bar(None, "  the teacher encodes", "texts", total=len(missing)) as bar:
        for start in range(0, len(missing), shard_rows):
            chosen = missing[start : start + shard_rows]
            vectors = embed([text_of(int(i)) for i in chosen])
            for name, array in ((VECTORS, vectors), (HASHES, wanted_N[chosen])):  # the second says that both are there
                with workdir.atomic(home / f"{name}-{len(known):05d}.npy") as path, open(path, "wb") as handle:
                    np.save(handle, array)
            known.append(wanted_N[chosen])
            bar.update(len(chosen))
    hashes_C = np.concatenate([*known, np.empty(0, "<u8")])
    order_C = np.argsort(hashes_C)
    return order_C[np.searchsorted(hashes_C, wanted_N, sorter=order_C)]


def write(out_dir: pathlib.Path, name: str, rows_N: np.ndarray, home: pathlib.Path) -> None:
    """Leaves `name`'s vectors in `out_dir`: the cache's shards by links, and the row of each text."""
    (out_dir / name).mkdir(parents=True, exist_ok=True)
    for path in sorted(home.glob(f"{VECTORS}-*.npy")):
        workdir.link(path, out_dir / name / path.name)
    np.save(out_dir / name / "rows.npy", rows_N)


def write_given(out_dir: pathlib.Path, name: str, vectors_NxE: np.ndarray) -> None:
    """The same for vectors made elsewhere, in the order of the texts."""
    (out_dir / name).mkdir(parents=True, exist_ok=True)
    np.save(out_dir / name / f"{VECTORS}-00000.npy", vectors_NxE)
    np.save(out_dir / name / "rows.npy", np.arange(len(vectors_NxE)))


def read(directory: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
    """Text numbers -> the teacher's vectors, float32; the vectors stay on disk."""
    blocks, rows_N = encode.shards(directory, VECTORS), np.load(directory / "rows.npy")
    return lambda numbers: encode.gather_rows(blocks, rows_N[numbers])
