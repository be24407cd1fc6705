import itertools
import json
from collections import Counter

import pytest

from jdmdr.llm import votes

EVERY = (None, 0, 1, 2)


@pytest.mark.parametrize("accuracy, completeness, label", [
    (0, 0, 0), (0, 2, 0), (2, 0, 0), (1, 0, 0), (1, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 2),
])  # fmt: skip
def test_two_criteria_make_one_label(accuracy, completeness, label):
    assert votes.label({"accuracy": accuracy, "completeness": completeness}) == label


def test_the_majority_is_the_most_frequent_label_and_of_two_the_larger():
    for labels in itertools.chain(*(itertools.product((0, 1, 2), repeat=n) for n in range(1, 5))):
        counts = Counter(labels)
        most = [value for value in counts if counts[value] == max(counts.values())]
        assert votes.majority(labels) == max(most)
    assert votes.majority([]) is None


@pytest.mark.parametrize("total", [1, 2, 3, 4])
@pytest.mark.parametrize("most", [0, 1])
def test_stopping_early_never_changes_whether_a_pair_is_kept_and_stops_at_the_first_chance(total, most):
    kept = lambda cast: (found := votes.majority([v for v in cast if v is not None])) is not None and found <= most
    for cast in itertools.product(EVERY, repeat=total):
        for n in range(1, total + 1):
            valid = [v for v in cast[:n] if v is not None]
            outcomes = {kept([*cast[:n], *rest]) for rest in itertools.product(EVERY, repeat=total - n)}
            # without a valid vote the pair may yet end unjudged, which is no verdict
            assert votes.settled(valid, total - n, most) == (n == total or bool(valid) and len(outcomes) == 1)


def test_of_four_votes_three_agree_to_keep_and_two_to_drop():
    calls = lambda label: next(n for n in range(1, 5) if votes.settled([label] * n, 4 - n, 0))
    assert [calls(0), calls(1), calls(2)] == [3, 2, 2] and votes.fewest(4, 0) == 2 and votes.fewest(1, 0) == 1


@pytest.mark.parametrize("text, grades", [
    ('{"accuracy": 2, "completeness": 0}', (2, 0)), ('```json\n{"Accuracy": "1", "Completeness": 1.0}\n```', (1, 1)),
    ('Accuracy: 1\nCompleteness: 2', (1, 2)), ('**accuracy** = 0, **completeness** = 1', (0, 1)),
    ('<think>{"accuracy": 0, "completeness": 0}?</think>{"accuracy": 2, "completeness": 2, "why": "..."}', (2, 2)),
    ('{"accuracy": 3, "completeness": 0}', None), ('{"accuracy": true, "completeness": 0}', None), ('{"accuracy": 1}', None),
    ('{"accuracy": null, "completeness": 1}', None), ('accuracy: 12, completeness: 1', None), ("2", None), ("", None),
    ("I cannot help with that.", None), ('{"accuracy": [1], "completeness": {}}', None), ('{"accuracy": 1, "compl', None),
])  # fmt: skip
def test_grades_are_read_from_what_models_write_and_nothing_is_made_up(text, grades):
    found = votes.read_vote(text)
    assert (found and (found["accuracy"], found["completeness"])) == grades


def test_a_vote_survives_json():
    vote = votes.read_vote('{"completeness": 2, "accuracy": 1}')
    assert json.loads(json.dumps(vote)) == vote == {"accuracy": 1, "completeness": 2}
