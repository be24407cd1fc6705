import os
import subprocess
import sys

import pytest

from jdmdr import compile_cache

COMPILES = """
import jax
from jdmdr import compile_cache
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
compile_cache.switch_on()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x * 2 + 1)(1.0)
print(len(hits))
"""


def compile_in_a_process(home, **more):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(home), "JAX_PLATFORMS": "cpu", **more}
    done = subprocess.run([sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout), done.stderr


def test_what_a_process_compiled_the_next_one_does_not(tmp_path):
    assert compile_in_a_process(tmp_path) == (0, "")
    hits, told = compile_in_a_process(tmp_path)
    assert hits > 0 and told == ""
    assert [path.parent for path in (tmp_path / "jdmdr").iterdir()] == [tmp_path / "jdmdr"]


def test_a_place_of_the_users_own_and_switching_it_off_are_heeded(tmp_path):
    compile_in_a_process(tmp_path / "home", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert any((tmp_path / "own").iterdir()) and not (tmp_path / "home").exists()
    for _ in range(2):
        assert compile_in_a_process(tmp_path / "home", JAX_ENABLE_COMPILATION_CACHE="false") == (0, "")


def test_a_home_that_cannot_be_written_to_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert compile_in_a_process(tmp_path / "file") == (0, "")


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="other systems tell less of their processor")
def test_another_processor_has_a_place_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    places = [compile_cache.directory()]
    for flags in ("flags : fpu sse avx512f", "flags : fpu sse"):
        monkeypatch.setattr(compile_cache.pathlib.Path, "read_text", lambda self, flags=flags: flags)
        places.append(compile_cache.directory())
    assert len(set(places)) == 3 and all(place.parent == tmp_path / "jdmdr" for place in places)
