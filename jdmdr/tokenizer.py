"""Text to token ids: any Hugging Face tokenizer, or a Unigram one trained on the corpus; and the token store on disk.

    python -m jdmdr.tokenizer --config configs/dmdr.py --workdir runs/dmdr --config.data.root=DIR

A store holds one ragged array per language and side (`{lang}.ids.bin`, `{lang}.offsets.npy`), memory-mapped, so that
every text is tokenised once whatever is trained on it; `{lang}.end.npy` is the token that the tokenizer puts behind every
text, -1 where there is none.
"""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from jdmdr.types import Tokens, UserError
from jdmdr.workdir import atomic, read_json, write_json

if TYPE_CHECKING:
    import transformers

PAD, UNKNOWN = "<pad>", "<unk>"
AROUND, MASK = ("<s>", "</s>"), "<mask>"
# No token of a real vocabulary is longer than this on average; what lies beyond would be truncated anyway.
CHARACTERS_PER_TOKEN = 64
BATCH = 1024
NO_END = -1
# Whether RoBERTa's tokenizer of that version of transformers, with do_lower_case=True, put a space before a text's first
# word. Both lower-cased and dropped blanks at the end (2.3.0: and at the start), which today's do not.
AS_IN = {"2.3.0": False, "2.8.0": True}


def train_unigram(
    texts: Iterable[str], vocab_size: int, out_dir: pathlib.Path, around: tuple[str, str] | None = None
) -> None:  # fmt: skip
    """Trains a Unigram vocabulary (Kudo 2018) and writes it as a Hugging Face tokenizer directory.

    NFKC and lower case; words of letters, combining marks and digits, all else dropped; no special tokens but pad (id 0)
    and unknown (id 1); `around` are two more, that stand before and behind every text (BERT's cls and sep). sentencepiece does the training because it
    gives the same vocabulary on every run, which the trainer of `tokenizers` does not. A text too small for
    `vocab_size` gets as many pieces as it supports.
    """
    import sentencepiece

    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(tokenizers.Regex(r"[^\p{L}\p{M}\p{N}]+"), "removed")

    def prepared(text: str) -> str:
        return " ".join(word for word, _ in words.pre_tokenize_str(normalizer.normalize_str(text)))

    model = io.BytesIO()
    with _quiet_stderr() as complaint:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=map(prepared, texts),
                model_writer=model, model_type="unigram", vocab_size=vocab_size, hard_vocab_limit=False,
                character_coverage=1.0, normalization_rule_name="identity", max_sentence_length=1 << 20, num_threads=4,
                pad_id=0, pad_piece=PAD, unk_id=1, unk_piece=UNKNOWN, bos_id=-1, eos_id=-1, minloglevel=2,
            )  # fmt: skip
        except (RuntimeError, OSError) as error:
            reason = complaint() or str(error)
            raise UserError(
                f"no tokenizer can be trained on this corpus ({reason}); add text, lower tokenizer.vocab_size, or name one "
                "with tokenizer.name"
            ) from error
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.vocab_size())]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=1, byte_fallback=False))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Metaspace(split=False)])
    tokenizer.decoder = decoders.Metaspace()
    names = {"pad_token": PAD, "unk_token": UNKNOWN}
    if around:
        tokenizer.add_special_tokens([PAD, UNKNOWN, *around])
        ids = [(token, tokenizer.token_to_id(token)) for token in around]
        tokenizer.post_processor = processors.TemplateProcessing(f"{around[0]} $A {around[1]}", special_tokens=ids)
        names |= {"cls_token": around[0], "sep_token": around[1]}
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out_dir / "tokenizer.json"))
    write_json(out_dir / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})


def add_pair_tokens(directory: pathlib.Path) -> None:
    """Gives a tokenizer directory BERT's special tokens: around a text, between the two of a pair, and for what is masked."""
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_special_tokens([*AROUND, MASK])
    special = [(token, backend.token_to_id(token)) for token in AROUND]
    first, end = AROUND
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {end}", pair=f"{first} $A {end} $B:1 {end}:1", special_tokens=special
    )
    backend.save(str(directory / "tokenizer.json"))
    path = directory / "tokenizer_config.json"
    names = {"cls_token": first, "sep_token": end, "mask_token": MASK}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    write_json(path, {**read_json(path), **names, "model_input_names": inputs})


@contextlib.contextmanager
def _quiet_stderr():
    """Holds back what the C++ trainer prints; yields a function that gives its last line."""
    import tempfile

    with tempfile.TemporaryFile() as sink:
        saved = os.dup(2)
        os.dup2(sink.fileno(), 2)

        def last_line() -> str:
            sink.seek(0)
            lines = sink.read().decode("utf-8", "replace").strip().splitlines()
            return lines[-1] if lines else ""

        try:
            yield last_line
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def copy_pretrained(name_or_dir: str, out_dir: pathlib.Path, as_in: str = "") -> None:
    """Writes the tokenizer of a Hugging Face checkpoint (hub name or directory) to `out_dir`, with its fast backend.

    `as_in` is a version of transformers whose RoBERTa tokenizer made other tokens than today's (`AS_IN`). What it did is
    written into tokenizer.json, from where it goes into token stores and exports.
    """
    load_pretrained(name_or_dir).save_pretrained(out_dir)
    if as_in:
        _change(out_dir, AS_IN[as_in])


def load_pretrained(name_or_dir: str) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face checkpoint (hub name or directory); raises UserError if it has no fast backend."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch is no news here
    import transformers

    from jdmdr.encoders.pretrained import tokenizer_place  # late: it loads jax

    transformers.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_place(name_or_dir))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"no tokenizer can be loaded from {name_or_dir!r} ({reason}); without network give a local directory that "
            "holds tokenizer.json"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {name_or_dir!r} has no fast version; convert it to a tokenizer.json first")
    if len(tokenizer) <= len(
        tokenizer.all_special_tokens
    ):  # what transformers makes of a directory without a vocabulary
        raise UserError(
            f"no tokenizer can be loaded from {name_or_dir!r} (it has no vocabulary); add its tokenizer.json"
        )
    return tokenizer


def _change(directory: pathlib.Path, prefix_space: bool) -> None:
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        raise UserError(
            "tokenizer.as_in is for RoBERTa's byte-level tokenizer, and this is another kind; leave it empty"
        )
    strip = normalizers.Strip(left=not prefix_space, right=True)
    backend.normalizer = normalizers.Sequence([strip, normalizers.Lowercase()])
    backend.pre_tokenizer.add_prefix_space = prefix_space
    backend.save(str(directory / "tokenizer.json"))
    path = directory / "tokenizer_config.json"
    # RoBERTa's own class would build the tokenizer anew and lose the changes; this one takes the file as it is.
    changed = {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": prefix_space}
    write_json(path, {**read_json(path), **changed})


class Tokenizer:
    """A tokenizer directory, ready to turn texts of one side into ids of at most `max_length` (special tokens included).

    With `chunks` above 1 a text has up to so many times that, in chunks of `max_length` tokens behind one another: each with its own
    special tokens (`chunk_specials`), or cut out of one long sequence.
    """

    def __init__(
        self, directory: pathlib.Path, max_length: int, prompt: str = "", chunks: int = 1, chunk_specials: bool = True
    ):
        path = directory / "tokenizer.json"
        try:
            self._backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the backend raises bare Exception
            raise UserError(
                f"{path}: not a readable tokenizer ({error}); delete its directory and run again"
            ) from error
        self._backend.no_padding()
        self._backend.enable_truncation(max_length if chunk_specials else max_length * chunks)
        self._more_chunks = chunks - 1 if chunk_specials else 0
        self._prompt, self._limit = prompt, max_length * chunks * CHARACTERS_PER_TOKEN
        self.vocab_size = self._backend.get_vocab_size(with_added_tokens=True)
        self.special_tokens = self._backend.num_special_tokens_to_add(is_pair=False)
        word = self._backend.encode("a")
        self.end = word.ids[-1] if word.ids and word.special_tokens_mask[-1] else NO_END

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text with the prompt before it."""
        cut = [(self._prompt + text)[: self._limit] for text in texts]
        encoded = self._backend.encode_batch_fast(cut)
        if not self._more_chunks:
            return [np.asarray(e.ids, np.int32) for e in encoded]
        chunks = ([e, *e.overflowing[: self._more_chunks]] for e in encoded)
        return [np.concatenate([np.asarray(part.ids, np.int32) for part in of]) for of in chunks]


def write_tokens(tokenizer: Tokenizer, texts: Iterable[str], directory: pathlib.Path, lang: str) -> None:
    """Tokenises `texts` into the store. Nothing is there until all of it is."""
    width = np.dtype(np.uint16 if tokenizer.vocab_size < 1 << 16 else np.uint32)
    offsets = [np.zeros(1, np.int64)]
    total = 0
    with atomic(directory / f"{lang}.ids.bin") as path, open(path, "wb") as handle:
        for block in blocks(texts):
            encoded = tokenizer.encode(block)
            np.concatenate([*encoded, np.empty(0, np.int32)]).astype(width).tofile(handle)
            ends = total + np.cumsum([len(ids) for ids in encoded], dtype=np.int64)
            offsets.append(ends)
            total = int(ends[-1])
    for name, array in (("end", np.int64(tokenizer.end)), ("offsets", np.concatenate(offsets))):
        with atomic(directory / f"{lang}.{name}.npy") as path, open(path, "wb") as handle:
            np.save(handle, array)


def blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists of `BATCH`, the last one shorter."""
    block: list[str] = []
    for text in texts:
        block.append(text)
        if len(block) == BATCH:
            yield block
            block = []
    if block:
        yield block


def has_tokens(directory: pathlib.Path, lang: str) -> bool:
    """Whether the store of this language is complete (its offsets are written last)."""
    return (directory / f"{lang}.offsets.npy").is_file()


class TokenStore:
    """Token sequences of several languages behind one another, by global row."""

    def __init__(self, directory: pathlib.Path, langs: Sequence[str], vocab_size: int):
        width = np.uint16 if vocab_size < 1 << 16 else np.uint32
        self._offsets = [np.load(directory / f"{lang}.offsets.npy", mmap_mode="r") for lang in langs]
        self._ids = [_memmap(directory / f"{lang}.ids.bin", width) for lang in langs]
        self._ends = [int(np.load(directory / f"{lang}.end.npy")) for lang in langs]
        self.bases = np.concatenate([[0], np.cumsum([len(o) - 1 for o in self._offsets])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.bases[-1])

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Token counts, int32, of global `rows`."""
        part, local = self._locate(rows)
        out = np.empty(len(rows), np.int32)
        for lang in np.unique(part):
            own = part == lang
            offsets = self._offsets[lang]
            out[own] = offsets[local[own] + 1] - offsets[local[own]]
        return out

    def gather(self, rows: np.ndarray, width: int, first_B: np.ndarray | None = None) -> Tokens:
        """Global `rows` padded with id 0, or cut, to `width` tokens.

        What is cut keeps the token behind every text, so that it is what the tokenizer would have cut to `width`. With `first_B`
        the tokens from there on, as they stand.
        """
        part, local = self._locate(rows)
        ids = np.zeros((len(rows), width), np.int32)
        mask = np.zeros((len(rows), width), np.int32)
        for i, (lang, row) in enumerate(zip(part, local, strict=True)):
            start, stop = self._offsets[lang][row : row + 2]
            if first_B is not None:
                start = min(start + first_B[i], stop)
            length = min(int(stop - start), width)
            ids[i, :length] = self._ids[lang][start : start + length]
            mask[i, :length] = 1
            if first_B is None and stop - start > width and self._ends[lang] != NO_END:
                ids[i, -1] = self._ends[lang]
        return Tokens(ids, mask)

    def document_frequency(self, vocab_size: int) -> np.ndarray:
        """How many sequences of each language hold each token at least once, int64 [languages, V]; streamed."""
        frequency = np.zeros((len(self._ids), vocab_size), np.int64)
        for lang, (offsets, ids) in enumerate(zip(self._offsets, self._ids, strict=True)):
            for first in range(0, len(offsets) - 1, 100_000):
                bounds = np.asarray(offsets[first : first + 100_001])
                rows = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
                pairs = np.unique(rows * vocab_size + np.asarray(ids[bounds[0] : bounds[-1]], np.int64))
                frequency[lang] += np.bincount(pairs % vocab_size, minlength=vocab_size)
        return frequency

    def _locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = np.asarray(rows, np.int64)
        part = np.searchsorted(self.bases, rows, side="right") - 1
        return part, rows - self.bases[part]


def _memmap(path: pathlib.Path, dtype) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


if __name__ == "__main__":
    from jdmdr import pipeline

    pipeline.command("tokens", __doc__)
