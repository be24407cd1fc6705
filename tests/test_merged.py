import numpy as np
import pytest
import safetensors.numpy
from test_decoders import save

from jdmdr import peft
from jdmdr.encoders import huggingface
from jdmdr.llm import decoders, merged

TARGET = "model.layers.0.mlp.up_proj"


def adapter(path, rank=2):
    """A safetensors file of one adapter in peft's names; returns what it adds at alpha = 1."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(rank, 8)).astype(np.float32), rng.normal(size=(12, rank)).astype(np.float32)
    stem = f"base_model.model.{TARGET}"
    huggingface.save_tensors({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, path)
    return b @ a / rank


@pytest.mark.parametrize(("files", "limit", "written"), [(1, 10**9, 1), (3, 10**9, 1), (1, 600, 6), (2, 100, 10)])
def test_the_adapters_are_added_and_nothing_else_changes(tmp_path, files, limit, written):
    base, out = tmp_path / "base", tmp_path / "out"
    tensors = save(base, files=files)
    (base / "tokenizer.json").write_text("{}")
    (base / "LICENSE").write_text("free")
    (base / "pytorch_model.bin").write_text("old")
    delta = adapter(tmp_path / peft.WEIGHTS)
    out.mkdir()
    counts = merged.write(base, decoders.read(base), tmp_path / peft.WEIGHTS, 6.0, out, limit)
    assert counts["adapted"] == 1 and counts["files"] == written == len(list(out.glob("*.safetensors")))
    found = huggingface.read_tensors(out)  # by its index, where there is one
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        if name == f"{TARGET}.weight":
            np.testing.assert_allclose(found[name], tensor + 6.0 * delta, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(found[name], tensor)
    names = {path.name for path in out.iterdir() if path.suffix != ".safetensors"}
    index = {"model.safetensors.index.json"} if written > 1 else set()
    assert names == {"config.json", "tokenizer.json", "LICENSE"} | index
    decoders.read(out)  # can be tuned again


def test_a_file_holds_its_limit_or_one_larger_tensor():
    plan = merged.shard({"a": 4, "b": 4, "c": 9, "d": 1, "e": 7}, 8)
    assert list(plan.values()) == [["a", "b"], ["c"], ["d", "e"]]
    assert list(plan)[0] == "model-00001-of-00003.safetensors"


def test_bfloat16_weights_stay_bfloat16(tmp_path):
    import ml_dtypes

    base, out = tmp_path / "base", tmp_path / "out"
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in save(base).items()}
    safetensors.numpy.save_file(tensors, base / "model.safetensors")
    delta = adapter(tmp_path / peft.WEIGHTS)
    out.mkdir()
    merged.write(base, decoders.read(base), tmp_path / peft.WEIGHTS, 1.0, out, 10**9)
    found = safetensors.numpy.load_file(out / "model.safetensors")
    name = f"{TARGET}.weight"
    assert {x.dtype for x in found.values()} == {np.dtype(ml_dtypes.bfloat16)}
    expected = (tensors[name].astype(np.float32) + delta).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found[name], expected)


def test_files_of_an_earlier_run_are_kept(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    save(base)
    adapter(tmp_path / peft.WEIGHTS)
    out.mkdir()
    write = lambda: merged.write(base, decoders.read(base), tmp_path / peft.WEIGHTS, 1.0, out, 600)
    write()
    first, second = sorted(out.glob("model-*.safetensors"))[:2]
    before, stamp = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()
    write()
    assert second.read_bytes() == before and first.stat().st_mtime_ns == stamp
