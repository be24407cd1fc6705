"""The command line that all stages share: `python -m jdmdr.STAGE --config configs/NAME.py --workdir DIR`.

absl and ml_collections parse the flags; here their errors, and every mistake of the user's, become one sentence and exit
code 2.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import itertools
import os
import pathlib
import re
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from jdmdr import heartbeat, processes, progress
from jdmdr.types import UserError

EXIT_FAULT, EXIT_USER_ERROR, EXIT_LOST, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 3, 130, 143
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"

# XLA's CPU backend frees its buffers at every step, and the kernel hands them out again page by page; one arena that is
# never trimmed keeps them (a training step of the quickstart takes two thirds of the time). glibc reads these only at
# start-up.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


class Terminated(BaseException):
    """SIGTERM arrived outside the training loop."""


def run(
    command: Callable[[ConfigDict, pathlib.Path | None, flags.FlagValues], None], doc: str, writes: bool = True
) -> None:
    """Parses the command line, holds the working directory, runs `command(config, workdir, flags)`, exits.

    A command that does not write needs no working directory; None stands for it where none is named.

    Exit codes: 0 done; 2 a mistake of the user's, told in one sentence; 3 another process is gone; 130 Ctrl-C; 143 SIGTERM.
    After any of the last three the same command goes on where it was. Of several processes those that hear of another's end
    take over its code.
    """
    restart_with_malloc_settings()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        values = _flags()
        if {"--help", "-h", "--helpfull", "-help"} & set(sys.argv[1:]):
            with contextlib.suppress(BrokenPipeError):  # `--help | head`
                print(_help(doc), flush=True)
            os._exit(0)
        config = _parse(values, writes)
        logging.set_verbosity(logging.FATAL)  # orbax logs the tracebacks of what it raises again
        if writes:
            processes.start(values.coordinator, values.processes, values.process, config.parallel.heartbeat)
        from jdmdr import compile_cache, workdir  # after --help, which should not wait for heavy imports

        compile_cache.switch_on()
        directory = pathlib.Path(values.workdir) if values.workdir else None
        with workdir.locked(directory) if writes else contextlib.nullcontext():
            if writes and processes.leads():
                heartbeat.start(directory, heartbeat.RUN)
            command(config, directory, values)
            heartbeat.finish()
    except UserError as error:
        _fail(str(error))
    except Exception as error:
        if _disk_is_full(error):
            _fail(f"the disk of --workdir {directory} is full; free some space and run the same command again: nothing "
                  "finished is lost")  # fmt: skip
        if processes.lost(error):
            _end(f"error: another process of the run is gone ({' '.join(str(error).split())[:120]}); start all of them again, "
                 "and the same command goes on from here", EXIT_LOST)  # fmt: skip
        traceback.print_exc()
        processes.leave(EXIT_FAULT)
    except KeyboardInterrupt:
        _end("stopped by Ctrl-C; the same command goes on from here", EXIT_INTERRUPTED)
    except Terminated:
        _end("stopped by SIGTERM; the same command goes on from here", EXIT_TERMINATED)
    except processes.Stopped as error:
        _end(str(error), error.code)


def run_tool(command: Callable[[list[str], flags.FlagValues], int], doc: str) -> None:
    """Parses the command line of a command without a recipe, runs `command(words, flags) -> exit code`, exits.

    `words` are the arguments that belong to no flag; its own flags the command has defined before. Mistakes of the user's
    and signals end as in `run`.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        if {"--help", "-h", "--helpfull", "-help"} & set(sys.argv[1:]):
            print(doc.strip(), flush=True)
            sys.exit(0)
        try:
            words = flags.FLAGS(sys.argv)[1:]
        except flags.Error as error:
            raise UserError(f"{' '.join(str(error).split())}; --help shows how flags are given") from error
        code = command(words, flags.FLAGS)
        sys.stdout.flush()
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:  # `... | head`
        os._exit(0)
    except (KeyboardInterrupt, Terminated) as stop:
        progress.close_bars()
        interrupted = isinstance(stop, KeyboardInterrupt)
        print(f"stopped by {'Ctrl-C' if interrupted else 'SIGTERM'}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED if interrupted else EXIT_TERMINATED)
    sys.exit(code)


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether a full disk is what the error came from; several libraries tell it in words alone, NumPy as a short write."""
    while error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if re.search(r"[Nn]o space left on device|database or disk is full|\d+ requested and \d+ written", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _fail(sentence: str) -> NoReturn:
    _end(f"error: {sentence}", EXIT_USER_ERROR)


def _end(sentence: str, code: int) -> NoReturn:
    progress.close_bars()
    print(sentence, file=sys.stderr)
    processes.leave(code)


def _terminate(signum, frame):
    raise Terminated


def restart_with_malloc_settings() -> None:
    if sys.platform == "linux" and not MALLOC.keys() & os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **MALLOC})


def _flags() -> flags.FlagValues:
    values = flags.FLAGS
    config_flags.DEFINE_config_file(
        "config", None, "The recipe: a file of configs/, with `:smoke` behind it to shrink it."
    )
    flags.DEFINE_string("workdir", None, "The directory that everything is written to.")
    flags.DEFINE_boolean("redo", False, "Train again even where a model trained with other settings is in the way.")
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where no cluster tells it.")
    flags.DEFINE_integer("processes", None, "How many processes run this command.", lower_bound=1)
    flags.DEFINE_integer("process", None, "Which of them this is, from 0.", lower_bound=0)
    return values


def _parse(values: flags.FlagValues, writes: bool) -> ConfigDict:
    sys.path.insert(0, str(CONFIGS.parent))  # recipes say `from configs import default` wherever they lie
    path, overrides = _config_words(sys.argv[1:])
    _check_config(path, overrides)
    off = [key for key, value in overrides.items() if value == "None" and key in _optional_keys()]
    try:
        rest = values([word for word in sys.argv if not any(word.lstrip("-") == f"config.{key}=None" for key in off)])
        config = values.config
    except flags.UnrecognizedFlagError as error:
        raise UserError(
            f"{error}; --help lists the flags, and keys of the config are set as --config.KEY=VALUE"
        ) from error
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        key = next((key for key in overrides if key in str(error)), None)
        if key is None:
            raise UserError(f"{' '.join(str(error).split())}; --help shows how flags are given") from error
        default = _flatten(_load(path))[key]
        raise UserError(
            f"--config.{key}={overrides[key]}: not a value for this key, which is {default!r} "
            f"({type(default).__name__}) by default"
        ) from error
    if len(rest) > 1:
        raise UserError(f"the argument {rest[1]!r} belongs to no flag; write --workdir=DIR and --config.KEY=VALUE")
    if writes and not values.workdir:
        raise UserError("--workdir is missing; name the directory to write to, as in --workdir runs/quickstart")
    for key in off:  # absl has no None of a number's type
        with config.unlocked(), config.ignore_type():
            config.update_from_flattened_dict({key: None})
    return config


def _optional_keys() -> set[str]:
    """The keys that may be None: those that are by default."""
    return {key for key, value in _flatten(_load(str(CONFIGS / "default.py"))).items() if value is None}


def _config_words(words: list[str]) -> tuple[str, dict[str, str]]:
    """The value of --config and those of --config.KEY, as they stand on the command line."""
    path, overrides = "", {}
    for word, following in itertools.pairwise([*words, ""]):
        match = re.fullmatch(r"--?(no)?config(?:\.([^=]+))?(?:=(.*))?", word, re.S)
        if match:
            value = following if match[3] is None else match[3]
            if match[2]:
                overrides[match[2]] = value
            else:
                path = value
    return path, overrides


def _check_config(path: str, overrides: dict[str, str]) -> None:
    """Finds what the libraries would tell in a traceback: a recipe that is not there or fails, a key that does not exist."""
    file = path.partition(":")[0]
    if not pathlib.Path(file).is_file():
        recipes = sorted(p.stem for p in CONFIGS.glob("*.py") if p.stem not in ("__init__", "default"))
        found = f"--config {file}: there is no such file" if file else "--config is missing"
        raise UserError(
            f"{found}; name a recipe, as in --config configs/quickstart.py (there are: {', '.join(recipes)})"
        )
    known = _flatten(_load(path))
    for key in overrides:
        if key in known:
            continue
        inside = [name for name in known if name.startswith(key + ".")]
        if inside:
            raise UserError(f"--config.{key} is a group of keys; set one of them, such as --config.{inside[0]}")
        near = difflib.get_close_matches(key, known, 3, 0.6)
        near += [name for name in known if name.endswith("." + key.rsplit(".", 1)[-1]) and name not in near]
        hint = f"did you mean {' or '.join(near[:3])}?" if near else "--help lists every key"
        raise UserError(f"--config.{key}: there is no such key; {hint}")


def _load(path: str) -> ConfigDict:
    """The config of `file.py:argument`, its errors told with file and line."""
    file, _, argument = path.partition(":")
    try:
        scope = runpy.run_path(file)
        return scope["get_config"](*([argument] if argument else []))
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from error
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(file)]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
        at = f"{file}, line {line}" if line else file
        raise UserError(f"the config cannot be loaded: {at}: {type(error).__name__}: {error}") from error


def _flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {prefix + key: value}
    return flat


def _help(doc: str) -> str:
    keys = CONFIGS / "default.py"
    lines = [
        doc.strip(),
        "",
        "  --config FILE[:smoke]   the recipe, e.g. configs/quickstart.py; :smoke shrinks it to a minute or two",
        "  --workdir DIR           where everything is written; a second run goes on from what is there",
        "  --config.KEY=VALUE      sets a key of the recipe, e.g. --config.data.root=DIR --config.data.langs=ar,ko",
        "  --redo                  train again where a model trained with other settings is in the way",
        "  --coordinator HOST:PORT --processes N --process I",
        "                          this is process I of N that run the command together (docs/launch.md)",
    ]
    if keys.is_file():
        body = keys.read_text(encoding="utf-8").partition("def get_config")[2]
        lines += ["", "Every key with its default (configs/default.py):", "", "def get_config" + body.rstrip()]
    return "\n".join(lines)
