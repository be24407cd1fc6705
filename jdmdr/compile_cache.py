"""XLA's compiled programs, kept from run to run: a second run of the same shapes does not compile.

They lie in `$XDG_CACHE_HOME/jdmdr` (`~/.cache/jdmdr`), for each kind of processor apart: what is compiled for one may hold
instructions that another does not have. JAX_COMPILATION_CACHE_DIR names another place, and JAX_ENABLE_COMPILATION_CACHE=false
switches the cache off.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import platform
import re

import jax

from jdmdr import workdir

MOST_BYTES = 4 * 2**30  # beyond that what was not used for longest goes


def switch_on() -> None:
    """Makes JAX keep what it compiles, unless it is told already where."""
    if jax.config.jax_compilation_cache_dir is None:
        with contextlib.suppress(OSError):  # a home that cannot be written to: all is compiled anew
            directory().mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(directory()))
            jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)


def directory() -> pathlib.Path:
    """Where programs for this machine's processor lie."""
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    info = pathlib.Path("/proc/cpuinfo")
    features = re.search(r"^(flags|Features)\s*:.*$", info.read_text(), re.M) if info.is_file() else None
    kind = workdir.digest(platform.machine(), platform.processor(), sorted(features[0].split()) if features else [])
    return home / "jdmdr" / f"xla-{kind[:12]}"
