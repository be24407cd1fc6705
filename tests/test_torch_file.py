import collections
import http.server
import io
import json
import os
import pathlib
import pickle
import shutil
import struct
import sys
import threading
import types
import urllib.parse
import zipfile
import zlib

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jdmdr import encoders
from jdmdr.encoders import huggingface, pretrained
from jdmdr.encoders.torch_file import read_state_dict
from jdmdr.types import UserError

GOLDENS = pathlib.Path(__file__).parent / "goldens"
SAVED = GOLDENS / "torch"


def rewrite(source, target, change=lambda members: members, compression=zipfile.ZIP_STORED):
    """Writes the archive `source` again, its members (bytes by name) as `change` returns them."""
    with zipfile.ZipFile(source) as archive:
        members = change({name: archive.read(name) for name in archive.namelist()})
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target


def with_pickle(tmp_path, content):
    return rewrite(SAVED / "kinds.bin", tmp_path / "crafted.bin", lambda members: members | {"kinds/data.pkl": content})


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def save_as_torch(path, state, monkeypatch):
    """Writes float32 arrays in nested dicts and lists as torch.save does, without torch."""
    storages, modules = [], {name: types.ModuleType(name) for name in ("torch", "torch._utils")}
    modules["torch"].FloatStorage = type("FloatStorage", (), {"__module__": "torch"})
    exec("def _rebuild_tensor_v2(*parts): ...", modules["torch._utils"].__dict__)
    modules["torch._utils"]._rebuild_tensor_v2.__module__ = "torch._utils"

    class Stored:
        def __init__(self, key, array):
            self.key, self.array = key, array

    class Pickler(pickle.Pickler):
        def persistent_id(self, of):
            if isinstance(of, Stored):
                return "storage", modules["torch"].FloatStorage, of.key, "cpu", of.array.size
            return None

        def reducer_override(self, of):
            if not isinstance(of, np.ndarray):
                return NotImplemented
            storages.append(np.ascontiguousarray(of))
            strides = tuple(stride // 4 for stride in storages[-1].strides)
            parts = Stored(str(len(storages) - 1), of), 0, of.shape, strides, False, collections.OrderedDict()
            return modules["torch._utils"]._rebuild_tensor_v2, parts

    with monkeypatch.context() as patch, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        buffer = io.BytesIO()
        Pickler(buffer, 2).dump(state)
        archive.writestr("saved/data.pkl", buffer.getvalue())
        for key, array in enumerate(storages):
            archive.writestr(f"saved/data/{key}", array.tobytes())


@pytest.fixture
def checkpoint(tmp_path):
    """The tiny BERT checkpoint with pytorch_model.bin in place of model.safetensors."""
    directory = pathlib.Path(shutil.copytree(GOLDENS / "bert", tmp_path / "bert"))
    (directory / "model.safetensors").unlink()
    shutil.copy(SAVED / "bert.bin", directory / "pytorch_model.bin")
    return directory


def test_state_dict_equals_the_safetensors_of_the_same_weights():
    expected = safetensors.numpy.load_file(GOLDENS / "bert" / "model.safetensors")
    found = read_state_dict(SAVED / "bert.bin")
    assert found.keys() == {name for name in expected if not name.startswith("pooler.")}
    for name, tensor in found.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, expected[name])


def test_every_dtype_and_shape_is_read():
    found = read_state_dict(SAVED / "kinds.bin")
    for name in ("float64", "float16", "bfloat16", "int32", "int64", "uint8"):
        assert found[name].dtype.name == name
        assert found[name].tolist() == [0, 1, 3]
    assert found["bfloat16"].dtype == ml_dtypes.bfloat16
    assert found["bool"].tolist() == [False, True, True]
    assert found["parameter"].tolist() == [0.5, -0.5]
    assert found["scalar"].shape == () and found["scalar"] == 7
    assert found["empty"].shape == (0, 3)


def test_views_honour_strides_and_offset_of_their_storage():
    found = read_state_dict(SAVED / "kinds.bin")
    table = np.arange(24, dtype=np.float32).reshape(4, 6)
    np.testing.assert_array_equal(found["table"], table)
    np.testing.assert_array_equal(found["view"], table[1:, ::2].T)
    np.testing.assert_array_equal(found["expanded"], np.full((2, 3), 23))
    assert np.shares_memory(found["view"], found["table"])


def test_storages_are_mapped_from_the_file_and_read_only():
    found = read_state_dict(SAVED / "bert.bin")
    for tensor in found.values():
        base = tensor
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap) and not tensor.flags.writeable


def test_archive_without_byteorder_is_little_endian(tmp_path):
    path = rewrite(
        SAVED / "kinds.bin",
        tmp_path / "old.bin",
        lambda members: {name: content for name, content in members.items() if not name.endswith("byteorder")},
    )
    np.testing.assert_array_equal(read_state_dict(path)["table"], np.arange(24).reshape(4, 6))


def test_big_endian_file_is_refused(tmp_path):
    path = rewrite(SAVED / "kinds.bin", tmp_path / "big.bin", lambda members: members | {"kinds/byteorder": b"big"})
    with pytest.raises(UserError, match="big-endian"):
        read_state_dict(path)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [os.system, eval, getattr, pickle.loads, shutil.rmtree])
def test_call_of_code_is_refused_and_not_run(tmp_path, function, protocol):
    witness = tmp_path / "witness"
    argument = {
        os.system: f"touch {witness}",
        eval: f"open({str(witness)!r}, 'w')",
        pickle.loads: pickle.dumps(Calls(os.system, f"touch {witness}")),
    }.get(function, str(tmp_path))
    path = with_pickle(tmp_path, pickle.dumps({"a": Calls(function, argument)}, protocol=protocol))
    with pytest.raises(
        UserError, match=rf"crafted.bin asks to load \w+\.{function.__name__}, .* nothing of it was run"
    ):
        read_state_dict(path)
    assert not witness.exists() and path.exists()


def test_pickle_cannot_set_attributes_of_what_it_may_call(tmp_path):
    function = b"ctorch._utils\n_rebuild_tensor_v2\n"
    attributes = b"N}\x8c\x0c__defaults__Ns\x86"  # (None, {"__defaults__": None}), which BUILD sets
    with pytest.raises(UserError, match="no attribute '__defaults__'"):
        read_state_dict(with_pickle(tmp_path, b"\x80\x04" + function + attributes + b"b."))


def test_whole_module_is_refused_by_the_class_it_needs():
    with pytest.raises(UserError, match=r"asks to load torch\.nn\.modules\.linear\.Linear"):
        read_state_dict(SAVED / "module.bin")


def test_training_state_is_refused_by_its_key():
    with pytest.raises(UserError, match="holds a dict under 'model'"):
        read_state_dict(SAVED / "training.bin")


def test_pickle_of_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds a list"):
        read_state_dict(with_pickle(tmp_path, pickle.dumps([1, 2])))


def test_format_of_before_torch_1_6_gives_the_same_tensors_mapped():
    expected, found = read_state_dict(SAVED / "kinds.bin"), read_state_dict(SAVED / "legacy.bin")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and tensor.strides == expected[name].strides
        np.testing.assert_array_equal(tensor, expected[name])
    assert np.shares_memory(found["view"], found["table"]) and not found["table"].flags.writeable


@pytest.mark.parametrize("kept", [20, 100, 1200, -1])
def test_truncated_file_of_before_torch_1_6_is_refused_by_name(tmp_path, kept):
    path = tmp_path / "short.bin"
    path.write_bytes((SAVED / "legacy.bin").read_bytes()[:kept])
    with pytest.raises(UserError, match="short.bin is no readable torch file"):
        read_state_dict(path)


def test_file_of_before_torch_1_6_runs_no_code_and_is_little_endian(tmp_path):
    start = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    for parts, says in (([*start, Calls(os.system, "false"), []], "asks to load posix.system"),
                        ([*start[:2], {"little_endian": False}, {}, []], "big-endian"),
                        ([*start, [1], []], "holds a list")):  # fmt: skip
        path = tmp_path / "crafted.bin"
        path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts))
        with pytest.raises(UserError, match=says):
            read_state_dict(path)


@pytest.mark.parametrize("kept", [0, 3, 1000, 60000, 96000])
def test_truncated_file_is_refused_by_name(tmp_path, kept):
    path = tmp_path / "short.bin"
    path.write_bytes((SAVED / "bert.bin").read_bytes()[:kept])
    with pytest.raises(UserError, match="short.bin is no readable torch file"):
        read_state_dict(path)


def test_file_that_is_no_archive_is_refused(tmp_path):
    path = tmp_path / "pointer.bin"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="pointer.bin is no readable torch file"):
        read_state_dict(path)
    with pytest.raises(UserError, match="no-such.bin is no readable torch file"):
        read_state_dict(tmp_path / "no-such.bin")


def test_compressed_archive_is_refused(tmp_path):
    with pytest.raises(UserError, match="compressed"):
        read_state_dict(rewrite(SAVED / "kinds.bin", tmp_path / "zip.bin", compression=zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("damage", ["pickle cut", "no pickle", "storage missing", "storage too short"])
def test_damaged_archive_is_refused(tmp_path, damage):
    def change(members):
        pickled = members.pop("kinds/data.pkl")
        table = members.pop("kinds/data/0")
        return {
            "pickle cut": members | {"kinds/data.pkl": pickled[:-40], "kinds/data/0": table},
            "no pickle": members | {"kinds/data/0": table},
            "storage missing": members | {"kinds/data.pkl": pickled},
            "storage too short": members | {"kinds/data.pkl": pickled, "kinds/data/0": table[:-4]},
        }[damage]

    with pytest.raises(UserError, match="damaged.bin is no readable torch file"):
        read_state_dict(rewrite(SAVED / "kinds.bin", tmp_path / "damaged.bin", change))


def test_storage_that_points_past_the_end_is_refused(tmp_path):
    content = bytearray((SAVED / "kinds.bin").read_bytes())
    at = content.rindex(b"kinds/data/0") - 46  # its entry in the directory of the archive
    struct.pack_into("<I", content, at + 42, len(content) - 10)
    (tmp_path / "moved.bin").write_bytes(content)
    with pytest.raises(UserError, match="moved.bin is no readable torch file"):
        read_state_dict(tmp_path / "moved.bin")


def test_encoder_from_torch_equals_the_one_from_safetensors(checkpoint):
    config, params = encoders.load_pretrained(checkpoint)
    expected_config, expected = encoders.load_pretrained(GOLDENS / "bert")
    assert config == expected_config
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_params_do_not_change_with_the_file(checkpoint):
    params = encoders.load_pretrained(checkpoint)[1]
    before = jax.tree.map(np.array, params)
    path = checkpoint / "pytorch_model.bin"
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_safetensors_win_over_torch(checkpoint):
    shutil.copy(GOLDENS / "bert" / "model.safetensors", checkpoint)
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    jax.tree.map(
        np.testing.assert_array_equal,
        encoders.load_pretrained(checkpoint)[1],
        encoders.load_pretrained(GOLDENS / "bert")[1],
    )


def test_missing_and_unexpected_tensors_of_a_torch_file_are_named(checkpoint):
    shutil.copy(SAVED / "kinds.bin", checkpoint / "pytorch_model.bin")
    with pytest.raises(UserError, match="lacks embeddings.LayerNorm.bias"):
        encoders.load_pretrained(checkpoint)
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    (checkpoint / "pytorch_model.bin").rename(checkpoint / shards[1])
    shutil.copy(SAVED / "bert.bin", checkpoint / shards[0])
    (checkpoint / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", shards, strict=True))})
    )
    with pytest.raises(UserError, match="unexpected bfloat16, bool, empty and 10 more"):
        encoders.load_pretrained(checkpoint)


def test_shards_are_joined_and_a_missing_one_is_named(tmp_path):
    for shard, name in enumerate(("bert.bin", "kinds.bin"), start=1):
        shutil.copy(SAVED / name, tmp_path / f"pytorch_model-0000{shard}-of-00002.bin")
    names = {name: f"pytorch_model-0000{i}-of-00002.bin" for i, name in ((1, "pooler"), (2, "table"), (1, "other"))}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    expected = read_state_dict(SAVED / "bert.bin") | read_state_dict(SAVED / "kinds.bin")
    found = huggingface.read_tensors(tmp_path)
    assert found.keys() == expected.keys()
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match=r"pytorch_model-00002-of-00002.bin is missing, but pytorch_model.bin.index"):
        huggingface.read_tensors(tmp_path)


class Hub(http.server.BaseHTTPRequestHandler):
    """The three routes of the hub that a snapshot download asks for, over the directories of one root."""

    root: pathlib.Path
    fetched: list[str]
    sha = "0" * 40

    def do_HEAD(self):
        path = urllib.parse.unquote(self.path.partition("?")[0]).lstrip("/")
        self.close_connection = True
        if path.startswith("api/models/"):
            owner, name, kind = path.removeprefix("api/models/").split("/")[:3]
            files = [p for p in (self.root / owner / name).rglob("*") if p.is_file()]
            names = [(p.relative_to(self.root / owner / name).as_posix(), p.stat().st_size) for p in files]
            tree = [{"type": "file", "path": n, "size": size, "oid": "1" * 40} for n, size in names]
            info = {"id": f"{owner}/{name}", "sha": self.sha, "siblings": [{"rfilename": n} for n, _ in names]}
            content = json.dumps(tree if kind == "tree" else info).encode()
        else:
            owner, name, _, _, rest = path.split("/", 4)
            content = (self.root / owner / name / rest).read_bytes()
            if self.command == "GET":
                self.fetched.append(rest)
        self.send_response(200)
        self.send_header("ETag", f'"{zlib.crc32(content):08x}"')
        self.send_header("X-Repo-Commit", self.sha)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine whose models are the directories owner/name under `hub.root`, with an empty cache."""
    handler = type("Handler", (Hub,), {"root": tmp_path / "hub", "fetched": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield handler
    server.shutdown()
    server.server_close()


def test_hub_gives_torch_weights_only_where_there_are_no_safetensors(hub, checkpoint):
    (checkpoint / "training_args.bin").write_bytes(b"a pickle that nobody needs")
    (checkpoint / "onnx").mkdir()
    (checkpoint / "onnx" / "model.onnx").write_bytes(b"large")
    shutil.copytree(checkpoint, hub.root / "someone" / "torch-only")
    shutil.copytree(checkpoint, hub.root / "someone" / "both")
    shutil.copy(GOLDENS / "bert" / "model.safetensors", hub.root / "someone" / "both")
    texts = {"config.json", "tokenizer.json", "tokenizer_config.json"}

    directory = pretrained.find_checkpoint("someone/torch-only")
    assert set(hub.fetched) == texts | {"pytorch_model.bin"}
    jax.tree.map(
        np.testing.assert_array_equal,
        encoders.load_pretrained(directory)[1],
        encoders.load_pretrained(GOLDENS / "bert")[1],
    )
    hub.fetched.clear()
    pretrained.find_checkpoint("someone/both")
    assert set(hub.fetched) == texts | {"model.safetensors"}


def test_fetched_torch_weights_load_again_offline(hub, checkpoint, monkeypatch):
    shutil.copytree(checkpoint, hub.root / "someone" / "torch-only")
    directory = pretrained.find_checkpoint("someone/torch-only")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert pretrained.find_checkpoint("someone/torch-only") == directory
    assert (directory / "pytorch_model.bin").is_file()
