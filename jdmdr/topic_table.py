"""The 12 topics of DMDR and the labels of two English classifiers that they stand for.

Source: Huang et al., "Boosting Data Utilization for Multilingual Dense Retrieval" (EMNLP 2025), appendix, and the authors'
released mapping; the label sets are those of DBpedia and Yahoo Answers (Zhang, Zhao and LeCun, NeurIPS 2015).
"""

from __future__ import annotations

from typing import NamedTuple

from jdmdr.types import UserError


class Topic(NamedTuple):
    """A topic; its id is its place in `TOPICS`."""

    code: str
    name: str
    yahoo: tuple[str, ...] = ()
    dbpedia: tuple[str, ...] = ()


TOPICS = (
    Topic("BL", "Books & Literature", (), ("WrittenWork",)),
    Topic("SM", "Science & Mathematics", ("Science & Mathematics",), ("EducationalInstitution",)),
    Topic("LH", "Life & Health", ("Health",), ("Animal", "Plant")),
    Topic("JE", "Jobs & Education", ("Education & Reference",)),
    Topic("CI", "Computers & Internet", ("Computers & Internet",), ("Company",)),
    Topic("SP", "Sports", ("Sports",), ("Athlete",)),
    Topic("BF", "Business & Finance", ("Business & Finance",), ("OfficeHolder",)),
    Topic("PG", "Politics & Government", ("Politics & Government",)),
    Topic("TT", "Traffic & Transportation", (), ("MeanOfTransportation",)),
    Topic("AE", "Arts & Entertainment", ("Entertainment & Music",), ("Artist", "Album", "Film")),
    Topic("GE", "Geography", (), ("Building", "Village", "NaturalPlace")),
    Topic("OT", "Others"),
)
CODES = [topic.code for topic in TOPICS]
OTHERS = CODES.index("OT")
YAHOO = (
    "Society & Culture", "Science & Mathematics", "Health", "Education & Reference", "Computers & Internet", "Sports",
    "Business & Finance", "Entertainment & Music", "Family & Relationships", "Politics & Government",
)  # fmt: skip
DBPEDIA = (
    "Company", "EducationalInstitution", "Artist", "Athlete", "OfficeHolder", "MeanOfTransportation", "Building",
    "NaturalPlace", "Village", "Animal", "Plant", "Album", "Film", "WrittenWork",
)  # fmt: skip
# Where the paper's mapping is odd: a minister is no business, a school no science, a company no computer.
FIXED = {"OfficeHolder": "PG", "EducationalInstitution": "JE", "Company": "BF"}
MAPPINGS = ("paper", "fixed")
PREFIX = "__label__"  # before fastText's labels


def topic_ids(mapping: str) -> dict[str, int]:
    """Every label that a topic is known by -> its id: codes, names, and the labels of the two classifiers.

    Yahoo's labels that the paper leaves out are Others. `mapping` is one of MAPPINGS.
    """
    ids = {label: OTHERS for label in YAHOO}
    for number, topic in enumerate(TOPICS):
        ids |= dict.fromkeys((topic.code, topic.name, *topic.yahoo, *topic.dbpedia), number)
    if mapping == "fixed":
        ids |= {label: CODES.index(code) for label, code in FIXED.items()}
    return ids


def classifier_ids(labels: tuple[str, ...], mapping: str) -> dict[str, int]:
    """What a classifier of these labels may answer -> topic id: a label's name without blanks or its number from 1, each
    with fastText's prefix or without."""
    ids = topic_ids(mapping)
    spelled = {}
    for number, label in enumerate(labels, 1):
        for name in (str(number), label, label.replace(" ", "_"), label.replace(" ", "")):
            spelled |= {name: ids[label], PREFIX + name: ids[label]}
    return spelled


def id_of(label: str, ids: dict[str, int], where: str) -> int:
    """The topic of a label of the user's; raises UserError, `where` telling the place, for one that there is not."""
    found = ids.get(label.removeprefix(PREFIX).strip())
    if found is None:
        raise UserError(
            f"{where}: {label!r} is no topic; name one of {', '.join(CODES)}, or a label of DBpedia or Yahoo Answers"
        )
    return found
