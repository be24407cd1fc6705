import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jdmdr.llm import chat
from jdmdr.llm.chat import Example
from jdmdr.types import UserError

SPECIAL = ["<pad>", "<user>", "<assistant>", "<end>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROW = {"instruction": "Summarise.", "input": "A long text, หนึ่งสอง.", "output": "Short."}


def tokenizer(directory, template=TEMPLATE):
    """One token a byte."""
    vocab = {piece: i for i, piece in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole = PreTrainedTokenizerFast(tokenizer_object=fast, additional_special_tokens=SPECIAL)
    whole.chat_template = template
    whole.save_pretrained(directory)
    return directory


def size(text):
    return len(text.encode())


def test_the_prompt_is_the_question_and_the_answer_ends_the_turn(tmp_path):
    found = chat.Chat(tokenizer(tmp_path)).example(ROW, 1000)
    asked = size(ROW["instruction"] + "\n\n" + ROW["input"])
    assert found.prompt == 1 + asked + 1 + 1  # <user>, the text, <end>, <assistant>
    assert len(found.ids) == found.prompt + size(ROW["output"]) + 1
    assert found.ids[0] == 1 and found.ids[found.prompt - 2 : found.prompt] == [3, 2] and found.ids[-1] == 3


@pytest.mark.parametrize("cut", [1, 4, 11, 20])
def test_a_long_example_loses_the_end_of_its_input(tmp_path, cut):
    template = chat.Chat(tokenizer(tmp_path))
    whole = template.example(ROW, 1000)
    found = template.example(ROW, len(whole.ids) - cut)
    assert len(whole.ids) - cut - 3 < len(found.ids) <= len(whole.ids) - cut  # a Thai letter is three bytes
    answer = slice(whole.prompt - 2, None)
    assert found.ids[found.prompt - 2 :] == whole.ids[answer]
    start = found.prompt - 2
    assert found.ids[:start] == whole.ids[:start]


def test_an_example_too_long_without_its_input_is_left_out(tmp_path):
    template = chat.Chat(tokenizer(tmp_path))
    assert template.example(ROW, size(ROW["instruction"]) + size(ROW["output"]) + 5) is None


def test_what_has_no_chat_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer that can be loaded"):
        chat.Chat(tmp_path)
    with pytest.raises(UserError, match="has no chat template"):
        chat.Chat(tokenizer(tmp_path / "plain", None))
    odd = TEMPLATE.replace("{% for", "{{ messages|length }}{% for")
    with pytest.raises(UserError, match="the answer cannot be told apart"):
        chat.Chat(tokenizer(tmp_path / "odd", odd)).example(ROW, 1000)


def made(count, rng):
    lengths = rng.integers(5, 300, count)
    return [Example([i] * n, int(rng.integers(1, n))) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_chunks_make_up_batches_whose_loss_is_the_mean_over_answers(rows):
    examples = made(12, np.random.default_rng(0))
    chunks = list(chat.batches(examples, 6, 4, rows, 1024, 0))
    each = -(-4 // rows)
    assert len(chunks) == 6 * each and {chunk["ids_BxT"].shape[0] for chunk in chunks} == {rows}
    assert {chunk["ids_BxT"].shape[1] for chunk in chunks} <= {128, 256, 512}
    seen = []
    for step in range(6):
        batch = chunks[step * each : (step + 1) * each]
        here = sorted(int(ids[0]) for c in batch for ids, weights in zip(*c.values(), strict=True) if weights.any())
        seen += here
        learned = sum(len(examples[i].ids) - examples[i].prompt for i in here)
        for chunk in batch:
            for ids, weights in zip(*chunk.values(), strict=True):
                example = examples[int(ids[0])] if weights.any() else Example([], 0)
                expected = np.zeros(len(ids))
                expected[example.prompt : len(example.ids)] = each / learned
                np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert sorted(seen) == sorted([*range(12)] * 2)  # two epochs, each example once in either


def test_the_order_is_the_seeds():
    examples = made(9, np.random.default_rng(1))
    run = lambda seed: [c["ids_BxT"].tolist() for c in chat.batches(examples, 3, 4, 4, 512, seed)]
    assert run(0) == run(0) != run(1)
