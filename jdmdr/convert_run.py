"""Converts a run between the TREC form, `qid Q0 docid rank score tag`, and MS MARCO's, `qid TAB docid TAB rank`; and DPR's results.

    python -m jdmdr.convert_run runs/star/evaluate/dev.star.en.trec dev.tsv --depth=1000
    python -m jdmdr.convert_run dev.tsv dev.trec
    python -m jdmdr.convert_run nq-test.json test.trec --topics=NQ/topics/en.test.tsv

    --topics FILE  the queries that DPR's results answer: they know them by their text alone
    --depth N      ranks a query that are kept; 0, the default: all
    --tag NAME     the last column of a TREC run; by default the file's name

Each form becomes the other; which one a file has is told by its first line. Ids are written as they stand. TREC runs are
ranked by score, equal ones as they stand; of a run in MS MARCO's form the score becomes one over the rank. The results of DPR's
retriever, `[{"question", "ctxs": [{"id", "score"}]}]` (jdmdr/dpr.py), become a TREC run. A file that is there already is never
overwritten.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from absl import flags

from jdmdr import cli, dpr, metrics, reading
from jdmdr.types import UserError
from jdmdr.workdir import atomic


def convert(
    source: pathlib.Path, target: pathlib.Path, depth: int, tag: str, topics: pathlib.Path | None = None
) -> tuple[str, int, int]:  # fmt: skip
    """Writes `source` in the other form, with `topics` the results of DPR as a TREC run, to `target`; returns the form's name, the queries and the lines.

    Raises UserError for a target that exists or cannot be written, a malformed run, and, towards MS MARCO's form, more
    ranks than its script reads.
    """
    if target.exists():
        raise UserError(f"{target} exists and is not overwritten; choose another name, or remove it")
    if not topics and reading.is_json_list(source):
        raise UserError(
            f"{source} holds DPR's results, which know questions by their text; name the queries with --topics=FILE"
        )
    run = dpr.results(source, reading.topics(topics)) if topics else None
    to_trec = run is not None or metrics.in_msmarco_form(source)
    if run is not None:
        ranks = {qid: metrics.hit_ranks(hits) for qid, hits in run.items()}
    elif to_trec:
        ranks, _ = metrics.read_ranks(source)
    else:
        ranks = {qid: metrics.hit_ranks(hits) for qid, hits in metrics.read_run(source).items()}
        longest = max(ranks, key=lambda qid: len(ranks[qid]), default=None)
        if longest and not 0 < depth <= metrics.LONGEST and len(ranks[longest]) > metrics.LONGEST:
            raise UserError(
                f"{source} ranks {len(ranks[longest])} passages for query {longest!r}, and MS MARCO's script reads "
                f"{metrics.LONGEST}; add --depth={metrics.LONGEST}"
            )

    def rows() -> Iterator[str]:
        for qid, of in ranks.items():
            for docid, rank in of.items():
                if not depth or rank <= depth:
                    score = 1 / rank if run is None else run[qid][docid]
                    yield f"{qid} Q0 {docid} {rank} {score:.9g} {tag}\n" if to_trec else f"{qid}\t{docid}\t{rank}\n"

    count = 0
    try:
        with atomic(target) as temporary, open(temporary, "w", encoding="utf-8") as handle:
            for row in rows():
                handle.write(row)
                count += 1
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}; name a file that can be written") from error
    return "TREC's form" if to_trec else "MS MARCO's form", len(ranks), count


def main() -> None:
    flags.DEFINE_string("topics", "", "The queries that DPR's results answer.")
    flags.DEFINE_integer("depth", 0, "Ranks a query that are kept; 0: all.", lower_bound=0)
    flags.DEFINE_string("tag", "", "The last column of a TREC run.")
    cli.run_tool(_command, __doc__)


def _command(words: list[str], values: flags.FlagValues) -> int:
    if len(words) != 2:
        raise UserError(f"{len(words)} files given; write python -m jdmdr.convert_run RUN OUT")
    source, target = map(pathlib.Path, words)
    tag = values.tag or source.name
    if tag.split() != [tag]:
        raise UserError(f"the tag {tag!r} is one word in a TREC run; give another with --tag=NAME")
    topics = pathlib.Path(values.topics) if values.topics else None
    form, queries, lines = convert(source, target, values.depth, tag, topics)
    print(f"{target}: {queries} queries, {lines} lines in {form}")
    return 0


if __name__ == "__main__":
    main()
