"""Checks the values of a config before any stage starts, so that a slip costs no work."""

from __future__ import annotations

import itertools
import json
import re
import urllib.parse
from collections.abc import Sequence

from ml_collections import ConfigDict

from jdmdr import requery, retrievers, splits, teacher
from jdmdr.corpus import parse_fields
from jdmdr.filters import rules_from_config
from jdmdr.filters.rules import SCORE_RULES
from jdmdr.index import SEARCHERS
from jdmdr.index.fusion import METHODS
from jdmdr.index.resident import DTYPES
from jdmdr.metrics import parse_measure, parse_measures
from jdmdr.mine import CONCAT
from jdmdr.objectives import BITEXT, DISTILLING, OBJECTIVES, SEARCHING
from jdmdr.objectives.adore import METRICS, MISSING, SCOPES
from jdmdr.objectives.contrastive import MODES
from jdmdr.objectives.distill_bitext import TERMS
from jdmdr.objectives.distill_scores import CANDIDATES, FORMS
from jdmdr.objectives.pairwise import NEGATIVES
from jdmdr.optim import OPTIMISERS
from jdmdr.parallel import FSDP
from jdmdr.planner import POLICIES
from jdmdr.refresh import MODES as MODES_OF_REFRESH
from jdmdr.refresh import ON_STALE, taken_path
from jdmdr.tokenizer import AS_IN
from jdmdr.topic_table import MAPPINGS
from jdmdr.topics import METHODS as METHODS_OF_TOPICS
from jdmdr.topics import RULES
from jdmdr.types import UserError
from jdmdr.weights import TOPIC_SCOPES

SYSTEMS = ("bm25", "warmup", "hybrid")  # names in metrics.json that a recipe cannot have

CHOICES = {
    "mine.fusion": (*METHODS, CONCAT),
    "mine.index": SEARCHERS,
    "mine.sample": ("best", "uniform"),
    "refresh.mode": MODES_OF_REFRESH,
    "refresh.on_stale": ON_STALE,
    "mine.pool": ("corpus", "positives"),
    "tokenizer.as_in": ("", *AS_IN),
    "topics.mapping": MAPPINGS,
    "topics.method": METHODS_OF_TOPICS,
    "topics.rule": RULES,
    "topics.scope": ("dataset", "language"),
    "weights.topic_scope": TOPIC_SCOPES,
    "weights.sign": (-1, 1),
    "encode.dtype": ("float16", "float32"),
    "encoder.dtype": ("", "float32", "bfloat16"),
    "encoder.pooling": ("", "cls", "mean", "last"),
    "judge.unjudged": ("drop", "keep"),
    "judge.keep_max_label": (0, 1),
    "encoder.towers": ("", "tied", "untied"),
    "evaluate.hybrid": METHODS,
    "tune.dtype": ("", "float32", "bfloat16"),
}
SECTION_CHOICES = {
    "keep": ("best", "last"),
    "policy": POLICIES,
    "decay": ("linear", "constant"),
    "objective.name": OBJECTIVES,
    "objective.mode": MODES,
    "objective.negatives": NEGATIVES,
    "objective.candidates": CANDIDATES,
    "objective.form": FORMS,
    "objective.metric": METRICS,
    "objective.missing": MISSING,
    "objective.scope": SCOPES,
    "objective.index_dtype": DTYPES,
    "optimiser": OPTIMISERS,
}
AT_LEAST = {
    "parallel.fsdp": 1, "parallel.heartbeat": 10, "parallel.stall": 0,
    "refresh.poll": 1, "refresh.chunks": 1, "refresh.keep": 0,
    "seed": 0, "audit.rows": 0, "data.cloze_per_lang": 1, "encoder.width": 1, "encoder.window": 0, "encoder.query_length": 1, "encoder.passage_length": 1, "encoder.chunks": 1,
    "tokenizer.vocab_size": 1, "mine.depth": 1, "mine.negatives": 1, "expand.rounds": 0, "expand.temperature": 0, "expand.passage_chars": 1,
    "expand.summary_tokens": 1, "expand.query_tokens": 1, "expand.query_length": 1, "topics.clusters": 1, "topics.iterations": 1,
    "judge.depth": 1, "judge.max_tokens": 1, "judge.passage_chars": 1, "judge.calibrate": 0, "judge.least_precision": 0, "judge.least_recall": 0,
    "llm.concurrency": 1, "llm.retries": 0, "llm.max_failures": 1, "llm.price_in": 0, "llm.price_out": 0,
    "cross_encoder.depth": 1, "cross_encoder.length": 1, "encode.shard_rows": 1, "encode.dimensions": 0, "encoder.projection": 0, "encoder.layers": 0, "evaluate.depth": 1, "evaluate.bootstrap": 1,
    "tune.samples": 1, "tune.length": 1, "tune.rank": 1, "tune.alpha": 0, "tune.epochs": 0, "tune.batch_size": 1,
    "tune.chunk_rows": 1, "tune.learning_rate": 0, "tune.clip": 0, "tune.checkpoint_every": 1, "tune.shard_gb": 0,
}  # fmt: skip
OPTIONAL_AT_LEAST = {
    "mine.least": 1,
    "refresh.every": 1,
    "refresh.max_age": 1,
    "judge.queries": 1,
    "llm.requests_per_minute": 1,
    "llm.max_calls": 0,
    "llm.max_tokens": 0,
    "llm.max_cost": 0,
    "tune.steps": 1,
}
SECTION_AT_LEAST = {
    "epochs": 0, "batch_size": 1, "passages_per_query": 0, "objective.top_k": 1, "chunk_rows": 1, "max_profiles": 1, "checkpoint_every": 1,
    "valid_pool": 1, "log_every": 1, "max_skipped": 1, "learning_rate": 0, "clip": 0, "weight_decay": 0,
    "lora.rank": 0, "lora.alpha": 0, "grad_cache": 0, **{f"objective.{term}": 0 for term in TERMS},
}  # fmt: skip


def check_config(config: ConfigDict) -> None:
    """Raises UserError for the first value that no stage could use, with its key and what may stand there."""
    sections = ("warmup", "train")
    for key, choices in [*CHOICES.items(), *((f"{s}.{k}", c) for s in sections for k, c in SECTION_CHOICES.items())]:
        if _get(config, key) not in choices:
            raise UserError(f"{key} is {_get(config, key)!r}; it is one of {', '.join(map(repr, choices))}")
    for key, least in [*AT_LEAST.items(), *((f"{s}.{k}", n) for s in sections for k, n in SECTION_AT_LEAST.items())]:
        if not _get(config, key) >= least:
            raise UserError(f"{key} is {_get(config, key)!r}; it is at least {least}")
    for key, least in OPTIONAL_AT_LEAST.items():
        if _get(config, key) is not None and not _get(config, key) >= least:
            raise UserError(f"{key} is {_get(config, key)!r}; it is at least {least}, or None for no limit")
    for key in (f"{section}.horizon" for section in sections):
        if _get(config, key) is not None and not _get(config, key) >= 1:
            raise UserError(f"{key} is {_get(config, key)!r}; it is a number of steps, or None for those of the run")
    if config.mine.least and config.mine.least > config.mine.negatives:
        raise UserError(
            f"mine.least is {config.mine.least}, and mine.negatives keeps {config.mine.negatives} a query; lower the first"
        )
    _check_llm(config.llm)
    _check_judge(config.judge)
    _check_expand(config.expand)
    for section in sections:
        _check_objective(f"{section}.objective", config[section].objective)
        _check_passages(section, config[section])
        _check_shares(section, config)
        _check_distilling(section, config)
        _check_regexes(section, config[section])
    for key in (
        "data.valid_share",
        "topics.least_probability",
        "tune.warmup_share",
        *(f"{s}.{key}" for s in sections for key in ("cloze_share", "pairs_share", "replay_share", "lora.dropout")),
    ):
        if not 0 <= _get(config, key) < 1:
            raise UserError(f"{key} is {_get(config, key)!r}; it is a share, at least 0 and below 1")
    dropout = config.encoder.attention_dropout
    if dropout is not None and not 0 <= dropout < 1:
        raise UserError(f"encoder.attention_dropout is {dropout!r}; it is a share, at least 0 and below 1, or None")
    if config.name in SYSTEMS or not config.name or set(config.name) & set("/\\ \t\n"):
        raise UserError(f"name is {config.name!r}; it is a word without slashes and other than {', '.join(SYSTEMS)}")
    _check_regex("tune.pattern", config.tune.pattern)
    for pattern, how in config.parallel.rules:
        _check_regex("parallel.rules", pattern)
        if how not in ("replicate", FSDP):
            raise UserError(f"parallel.rules has {how!r} for {pattern!r}; it is one of replicate, {FSDP}")
    _check_encoder(config)
    _check_refresh(config)
    parse_fields(config.data.fields)
    for measure in parse_measures(config.evaluate.measures):
        cut = parse_measure(measure)[-1]
        if cut and cut > config.evaluate.depth:
            raise UserError(
                f"evaluate.measures has {measure}, but evaluate.depth keeps {config.evaluate.depth} hits; raise it"
            )
    splits.parse(config.data.splits)
    ensemble = retrievers.parse(config.mine.retrievers)
    if config.mine.weights and len(config.mine.weights) != len(ensemble):
        raise UserError(
            f"mine.weights has {len(config.mine.weights)} numbers for the {len(ensemble)} retrievers of mine.retrievers; "
            "give one each, or none"
        )
    if config.mine.fusion == CONCAT and not all(spec.dense for spec in ensemble):
        other = next(spec.name for spec in ensemble if not spec.dense)
        raise UserError(f"mine.fusion=concat joins vectors, and {other} has none; take it out, or choose rrf")
    if config.llm.base_url and config.expand.rounds:
        requery.askable(ensemble)
    rules_from_config(config.filters.to_dict())
    _check_cross_encoder(config)
    scored = [f"filters.{rule}" for rule in SCORE_RULES if config.filters[rule] is not None]
    scored += ["judge.keep_below"] if config.judge.keep_below is not None else []
    if scored and not any(spec.dense for spec in ensemble):
        raise UserError(f"{scored[0]} compares the scores of an encoder; add one, such as warmup, to mine.retrievers")


def _check_cross_encoder(config: ConfigDict) -> None:
    rule = next((rule for rule, value in config.filters.cross_encoder.items() if value is not None), None)
    if rule and not config.cross_encoder.name:
        raise UserError(
            f"filters.cross_encoder.{rule} compares the scores of a cross-encoder; name one with cross_encoder.name"
        )


def _check_llm(llm: ConfigDict) -> None:
    if not llm.timeout > 0:
        raise UserError(f"llm.timeout is {llm.timeout!r}; it is a number of seconds above 0")
    if llm.max_cost is not None and not (llm.price_in or llm.price_out):
        raise UserError("llm.max_cost needs the prices of a million tokens; set llm.price_in and llm.price_out")
    try:
        body = json.loads(llm.extra_body or "{}")
    except ValueError as error:
        raise UserError(f"llm.extra_body is no JSON ({error}): {llm.extra_body!r}") from None
    if not isinstance(body, dict):
        raise UserError(f"llm.extra_body is {llm.extra_body!r}; it is a JSON object")
    if not llm.base_url:
        return
    if not llm.model:
        raise UserError("llm.model is empty; give the name by which the server at llm.base_url knows it")
    try:
        url = urllib.parse.urlsplit(llm.base_url)
        usable = url.scheme in ("http", "https") and url.hostname and (url.port or True)
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"llm.base_url is {llm.base_url!r}; it is an address such as http://localhost:8000/v1")
    if url.username or url.password:
        raise UserError("llm.base_url holds a name or password; put the key into the environment (llm.api_key_from)")


def _check_judge(judge: ConfigDict) -> None:
    grid = [tuple(line) if isinstance(line, Sequence) else (line,) for line in judge.sampling]
    if not grid or not all(len(line) == 2 and line[0] >= 0 and 0 < line[1] <= 1 for line in grid):
        raise UserError(
            f"judge.sampling is {judge.sampling!r}; it has a pair a vote: a temperature from 0 and a top_p above 0 and up to 1"
        )
    if judge.keep_below is not None and not 0 < judge.keep_below <= 1:
        raise UserError(f"judge.keep_below is {judge.keep_below!r}; it is a share above 0 and up to 1, or None for off")


def _check_expand(expand: ConfigDict) -> None:
    depths = tuple(expand.depths)
    if not depths or depths[0] < 1 or any(b <= a for a, b in itertools.pairwise(depths)):
        raise UserError(
            f"expand.depths is {depths!r}; it is one rising number of passages or more, such as (40, 100, 200)"
        )
    if not 0 < expand.top_p <= 1:
        raise UserError(f"expand.top_p is {expand.top_p!r}; it is a share above 0, at most 1")


def _check_encoder(config: ConfigDict) -> None:
    """Keys of encoder and tokenizer that need one another; a training run reads no more of a text than is stored."""
    if config.tokenizer.as_in and not (config.tokenizer.name or config.encoder.name):
        raise UserError(
            "tokenizer.as_in is for RoBERTa's tokenizer, and none is named; set tokenizer.name, or leave it empty"
        )
    for key in ("new_vocabulary", "layers"):
        if config.encoder[key] and not config.encoder.name:
            raise UserError(f"encoder.{key} is of a checkpoint, and encoder.name is empty; name one")
    if config.encoder.new_vocabulary and config.tokenizer.as_in:
        raise UserError(
            "tokenizer.as_in changes a checkpoint's tokenizer, which encoder.new_vocabulary leaves; drop one"
        )
    if config.encoder.passage_name and not config.encoder.name:
        raise UserError(
            "encoder.passage_name is for a second checkpoint beside encoder.name, which is empty; name both"
        )
    if config.encoder.projection_norm and not config.encoder.projection:
        raise UserError("encoder.projection_norm is for a new head; give its width in encoder.projection")
    if config.encoder.projection_norm and config.encode.dimensions:
        raise UserError(
            f"encode.dimensions is {config.encode.dimensions}, but the vectors behind encoder.projection_norm cannot be cut; "
            "set it to 0"
        )
    if config.encoder.chunks > 1:
        _check_chunks(config)
    for section in ("warmup", "train"):
        for key in ("query_length", "passage_length"):
            length, stored = config[section][key], config.encoder[key]
            if length is not None and not 1 <= length <= stored:
                raise UserError(f"{section}.{key} is {length}; it is from 1 to {stored}, which is encoder.{key}")


def _check_chunks(config: ConfigDict) -> None:
    """What does not work with passages in chunks (jdmdr/maxp.py)."""
    train = config.train
    refused = {
        f"train.objective.name is {train.objective.name!r}; it is pairwise": train.objective.name != "pairwise",
        "train.cloze_share is above 0; set it to 0": train.cloze_share > 0,
        "train.pairs_share is above 0; set it to 0": train.pairs_share > 0,
        "mine.fusion is 'concat'; choose another": config.mine.fusion == "concat",
        "encode.passages names vectors; leave it empty": bool(config.encode.passages),
        "llm.base_url names a server, whose new queries search whole passages; leave it empty": bool(
            config.llm.base_url
        ),
    }
    if reason := next((reason for reason, holds in refused.items() if holds), None):
        raise UserError(f"encoder.chunks is {config.encoder.chunks}, and {reason}")


def _check_objective(name: str, config: ConfigDict) -> None:
    if not config.temperature > 0:
        raise UserError(f"{name}.temperature divides the scores; it must be above 0")
    if config.learn_temperature and not 0 < config.min_temperature <= config.temperature <= config.max_temperature:
        raise UserError(
            f"{name}.temperature is {config.temperature!r}; a learned one starts between min_temperature "
            f"({config.min_temperature!r}, above 0) and max_temperature ({config.max_temperature!r})"
        )
    if config.dimension_weights and len(config.dimension_weights) != len(config.dimensions):
        raise UserError(
            f"{name}.dimension_weights has {len(config.dimension_weights)} numbers for {len(config.dimensions)} "
            "dimensions; give one each, or none"
        )


def _check_passages(name: str, section: ConfigDict) -> None:
    """What an objective that searches needs, and the others cannot have."""
    objective, searching = section.objective, section.objective.name in SEARCHING
    if searching != (section.passages_per_query == 0):
        wanted = "0: it finds its passages itself" if searching else "at least 1"
        raise UserError(
            f"{name}.passages_per_query is {section.passages_per_query}; for the objective {objective.name} it is {wanted}"
        )
    if not searching:
        return
    if name == "warmup":
        raise UserError(
            f"warmup.objective.name is {objective.name!r}, which searches embeddings; there are none before"
        )
    if not objective.metric_cut or objective.metric_cut < 1:
        raise UserError(
            f"{name}.objective.metric_cut is {objective.metric_cut!r}; {objective.name} needs it, as a rule the number in "
            f"{name}.objective.top_k ({objective.top_k}): without it no rank counts"
        )
    if objective.dimensions:
        raise UserError(f"{name}.objective.dimensions: {objective.name} searches whole vectors; leave it empty")
    for key in ("cloze_share", "pairs_share"):
        if section[key]:
            raise UserError(
                f"{name}.{key} is {section[key]}; {objective.name} has no passages in its batches, so it is 0"
            )


def _check_shares(name: str, config: ConfigDict) -> None:
    section = config[name]
    if section.cloze_share + section.pairs_share >= 1:
        raise UserError(
            f"{name}.cloze_share {section.cloze_share} and pairs_share {section.pairs_share} leave nothing for training queries; "
            "lower one of them"
        )
    if section.pairs_share and not config.data.pairs:
        raise UserError(
            f"{name}.pairs_share is {section.pairs_share}, but data.pairs names no working directory of jdmdr.pretrain"
        )


def _check_distilling(name: str, config: ConfigDict) -> None:
    """What an objective with a teacher needs."""
    section = config[name]
    objective = section.objective.name
    if section.replay_share and objective != BITEXT:
        raise UserError(
            f"{name}.replay_share is {section.replay_share}; the objective {objective} has no bi-text to come back from, so it is 0"
        )
    if objective not in DISTILLING:
        return
    if config.mine.least:
        raise UserError(
            f"mine.least is {config.mine.least}; with the objective {objective} every query is filled up: set None"
        )
    if name == "warmup":
        raise UserError(f"warmup.objective.name is {objective!r}; what has a teacher is set in train.objective.name")
    for key in ("cloze_share", "pairs_share"):
        if section[key]:
            raise UserError(f"{name}.{key} is {section[key]}; the teacher has no vectors of such pairs, so it is 0")
    if not section.objective.teacher_temperature > 0:
        raise UserError(f"{name}.objective.teacher_temperature divides the teacher's scores; it must be above 0")
    teacher.parse(config.distill.teacher)
    if objective == BITEXT and not config.distill.bitext and not config.distill.parallel:
        raise UserError(
            "distill.bitext is empty; name files or directories of translations, or set distill.parallel=True where equal ids of "
            "data.root are translations"
        )
    if config.distill.translate and not config.llm.base_url:
        raise UserError(
            "distill.translate asks a language model, and llm.base_url is empty; give the address of an OpenAI-compatible server, or "
            "files with distill.translations"
        )


def _check_regexes(name: str, section: ConfigDict) -> None:
    patterns = {
        f"{name}.{key}": pattern
        for key, pattern in (
            ("trainable", section.trainable), ("no_decay", section.no_decay), ("lora.target", section.lora.target)
        )
    }  # fmt: skip
    patterns |= {f"{name}.learning_rates": pattern for pattern, _ in section.learning_rates}
    for key, pattern in patterns.items():
        _check_regex(key, pattern)


def _check_regex(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: {pattern!r} is no regular expression ({error})") from None


def _get(config: ConfigDict, key: str):
    for part in key.split("."):
        config = config[part]
    return config


def _check_refresh(config: ConfigDict) -> None:
    c, every = config.refresh, config.train.checkpoint_every
    if c.mode != "off" and config.train.objective.name in (*SEARCHING, *DISTILLING):
        raise UserError(
            f"refresh.mode is {c.mode!r}, but what the objective {config.train.objective.name} compares is not mined with the "
            "model that trains; set refresh.mode to 'off'"
        )
    if c.mode == "inline" and c.every and c.every % every:
        raise UserError(
            f"refresh.every is {c.every}, no multiple of train.checkpoint_every ({every}): a refresh takes the model of a "
            "checkpoint"
        )
    if (c.mode == "replay") != bool(c.replay):
        raise UserError(
            f"refresh.replay is {c.replay!r} and refresh.mode {c.mode!r}; a replay needs the one to name a working directory and "
            "the other to be 'replay'"
        )
    if c.mode == "replay" and not taken_path(c.replay).is_file():
        raise UserError(
            f"refresh.replay: {taken_path(c.replay)} does not exist; name the --workdir of a run that refreshed"
        )
