"""What judging is worth where the judge is never wrong: training on one positive a query, the others hidden among the candidates.

    python -m benchmarks.judging --data mini-miracl --langs ru,sw

Of every training query one positive is kept, by a hash; the others stay in the corpus without a label, where mining finds them
and a recipe without a judge takes them for negatives. An *oracle* judges: a server on loopback that answers from the hidden
labels, asked through the real client by the real stage. So the difference is what a perfect judge brings to this encoder, not
what a language model does. Rows: no filter, the rule filter that stands in for the judge, the judge.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate

from benchmarks import command
from configs import ablation
from jdmdr import ablate, datasets, hashing, metrics, negatives, progress, reading, retrievers
from jdmdr.corpus import passage_text
from jdmdr.library import TRAIN, Library
from jdmdr.llm import prompts
from jdmdr.mine import read_mined
from jdmdr.types import NO_HIT, UserError
from tests.llm_servers import MODEL, oracle, serve

NO_FILTER = {"filters.percent_of_positive": None}
PLAIN, RULES, JUDGED = "no filter", "rule filter (PercPos 95 %)", "judged by an oracle"
Hidden = dict[str, dict[str, list[str]]]  # {lang: {qid: docids}}


def hide(root: pathlib.Path, langs: str, out: pathlib.Path, seed: int) -> Hidden:
    """Copies a data root with one positive a training query; returns the docids of the others.

    Training rows stay out, since they hold the others too.
    """
    shutil.rmtree(out, ignore_errors=True)
    hidden: Hidden = {}
    for lang, files in datasets.discover(root, langs).items():
        if TRAIN not in files.qrels:
            raise UserError(f"--data {root}: {lang} has no training qrels, whose positives could be hidden")
        for path in (*files.corpus, *files.topics.values(), *files.qrels.values()):
            target = out / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        judged, _ = reading.qrels(files.qrels[TRAIN])
        lines, hidden[lang] = [], {}
        for qid, of in judged.items():
            order = sorted(
                (docid for docid, rel in of.items() if rel > 0),
                key=lambda docid, qid=qid: hashing.stable_hash(seed, "shown positive", qid, docid),
            )
            lines += [f"{qid} Q0 {docid} 1\n" for docid in order[:1]]
            hidden[lang] |= {qid: order[1:]} if order[1:] else {}
        (out / files.qrels[TRAIN].relative_to(root)).write_text("".join(lines), encoding="utf-8")
    return hidden


def relevant_pairs(library: Library, hidden: Hidden, characters: int) -> set[tuple[str, str]]:
    """(question, candidate) as the judge's prompt shows them, of all hidden positives."""
    shown = lambda text: prompts.tagged("text", text[:characters]).splitlines()[1]
    pairs = set()
    for lang, collection in zip(library.langs, library.collections, strict=True):
        questions = dict(zip(*library.queries(lang, TRAIN), strict=True))
        for qid, docids in hidden[lang].items():
            rows = collection.rows(docids)
            pairs |= {
                (shown(questions[qid]), shown(passage_text(collection.passage(int(row))))) for row in rows if row >= 0
            }
    return pairs


def recipe(arguments: argparse.Namespace, data: pathlib.Path, url: str) -> ConfigDict:
    config = ablation.get_config()
    with config.unlocked(), config.ignore_type():
        config.data.root, config.data.langs = str(data), ""
        config.judge.depth, config.judge.calibrate = config.mine.depth, 0
        config.judge.sampling = ((0.4, 0.7),)  # an oracle says the same every time
        config.expand.rounds = 0
        config.mine.negatives, config.train.epochs = arguments.negatives, arguments.epochs
        config.llm.cache = str(arguments.out / "llm")  # of all rows and seeds
        server = {"llm.base_url": url, "llm.model": MODEL}
        rows = [("Judging", PLAIN, NO_FILTER), ("Judging", RULES, {}), ("Judging", JUDGED, {**NO_FILTER, **server})]
        config.ablation = {"rows": rows, "seeds": tuple(range(arguments.seeds)), "reference": PLAIN}
    return config


def met(cell: pathlib.Path, hidden: Hidden) -> tuple[int, int]:
    """How many hidden positives are among a cell's candidates, and among its negatives."""
    library, counts = Library(cell / "corpus"), [0, 0]
    for lang, collection in zip(library.langs, library.collections, strict=True):
        qids, chosen = negatives.read(negatives.version_dir(cell / "negatives", 0), lang)
        lists = read_mined(cell / "mine", lang, []).rows_QxK, chosen.rows_QxN
        for q, qid in enumerate(qids):
            rows = collection.rows(hidden[lang].get(qid, []))
            for index, rows_QxN in enumerate(lists):
                counts[index] += int(np.isin(rows[rows >= 0], rows_QxN[q][rows_QxN[q] != NO_HIT]).sum())
    return counts[0], counts[1]


def found_again(cell: pathlib.Path, hidden: Hidden) -> float:
    """nDCG@10 of the trained encoder for the hidden positives of the queries that it trained on, mean of the languages.

    The shown positive is taken out of the collection.
    """
    library, means = Library(cell / "corpus"), {}
    for lang, collection in zip(library.langs, library.collections, strict=True):
        trained, shown = (
            negatives.read(negatives.version_dir(cell / "negatives", 0), lang)[0],
            library.qrels(lang, TRAIN),
        )
        qids = [qid for qid in trained if qid in hidden[lang]]
        place = {qid: row for row, qid in enumerate(library.queries(lang, TRAIN)[0])}
        vectors = retrievers.stored(cell / "embeddings" / lang, TRAIN, [cell / "embeddings" / lang])
        passages_CxD = np.concatenate(vectors.blocks).astype(np.float32)
        scores_QxC = vectors.queries_QxD[[place[qid] for qid in qids]] @ passages_CxD.T
        run = {}
        for q, qid in enumerate(qids):
            scores_QxC[q, collection.rows(list(shown[qid]))] = -np.inf
            best = np.argsort(-scores_QxC[q])[:10]
            run[qid] = dict(zip(collection.docids(best), scores_QxC[q, best].tolist(), strict=True))
        qrels = {qid: dict.fromkeys(hidden[lang][qid], 1) for qid in qids}
        means[lang] = float(np.mean(list(metrics.evaluate_run(qrels, run, ("ndcg@10",))["ndcg@10"].values())))
    return metrics.macro_average(means)


def page(found: Mapping[str, Any], cells: pathlib.Path, hidden: Hidden, seeds: int) -> str:
    rows = []
    for name in (PLAIN, RULES, JUDGED):
        own = [cells / f"{ablate.Row('', name, None).slug}-{seed}" for seed in range(seeds)]
        candidates, chosen = np.mean([met(cell, hidden) for cell in own], axis=0)
        again = [found_again(cell, hidden) for cell in own]
        spread = f"{min(again):.3f} to {max(again):.3f}"
        rows.append([name, f"{candidates:,.0f}", f"{chosen:,.0f}", f"{np.mean(again):.3f}", spread])
    headers = ["", "hidden among the candidates", "among the negatives", "nDCG@10 of the hidden", "over the seeds"]
    table = tabulate(rows, headers, "github", disable_numparse=True, colalign=["left"] + ["right"] * 4)
    queries = sum(len(of) for of in hidden.values())
    total = sum(len(docids) for of in hidden.values() for docids in of.values())
    return f"{total:,} positives of {queries:,} queries are hidden; mean over the seeds:\n\n{table}\n\n{ablate.page(found, 'github')}"


def measure(arguments: argparse.Namespace) -> None:
    """The command: all rows and seeds, then the table."""
    hidden = hide(pathlib.Path(arguments.data), arguments.langs, arguments.out / "data", 0)
    relevant: set[tuple[str, str]] = set()
    grade = lambda question, candidate: 2 * ((question, candidate) in relevant)
    with serve(oracle(grade)) as server:
        config = recipe(arguments, arguments.out / "data", server.base_url)
        rows = [ablate.Row(*row) for row in config.ablation.rows]
        for row in rows:  # without the judge first: its corpus tells what the oracle needs to know
            for seed in config.ablation.seeds:
                cell = ablate.cell_config(config, row, seed)
                progress.say(f"{row.name}, seed {seed}")
                ablate.run_cell(cell, arguments.out / "cells", f"{row.slug}-{seed}")
                if not relevant:
                    library = Library(arguments.out / "cells" / f"{row.slug}-{seed}" / "corpus")
                    relevant |= relevant_pairs(library, hidden, config.judge.passage_chars)
        progress.say(f"{len(server.requests):,} calls")
    found = ablate.results(rows, config.ablation.seeds, PLAIN, config.name, arguments.out / "cells")
    text = page(found, arguments.out / "cells", hidden, arguments.seeds)
    print(text)
    if arguments.docs:
        command.replace_section(arguments.docs, "judging", text)


if __name__ == "__main__":
    parser = command.parser_with_data(__doc__, "runs/judging")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 (%(default)s)")
    parser.add_argument("--negatives", type=int, default=7, help="mine.negatives: kept a query (%(default)s)")
    parser.add_argument("--epochs", type=float, default=2.0, help="of the main training (%(default)s)")
    command.run(measure, parser)
