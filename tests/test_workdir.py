import json
import multiprocessing
import os

import pytest

from jdmdr import workdir
from jdmdr.types import UserError
from jdmdr.workdir import Stage, atomic, bring_up_to_date, locked


def _write(text):
    def run(out_dir):
        (out_dir / "out.txt").write_text(text)
        return {"characters": len(text)}

    return run


def _fail(out_dir):
    (out_dir / "half.txt").write_text("half")
    raise KeyboardInterrupt


class _Say(list):
    __call__ = list.append


def test_finished_stage_is_not_run_again(tmp_path):
    bring_up_to_date(Stage("a", _write("one"), {"x": (1, 2)}), tmp_path, False, _Say())
    said = _Say()
    bring_up_to_date(Stage("a", _fail, {"x": (1, 2)}), tmp_path, False, said)
    assert said == ["a: up to date"]
    assert workdir.counts_of(tmp_path, "a") == {"characters": 3}


def test_changed_setting_redoes_the_stage_and_says_which(tmp_path):
    bring_up_to_date(Stage("a", _write("one"), {"x": {"y": 1}}), tmp_path, False, _Say())
    said = _Say()
    bring_up_to_date(Stage("a", _write("other"), {"x": {"y": 2}}), tmp_path, False, said)
    assert said == ["a: done again, because x.y was 1, now 2"]
    assert (tmp_path / "a" / "out.txt").read_text() == "other"


def test_changed_output_upstream_redoes_what_reads_it_and_equal_output_does_not(tmp_path):
    second = Stage("b", _write("b"), {}, needs=("a",))
    for text in ("one", "two", "two"):
        (tmp_path / "a" / "manifest.json").unlink(missing_ok=True)
        bring_up_to_date(Stage("a", _write(text), {}), tmp_path, False, _Say())
        said = _Say()
        bring_up_to_date(second, tmp_path, False, said)
    assert said == ["b: up to date"]


def test_changed_input_file_redoes_the_stage_and_a_touched_one_does_not(tmp_path):
    source = tmp_path / "source.txt"
    stage = Stage("a", _write("one"), {}, files=(source,))
    source.write_text("x")
    bring_up_to_date(stage, tmp_path, False, _Say())
    os.utime(source, (1, 1))
    said = _Say()
    bring_up_to_date(stage, tmp_path, False, said)
    source.write_text("y")
    bring_up_to_date(stage, tmp_path, False, said)
    assert said[0] == "a: up to date" and "source.txt changed" in said[1]


def test_unfinished_stage_keeps_its_files_under_the_same_plan_and_loses_them_under_another(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        bring_up_to_date(Stage("a", _fail, {"x": 1}), tmp_path, False, _Say())
    assert not (tmp_path / "a" / "manifest.json").exists()
    said = _Say()
    bring_up_to_date(Stage("a", _write("one"), {"x": 1}), tmp_path, False, said)
    assert said == ["a: going on with unfinished work"] and (tmp_path / "a" / "half.txt").exists()
    bring_up_to_date(Stage("a", _write("one"), {"x": 2}), tmp_path, False, said)
    assert not (tmp_path / "a" / "half.txt").exists()


def test_leftovers_without_a_plan_are_not_trusted(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "stale.txt").write_text("of another time")
    bring_up_to_date(Stage("a", _write("one"), {}), tmp_path, False, _Say())
    assert not (tmp_path / "a" / "stale.txt").exists()


def test_deleted_manifest_goes_on_with_the_files_of_the_same_plan(tmp_path):
    stage = Stage("a", _write("one"), {})
    bring_up_to_date(stage, tmp_path, False, _Say())
    (tmp_path / "a" / "manifest.json").unlink()
    said = _Say()
    bring_up_to_date(stage, tmp_path, False, said)
    assert said == ["a: going on with unfinished work"]


def test_deleted_output_file_redoes_the_stage(tmp_path):
    stage = Stage("a", _write("one"), {})
    bring_up_to_date(stage, tmp_path, False, _Say())
    (tmp_path / "a" / "out.txt").unlink()
    bring_up_to_date(stage, tmp_path, False, _Say())
    assert (tmp_path / "a" / "out.txt").exists()


def test_precious_stage_is_redone_only_when_asked(tmp_path):
    bring_up_to_date(Stage("a", _write("one"), {"lr": 1}, precious=True), tmp_path, False, _Say())
    changed = Stage("a", _write("other"), {"lr": 2}, precious=True)
    with pytest.raises(UserError, match="lr was 1, now 2.*--redo"):
        bring_up_to_date(changed, tmp_path, False, _Say())
    assert (tmp_path / "a" / "out.txt").read_text() == "one"
    bring_up_to_date(changed, tmp_path, True, _Say())
    assert (tmp_path / "a" / "out.txt").read_text() == "other"


def test_precious_stage_that_never_started_is_no_model_to_keep(tmp_path):
    def refuse(out_dir):
        raise UserError("policy is 'foo'")

    with pytest.raises(UserError, match="foo"):
        bring_up_to_date(Stage("a", refuse, {"policy": "foo"}, precious=True), tmp_path, False, _Say())
    bring_up_to_date(Stage("a", _write("one"), {"policy": "random"}, precious=True), tmp_path, False, _Say())
    assert (tmp_path / "a" / "out.txt").read_text() == "one"


def test_manifest_leaves_out_volatile_files(tmp_path):
    def run(out_dir):
        (out_dir / "log").mkdir()
        (out_dir / "log" / "time.txt").write_text("now")
        return {}

    bring_up_to_date(Stage("a", run, {}, volatile=("log/*",)), tmp_path, False, _Say())
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["files"] == {}


def _hold(directory, ready, done):
    with locked(directory):
        ready.set()
        done.wait(30)


def test_second_process_is_refused_with_the_owners_pid(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready, done))
    process.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match=f"pid {process.pid}"), locked(tmp_path):
        pass
    process.kill()
    process.join()
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_atomic_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"


def test_corrupt_manifest_is_told_by_name(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest.json is not readable JSON"):
        bring_up_to_date(Stage("a", _write("one"), {}), tmp_path, False, _Say())


def test_what_a_full_disk_cut_off_is_no_output(tmp_path):
    stage = Stage("a", _write("one"), {})
    (tmp_path / "a").mkdir()
    bring_up_to_date(stage, tmp_path, False, _Say())
    undisturbed = (tmp_path / "a" / "manifest.json").read_bytes()
    (tmp_path / "a" / "manifest.json").unlink()
    (tmp_path / "a" / ".manifest.json.partial").write_text("{")
    (tmp_path / "a" / ".en.partial").mkdir()
    (tmp_path / "a" / ".en.partial" / "half.txt").write_text("half")
    said = _Say()
    for _ in range(2):
        bring_up_to_date(stage, tmp_path, False, said)
    assert said == ["a: going on with unfinished work", "a: up to date"]
    assert (tmp_path / "a" / "manifest.json").read_bytes() == undisturbed
