"""Makes the files beside it, a tiny byte-level tokenizer as RoBERTa has, and what old libraries make of it.

    python make.py vocabulary              needs tokenizers and transformers 5
    PYTHONPATH=DIR python make.py ids      once with transformers==2.3.0 in DIR, once with 2.8.0

`pip install --no-deps --target DIR transformers==2.8.0 regex sacremoses sentencepiece boto3 botocore jmespath s3transfer
joblib click` fills DIR. ids.json is {version: [ids of each text, or null where the library fails]}, `MAX_LENGTH` at most.
"""

import json
import pathlib
import shutil
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
MAX_LENGTH = 16
TEXTS = [
    "Hello World", " hello world", "hello", "", " ", "What is the Capital of İstanbul, ΣΟΦΟΣ?", "http://A.b/C<sep>The Title<sep>",
    "ÉTAT d'Ünï  two blanks ", "a\tTab\nand a line", "MASKED <mask> word </s> End", "ein Haus, 日本語 мир",
    "The quick brown fox jumps over the lazy dog and the cat and the capital of the world",
]  # fmt: skip


def vocabulary():
    import tokenizers
    import transformers

    words = ["hello world the title of what is the capital of the world"] * 20 + [t.lower() for t in TEXTS] * 3
    trainer = tokenizers.ByteLevelBPETokenizer()
    trainer.train_from_iterator(words, 340, min_frequency=2, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    trainer.save_model(str(HERE))
    vocab = json.loads((HERE / "vocab.json").read_text())
    merges = [tuple(line.split()) for line in (HERE / "merges.txt").read_text().splitlines()[1:]]
    transformers.RobertaTokenizer(vocab=vocab, merges=merges).save_pretrained(HERE)


def ids():
    import transformers
    from transformers.tokenization_roberta import RobertaTokenizer

    with (
        tempfile.TemporaryDirectory() as directory
    ):  # from_pretrained alone heeds do_lower_case; today's other files confuse it
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(HERE / name, directory)
        tokenizer = RobertaTokenizer.from_pretrained(directory, do_lower_case=True)
    found = []
    for text in TEXTS:
        try:
            found.append(tokenizer.encode(text, add_special_tokens=True, max_length=MAX_LENGTH))
        except IndexError:
            found.append(None)
    path = HERE / "ids.json"
    written = json.loads(path.read_text()) if path.exists() else {}
    written[transformers.__version__] = found
    path.write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    {"vocabulary": vocabulary, "ids": ids}[sys.argv[1]]()
