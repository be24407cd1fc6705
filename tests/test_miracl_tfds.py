import json
import shutil
import subprocess
import sys

import pytest

from tests.conftest import REPO, TINYPEDIA

tfds = pytest.importorskip("tensorflow_datasets")


def test_a_prepared_language_is_read_by_grain_without_tensorflow(data_root, tmp_path):
    program = f"""
import json, sys, pathlib
from jdmdr.datasets import miracl_tfds
made = miracl_tfds.prepare(pathlib.Path({str(tmp_path)!r}), pathlib.Path({str(data_root)!r}), "sw")
before = [p.stat().st_mtime_ns for p in sorted(made[0].iterdir())]
again = miracl_tfds.prepare(pathlib.Path({str(tmp_path)!r}), pathlib.Path({str(data_root)!r}), "sw")
assert made == again and before == [p.stat().st_mtime_ns for p in sorted(made[0].iterdir())]
import grain, tensorflow_datasets as tfds
builder = tfds.builder_from_directory(str(made[0]))
rows = {{}}
for split in builder.info.splits:
    source = grain.MapDataset.source(builder.as_data_source(split=split))
    text = lambda x: x.decode() if isinstance(x, bytes) else x
    rows[split] = [{{k: [text(v) for v in row[k]] if k.endswith("tives") else text(row[k]) for k in row}} for row in source]
assert "tensorflow" not in sys.modules
print(json.dumps(rows))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert set(rows) == {"corpus", "train", "dev", "test"}
    expected = [json.loads(line) for line in (data_root / "corpus" / "sw.jsonl").read_text().splitlines()]
    found = {row["id"]: (row["title"], row["text"]) for row in rows["corpus"]}
    assert found == {p["docid"]: (p["title"], p["text"]) for p in expected} and len(rows["corpus"]) == len(expected)
    qrels = [line.split() for line in (data_root / "qrels" / "sw.dev.tsv").read_text().splitlines()]
    assert {row["id"]: row["positives"] for row in rows["dev"]} == {qid: [docid] for qid, _, docid, _ in qrels}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "write python -m jdmdr.datasets.miracl_tfds --data_dir DIR"), (("--data_dir=D", "--langs=xx"), "--langs has 'xx'"),
     (("--data_dir=D", "--langs=yo"), "miracl/miracl cannot be fetched from the Hugging Face hub"),
     ((f"--data_dir={__file__}", f"--root={TINYPEDIA}"), "File exists; name a directory that can be written"),
     (("--data_dir=D", "--root=/no/such"), "is not a directory")],
)  # fmt: skip
def test_mistakes_and_a_missing_network_are_told_in_a_sentence(command, tmp_path, arguments, message):
    arguments = [word.replace("=D", f"={tmp_path}") for word in arguments]
    done = command("jdmdr.datasets.miracl_tfds", *arguments, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_command_prepares_a_language_and_tells_what_cannot_be_used(command, data_root, tmp_path):
    arguments = (f"--data_dir={tmp_path}", f"--root={data_root}")
    done = command("jdmdr.datasets.miracl_tfds", *arguments, "--langs=sw")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "miracl" / "sw" / "1.0.0")
    again = command("jdmdr.datasets.miracl_tfds", *arguments, "--langs=sw")
    assert again.returncode == 0 and again.stderr.count("sw/1.0.0 is there already and left alone") == 1
    path = data_root / "corpus" / "en.jsonl"
    path.write_text(path.read_text() + path.read_text().partition("\n")[0])
    done = command("jdmdr.datasets.miracl_tfds", *arguments, "--langs=en")
    assert done.returncode == 2 and "line 25: the docid '0#0' was used before" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "miracl" / "en" / "1.0.0").exists()


def test_what_the_hub_gives_of_miracl_is_read(monkeypatch, tmp_path):
    """The hub is not asked: its two data sets are laid out here under their published names."""
    from jdmdr.datasets import miracl_tfds

    asked = []

    def snapshot_download(repository, *, repo_type, local_dir, allow_patterns):
        asked.append((repository, repo_type, allow_patterns))
        for path, source in {
            "miracl/miracl-v1.0-sw/topics/topics.miracl-v1.0-sw-dev.tsv": "topics/sw.dev.tsv",
            "miracl/miracl-v1.0-sw/qrels/qrels.miracl-v1.0-sw-dev.tsv": "qrels/sw.dev.tsv",
            "miracl-corpus/miracl-corpus-v1.0-sw/docs-0.jsonl": "corpus/sw.jsonl",
        }.items():
            if path.startswith(f"{local_dir.name}/"):
                (local_dir.parent / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(TINYPEDIA / source, local_dir.parent / path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (made,) = miracl_tfds.prepare(tmp_path, None, "sw")
    assert asked == [(f"miracl/{name}", "dataset", ["miracl*-v1.0-sw/*"]) for name in ("miracl", "miracl-corpus")]
    splits = tfds.builder_from_directory(str(made)).info.splits
    assert {name: split.num_examples for name, split in splits.items()} == {"corpus": 240, "dev": 384}
