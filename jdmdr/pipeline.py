"""A recipe's stages in order; each is skipped when it is up to date and goes on where it was when it was cut off.

    python -m jdmdr.pipeline --config configs/quickstart.py --workdir runs/quickstart

`python -m jdmdr.STAGE` brings one stage, and what it needs, up to date: tokenizer, mine, negatives, topics, train, encode,
evaluate, export.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from jdmdr import cli, progress, workdir
from jdmdr.types import UserError
from jdmdr.workdir import Stage


def command(target: str, doc: str, show: Callable[[pathlib.Path], None] | None = None) -> None:
    """The main function of a stage's module: brings `target` up to date, and shows what it wrote."""

    def bring(config: ConfigDict, directory: pathlib.Path, flags: Any) -> None:
        run(config, directory, target, flags.redo)
        if show:
            show(directory / target)

    cli.run(bring, doc)


def run(config: ConfigDict, directory: pathlib.Path, target: str, redo: bool = False) -> None:
    """Brings stage `target` and all that it needs up to date under `directory`."""
    from jdmdr.recipe import Recipe  # late: a mistake on the command line is told before jax is loaded

    stages = {stage.name: stage for stage in Recipe(config, directory).stages()}
    if target not in stages:
        raise UserError(
            f"data.root has no training queries and nothing is set to train, so there is no {target} stage; run "
            "jdmdr.evaluate for the figures of the encoder as it is"
        )
    for name in needed(stages, target):
        workdir.bring_up_to_date(stages[name], directory, redo, progress.say)


def needed(stages: dict[str, Stage], target: str) -> list[str]:
    """The target and its needs, in pipeline order."""
    wanted, todo = set(), [target]
    while todo:
        name = todo.pop()
        if name not in wanted:
            wanted.add(name)
            todo.extend(stages[name].needs)
    return [name for name in stages if name in wanted]


def run_and_print(config: ConfigDict, directory: pathlib.Path, flags: Any) -> None:
    """The pipeline command: all stages, then the table and where everything lies."""
    from jdmdr import report

    run(config, directory, "report", flags.redo)
    report.publish(config.name, directory)


if __name__ == "__main__":
    cli.run(run_and_print, __doc__)
