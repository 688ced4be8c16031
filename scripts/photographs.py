"""Pictures with the statistics of photographs, and how near a training row is to Pillow's."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from clip_train.data.images.transforms import TrainTransform, random_crop, scaled_crop


def photograph(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """Draw a picture with a 1/f spectrum, correlated channels, and sharp edges."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = math.inf
    light = rng.normal(size=(4, *frequency.shape)) + 1j * rng.normal(size=(4, *frequency.shape))
    light = np.fft.irfft2(light / frequency**1.15, (height, width))  # [4, H, W]: one common, three of the channels
    light /= light.std(axis=(1, 2), keepdims=True)
    pixels = 40 * (light[0] + 0.25 * light[1:]).transpose(1, 2, 0) + rng.uniform(80, 170, 3)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y, r = rng.integers(width), rng.integers(height), rng.uniform(0.03, 0.2) * min(width, height)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x - r, y - r / 2, x + r, y + r / 2), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of uint8 pixels in dB, infinite for equal pictures."""
    error = np.mean((image.astype(np.float64) - reference) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


def pillow_row(content: bytes, *, transform: TrainTransform, uniforms: Sequence[float]) -> np.ndarray:
    """Return the crop that `transform` draws, by Pillow alone: decode, cut, antialiased bicubic, rows first.

    Up to version 12 Pillow resized rows before columns; 13 begins with the columns of tall pictures. Both round to
    uint8 in between, so that the two orders are as far from each other as from exact arithmetic, 55 to 60 dB.
    """
    image = Image.open(io.BytesIO(content)).convert("RGB")
    crop = random_crop(image.height, image.width, uniforms=uniforms, scale=transform.crop_scale)
    factor = transform.scale_factor(crop)
    top, left, height, width = (factor * edge for edge in scaled_crop(crop, factor=factor))
    size = transform.image_size
    rows = image.crop((left, top, left + width, top + height)).resize((size, height), Image.Resampling.BICUBIC)
    return np.asarray(rows.resize((size, size), Image.Resampling.BICUBIC))
