"""Versions of the negatives of one training run: published whole by a rename, read only when their hashes verify.

    train/refresh/v00001/{lang}.*        as in the negatives store (jdmdr/negatives.py)
    train/refresh/v00001/manifest.json   version, source_step, what made it, and size and SHA-256 of every file

Version 0 is the static one, of the stage `negatives`. A directory under its final name is complete or damaged, never half
written: everything is written and flushed under another name, the manifest last. No JAX is loaded here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

MANIFEST = "manifest.json"
DAMAGED = ".damaged"
_NAME = re.compile(r"v(\d{5,})(\.damaged)?")


class Damaged(Exception):
    """A version that must not be read; says why."""


class Taken(Exception):
    """Another writer has published the version."""


def version_dir(directory: pathlib.Path, version: int) -> pathlib.Path:
    return directory / f"v{version:05d}"


def publish(
    directory: pathlib.Path, version: int, write: Callable[[pathlib.Path], None], facts: Mapping[str, Any]
) -> None:
    """Makes a version appear under `directory`, whole or not at all.

    Args:
      write: fills the directory that it is given.
      facts: what the manifest tells beside the version and its files.

    Raises:
      Taken: the version is there already; what was written is gone.
    """
    partial = directory / f".v{version:05d}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    files = {}
    for path in sorted(partial.iterdir()):
        files[path.name] = [path.stat().st_size, _sha256(path)]
        _flush(path)
    manifest = {**facts, "version": version, "files": files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    _flush(partial / MANIFEST)
    _flush(partial)
    try:
        os.rename(partial, version_dir(directory, version))
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise Taken(f"{version_dir(directory, version)} is there already") from error
        raise
    _flush(directory)


def numbers(directory: pathlib.Path) -> list[int]:
    """The versions that have been published and not found damaged, ascending."""
    return sorted(number for number, damaged in _listed(directory) if not damaged)


def next_number(directory: pathlib.Path) -> int:
    """The first number that no version has had, damaged ones included; version 0 lies elsewhere."""
    return max((number for number, _ in _listed(directory)), default=0) + 1


def manifest(directory: pathlib.Path, version: int) -> dict[str, Any]:
    """The manifest of a version, whose files are as large as it says; raises Damaged."""
    home = version_dir(directory, version)
    try:
        found = json.loads((home / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (int(size), str(digest)) for name, (size, digest) in found["files"].items()}
        if found["version"] != version or not isinstance(found["source_step"], int):
            raise Damaged(f"{home / MANIFEST} is of another version")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{home / MANIFEST} cannot be read ({error or type(error).__name__})") from error
    for name, (size, _) in files.items():
        path = home / name
        if not path.is_file() or path.stat().st_size != size:
            raise Damaged(f"{path} is missing or does not have {size} bytes")
    return found


def verify(directory: pathlib.Path, version: int, fingerprint: str | None = None) -> dict[str, Any]:
    """The manifest of a version whose every byte is as it was written.

    Args:
      fingerprint: of the passages and queries that its rows count in; None takes any.

    Raises:
      Damaged: a file is missing, cut, or changed, or the version is of other passages or queries.
    """
    found = manifest(directory, version)
    home = version_dir(directory, version)
    if fingerprint is not None and found.get("fingerprint") != fingerprint:
        raise Damaged(f"{home} is of other passages or queries than this run's")
    for name, (_, digest) in found["files"].items():
        try:
            if _sha256(home / name) != digest:
                raise Damaged(f"{home / name} is not what was written")
        except OSError as error:
            raise Damaged(f"{home / name} cannot be read ({error})") from error
    return found


def set_aside(directory: pathlib.Path, version: int) -> None:
    """Renames a damaged version so that nobody takes it again."""
    home = version_dir(directory, version)
    with contextlib.suppress(OSError):
        os.rename(home, home.with_name(home.name + DAMAGED))


def remove(directory: pathlib.Path, version: int) -> None:
    """Deletes a version; it disappears from the list before its first file does."""
    gone = directory / f".v{version:05d}.{os.getpid()}.partial"
    with contextlib.suppress(OSError):
        os.rename(version_dir(directory, version), gone)
    shutil.rmtree(gone, ignore_errors=True)


def sweep(directory: pathlib.Path) -> list[str]:
    """Deletes what dead writers left; only for who holds the writers' lock. Returns the names."""
    stale = sorted(directory.glob(".v*.partial"))
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in stale]


def _listed(directory: pathlib.Path) -> list[tuple[int, bool]]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return [(int(match[1]), bool(match[2])) for match in map(_NAME.fullmatch, names) if match]


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _flush(path: pathlib.Path) -> None:
    """Waits until the file, or the directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
