"""Weight files of every kind, read without running anything from them, and given to a model."""

from __future__ import annotations

import pickle
import sys
import warnings
import zipfile
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from clip_train.errors import IntegrityError, UserError, first_of
from clip_train.interop.torchscript import is_archive, read_archive

if TYPE_CHECKING:
    from pathlib import Path

    from clip_train.model.clip import CLIP

# What torch.compile, DDP and open_clip's second layout put before a name.
PREFIXES = ("module.", "_orig_mod.", "text.")
# An archive's numbers are stored as they are; only TorchScript's code is compressed, and that is small.
MAX_INFLATED_BYTES = 64 << 20


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a `.safetensors`, a TorchScript archive or a file of `torch.save` into native names, on the CPU.

    The archive is opened for its parameters and never called; `torch.save` files are read with `weights_only=True`.

    Raises:
        UserError: the file is unreadable, asks to run code, or holds no tensors by name.
    """
    return {_native_name(name): tensor for name, tensor in read_tensors(path).items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a weight file as `read_weights` does, under the file's own names."""
    try:
        _refuse_bomb(path)
        if path.suffix == ".safetensors":
            values: Any = load_file(path)
        elif is_archive(path):
            values = read_archive(path)
        else:
            with warnings.catch_warnings(action="ignore"):  # of pickles in a form that torch.save does not write
                values = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a hostile or damaged file makes the readers fail in every way there is
        raise UserError(f"{path}: {_reason(path, error)}") from error
    if isinstance(values, dict) and isinstance(values.get("state_dict"), dict):
        values = values["state_dict"]
    tensors = {str(k): v for k, v in values.items() if isinstance(v, Tensor)} if isinstance(values, dict) else {}
    if not tensors:
        found = f"its first keys: {first_of(values)}" if isinstance(values, dict) and values else "it holds nothing"
        raise UserError(f"{path}: no tensors by name, neither at the top nor under 'state_dict'; {found}")
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {name} claims {list(tensor.shape)}, more numbers than the file has for it")
    return tensors


def assign_weights(model: CLIP, tensors: dict[str, Tensor], *, origin: str) -> None:
    """Give the model, possibly on the meta device, these tensors as float32 parameters.

    Raises:
        UserError: names or shapes differ; up to ten of each kind are listed, and the first ten keys.
        IntegrityError: a tensor holds values that are not finite.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    own_keys, tensors = list(tensors), dict(tensors)
    if "logit_scale" not in tensors:
        print(f"{origin}: no logit_scale: probabilities take the start value; cosines need none", file=sys.stderr)
        tensors["logit_scale"] = torch.tensor(model.config.init_logit_scale)
    for name in ("logit_scale", "logit_bias"):
        if name in tensors and tensors[name].numel() == 1:
            tensors[name] = tensors[name].reshape(())  # some files hold [1]
    reshaped = {name for name in tensors.keys() & expected.keys() if tensors[name].shape != expected[name]}
    problems = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "of another shape": [f"{n} {list(tensors[n].shape)}, not {list(expected[n])}" for n in sorted(reshaped)],
    }
    found = [f"{len(names)} {kind} ({first_of(names)})" for kind, names in problems.items() if names]
    if found:
        raise UserError(
            f"{origin}: the tensors are not those of {model.config.name}: {'; '.join(found)}; "
            f"first keys of the file: {first_of(own_keys)}"
        )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise IntegrityError(f"{origin}: {name} holds values that are not finite")
    model.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}, assign=True)


def weights_sha256(model: CLIP) -> str:
    """Return a hash of all parameters and buffers with their names: two models with one hash compute the same."""
    digest = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _refuse_bomb(path: Path) -> None:
    """Refuse a container that would unpack to far more than it is."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > path.stat().st_size + MAX_INFLATED_BYTES:
        raise UserError(f"{path}: would unpack to {unpacked:,} bytes from {path.stat().st_size:,}; no weight file does")


def _reason(path: Path, error: Exception) -> str:
    """Say in one line what the file is, or what is wrong with it."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError) and ("GLOBAL" in text or "asks for" in text or "restores" in text):
        asked = text.partition("GLOBAL ")[2].split()[0] if "GLOBAL " in text else text
        return (
            f"unsafe pickle, not read: it would run code or make objects other than tensors ({asked}). Where you trust "
            "it, convert it once to safetensors with safetensors.torch.save_file(state_dict, 'model.safetensors')"
        )
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as unreadable:
        return f"not readable ({unreadable.strerror})"
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer in place of the weights: run git lfs pull, or download the file again"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page in place of the weights: download the file again"
    if text.startswith("Weights only load failed"):  # and torch advises to run it
        detail = text.partition("WeightsUnpickler error: ")[2].strip().splitlines() or ["not a file of torch.save"]
        return f"not a readable weight file (damaged, or a pickle of more than tensors: {detail[0].strip()})"
    return f"not a readable weight file ({text.splitlines()[0] if text else type(error).__name__})"


def _native_name(name: str) -> str:
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if name.startswith(prefix):
                name, stripped = name.removeprefix(prefix), True
    return name
