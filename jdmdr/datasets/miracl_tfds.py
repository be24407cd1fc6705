"""MIRACL as a tensorflow-datasets builder: ArrayRecord files that grain reads, without TensorFlow.

    python -m jdmdr.datasets.miracl_tfds --data_dir DIR --langs sw,te              # fetched from the Hugging Face hub
    python -m jdmdr.datasets.miracl_tfds --data_dir DIR --root ROOT                # from a data root (docs/data.md)

Each language is a config with the split `corpus` (id, title, text) and, for each split that has topics and qrels, one of
its name (id, text, positives, negatives: docids judged relevant and not relevant).

Source: Zhang et al., "MIRACL: A Multilingual Retrieval Dataset Covering 18 Diverse Languages" (TACL 2023).
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags, logging

try:
    import tensorflow_datasets as tfds
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"error: {error}; this command needs an extra: pip install 'jdmdr[data]'", file=sys.stderr)
    sys.exit(2)

from jdmdr import cli, progress, reading
from jdmdr.corpus import TRAIN, add_train_rows, split_queries
from jdmdr.datasets import LanguageFiles, discover
from jdmdr.datasets.audit import audit
from jdmdr.types import UserError

LANGS = ("ar", "bn", "de", "en", "es", "fa", "fi", "fr", "hi", "id", "ja", "ko", "ru", "sw", "te", "th", "yo", "zh")
HUB = {"miracl": "miracl/miracl", "miracl-corpus": "miracl/miracl-corpus"}  # directory -> data set on the hub
CORPUS = "corpus"


def fetch(lang: str, root: pathlib.Path) -> pathlib.Path:
    """Downloads one language from the hub into `root`, in the layout that `discover` knows.

    Raises UserError where the hub cannot be reached, or wants a login that is not there.
    """
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()
    for name, repository in HUB.items():
        try:
            huggingface_hub.snapshot_download(
                repository, repo_type="dataset", local_dir=root / name, allow_patterns=[f"miracl*-v1.0-{lang}/*"]
            )
        except (OSError, ValueError) as error:  # all that huggingface_hub raises is one of the two
            reason = str(error).strip().splitlines()[0].rstrip(". ")
            raise UserError(
                f"{repository} cannot be fetched from the Hugging Face hub ({reason}); log in with `hf auth login` if it asks "
                "for that, or download it elsewhere and name its directory with --root"
            ) from error
    return root


class Miracl(tfds.core.GeneratorBasedBuilder):
    """One language of MIRACL, or of any data root in a layout of docs/data.md."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = pathlib.Path(__file__).parent  # tfds cannot find it where this module is the command
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=lang) for lang in LANGS]

    def __init__(self, *, files: LanguageFiles | None = None, **settings: Any):
        """`files` are the language's, needed to prepare the data; to read what is prepared, none are."""
        self._files = files
        super().__init__(file_format="array_record", **settings)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(doc="docid of a passage, qid of a query"),
                    "title": tfds.features.Text(doc="of a passage"),
                    "text": tfds.features.Text(doc="of a passage or of a query"),
                    "positives": tfds.features.Sequence(tfds.features.Text(), doc="docids judged relevant"),
                    "negatives": tfds.features.Sequence(tfds.features.Text(), doc="docids judged not relevant"),
                }
            ),
            homepage="https://github.com/project-miracl/miracl",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # `fetch` downloads: the hub's client resumes and caches
        judged = {split: reading.qrels(path)[0] for split, path in self._files.qrels.items()}
        queries = {split: dict(split_queries(self._files, split, of)) for split, of in judged.items()}
        if self._files.train:
            rows = queries.setdefault(TRAIN, {}), judged.setdefault(TRAIN, {})
            add_train_rows(self._files.train, *rows)
        found = {split: _queries(queries[split], judged[split]) for split in sorted(judged) if queries[split]}
        return {CORPUS: _passages(self._files.corpus), **found}

    def _generate_examples(self, **kwargs: Any) -> Iterator:
        raise NotImplementedError  # the splits' generators are given above


def _passages(paths: list[pathlib.Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in paths:
        for passage in reading.passages(path):
            row = {"id": passage.docid, "title": passage.title, "text": passage.text}
            yield passage.docid, {**row, "positives": [], "negatives": []}


def _queries(texts: dict[str, str], judged: reading.Qrels) -> Iterator[tuple[str, dict[str, Any]]]:
    for qid, text in texts.items():
        of_query = judged.get(qid, {})
        yield (
            qid,
            {
                "id": qid,
                "title": "",
                "text": text,
                "positives": [docid for docid, rel in of_query.items() if rel > 0],
                "negatives": [docid for docid, rel in of_query.items() if rel <= 0],
            },
        )


def prepare(data_dir: pathlib.Path, root: pathlib.Path | None, langs: str) -> list[pathlib.Path]:
    """Writes the languages as ArrayRecord; returns their directories. What is there already is left alone, and told."""
    logging.set_verbosity(logging.ERROR)  # it warns of every directory that it is about to fill
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--data_dir {data_dir}: {error.strerror}; name a directory that can be written") from error
    if root is None:
        wanted = [lang.strip() for lang in langs.split(",") if lang.strip()]
        if unknown := [lang for lang in wanted or [""] if lang not in LANGS]:
            raise UserError(f"--langs has {unknown[0]!r}; name languages of MIRACL to fetch, from {', '.join(LANGS)}")
        home = data_dir / "downloads"
        for lang in wanted:
            fetch(lang, home)
        root = home
    made = []
    for lang, files in discover(root, langs).items():
        config = lang if lang in LANGS else tfds.core.BuilderConfig(name=lang)
        builder = Miracl(files=files, config=config, data_dir=str(data_dir))
        if builder.is_prepared():
            progress.say(f"{builder.data_dir} is there already and left alone; remove it to write it again")
        try:
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        except UserError:
            raise
        except Exception:  # a repeated id, which tfds can tell with TensorFlow only
            for sentences in audit({lang: files}).errors.values():
                raise UserError(sentences[0]) from None
            raise
        made.append(pathlib.Path(builder.data_dir))
    return made


def _command(words: list[str], values: flags.FlagValues) -> int:
    if len(words) > 1 or not values.data_dir:
        raise UserError("write python -m jdmdr.datasets.miracl_tfds --data_dir DIR, with --root ROOT or --langs CODES")
    root = pathlib.Path(values.root) if values.root else None
    for directory in prepare(pathlib.Path(values.data_dir), root, values.langs):
        print(directory)
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("data_dir", None, "Where the data sets are written.")
    flags.DEFINE_string("root", None, "A data root to read; without it the languages are fetched from the hub.")
    flags.DEFINE_string("langs", "", "Language codes, separated by commas; with --root empty means all.")
    cli.run_tool(_command, __doc__)
