"""sentence-transformers' side of a comparison; runs where torch is installed and knows nothing of jdmdr.

    python torch_side.py JOB.json

JOB.json says what to load and how to train. Then one command a line comes on stdin and one line of JSON answers it:

    {"encode": TEXTS.json, "out": FILE.npy}   embeds the texts; answers with the seconds it took
    {"train": n}                              makes n steps; answers with the seconds they took and the losses
"""

import contextlib
import json
import os
import pathlib
import sys
import tempfile
import time

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.losses import MultipleNegativesRankingLoss
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the libraries print is no answer


def answer(**values):
    print(json.dumps(values), file=ANSWERS, flush=True)


class InOrder(DefaultBatchSampler):
    """Batches of the rows as they stand."""

    def __init__(self, dataset, **settings):
        super().__init__(SequentialSampler(dataset), **settings)


class Loss(MultipleNegativesRankingLoss):
    """The library's loss, which also keeps its values."""

    def forward(self, features, labels):
        loss = super().forward(features, labels)
        self.values.append(loss.detach())
        return loss


class Stepwise(TrainerCallback):
    """Makes the trainer wait for the next command whenever it has done what the last one asked for."""

    def __init__(self, loss, asked):
        self.loss, self.left = loss, asked
        self.began = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.left -= 1
        if self.left == 0:
            answer(seconds=time.perf_counter() - self.began, losses=[float(x) for x in self.loss.values])
            self.loss.values.clear()
            if state.global_step < state.max_steps:
                self.left = commands(self.loss.model, bf16=args.bf16)
                self.began = time.perf_counter()


def commands(model, bf16):
    """Obeys commands until one asks for training; returns its number of steps."""
    for line in sys.stdin:
        command = json.loads(line)
        if "train" in command:
            return command["train"]
        began = time.perf_counter()
        autocast = torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()
        with autocast, torch.inference_mode():
            texts = json.loads(pathlib.Path(command["encode"]).read_text())
            vectors = model.encode(texts, batch_size=32, show_progress_bar=False)
        np.save(command["out"], vectors.astype(np.float32))
        answer(seconds=time.perf_counter() - began)
    sys.exit()  # stdin is closed: nobody asks any more


def bfloat16_is_faster():
    """Whether this processor multiplies faster in bfloat16 than in float32, by a product of a feed-forward layer's shape."""

    def seconds(dtype):
        a, b = torch.randn(2048, 384, dtype=dtype), torch.randn(384, 1536, dtype=dtype)
        taken = []
        for _ in range(10):
            began = time.perf_counter()
            a @ b
            taken.append(time.perf_counter() - began)
        return min(taken)

    return seconds(torch.bfloat16) < seconds(torch.float32)


def main():
    job = json.loads(pathlib.Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    model = SentenceTransformer(job["checkpoint"], device="cpu")
    bf16 = job["bf16 where it pays"] and bfloat16_is_faster()
    answer(threads=torch.get_num_threads(), attention=model[0].auto_model.config._attn_implementation, bf16=bf16)
    asked = commands(model, bf16)
    loss = Loss(model, scale=1 / job["temperature"])
    loss.values = []
    with tempfile.TemporaryDirectory() as scratch:
        settings = SentenceTransformerTrainingArguments(
            output_dir=scratch,
            max_steps=job["steps"],
            per_device_train_batch_size=job["batch_size"],
            learning_rate=job["learning_rate"],
            warmup_steps=job["warmup_steps"],
            lr_scheduler_type="linear",
            weight_decay=job["weight_decay"],
            max_grad_norm=job["clip"],
            bf16=bf16,
            batch_sampler=InOrder,
            seed=job["seed"],
            use_cpu=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows = Dataset.from_list(json.loads(pathlib.Path(job["batches"]).read_text()))
        rows = rows.select_columns(job["columns"])  # their order tells the loss which is which
        trainer = SentenceTransformerTrainer(model, settings, rows, loss=loss, callbacks=[Stepwise(loss, asked)])
        trainer.train()
    commands(model.eval(), bf16)


main()
