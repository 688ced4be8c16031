"""What every check shares: where its inputs are, features of unit length, where its answers go."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FOLDER, WORK = Path(sys.argv[1]), Path(sys.argv[2])


def read_tensors() -> tuple[np.ndarray, np.ndarray]:
    """Return pixels float32 [8, 3, S, S] and tokens int64 [16, L], the same tensors for every library."""
    with np.load(WORK / "inputs.npz") as arrays:
        return arrays["pixels"], arrays["tokens"]


def read_files() -> tuple[list[Image.Image], list[str]]:
    """Return the pictures and texts behind the tensors, for the library's own preprocessing and tokenizer."""
    pictures: list[Image.Image] = [Image.open(path) for path in sorted((WORK / "images").glob("*.png"))]
    return pictures, json.loads((WORK / "texts.json").read_text(encoding="utf-8"))


def write_features(**features: Any) -> None:
    """Write `image`, `text` and, where the library reads files, `file_image` and `file_text`, as unit vectors."""
    rows = {name: np.asarray(value, dtype=np.float64) for name, value in features.items()}
    unit = {name: value / np.linalg.norm(value, axis=1, keepdims=True) for name, value in rows.items()}
    np.savez(WORK / "outputs.npz", **unit)
