"""What the commands of this directory share: their arguments, the machine they ran on, and where figures are written."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import sys
from collections.abc import Callable

from benchmarks.peer import TORCH_PYTHON
from configs import default
from jdmdr import cli, progress, workdir
from jdmdr.types import UserError


def parser(doc: str, out: str) -> argparse.ArgumentParser:
    """Arguments of a command that makes its own inputs."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=pathlib.Path, default=pathlib.Path(out), help="working directory (%(default)s)")
    found.add_argument("--torch-python", type=pathlib.Path, default=TORCH_PYTHON, help="a Python that has torch")
    found.add_argument("--docs", type=pathlib.Path, help="a Markdown file whose section of these figures is replaced")
    return found


def parser_with_data(doc: str, out: str) -> argparse.ArgumentParser:
    """Arguments of a command that trains a checkpoint on a data root too."""
    found = parser(doc, out)
    found.add_argument(
        "--data", default=default.TINYPEDIA, help="data root (docs/data.md); default: the one that ships"
    )
    found.add_argument("--langs", default="", help="comma-separated; default: all that are found")
    found.add_argument("--layers", type=int, default=6, help="of the checkpoint that are kept (%(default)s)")
    found.add_argument("--batch-size", type=int, default=16, help="queries a step (%(default)s)")
    return found


def run(command: Callable[[argparse.Namespace], None], arguments: argparse.ArgumentParser) -> None:
    """Runs `command` on the parsed arguments under the lock of its directory; a user's mistake is one sentence."""
    cli.restart_with_malloc_settings()
    parsed = arguments.parse_args()
    try:
        with workdir.locked(parsed.out):
            command(parsed)
    except UserError as error:
        progress.close_bars()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(cli.EXIT_USER_ERROR)
    except KeyboardInterrupt:
        progress.close_bars()
        sys.exit(cli.EXIT_INTERRUPTED)


def cores() -> int:
    return len(os.sched_getaffinity(0))


def machine(torch_versions: str) -> str:
    """Processor, libraries and date in a sentence."""
    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        cpu = re.search(r"model name\s*: (.+)", info.read_text() + "model name : " + cpu)[1].strip()
    ours = f"jax {importlib.metadata.version('jax')}, Python {platform.python_version()}"
    return f"{cores()} cores of {cpu}; {ours}; {torch_versions}; {datetime.date.today().isoformat()}"


def replace_section(path: pathlib.Path, name: str, text: str) -> None:
    """Replaces what stands between the comments `<!-- name -->` and `<!-- end of name -->` of a Markdown file.

    Raises:
      UserError: the file has no such comments.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise UserError(f"{path} has no comments {begin.strip()} and {end} to write the figures between; add them")
    workdir.write_text(path, f"{before}{begin}\n{text.strip()}\n\n{end}{after}")
