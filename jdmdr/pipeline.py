"""A recipe's stages in order; each is skipped when it is up to date and goes on where it was when it was cut off.

    python -m jdmdr.pipeline --config configs/quickstart.py --workdir runs/quickstart

`python -m jdmdr.STAGE` brings one stage, and what it needs, up to date: tokenizer, mine, negatives, topics, train, encode,
evaluate, export; with a language model also judge and expand.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict

from jdmdr import cli, processes, progress, workdir
from jdmdr.types import UserError
from jdmdr.workdir import Stage

if TYPE_CHECKING:
    from jdmdr.recipe import Recipe

LLM_STAGES = ("judge", "expand")


def command(
    target: str, doc: str, show: Callable[[pathlib.Path], None] | None = None, plan: Callable[[Recipe], str] | None = None
) -> None:  # fmt: skip
    """The main function of a stage's module: brings `target` up to date, and shows what it wrote.

    With `plan` it has a flag --dry_run, under which only what the stage needs is done and the plan is printed.
    """
    if plan:
        flags.DEFINE_boolean("dry_run", False, "Tell calls, tokens, cost and time, and send nothing.")

    def bring(config: ConfigDict, directory: pathlib.Path, values: flags.FlagValues) -> None:
        if plan and values.dry_run:
            recipe = run(config, directory, target, values.redo, itself=False)
            if processes.leads():
                print(plan(recipe))
            return
        run(config, directory, target, values.redo)
        if show and processes.leads():
            show(directory / target)

    cli.run(bring, doc)


def run(config: ConfigDict, directory: pathlib.Path, target: str, redo: bool = False, itself: bool = True) -> Recipe:
    """Brings stage `target` and all that it needs up to date under `directory`; without `itself` only what it needs."""
    from jdmdr.recipe import Recipe  # late: a mistake on the command line is told before jax is loaded

    recipe = Recipe(config, directory)
    stages = {stage.name: stage for stage in recipe.stages()}
    if target in LLM_STAGES and not config.llm.base_url:
        raise UserError(
            f"llm.base_url is empty, so there is no {target} stage: the rule filters stand in for it; give the address of an "
            "OpenAI-compatible server, e.g. http://localhost:8000/v1, and its llm.model"
        )
    if target == "translate" and target not in stages:
        raise UserError(
            "distill.translate names no language, or the recipe's objective reads no queries; write such as "
            "--config configs/kdr_stage1.py --config.distill.translate=ko,ja"
        )
    if target not in stages:
        raise UserError(
            f"data.root has no training queries and nothing is set to train, so there is no {target} stage; run "
            "jdmdr.evaluate for the figures of the encoder as it is"
        )
    names = needed(stages, target)
    for name in names if itself else names[:-1]:
        if not itself and name in LLM_STAGES and not workdir.is_done(stages[name], directory):
            raise UserError(
                f"{target} --dry_run tells what follows from the stage {name}, and that is not done; see first what it takes: "
                f"python -m jdmdr.{name} --dry_run"
            )
        workdir.bring_up_to_date(stages[name], directory, redo, progress.say)
    return recipe


def staged(
    stages: Callable[[ConfigDict, pathlib.Path], Iterable[Stage]], target: str, table: Callable[[pathlib.Path], str], doc: str
) -> None:  # fmt: skip
    """The main function of a command with stages of its own: brings `target` up to date and prints the table of what it wrote."""

    def bring_and_print(config: ConfigDict, directory: pathlib.Path, values: flags.FlagValues) -> None:
        if processes.count() > 1:
            raise UserError("this command runs in one process, on all devices of its machine; start it once")
        bring(stages(config, directory), directory, target, values.redo)
        print(table(directory))

    cli.run(bring_and_print, doc)


def bring(stages: Iterable[Stage], directory: pathlib.Path, target: str, redo: bool = False) -> None:
    """Brings one of these stages, and what it needs, up to date under `directory`."""
    by_name = {stage.name: stage for stage in stages}
    for name in needed(by_name, target):
        workdir.bring_up_to_date(by_name[name], directory, redo, progress.say)


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
    if processes.leads():
        report.publish(config.name, directory)


if __name__ == "__main__":
    cli.run(run_and_print, __doc__)
