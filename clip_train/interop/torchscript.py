"""The parameters of a TorchScript archive, without TorchScript.

`torch.jit.load` runs the archive's own `__setstate__` methods. Here its pickle is read by an unpickler that knows
tensors and inert modules only, and its code is searched for the names of parameters, never compiled.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


def is_archive(path: Path) -> bool:
    """Say whether the file is a TorchScript archive; `torch.save` writes the same container without constants."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_archive(path: Path) -> dict[str, Tensor]:
    """Return the state dict of a TorchScript archive: parameters and buffers under their dotted names, on the CPU.

    Raises:
        pickle.UnpicklingError: it asks for anything but tensors, numbers and modules.
        zipfile.BadZipFile, KeyError, ValueError: it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl"))
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        with archive.open(f"{root}data.pkl") as file:
            module = _Unpickler(file, archive=archive, root=root).load()
        if not isinstance(module, _Module):
            raise pickle.UnpicklingError("its data are not a module")
        return dict(_tensors(module, prefix="", archive=archive, root=root))


class _Module:
    """Any class of the archive: its attributes, and where its code stands."""

    code_file: str
    class_name: str
    attributes: dict[str, Any]

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"{self.class_name} restores itself with code of its own, which is not run")
        self.attributes = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, *, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file, fix_imports=False)
        self.archive = archive
        self.root = root
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name in ("build_intlist", "build_doublelist", "build_boollist"):
            return list
        if f"{module}.".startswith("__torch__."):
            return type(name, (_Module,), {"code_file": f"code/{module.replace('.', '/')}.py", "class_name": name})
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, num_elements = pid
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.root}data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        if len(self.storages[key]) != num_elements:
            raise ValueError(f"data/{key} has {len(self.storages[key])} numbers, not {num_elements}")
        return self.storages[key]


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: object) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _tensors(module: _Module, *, prefix: str, archive: zipfile.ZipFile, root: str) -> Iterator[tuple[str, Tensor]]:
    """Yield what `state_dict()` would: other tensors, such as masks, are attributes and stay behind."""
    registered = _registered_names(archive.read(root + module.code_file).decode(), module.class_name)
    for name, value in module.attributes.items():
        if isinstance(value, Tensor) and name in registered:
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors(value, prefix=f"{prefix}{name}.", archive=archive, root=root)


def _registered_names(code: str, class_name: str) -> set[str]:
    """Return what the class of the archive's code lists as parameters and buffers."""
    body = code.partition(f"class {class_name}(")[2].partition("\nclass ")[0]
    lists = re.findall(r"^  __(?:parameters|buffers)__ = \[(.*)\]$", body, flags=re.MULTILINE)
    return {name for names in lists for name in re.findall(r'"([^"]*)"', names)}
