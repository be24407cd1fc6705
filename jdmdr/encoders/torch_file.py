"""Weights that torch saved (`pytorch_model.bin`), read without torch and without running what their pickle asks for.

torch.save writes a zip archive whose members are stored, not compressed: `NAME/data.pkl` is the pickle of the state
dict, in which each tensor is a view (offset, shape, strides) of a storage, and `NAME/data/KEY` the bytes of a storage.
Before version 1.6 it wrote one pickle after another, of a magic number, the format's version, the machine, the state dict
and the storages' keys, and then for each key its number of elements (8 bytes) and its bytes.
"""

from __future__ import annotations

import collections
import io
import pathlib
import pickle
import struct
import zipfile
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jdmdr.types import UserError

STORAGES = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "BoolStorage": np.dtype("bool"),
    "ByteStorage": np.dtype("u1"),
    "CharStorage": np.dtype("i1"),
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "IntStorage": np.dtype("<i4"),
    "LongStorage": np.dtype("<i8"),
    "ShortStorage": np.dtype("<i2"),
}
BIG_ENDIAN = "was saved on a big-endian machine; save it again on a little-endian one"
WRAPPED = "model_dict"  # where DPR's code keeps the state dict, beside those of its optimiser and schedule
LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # the magic number of the format before torch 1.6


class Storage(NamedTuple):
    """What tensors are views of, by its key, and the type of its elements."""

    key: str
    dtype: np.dtype


class View(NamedTuple):
    """A tensor as the pickle tells it; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple
    strides: tuple

    def array(self, raw: dict[str, np.ndarray]) -> np.ndarray:
        """The tensor over the bytes of the storages."""
        key, dtype = self.storage
        if key not in raw:
            raise pickle.UnpicklingError(f"its pickle names a storage {key} that it lacks")
        strides = [stride * dtype.itemsize for stride in self.strides]
        # np.ndarray refuses a view that leaves its buffer.
        return np.ndarray(self.shape, dtype, raw[key], self.offset * dtype.itemsize, strides)


def read_state_dict(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict that torch.save wrote, by name; of a training checkpoint of DPR those of its `model_dict`.

    Returns:
      Read-only arrays over the memory-mapped file: a tensor takes no memory before it is used, and views of one storage
      share it. bfloat16 is that of ml_dtypes.

    Raises:
      UserError: a file that is damaged or of a big-endian machine; one that holds anything but tensors by name, or whose
        pickle asks for code (none of it is run).
    """
    path = pathlib.Path(path)
    try:
        with open(path, "rb") as file:
            legacy = file.read(len(LEGACY_START)) == LEGACY_START
        state, raw = (_read_legacy if legacy else _read_archive)(path)
        if isinstance(state, dict) and isinstance(state.get(WRAPPED), dict):
            state = state[WRAPPED]
        if isinstance(state, dict):
            state = {name: view.array(raw) if isinstance(view, View) else view for name, view in state.items()}
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path} is no readable torch file ({error}); fetch it again") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}; only a state dict, tensors by name, can be read")
    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, np.ndarray)):
            raise UserError(
                f"{path} holds a {type(value).__name__} under {name!r}; only a state dict, tensors by name, can be read"
            )
    return state


def _read_archive(path: pathlib.Path) -> tuple[Any, dict[str, np.ndarray]]:
    """What the pickle holds, and the bytes of its storages."""
    members = _map_members(path)
    if bytes(members.get("byteorder", b"little")) != b"little":
        raise UserError(f"{path} {BIG_ENDIAN}")
    state = _Unpickler(path, io.BytesIO(members["data.pkl"])).load()
    return state, {name.removeprefix("data/"): raw for name, raw in members.items() if name.startswith("data/")}


def _read_legacy(path: pathlib.Path) -> tuple[Any, dict[str, np.ndarray]]:
    """As `_read_archive`, of a file from before torch 1.6."""
    mapped = np.asarray(np.memmap(path, np.uint8, mode="r"))
    raw = {}
    with open(path, "rb") as file:
        _magic, _version, machine = (_Unpickler(path, file).load() for _ in range(3))
        if not machine["little_endian"]:
            raise UserError(f"{path} {BIG_ENDIAN}")
        unpickler = _Unpickler(path, file)
        state, keys = unpickler.load(), _Unpickler(path, file).load()
        start = file.tell()
    for key in keys:
        (elements,) = struct.unpack_from("<q", mapped, start)
        size = elements * unpickler.dtypes[key].itemsize
        raw[key] = mapped[start + 8 : start + 8 + size]
        start += 8 + size
    return state, raw


def _map_members(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The bytes of each member of the archive, mapped, by its name without the top directory."""
    file = np.asarray(np.memmap(path, np.uint8, mode="r"))
    members = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"{path} is a compressed archive, which torch.save does not write; fetch it again")
            # The local header's fields may be longer than those of the directory: torch aligns storages by them.
            name_bytes, extra_bytes = struct.unpack_from("<26x2H", file, member.header_offset)
            start = member.header_offset + 30 + name_bytes + extra_bytes
            members[member.filename.partition("/")[2]] = file[start : start + member.file_size]
    return members


class _Unpickler(pickle.Unpickler):
    """Admits tensors and dictionaries; what a pickle may call is only what `find_class` returns."""

    def __init__(self, path: pathlib.Path, stream: BinaryIO):
        super().__init__(stream)
        self.path, self.dtypes = path, {}

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "collections", "OrderedDict":
                return collections.OrderedDict
            # Bound methods, because a pickle could set attributes (defaults, say) of a plain function.
            case "torch._utils", "_rebuild_tensor_v2":
                return self._tensor
            case "torch._utils", "_rebuild_parameter":
                return self._parameter
            case "torch", _ if name in STORAGES:
                return name
        raise UserError(
            f"{self.path} asks to load {module}.{name}, which a state dict of plain tensors does not need; nothing of "
            "it was run: if you trust the file, save its state dict as model.safetensors where torch is installed"
        )

    def persistent_load(self, pid: tuple) -> Storage:
        _kind, storage, key, _device, _elements, *part = pid
        if part not in ([], [None]):  # before torch 1.6 a storage could be a part of another one
            raise pickle.UnpicklingError(f"its storage {key} is a part of another one")
        self.dtypes[key] = STORAGES[storage]
        return Storage(key, STORAGES[storage])

    def _tensor(self, storage: Storage, offset: int, shape: tuple, strides: tuple, *_requires_grad_and_hooks) -> View:
        return View(storage, offset, shape, strides)

    def _parameter(self, tensor: View, *_requires_grad_and_hooks) -> View:
        return tensor
