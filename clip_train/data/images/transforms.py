"""The geometry of pictures: random crops for training, from a sample's own numbers, and centre crops elsewhere."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image

from clip_train.data.images.decode import SCALE_FACTORS, check_pixels, decode_image, open_plain_jpeg, to_rgb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# The words of a sample's Philox stream, each used for one thing only, so that a new use never shifts an old one.
CAPTION_WORD = 0  # which field, and which item of a list
CROP_WORDS = range(1, 41)  # ten attempts of (area, ratio, x, y)
FLIP_WORD = 41
SUBSTITUTION_WORD = 42
JITTER_WORDS = range(43, 47)  # brightness, contrast, saturation, hue
JITTER_ORDER_WORD = 47
RANDAUGMENT_WORDS = range(48, 64)  # eight times (operation, sign)
# All words are given out: a new use derives its numbers from those of a use that it excludes, or from a second key.
NUM_WORDS = 64

_generators = threading.local()
_ZEROS = np.zeros(4, dtype=np.uint64)
_RATIO = (3 / 4, 4 / 3)
_LOG_RATIO = (math.log(_RATIO[0]), math.log(_RATIO[1]))


class Crop(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


class Augmentation(Protocol):
    """A random change of a picture."""

    def __call__(self, image: Tensor, *, uniforms: Sequence[float]) -> Tensor:
        """Return a changed `image` [3, H, W] uint8, a pure function of the picture and the sample's numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainTransform:
    """From a file's bytes to the pixels of a row, a pure function of the bytes and of the sample's numbers.

    Args:
        image_size: side of the result in pixels.
        crop_scale: smallest and largest share of the area that a crop keeps.
        flip: mirror half of the pictures.
        decode_floor: decode large JPEGs at 1/2, 1/4 or 1/8 as long as the crop keeps this many times `image_size`
            pixels on each side; None decodes every pixel.
        augmentations: applied in turn to the resized crop.
    """

    image_size: int
    crop_scale: tuple[float, float] = (0.9, 1.0)
    flip: bool = False
    decode_floor: float | None = None
    augmentations: tuple[Augmentation, ...] = ()

    def __call__(self, content: bytes, *, uniforms: Sequence[float], out: np.ndarray) -> None:
        """Decode, crop and resize a picture into `out` [S, S, 3] uint8, which stays as it is if that fails.

        Raises:
            BadSampleError: the picture cannot be used.
        """
        resize_into(self._decode_crop(content, uniforms), out=out)
        row = torch.from_numpy(out).permute(2, 0, 1)  # [3, S, S], a view of `out`
        if self.flip and uniforms[FLIP_WORD] < 0.5:
            row.copy_(row.flip(-1))
        if self.augmentations:
            image = row.contiguous()
            for augmentation in self.augmentations:
                image = augmentation(image, uniforms=uniforms)
            row.copy_(image)

    def crop_of(self, content: bytes, *, uniforms: Sequence[float]) -> tuple[Crop, tuple[int, int]]:
        """Return the crop that a call would take, and height and width of the picture that it is taken from.

        Raises:
            BadSampleError: the picture cannot be used.
        """
        jpeg = open_plain_jpeg(content)
        height, width = decode_image(content).shape[:2] if jpeg is None else (jpeg.height, jpeg.width)
        return random_crop(height, width, uniforms=uniforms, scale=self.crop_scale), (height, width)

    def scale_factor(self, crop: Crop) -> int:
        """Return the largest factor at which a plain JPEG may be decoded for `crop`."""
        if self.decode_floor is None:
            return 1
        needed = self.decode_floor * self.image_size
        return next((f for f in SCALE_FACTORS if min(scaled_crop(crop, factor=f)[2:]) >= needed), 1)

    def _decode_crop(self, content: bytes, uniforms: Sequence[float]) -> np.ndarray:
        jpeg = open_plain_jpeg(content)
        if jpeg is None:
            pixels = decode_image(content)
            crop = random_crop(*pixels.shape[:2], uniforms=uniforms, scale=self.crop_scale)
        else:
            crop = random_crop(jpeg.height, jpeg.width, uniforms=uniforms, scale=self.crop_scale)
            factor = self.scale_factor(crop)
            pixels = jpeg.decode(factor=factor)
            if factor > 1:
                crop = scaled_crop(crop, factor=factor)
        return pixels[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]


def scaled_crop(crop: Crop, *, factor: int) -> Crop:
    """Return `crop` on a picture reduced by `factor`, its edges rounded down: the last column may be partly padding."""
    top, left = crop.top // factor, crop.left // factor
    return Crop(top, left, (crop.top + crop.height) // factor - top, (crop.left + crop.width) // factor - left)


def sample_uniforms(seed: int, slot: int) -> list[float]:
    """Return the 64 numbers in [0, 1) that belong to a slot. Only raw words are used: their stream never changes."""
    words = _philox(seed, slot).random_raw(NUM_WORDS)
    return ((words >> np.uint64(11)) * 2.0**-53).tolist()


def _philox(seed: int, slot: int) -> np.random.Philox:
    """Return the generator with key [seed, slot] at its start; one per thread, as a new one costs 40 µs."""
    generator: np.random.Philox | None = getattr(_generators, "philox", None)
    if generator is None:
        generator = _generators.philox = np.random.Philox(key=[0, 0])
    state: Any = {"counter": _ZEROS, "key": np.array([seed, slot], dtype=np.uint64)}
    generator.state = {
        "bit_generator": "Philox", "state": state, "buffer": _ZEROS, "buffer_pos": 4, "has_uint32": 0, "uinteger": 0,
    }  # fmt: skip
    return generator


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
    """Resize `image` [H, W, 3] into `out` [h, w, 3], both uint8, antialiased bicubic; equal shapes are copied.

    torch's uint8 kernel is six times faster than Pillow's and differs from it by rounding only: over 65 dB where Pillow
    also resizes rows before columns, as it always did up to version 12 and since 13 does for wide pictures. The
    operator behind `interpolate` is called directly, because it alone can write rows of [H, W, 3] without a copy.
    """
    if image.shape == out.shape:
        out[:] = image
        return
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).unsqueeze(0)  # [1, 3, H, W]
    target = torch.from_numpy(out).permute(2, 0, 1).unsqueeze(0)  # [1, 3, h, w]
    torch.ops.aten._upsample_bicubic2d_aa.out(pixels, target.shape[2:], False, None, None, out=target)


def preprocess_pixels(image: Image.Image, *, image_size: int, squash: bool = False) -> np.ndarray:
    """Resize the short side and crop the centre, as published CLIP models expect. EXIF orientation is not applied.

    Pillow's bicubic filter on RGB, pixel-equal to torchvision's `Resize` and `CenterCrop` on the same picture.

    Args:
        image_size: S.
        squash: resize both sides instead, as SigLIP expects.

    Returns:
        uint8 [S, S, 3], transparency over white.

    Raises:
        BadSampleError: the resized picture has more than 64 million pixels, as of one that is 1 x 2,000.
    """
    image = to_rgb(image)
    width, height = image.size
    if squash and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
        width, height = image.size
    if min(width, height) != image_size:
        if width <= height:
            width, height = image_size, int(image_size * height / width)
        else:
            width, height = int(image_size * width / height), image_size
        check_pixels(width, height)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    return np.asarray(image.crop((left, top, left + image_size, top + image_size)))
