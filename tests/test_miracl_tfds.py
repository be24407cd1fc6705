import json
import subprocess
import sys

import pytest

from tests.conftest import REPO, SHARED

pytest.importorskip("tensorflow_datasets")

# dmdr: train queries, train judgments, dev queries, dev judgments (Zhang et al., TACL 2023, table 2; de and yo have no train)
SIZES = {
    "ar": (3495, 25382, 2896, 29197), "bn": (1631, 16754, 411, 4206), "en": (2863, 29416, 799, 8350),
    "es": (2162, 21531, 648, 6443), "fa": (2107, 21844, 632, 6571), "fi": (2897, 20350, 1271, 12008),
    "fr": (1143, 11426, 343, 3429), "hi": (1169, 11668, 350, 3494), "id": (4071, 41358, 960, 9668),
    "ja": (3477, 34387, 860, 8354), "ko": (868, 12767, 213, 3057), "ru": (4683, 33921, 1252, 13100),
    "sw": (1901, 9359, 482, 5092), "te": (3452, 18608, 828, 1606), "th": (2972, 21293, 733, 7573),
    "zh": (1312, 13113, 393, 3928), "de": (0, 0, 305, 3144), "yo": (0, 0, 119, 1188),
}  # fmt: skip


@pytest.mark.skipif(not (SHARED / "miracl-dev").is_dir(), reason="MIRACL's topics and qrels are not at hand")
def test_miracls_published_sizes_are_those_of_its_files():
    from jdmdr import datasets, reading

    files = datasets.find(SHARED / "miracl-dev")
    assert set(files) == set(SIZES)
    for lang, (*train, dev_queries, dev_judgments) in SIZES.items():
        for split, sizes in (("train", tuple(train)), ("dev", (dev_queries, dev_judgments))):
            topics, qrels = files[lang].topics.get(split), files[lang].qrels.get(split)
            judged = reading.qrels(qrels)[0] if qrels else {}
            found = len(reading.topics(topics)) if topics else 0, sum(map(len, judged.values()))
            assert found == sizes, (lang, split)


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
     (("--data_dir=D", "--root=/no/such"), "is not a directory")],
)  # fmt: skip
def test_mistakes_are_told_in_a_sentence(command, arguments, message):
    done = command("jdmdr.datasets.miracl_tfds", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
