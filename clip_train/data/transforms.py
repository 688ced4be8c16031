"""The geometry of pictures: random crops for training, from a sample's own numbers, and centre crops elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image

from clip_train.data.decode import to_rgb

if TYPE_CHECKING:
    from collections.abc import Sequence

# The words of a sample's Philox stream, each used for one thing only, so that a new use never shifts an old one.
CAPTION_WORD = 0
CROP_WORDS = range(1, 41)  # ten attempts of (area, ratio, x, y)
FLIP_WORD = 41
SUBSTITUTION_WORD = 42
NUM_WORDS = 64  # 43-63 are reserved

_RATIO = (3 / 4, 4 / 3)
_LOG_RATIO = (math.log(_RATIO[0]), math.log(_RATIO[1]))


class Crop(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainTransform:
    """Random resized crop and flip, a pure function of the picture and of the sample's numbers.

    Args:
        image_size: side of the result in pixels.
        crop_scale: smallest and largest share of the area that a crop keeps.
        flip: mirror half of the pictures.
    """

    image_size: int
    crop_scale: tuple[float, float] = (0.9, 1.0)
    flip: bool = False

    def __call__(self, image: np.ndarray, *, uniforms: Sequence[float], out: np.ndarray) -> None:
        """Crop and resize `image` [H, W, 3] into `out` [S, S, 3], both uint8."""
        crop = random_crop(image.shape[0], image.shape[1], uniforms=uniforms, scale=self.crop_scale)
        cropped = image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        if self.flip and uniforms[FLIP_WORD] < 0.5:
            cropped = cropped[:, ::-1]
        if cropped.shape == out.shape:
            out[:] = cropped
        else:
            resize_into(cropped, out=out)


def sample_uniforms(seed: int, slot: int) -> list[float]:
    """Return the 64 numbers in [0, 1) that belong to a slot. Only raw words are used: their stream never changes."""
    words = np.random.Philox(key=[seed, slot]).random_raw(NUM_WORDS)
    return ((words >> np.uint64(11)) * 2.0**-53).tolist()


def random_crop(height: int, width: int, *, uniforms: Sequence[float], scale: tuple[float, float]) -> Crop:
    """Draw a crop of random area and aspect ratio that fits (Szegedy et al. 2015; torchvision's RandomResizedCrop).

    After ten attempts that do not fit it is the largest centre crop within the ratios 3/4 and 4/3.
    """
    area = height * width
    for word in range(CROP_WORDS.start, CROP_WORDS.stop, 4):
        area_u, ratio_u, x_u, y_u = uniforms[word : word + 4]
        target = area * (scale[0] + (scale[1] - scale[0]) * area_u)
        ratio = math.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * ratio_u)
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Crop(int(y_u * (height - h + 1)), int(x_u * (width - w + 1)), h, w)
    ratio = min(max(width / height, _RATIO[0]), _RATIO[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return Crop((height - h) // 2, (width - w) // 2, h, w)


def resize_into(image: np.ndarray, *, out: np.ndarray) -> None:
    """Resize `image` [H, W, 3] into `out` [h, w, 3], both uint8, antialiased bicubic.

    torch's uint8 kernel is six times faster than Pillow's and differs from it by rounding only (over 65 dB). The
    operator behind `interpolate` is called directly, because it alone can write rows of [H, W, 3] without a copy.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).unsqueeze(0)  # [1, 3, H, W]
    target = torch.from_numpy(out).permute(2, 0, 1).unsqueeze(0)  # [1, 3, h, w]
    torch.ops.aten._upsample_bicubic2d_aa.out(pixels, target.shape[2:], False, None, None, out=target)


def preprocess_pixels(image: Image.Image, *, image_size: int) -> np.ndarray:
    """Resize the short side and crop the centre, as published CLIP models expect. EXIF orientation is not applied.

    Pillow's bicubic filter on RGB, pixel-equal to torchvision's `Resize` and `CenterCrop` on the same picture.

    Returns:
        uint8 [S, S, 3], transparency over white.
    """
    image = to_rgb(image)
    width, height = image.size
    if min(width, height) != image_size:
        if width <= height:
            width, height = image_size, int(image_size * height / width)
        else:
            width, height = int(image_size * width / height), image_size
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    return np.asarray(image.crop((left, top, left + image_size, top + image_size)))
