"""Encoding and contrastive training side by side with sentence-transformers: same weights, passages, batches and steps.

    make bench
    python -m benchmarks.speed --data DIR --langs en,sw --out runs/bench

All three run in turns: jdmdr; sentence-transformers as it comes (fp32); and tuned (this command's malloc settings, and
bf16 autocast where torch is faster with it). Attention is torch's scaled_dot_product_attention in both of these, and both sort what they encode by length,
which the library does by itself. A ratio is of two neighbouring turns; the median of the rounds stands with their range.
Writes OUT/speed.json. Time: under 10 minutes on 2 cores.
"""

from __future__ import annotations

import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from benchmarks import command, material
from benchmarks.peer import Peer, find_torch
from configs.quickstart_minilm import checkpoint
from jdmdr import batches, cli, encode, encoders, models, objectives, optim, parallel, perf, progress, sources, step
from jdmdr.evaluate import ndcg_by_rows
from jdmdr.index.exact import ExactSearcher
from jdmdr.tokenizer import Tokenizer, TokenStore, write_tokens
from jdmdr.workdir import write_json

PASSAGES_PER_QUERY = 2  # the positive and one negative
OURS, DEFAULT, TUNED = "jdmdr", "sentence-transformers", "sentence-transformers, tuned"
WARM_UP = 1  # rounds that are not counted


class Ours:
    """jdmdr's side: the parts that encode and train in every recipe, driven round by round."""

    def __init__(self, recipe: Any, section: Any, make: Any, steps: list[int], length: int):
        self.config, params = models.start(recipe.config.encoder, recipe.vocab_size, recipe.stores.passages, 0)
        self.params = params
        self.encoder, self.mesh = encoders.build(self.config), recipe.mesh
        self._tokenizer = Tokenizer(recipe.directory / "tokenizer", length)
        self._embedder = encode.Embedder(self.encoder, self.mesh, length, "passage")
        objective = objectives.build(section.objective, self.config, self.mesh)
        optimiser = optim.make_optimiser(section, params)
        start = step.init_state(jax.tree.map(jnp.copy, params), optimiser)  # the step gives its state away
        self._state = jax.device_put(start, parallel.replicated(self.mesh))
        self._step = step.make_step(self.encoder, objective, optimiser, recipe.config.seed)
        self._batches = batches.batch_iterator(lambda i: make(steps[i]), 0, len(steps))

    def compile(self, planned: list[dict[str, Any]]) -> float:
        """Seconds of a step with a first batch of each shape, whose results are thrown away."""
        began = time.perf_counter()
        for batch in {str(jax.tree.map(np.shape, batch)): batch for batch in planned}.values():
            state = jax.tree.map(jnp.copy, self._state)
            jax.block_until_ready(self._step(state, parallel.put_batch(batch, self.mesh)))
        return time.perf_counter() - began

    def encode(self, texts: list[str], scratch: pathlib.Path) -> tuple[float, np.ndarray]:
        """Seconds and embeddings, tokenisation to disk included, as the stages do it."""
        began = time.perf_counter()
        write_tokens(self._tokenizer, texts, scratch, "all")
        store = TokenStore(scratch, ["all"], self._tokenizer.vocab_size)
        vectors = self._embedder.embed(self.params, store, np.arange(len(texts)))
        return time.perf_counter() - began, vectors

    def train(self, count: int) -> tuple[float, list[float]]:
        """Seconds and losses of the next steps."""
        began = time.perf_counter()
        losses = []
        for _ in range(count):
            batch, _ = next(self._batches)
            self._state, metrics = self._step(self._state, parallel.put_batch(batch, self.mesh))
            losses.append(metrics["loss"])
        losses = [float(loss) for loss in losses]
        return time.perf_counter() - began, losses

    def trained(self) -> Any:
        """The parameters as they are now."""
        return self._state["params"]


def ratios(of: dict[str, list[float]], system: str) -> dict[str, float]:
    """How many times as fast as `system` jdmdr is: median, least and most of the rounds."""
    found = np.array(of[system]) / np.array(of[OURS])
    return {"median": float(np.median(found)), "low": float(found.min()), "high": float(found.max())}


def padding_shares(lengths_BxS: np.ndarray) -> float:
    """Share of padding where queries (column 0) and passages (the rest) are each padded to their longest."""
    q, p = lengths_BxS[:, 0], lengths_BxS[:, 1:]
    return 1 - lengths_BxS.sum() / (q.size * q.max() + p.size * p.max())


def measure(a: Any) -> dict[str, Any]:
    versions = find_torch(a.torch_python)
    start = material.cut_checkpoint(pathlib.Path(checkpoint()), a.out / "checkpoint", a.layers, a.length)
    recipe = material.prepare(a.data, a.langs, start, a.length, a.out / "workdir")
    total = (WARM_UP + a.rounds) * a.steps
    section = material.section(steps=total, batch_size=a.batch_size, passages_per_query=PASSAGES_PER_QUERY)
    make, _, _ = sources.batch_maker(
        [sources.Source(material.training_set(recipe, 0), 1.0, PASSAGES_PER_QUERY)], section, recipe.config.weights,
        (a.length, a.length), recipe.mesh.devices.size, 0, len(recipe.library.langs), 1,
    )  # fmt: skip
    steps = material.clean_steps(make, total)
    planned = [make(i) for i in steps]
    rows = [row for batch, _ in planned for row in material.batch_texts(recipe, batch)]

    asking = material.spread(recipe.training, a.passages)
    passages = np.unique(np.concatenate([q.positives for q in asking]))[: a.passages]
    asking = [q for q in asking if np.isin(q.positives, passages).any()]
    texts, questions = material.passage_texts(recipe.library, passages), [q.text for q in asking]

    job = {
        "checkpoint": str(start), "batches": str(a.out / "batches.json"), "threads": command.cores(), "seed": 0,
        "steps": total, "batch_size": a.batch_size, "temperature": section.objective.temperature,
        "learning_rate": section.learning_rate, "warmup_steps": round(section.warmup_share * total),
        "weight_decay": section.weight_decay, "clip": section.clip, "columns": material.columns(PASSAGES_PER_QUERY),
    }  # fmt: skip
    write_json(a.out / "batches.json", rows)
    peers = {
        DEFAULT: Peer(
            a.torch_python, a.out / "default", {**job, "bf16 where it pays": False}, dict.fromkeys(cli.MALLOC, "")
        ),
        TUNED: Peer(a.torch_python, a.out / "tuned", {**job, "bf16 where it pays": True}, cli.MALLOC),
    }
    for peer in peers.values():
        peer.write_texts("passages", texts)
        peer.write_texts("questions", questions)
    ours = Ours(recipe, section, make, steps, a.length)

    encoders_ = {OURS: functools.partial(ours.encode, texts, a.out / "scratch")}
    encoders_ |= {name: functools.partial(peer.encode, "passages") for name, peer in peers.items()}
    seconds, vectors = _in_turns(encoders_, a.rounds, "  encoding")
    asked = {OURS: ours.encode(questions, a.out / "scratch")[1]}
    asked |= {name: peer.encode("questions")[1] for name, peer in peers.items()}
    compiling = ours.compile([batch for batch, _ in planned])
    trainers = {OURS: ours.train} | {name: peer.train for name, peer in peers.items()}
    trained, losses = _in_turns(
        {name: functools.partial(train, a.steps) for name, train in trainers.items()}, a.rounds, "  training"
    )
    for peer in peers.values():
        peer.close()

    lengths = recipe.stores.passages.lengths(passages)
    of_batches = np.stack([_lengths(recipe, batch) for batch, _ in planned])
    per_round = 3 * perf.forward_flops(ours.config, of_batches[WARM_UP * a.steps :]) / a.rounds
    peak = perf.matmul_peak("float32")
    curves = {name: [x for part in parts for x in part] for name, parts in losses.items()}
    positives = [np.flatnonzero(np.isin(passages, q.positives)) for q in asking]
    ndcg = {
        name: ndcg_by_rows(
            positives, ExactSearcher([v[-1]], recipe.mesh).search(asked[name], 10), [0] * len(asking)
        )[0]
        for name, v in vectors.items()
    }  # fmt: skip
    return {
        "machine": command.machine(versions),
        "bf16": peers[TUNED].greeting["bf16"],
        "attention": peers[DEFAULT].greeting["attention"],
        "threads": {OURS: command.cores(), **{name: peer.greeting["threads"] for name, peer in peers.items()}},
        "sizes": {
            "passages": len(texts), "mean_tokens": float(lengths.mean()), "max_tokens": int(lengths.max()),
            "batch_size": a.batch_size, "passages_per_query": PASSAGES_PER_QUERY, "steps_a_round": a.steps,
            "rounds": a.rounds, "layers": a.layers, "mean_tokens_of_passages_in_batches": float(of_batches[:, :, 1:].mean()),
            "clean_of_planned": [total, steps[-1] + 1],
        },
        "padding": {
            OURS: float(np.mean([figures["padding_share"] for _, figures in planned])),
            DEFAULT: float(np.mean([padding_shares(x) for x in of_batches])),
        },
        "seconds": {"encode": _counted(seconds), "train": _counted(trained)},
        "compiling_seconds": compiling,
        "ratios": {
            "encode": {name: ratios(_counted(seconds), name) for name in peers},
            "train": {name: ratios(_counted(trained), name) for name in peers},
        },
        "matmul_peak_gflops": peak / 1e9,
        "share_of_peak": {
            "encode": _share(_counted(seconds), perf.forward_flops(ours.config, lengths), peak),
            "train": _share(_counted(trained), per_round, peak),
        },
        "quality": {
            name: {
                "embedding_difference": float(np.abs(vectors[name][-1] - vectors[OURS][-1]).max()),
                "lowest_cosine": float((vectors[name][-1] * vectors[OURS][-1]).sum(1).min()),
                "loss_difference": float(np.abs(np.array(curves[name]) - curves[OURS]).max()),
            }
            for name in peers
        },
        "ndcg@10": ndcg,
        "losses": curves,
    }  # fmt: skip


def _in_turns(systems: dict[str, Any], rounds: int, what: str) -> tuple[dict[str, list], dict[str, list]]:
    """Seconds and results of each system by round; every round begins with another one."""
    names = list(systems)
    seconds, results = ({name: [] for name in names} for _ in range(2))
    for turn in progress.bar(range(WARM_UP + rounds), what, "rounds"):
        for name in np.roll(names, -turn).tolist():
            taken, result = systems[name]()
            seconds[name].append(taken)
            results[name].append(result)
    return seconds, results


def _lengths(recipe: Any, batch: dict[str, Any]) -> np.ndarray:
    """Tokens of the query and its passages, B x (1 + P)."""
    queries = np.array([recipe.training[i].row for i in batch["query_index_B"]])
    rows_BxP = batch["passage_ids_N"].reshape(len(queries), -1)
    passages_BxP = recipe.stores.passages.lengths(rows_BxP.ravel()).reshape(rows_BxP.shape)
    return np.concatenate([recipe.stores.queries.lengths(queries)[:, None], passages_BxP], axis=1)


def _counted(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: values[WARM_UP:] for name, values in seconds.items()}


def _share(seconds: dict[str, list[float]], work: float, peak: float) -> dict[str, float]:
    return {name: work / float(np.median(values)) / peak for name, values in seconds.items()}


def table(found: dict[str, Any], form: str) -> str:
    """The figures by system."""
    sizes, rows = found["sizes"], []
    for name in (OURS, DEFAULT, TUNED):
        row = [name]
        for what, amount in (("encode", sizes["passages"]), ("train", sizes["steps_a_round"] * sizes["batch_size"])):
            row.append(f"{amount / np.median(found['seconds'][what][name]):.1f}")
            row.append(f"{found['share_of_peak'][what][name]:.0%}")
            spread = found["ratios"][what].get(name)
            row.append(
                "" if spread is None else f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"
            )
        quality = found["quality"].get(name)
        row.append(f"{found['ndcg@10'][name]:.4f}")
        row.append("" if quality is None else f"{1 - quality['lowest_cosine']:.0e}")
        row.append("" if quality is None else f"{quality['loss_difference']:.0e}")
        rows.append(row)
    headers = ["", "passages/s", "of peak", "jdmdr is x times as fast", "training queries/s", "of peak",
               "jdmdr is x times as fast", "nDCG@10", "1 - cosine", "loss differs by"]  # fmt: skip
    return tabulate(rows, headers, tablefmt=form, disable_numparse=True)


def text(found: dict[str, Any]) -> str:
    """The section of docs/performance.md."""
    s, p = found["sizes"], found["padding"]
    return "\n".join(
        [
            f"{found['machine']}.",
            "",
            table(found, "github"),
            "",
            f"{s['passages']} passages of {s['mean_tokens']:.0f} tokens on average, {s['max_tokens']} at most; {s['rounds']} "
            f"rounds of {s['steps_a_round']} steps with {s['batch_size']} queries and {s['passages_per_query']} passages "
            f"each ({s['mean_tokens_of_passages_in_batches']:.0f} tokens on average), {s['layers']} layers, no dropout; "
            f"{found['threads'][OURS]} threads; attention of sentence-transformers: {found['attention']}; bf16 autocast in the tuned row: {'yes' if found['bf16'] else 'no, this processor is faster in float32'}. Padding in "
            f"training batches: {p[OURS]:.0%} here, {p[DEFAULT]:.0%} there. The float32 matmul peak is "
            f"{found['matmul_peak_gflops']:.0f} GFLOP/s. Not counted: a first round, and the {found['compiling_seconds']:.0f} s in "
            "which jdmdr compiles its steps.",
        ]
    )


def main(a: Any) -> None:
    found = measure(a)
    write_json(a.out / "speed.json", found)
    print(table(found, "simple"))
    print(f"\n{a.out / 'speed.json'}")
    if a.docs:
        command.replace_section(a.docs, "speed", text(found))


if __name__ == "__main__":
    arguments = command.parser_with_data(__doc__, "runs/bench")
    arguments.add_argument("--length", type=int, default=256, help="tokens of a text at most (%(default)s)")
    arguments.add_argument("--passages", type=int, default=256, help="encoded a round (%(default)s)")
    arguments.add_argument("--rounds", type=int, default=3, help="counted (%(default)s)")
    arguments.add_argument("--steps", type=int, default=5, help="training steps a round (%(default)s)")
    command.run(main, arguments)
