"""Reads torch checkpoints that hold pickled objects of any class, and runs none of their code.

A checkpoint of a research toolkit holds more than weights: dictionaries, namespaces, configuration objects. Plain
unpickling imports those classes and runs what the file says. Here tensors are rebuilt, and everything else becomes a
`Record`: the name of its class and what was stored, inert.
"""

from __future__ import annotations

import collections
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar, Self

import torch
from torch import Tensor

from harken.core.errors import HarkenError

# the storage classes that torch names in a checkpoint, by the type of their numbers
STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
# containers without code of their own; protocol 2 calls `builtins` by its old name
CONTAINERS: dict[str, type[Any]] = {
    "collections.OrderedDict": collections.OrderedDict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "__builtin__.set": set,
    "__builtin__.frozenset": frozenset,
}
# what a damaged or hostile pickle makes the unpickler raise; Python's documentation gives no closed list
FAILURES = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Record:
    """A pickled object of an unknown class: what was stored, and nothing that runs.

    path: full name of the class or function in the file. args: what it would have been called with. state: what its
    `__setstate__` would have been given. items, entries: what would have been appended and set by key.
    """

    path: ClassVar[str] = ""
    args: tuple[Any, ...]
    state: Any
    items: list[Any]
    entries: dict[Any, Any]

    def __new__(cls, *args: Any, **named: Any) -> Self:
        """Keep the arguments; `pickle` makes objects through here."""
        record = super().__new__(cls)
        record.args, record.state, record.items, record.entries = args, None, [], dict(named)
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, item: Any) -> None:
        """Keep an item of a list-like object."""
        self.items.append(item)

    add = append

    def extend(self, items: Any) -> None:
        """Keep items of a list-like object."""
        self.items.extend(items)

    def fields(self) -> dict[str, Any]:
        """Return the stored attributes, those of `__slots__` among them."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)
        return {str(k): v for part in parts if isinstance(part, Mapping) for k, v in part.items()}

    def __repr__(self) -> str:
        return f"<record of {self.path}>"


class _Reader(pickle.Unpickler):
    """Rebuilds tensors; turns every other name in the pickle into a kind of `Record`. Nothing is imported."""

    def __init__(self, stream: IO[bytes], read_bytes: Callable[[str], bytes]) -> None:
        super().__init__(stream)
        self._read_bytes = read_bytes
        self._storages: dict[str, Tensor] = {}
        self._records: dict[str, type[Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name; called for every global of the pickle."""
        path = f"{module}.{name}"
        if path in CONTAINERS:
            return CONTAINERS[path]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if path in {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}:
            return self.tensor
        if path == "torch._utils._rebuild_parameter":
            return self.parameter
        if path not in self._records:
            self._records[path] = type("Record", (Record,), {"path": path})
        return self._records[path]

    def persistent_load(self, pid: Any) -> Tensor:
        """Return a storage as a flat tensor, the same one each time: views of it stay views."""
        kind, dtype, key, _device, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown kind of storage: {kind}, {dtype}")
        if key not in self._storages:
            data = self._read_bytes(key)
            if len(data) != count * dtype.itemsize:
                found = f"found {len(data)} bytes"
                raise pickle.UnpicklingError(f"storage {key} must hold {count} numbers of {dtype}, {found}")
            # a bytearray, as torch warns of memory that it may not write to
            flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
            self._storages[key] = flat
        return self._storages[key]

    # Bound methods of this reader, not functions of the module: a pickle can set attributes of what it is given.

    def tensor(
        self, storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_rest: Any
    ) -> Tensor:
        """Return a view of a storage; torch refuses one that would leave it."""
        return storage.as_strided(tuple(size), tuple(stride), offset)

    def parameter(self, data: Tensor, *_rest: Any) -> Tensor:
        """Return a parameter's values."""
        return data


def read_checkpoint(path: str | Path) -> Any:
    """Read what `torch.save` wrote (zip format, torch 1.6 and later), tensors on the CPU, unknown objects as `Record`.

    Raises HarkenError when there is no such file, when it has another format or is damaged, and when its pickle asks
    for anything that data does not need.
    """
    path = Path(path)
    if not path.is_file():
        raise HarkenError(f"no checkpoint at {path}")
    with path.open("rb") as stream:
        head = stream.read(4)
    if head != b"PK\x03\x04":
        raise HarkenError(_other_format(path, head))
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive, path)
    except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError) as error:
        raise HarkenError(f"{path} is damaged or cut short, copy it again: {error}") from error


def _read_archive(archive: zipfile.ZipFile, path: Path) -> Any:
    names = set(archive.namelist())
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise HarkenError(
            f"{path} is a zip file but no torch checkpoint: expected one `data.pkl`, found {len(pickles)}"
        )
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in names:
        raise HarkenError(f"{path} is a TorchScript program, not a checkpoint: give the file it was exported from")
    if f"{prefix}byteorder" in names and archive.read(f"{prefix}byteorder") != b"little":
        raise HarkenError(f"{path} was written on a big-endian machine: save it again on a little-endian one")
    with archive.open(f"{prefix}data.pkl") as stream:
        try:
            return _Reader(stream, lambda key: archive.read(f"{prefix}data/{key}")).load()
        except FAILURES as error:
            reason = f"{type(error).__name__}: {error}"
            raise HarkenError(
                f"{path} cannot be read as plain data, it is damaged or asks to run code: {reason}"
            ) from error


def _other_format(path: Path, head: bytes) -> str:
    if head[:1] == b"\x80" or tarfile.is_tarfile(path):
        return (
            f"{path} is in torch's format from before version 1.6, and harken reads the zip format alone. If you trust "
            "its author, convert it where the toolkit that wrote it is installed: `torch.save(torch.load(OLD, "
            "map_location='cpu', weights_only=False), NEW)` (this runs code that the file holds), and import NEW"
        )
    return f"{path} is no torch checkpoint: expected a zip file written by `torch.save`, it begins with {head!r}"


def plain(value: Any) -> Any:
    """Return dicts, lists and numbers for what a checkpoint stores of a configuration.

    Understands namespaces and dataclasses (their attributes), enumerations (their value) and OmegaConf's containers
    (their content). Interpolations stay text. A record that is none of these stays a record.
    """
    if isinstance(value, Record):
        fields = value.fields()
        for content in ("_content", "_val"):  # OmegaConf's containers and leaves
            if content in fields:
                return plain(fields[content])
        if fields:
            return plain(fields)
        return plain(value.args[0]) if len(value.args) == 1 else value
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
