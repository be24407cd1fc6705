"""The processes of a run: how they find each other, divide work, wait for each other, and stop together.

A run is one process on one machine, or the same command on many: one a host, or one an accelerator. `start` is the first act
of every command that computes. A stage knows of processes through three functions at most: `leads` says who writes what is
written once, `claimed` divides tasks, `from_first` has one process find out what all need to know. With one process they
do nothing. All processes see one file system; arrays that lie over the devices of several are `parallel.py`'s.

JAX's distributed runtime is what they talk through. Calls that wait must come in the same order in every process.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeVar

from jdmdr.types import UserError

T = TypeVar("T")
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
POLL_MS = 500  # between two looks at whether another process has stopped
GRACE = 5.0  # seconds that a process which stops gives the others to hear of it
CONNECTING = 300  # seconds that processes wait for each other in the beginning
STOPPED = "stopped/"


class Stopped(BaseException):
    """Another process of the run has stopped, with the exit code `code`."""

    def __init__(self, index: int, code: int):
        super().__init__(f"stopped, because process {index} stopped; it says why")
        self.code = code


class _State:
    index, count = 0, 1
    client: Any = None
    alone = claiming = False
    turns = itertools.count()  # numbers the calls that wait


def start(address: str = "", count: int | None = None, index: int | None = None, heartbeat: int = 100) -> None:
    """Joins the other processes of the run, if there are any; before anything else is asked of JAX.

    Args:
      address: HOST:PORT of process 0, with the number of processes and the own number; from the environment where they are
        not given (ADDRESS, COUNT, INDEX). Without any of them JAX asks the cluster (SLURM, Open MPI, TPU pods), and where
        there is none the process is alone.
      heartbeat: seconds without a sign of life after which a process counts as dead, and the runtime ends the others.

    Raises:
      UserError: they are given in part, or are no numbers, or process 0 cannot be reached.
    """
    address = address or os.environ.get(ADDRESS, "")
    count = _number(COUNT) if count is None else count
    index = _number(INDEX) if index is None else index
    given = [bool(address), count is not None, index is not None]
    if count == 1 or (not any(given) and os.environ.get("SLURM_NTASKS") == "1"):
        return
    if any(given) and not all(given):
        raise UserError(
            f"of {ADDRESS} (or --coordinator), {COUNT} (--processes) and {INDEX} (--process) some are set and some are not; "
            "set all three, or none where the cluster tells them"
        )
    if any(given) and not 0 <= index < count:
        raise UserError(f"process {index} of {count}: the processes are numbered from 0 to {count - 1}")
    watch = _watch(index, count) if all(given) else None
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from us
    detect = "deactivate" if all(given) else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of clusters that it does not know well enough
            jax.distributed.initialize(
                address or None, count, index, cluster_detection_method=detect, initialization_timeout=CONNECTING,
                heartbeat_timeout_seconds=heartbeat,
            )  # fmt: skip
    except ValueError as error:
        if all(given):
            raise UserError(f"{ADDRESS}={address}: {error}") from error
        return  # no cluster that JAX knows: one process
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the processes of the run did not find each other at {address or 'the address that the cluster told'} ({reason}); "
            "start the same command on all of them, with an address of process 0 that all can reach"
        ) from error
    from jax._src.distributed import global_state  # the client has no public name

    _State.client, _State.index, _State.count = global_state.client, jax.process_index(), jax.process_count()
    if _State.count > 1 and watch is None:
        _watch(_State.index, _State.count)


def _number(name: str) -> int | None:
    word = os.environ.get(name, "")
    if word and not word.isdigit():
        raise UserError(f"the environment variable {name} is {word!r}; it is a number")
    return int(word) if word else None


def _watch(index: int, count: int) -> subprocess.Popen:
    """A shell that outlives a process that is killed, and says in words what JAX's runtime says in a stack trace."""
    sentence = (
        f"process {index} of {count} is gone without a word of its own: it was killed (out of memory?), or the runtime ended it "
        "because another process of the run is gone; start all of them again, and the same command goes on from here"
    )
    words = ["sh", "-c", 'read word || echo "$0" >&2', sentence]
    watch = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    _State.watch = watch
    atexit.register(_dismiss)  # before JAX registers its own end, and so called after it
    return watch


def _dismiss() -> None:
    with contextlib.suppress(OSError):
        os.write(_State.watch.stdin.fileno(), b"\n")


def index() -> int:
    return _State.index


def count() -> int:
    """How many processes work together: all of the run, or one that works `alone`."""
    return 1 if _State.alone else _State.count


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While this process does by itself what the others wait for, it is all there is."""
    before, _State.alone = _State.alone, True
    try:
        yield
    finally:
        _State.alone = before


def leads() -> bool:
    """Whether this process writes what is written once, and speaks to the user."""
    return _State.index == 0


def claimed(tasks: Iterable[T]) -> Iterator[T]:
    """The tasks that this process is the first to claim, one after another; ends when every process has finished its own.

    `tasks` are the same in every process, and each task leaves its result in a file. A task must not wait for others.
    """
    if count() == 1:
        yield from tasks
        return
    if _State.claiming:
        raise AssertionError("a claimed task claims tasks")
    key = f"claimed/{next(_State.turns)}"
    own = _State.client.key_value_increment(key, 1) - 1
    _State.claiming = True
    for number, task in enumerate(tasks):
        if number == own:
            yield task
            _raise_if_stopped()
            own = _State.client.key_value_increment(key, 1) - 1
    _State.claiming = False
    barrier()


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives in process 0, which alone calls it; a value of JSON."""
    if count() == 1:
        return make()
    key = f"told/{_turn()}"
    if leads():
        with alone():
            value = make()
        _State.client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(_await(key))


def barrier() -> None:
    """Returns when every process is here, however long that takes."""
    if count() == 1:
        return
    turn = _turn()
    if _State.client.key_value_increment(f"arrived/{turn}", 1) == _State.count:
        _State.client.key_value_set(f"all/{turn}", "")
    else:
        _await(f"all/{turn}")


def leave(code: int) -> NoReturn:
    """Ends this process; the others hear of it, and stop with the same code when they next wait."""
    if _State.count == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(Exception):  # without the coordinator there is nobody to tell
        _State.client.key_value_set(f"{STOPPED}{_State.index}", str(code), allow_overwrite=True)
        deadline = time.monotonic() + GRACE
        while len(_State.client.key_value_dir_get(STOPPED)) < _State.count and time.monotonic() < deadline:
            time.sleep(0.05)
        if leads():  # the coordinator ends with this process; the others are gone before it
            time.sleep(0.2)
    _dismiss()
    os._exit(code)


def lost(error: BaseException) -> bool:
    """Whether the error is how a collective operation ends when another process is gone."""
    words = r"gloo|connection (closed|reset)|broken pipe|nccl|coordination service|heartbeat"
    return _State.count > 1 and type(error).__name__ == "JaxRuntimeError" and bool(re.search(words, str(error), re.I))


def _turn() -> int:
    if _State.claiming:
        raise AssertionError("a claimed task waits for other processes")
    return next(_State.turns)


def _await(key: str) -> str:
    while True:
        try:
            return _State.client.blocking_key_value_get(key, POLL_MS)
        except Exception as error:  # JAX has one kind for all
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        _raise_if_stopped()


def _raise_if_stopped() -> None:
    for name, code in _State.client.key_value_dir_get(STOPPED):
        raise Stopped(int(name.rsplit("/", 1)[-1]), int(code))
