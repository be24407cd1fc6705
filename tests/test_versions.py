import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPO

from jdmdr import versions


def writer(*words):
    path = os.pathsep.join([str(REPO), str(REPO / "tests")])
    result = subprocess.run(
        [sys.executable, str(REPO / "tests" / "version_writer.py"), *map(str, words)],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def publish(directory, version, **facts):
    def write(out):
        np.save(out / "en.rows.npy", np.arange(40).reshape(8, 5) + version)
        (out / "en.qids.txt").write_text("".join(f"q{i}\n" for i in range(8)))

    versions.publish(directory, version, write, {"source_step": 10 * version, "fingerprint": "ours", **facts})


def test_readers_never_see_half_a_version_while_200_writers_are_killed(tmp_path):
    found = writer("kill", tmp_path, 200, 0)
    assert found["torn"] == []
    # the kills hit writers that were at it, and readers met whole versions
    assert found["partials"] > 50 and found["seen"] > 50 and found["reads"] > 1000


def test_readers_never_see_half_a_version_of_a_slow_writer(tmp_path):
    found = writer("slowly", tmp_path, 6)
    assert found["torn"] == [] and found["seen"] == 6


def test_the_manifest_tells_what_was_written(tmp_path):
    publish(tmp_path, 3, metrics={"dev_mrr@10": 0.5})
    found = versions.verify(tmp_path, 3, "ours")
    assert found["source_step"] == 30 and found["metrics"] == {"dev_mrr@10": 0.5}
    assert set(found["files"]) == {"en.rows.npy", "en.qids.txt"}
    assert versions.numbers(tmp_path) == [3] and versions.next_number(tmp_path) == 4


def damage_by(name):
    def cut(home):
        os.truncate(home / "en.rows.npy", 200)

    def flip(home):
        data = bytearray((home / "en.rows.npy").read_bytes())
        data[-3] ^= 1
        (home / "en.rows.npy").write_bytes(data)

    def missing(home):
        (home / "en.qids.txt").unlink()

    def empty(home):
        (home / "manifest.json").write_text("")

    def no_manifest(home):
        (home / "manifest.json").unlink()

    def other(home):
        manifest = json.loads((home / "manifest.json").read_text())
        (home / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": "theirs"}))

    def list_instead(home):
        (home / "manifest.json").write_text("[]")

    return locals()[name]


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "empty", "no_manifest", "other", "list_instead"])
def test_a_damaged_version_is_refused_and_set_aside_by_name(tmp_path, damage):
    publish(tmp_path, 1)
    publish(tmp_path, 2)
    damage_by(damage)(versions.version_dir(tmp_path, 2))
    with pytest.raises(versions.Damaged, match="v00002"):
        versions.verify(tmp_path, 2, "ours")
    versions.set_aside(tmp_path, 2)
    assert versions.numbers(tmp_path) == [1] and versions.next_number(tmp_path) == 3
    assert versions.verify(tmp_path, 1, "ours")["version"] == 1


def test_a_second_writer_of_the_same_version_is_told_and_changes_nothing(tmp_path):
    publish(tmp_path, 1)
    before = versions.verify(tmp_path, 1)
    with pytest.raises(versions.Taken, match="v00001 is there already"):
        publish(tmp_path, 1, source_step=99)
    assert versions.verify(tmp_path, 1) == before and not list(tmp_path.glob(".v*"))


def test_what_dead_writers_left_is_no_version_and_is_swept(tmp_path):
    publish(tmp_path, 1)
    (tmp_path / ".v00002.77.partial").mkdir()
    (tmp_path / ".v00002.77.partial" / "en.rows.npy").write_bytes(b"half")
    assert versions.numbers(tmp_path) == [1] and versions.next_number(tmp_path) == 2
    assert versions.sweep(tmp_path) == [".v00002.77.partial"]
    assert not list(tmp_path.glob(".v*"))


def test_a_removed_version_is_gone_whole(tmp_path):
    publish(tmp_path, 1)
    publish(tmp_path, 2)
    versions.remove(tmp_path, 1)
    assert versions.numbers(tmp_path) == [2] and [p.name for p in tmp_path.iterdir()] == ["v00002"]
