"""Says what a data root holds and what to mend, before anything is run on it.

    python -m jdmdr.corpus check DIR [--langs=ar,ko] [--json]

Prints how many passages, queries and judgments each language and split has, how long they are, and what looks wrong, each
with what to do. Errors name the file and the line.

    DIR            a data root, in any layout of docs/data.md; without corpora, topics and qrels are checked alone
    --langs=a,b    only these languages
    --json         one JSON object instead of tables

Exit code 0: every record can be used, and what is reported is for you to judge. 2: a record cannot be read, or an id
repeats; a recipe would stop there.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import tabulate
from absl import flags

from jdmdr import cli, progress
from jdmdr.datasets import find
from jdmdr.datasets.audit import SHOWN, Audit, audit, quantiles
from jdmdr.datasets.layouts import LAYOUTS
from jdmdr.types import UserError

# What a kind of finding means, and what to do about it; in the order of the report.
KINDS = {
    "no corpus": "languages without a corpus: their passages cannot be checked, and a recipe leaves them out; add the "
    "corpus to train or evaluate on them",
    "empty file": "corpus files without a passage: was the download cut short?",
    "empty passages": "passages without text: they are kept and can be retrieved; remove them",
    "duplicates": "passages with the title and text of an earlier one: a copy of a positive counts as wrong when it is "
    "retrieved and can be mined as a negative; keep one of each, or judge all",
    "no title": "passages without a title where others have one: harmless, unless the titles were lost",
    "other script": "texts not in a script of their language: were files swapped, or texts left untranslated?",
    "empty queries": "queries without text: they are kept; remove them",
    "repeated questions": "queries that ask what an earlier one asks: each counts in the averages; keep one of each",
    "unjudged": "queries without judgments: they are not evaluated; add judgments or remove them",
    "judged elsewhere": "queries that qrels of another name judge: these topics are not evaluated by themselves, but can be "
    "put together with them (docs/data.md, Splits)",
    "no topic": "judged qids without a query: their judgments are left out; add the queries, or look whether the ids of "
    "topics and qrels are of one kind",
    "not in the corpus": "judged passages that the corpus does not hold: in train they are left out, elsewhere they count "
    "as not retrieved; complete the corpus or remove the judgments",
    "in another corpus": "judged passages that are in the corpus of another language: they count only where all corpora "
    "are searched together (docs/data.md, Splits)",
    "no positive": "judged queries without a positive passage in the corpus: in train they are left out, elsewhere they "
    "score 0; add a positive or remove them",
    "contradictions": "judgments that contradict an earlier one of the same pair: the higher relevance is kept; keep one",
    "questions of train": "queries that train asks too: remove them from one side, figures on them tell of memory",
    "positives of train": "queries whose positive passage is one of a training query: figures on them do not tell of unseen "
    "passages; fine if that is meant",
}


def main() -> None:
    flags.DEFINE_string("langs", "", "Languages to check, separated by commas; empty: all.")
    flags.DEFINE_boolean("json", False, "One JSON object instead of tables.")
    cli.run_tool(_command, __doc__)


def _command(words: list[str], values: flags.FlagValues) -> int:
    if len(words) != 2 or words[0] != "check":
        raise UserError(f"{' '.join(words) or 'no argument'!r} given; write python -m jdmdr.corpus check DIR")
    root = Path(words[1])
    files = find(root, values.langs)
    found = audit(files)
    progress.close_bars()
    taken = {path for of in files.values() for path in of.paths()}
    layouts = [name for name, layout in LAYOUTS.items() if any(taken.intersection(paths) for *_, paths in layout(root))]
    spare = [] if values.langs else _spare(root, taken)
    if values.json:
        print(json.dumps(as_dict(root, layouts, spare, found), ensure_ascii=False, indent=1))
    else:
        print("\n".join(lines(root, layouts, spare, found)))
    return 2 if found.errors else 0


def as_dict(root: Path, layouts: list[str], spare: list[str], found: Audit) -> dict[str, Any]:
    """The report as one JSON object; lengths are quantiles 0.05, 0.5, 0.95 and 1 in characters."""

    def counted(counts: Any) -> dict[str, Any]:
        return {**dataclasses.asdict(counts), "lengths": quantiles(counts.lengths)}

    return {
        "root": str(root),
        "layouts": layouts,
        "passages": {lang: counted(counts) for lang, counts in found.passages.items()},
        "splits": [{"lang": lang, "split": split, **counted(counts)} for (lang, split), counts in found.splits.items()],
        "findings": [finding._asdict() for finding in found.findings],
        "unread_files": spare,
        "errors": [
            {"file": path, "count": found.error_counts[path], "first": some} for path, some in found.errors.items()
        ],
    }


def lines(root: Path, layouts: list[str], spare: list[str], found: Audit) -> list[str]:
    """The report for a terminal."""
    langs = sorted({*found.passages, *(lang for lang, _ in found.splits)})
    out = [f"{root}: {len(langs)} languages ({', '.join(langs)}), layout {' and '.join(layouts)}"]
    out += _table(
        ["lang", "passages", "chars 5%", "50%", "95%", "max", "empty", "untitled", "duplicates", "other script"],
        [[lang, c.passages, *_lengths(c.lengths), c.empty, c.untitled, c.duplicates, c.other_script]
         for lang, c in found.passages.items()],
    )  # fmt: skip
    out += _table(
        ["lang", "split", "queries", "judgments", "positive", "per query", "chars 5%", "50%", "95%", "max", "other script"],
        [[lang, split, c.queries, c.judgments, c.positives, c.positives / c.with_positive if c.with_positive else None,
          *_lengths(c.lengths), c.other_script] for (lang, split), c in found.splits.items()],
    )  # fmt: skip
    for kind, sentence in KINDS.items():
        of_kind = [finding for finding in found.findings if finding.kind == kind]
        if of_kind:
            out += ["", f"warning: {sentence}"]
            if kind == "no corpus":
                out.append("  " + ", ".join(f.lang for f in of_kind))
                continue
            rows = [[f.lang, f.split, f"{f.count} of {f.total}", f.example] for f in of_kind]
            out += [
                "  " + line for line in tabulate.tabulate(rows, tablefmt="plain", disable_numparse=True).splitlines()
            ]
    if spare:
        out += ["", f"{_files(len(spare))} that no layout reads: {', '.join(spare[:SHOWN])}"
                    f"{', ...' if len(spare) > SHOWN else ''}; docs/data.md says which names are read"]  # fmt: skip
    for path, sentences in found.errors.items():
        out += ["", *(f"error: {sentence}" for sentence in sentences)]
        if more := found.error_counts[path] - len(sentences):
            out.append(f"error: {path}: {more} more of its records cannot be used")
    warnings = len({finding.kind for finding in found.findings})
    out += ["", f"errors in {_files(len(found.errors))}: mend them first" if found.errors else
                f"every record can be used; {warnings} warning{'s' * (warnings > 1)} to look at" if warnings else
                "every record can be used, and nothing looks wrong"]  # fmt: skip
    return out


def _spare(root: Path, taken: set[Path]) -> list[str]:
    """The data files of the root and of its directories, two levels down, that no layout takes."""
    there = itertools.chain.from_iterable(root.glob("/".join("*" * depth)) for depth in (1, 2, 3))
    data = (".jsonl", ".tsv", ".txt", ".json", ".csv", ".parquet", ".gz", ".zip", ".zst")
    spare = (path for path in there if path.name.endswith(data) and path not in taken and path.is_file())
    return sorted(str(path.relative_to(root)) for path in spare if "LICENSE" not in path.name)


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    return (
        ["", *tabulate.tabulate(rows, head, tablefmt="simple", intfmt=",", floatfmt=".2f", missingval="-").splitlines()]
        if rows
        else []
    )


def _files(count: int) -> str:
    return f"{count} file{'s' * (count != 1)}"


def _lengths(lengths: dict[int, int]) -> list[int | None]:
    return quantiles(lengths) or [None] * 4
