"""From a judge's replies to a verdict: two criteria a reply, a label a vote, the majority of the votes.

Labels are 0 irrelevant, 1 partly relevant, 2 highly relevant (DMDR, Huang et al., EMNLP 2025, section 3.3).
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Sequence

from jdmdr.llm.parse import json_object, without_thoughts

CRITERIA = ("accuracy", "completeness")
LABELS = (0, 1, 2)
Vote = dict[str, int]


def read_vote(text: str) -> Vote | None:
    """The grades of a reply; None where one is missing or is no grade."""
    found = json_object(text) or {name: grade for name, grade in _GRADE.findall(without_thoughts(text).lower())}
    found = {str(name).lower(): grade for name, grade in found.items()}
    grades = {name: _grade(found.get(name)) for name in CRITERIA}
    return None if None in grades.values() else grades


_GRADE = re.compile(rf"\b({'|'.join(CRITERIA)})\W{{1,6}}([0-2])(?![\d.])")


def _grade(value: object) -> int | None:
    if isinstance(value, str) and value.strip() in ("0", "1", "2"):
        value = int(value)
    return int(value) if value in LABELS and not isinstance(value, bool) else None


def label(vote: Vote) -> int:
    """A 0 in any criterion gives 0; else more 1s than 2s give 1, and all else 2."""
    grades = list(vote.values())
    if 0 in grades:
        return 0
    return 1 if grades.count(1) > grades.count(2) else 2


def majority(labels: Sequence[int]) -> int | None:
    """The most frequent label; of equally frequent ones the larger. None without any."""
    counts = Counter(labels)
    return max(counts, key=lambda value: (counts[value], value), default=None)


@functools.cache
def _settled(labels: tuple[int, ...], left: int, most: int) -> bool:
    outcomes = {
        majority([*labels, *(value for value in rest if value is not None)]) <= most
        for rest in itertools.combinations_with_replacement((None, *LABELS), left)
    }
    return len(outcomes) == 1


def settled(labels: Sequence[int], left: int, most: int) -> bool:
    """Whether `left` more votes, valid or not, cannot change if the majority is at most `most`."""
    return not left or bool(labels) and _settled(tuple(sorted(labels)), left, most)


def fewest(votes: int, most: int) -> int:
    """How many of `votes` votes are cast even if they agree at once."""
    return min(n for n in range(1, votes + 1) for value in LABELS if settled([value] * n, votes - n, most))
