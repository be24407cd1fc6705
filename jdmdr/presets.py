"""Known checkpoints by a short name: where they are published and how their embeddings are meant to be made.

A preset is a recipe's backbone (`configs/dmdr.py:NAME`) and a retriever of the ensemble (`mine.retrievers`). Pooling,
normalisation and prompts are those of the checkpoint's authors. Temperature, learning rate and epochs are for training
with DMDR: those of mbert, mdpr, me5-large and bge-m3 are from Huang et al. (EMNLP 2025), whose temperatures are not told
and are ours, as is everything that the others train with.
"""

from __future__ import annotations

from typing import NamedTuple

from jdmdr.types import UserError


class Preset(NamedTuple):
    """A checkpoint's own recipe; lengths are in tokens, special tokens included."""

    name: str  # on the Hugging Face hub
    pooling: str  # "": what the checkpoint's sentence-transformers modules say
    normalize: bool
    query_prompt: str = ""
    passage_prompt: str = ""
    temperature: float = 0.05
    learning_rate: float = 2e-6
    epochs: int = 20
    query_length: int = 64
    passage_length: int = 256
    tokenizer: str = ""  # on the hub; "": the checkpoint's own
    as_in: str = ""
    passage_name: str = ""  # of the passages' encoder, where it is another
    published: str = ""  # where the weights are, if not on the hub

    def encoder(self) -> dict[str, object]:
        """The `encoder` keys of configs/default.py that it decides."""
        keys = (
            "name", "passage_name", "pooling", "normalize", "query_prompt", "passage_prompt", "query_length",
            "passage_length",
        )  # fmt: skip
        return {key: getattr(self, key) for key in keys}

    def words(self) -> dict[str, object]:
        """The `tokenizer` keys that it decides."""
        return {"name": self.tokenizer, "as_in": self.as_in}


E5 = {
    "pooling": "mean",
    "normalize": True,
    "query_prompt": "query: ",
    "passage_prompt": "passage: ",
    "temperature": 0.01,
}

# Head and tokenizers: docs/models.md
DRHARD = {
    "pooling": "cls",
    "normalize": False,
    "temperature": 1.0,
    "tokenizer": "roberta-base",
    "as_in": "2.8.0",
    "published": "https://github.com/jingtaozhan/DRhard",
}

PRESETS = {
    # bare masked language model: untrained for retrieval
    "mbert": Preset("bert-base-multilingual-cased", "cls", False, temperature=1.0, learning_rate=3e-6, epochs=16),
    # Zhang et al. (2023), "Towards Best Practices for Training Multilingual Dense Retrieval Models"
    "mdpr": Preset("castorini/mdpr-tied-pft-msmarco", "cls", False, temperature=1.0, learning_rate=3e-6, epochs=16),
    # Wang et al. (2024), "Multilingual E5 Text Embeddings"
    "me5-small": Preset("intfloat/multilingual-e5-small", **E5, learning_rate=6e-6),
    "me5-base": Preset("intfloat/multilingual-e5-base", **E5, learning_rate=4e-6),
    "me5-large": Preset("intfloat/multilingual-e5-large", **E5),
    # Chen et al. (2024), "BGE M3-Embedding": its dense head
    "bge-m3": Preset("BAAI/bge-m3", "cls", True, temperature=0.02),
    # Feng et al. (ACL 2022), "Language-agnostic BERT Sentence Embedding": a tanh layer behind the pooling
    "labse": Preset("sentence-transformers/LaBSE", "cls", True),
    # Izacard et al. (TMLR 2022), "Unsupervised Dense Information Retrieval with Contrastive Learning"
    "mcontriever": Preset("facebook/mcontriever-msmarco", "mean", False, temperature=1.0),
    # Wang et al. (2020), "MiniLM", as tuned by sentence-transformers: English, and 50 languages
    "minilm": Preset("sentence-transformers/all-MiniLM-L6-v2", "mean", True, learning_rate=1e-5),
    "multilingual-minilm": Preset(
        "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
        "mean",
        True,
        learning_rate=1e-5,
        passage_length=128,
    ),
    # Xiong et al. (ICLR 2021), "Approximate Nearest Neighbor Negative Contrastive Learning": English passages
    "ance-firstp": Preset(
        "castorini/ance-msmarco-passage", "cls", False, temperature=1.0, passage_length=512, tokenizer="roberta-base",
        as_in="2.3.0",
    ),
    # Zhan et al. (SIGIR 2021), "Optimizing Dense Retrieval Model Training with Hard Negatives": English passages; ADORE's
    # queries are searched among STAR's passages
    "star": Preset("DRhard-star", **DRHARD, query_length=32),
    "adore": Preset("DRhard-adore-star", **DRHARD, passage_name="DRhard-star"),
}  # fmt: skip


def preset(name: str) -> Preset:
    """The preset `name`; raises UserError with the names that there are."""
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]
