"""The pictures of a report: embedded files, and the similarities of a few pairs."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from clip_train.evaluation.samples import ReportSamples


def similarity_matrix(samples: ReportSamples, *, name: str) -> dict[str, Any]:
    """Return the matrix of held-out pairs: its cells' cosines and their place between the extremes, in [0, 1]."""
    cosines = samples.pair_cosines
    low, high = float(cosines.min()), float(cosines.max())
    best = cosines.argmax(axis=1)
    shade = (cosines - low) / ((high - low) or 1)
    return {
        "name": name,
        "pictures": samples.pair_pictures,
        "captions": samples.pair_captions,
        "cosines": cosines.tolist(),
        "shade": shade.round(3).tolist(),
        "best": best.tolist(),
        "low": low,
        "high": high,
        "on_diagonal": int((best == np.arange(len(best))).sum()),
    }


def data_uri(pixels: np.ndarray, size: int | None = None) -> str:
    """Return uint8 [S, S, 3] as the address of an embedded PNG, or of a JPEG where that is smaller (photographs)."""
    image = Image.fromarray(pixels)
    if size:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        buffer = io.BytesIO()
        image.save(buffer, format=kind, **options)
        encoded.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, content = min(encoded)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
