"""Pictures as a model takes them: from files, PIL images and arrays, one or very many."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import torch
from PIL import ImageOps
from torch import Tensor

from clip_train.data.images.decode import BadSampleError, open_image, without_warnings
from clip_train.data.images.transforms import preprocess_pixels
from clip_train.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from clip_train.model.config import ModelConfig

# Each holds one decoded picture, of 64 million pixels at most.
MAX_DECODERS = 16


class Preprocess:
    """Turn a picture into what the model expects: resize, crop the centre unless squashed, scale, normalise.

    Pixel-equal to the transform of OpenAI CLIP. Transparency goes over white; EXIF orientation is not applied.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.image_size = config.vision.image_size
        self.squash = config.squash
        # numpy, because torch would start threads of its own in each thread that decodes.
        self.mean = np.array(config.mean, dtype=np.float32)[:, None, None]
        self.std = np.array(config.std, dtype=np.float32)[:, None, None]

    def __repr__(self) -> str:
        """Say what it does."""
        size, fit = self.image_size, "squash" if self.squash else "resize the short side, crop the centre"
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        return f"Preprocess({fit} to {size} x {size}, mean={mean}, std={std})"

    def __call__(self, image: Image.Image) -> Tensor:
        """Return float32 [3, S, S].

        Raises:
            UserError: `image` is no PIL image.
        """
        if not isinstance(image, PIL.Image.Image):
            raise UserError(f"preprocess takes a PIL image, not {type(image).__name__}: PIL.Image.open(FILE) gives one")
        square = preprocess_pixels(image, image_size=self.image_size, squash=self.squash)  # uint8 [S, S, 3]
        pixels = square.transpose(2, 0, 1).astype(np.float32, order="C")
        pixels /= 255
        pixels -= self.mean
        pixels /= self.std
        return torch.from_numpy(pixels)


def picture_batches(
    images: Iterable[object], *, preprocess: Preprocess, batch_size: int, upright: bool = False
) -> Generator[list[tuple[str, Tensor | str]], None, None]:
    """Yield names of pictures with what the model takes, float32 [3, S, S], or the reason why they cannot be read.

    Files are decoded by all cores, those of the next batch while the caller works on this one. Everything else is read
    when it is drawn: an iterator may give one object again and again with other contents, as over the frames of an
    animation or into one buffer.

    Args:
        images: see `read_picture`.
        preprocess: the model's.
        batch_size: pictures at a time, of which two batches are held.
        upright: apply EXIF orientation.

    Raises:
        UserError: an item is no picture at all.
    """
    items = enumerate(images)

    def read(item: object) -> Tensor | str:
        try:
            return read_picture(item, preprocess=preprocess, upright=upright)
        except BadSampleError as error:
            return error.reason.replace("_", " ")

    def begin(item: object) -> Future[Tensor | str]:
        if isinstance(item, str | os.PathLike):
            return pool.submit(read, item)
        done: Future[Tensor | str] = Future()
        done.set_result(read(item))
        return done

    def draw() -> list[tuple[str, Future[Tensor | str]]]:
        return [
            (str(item) if isinstance(item, str | os.PathLike) else f"picture {place}", begin(item))
            for place, item in islice(items, batch_size)
        ]

    pool = ThreadPoolExecutor(min(MAX_DECODERS, os.cpu_count() or 1), thread_name_prefix="decode")
    try:
        ahead = draw()
        while ahead:
            batch, ahead = ahead, draw()
            yield [(name, future.result()) for name, future in batch]
    finally:
        pool.shutdown(cancel_futures=True)


def read_picture(item: object, *, preprocess: Preprocess, upright: bool = False) -> Tensor:
    """Return what the model takes of a picture, float32 [3, S, S].

    Args:
        item: a PIL image, the path of a file, an array uint8 [H, W, 3], or what `preprocess` returned.
        preprocess: the model's.
        upright: apply EXIF orientation.

    Raises:
        UserError: the item is of another kind.
        BadSampleError: the picture cannot be read.
    """
    if isinstance(item, Tensor):
        size = preprocess.image_size
        if not item.is_floating_point() or item.shape != (3, size, size):
            raise UserError(
                f"a tensor {item.dtype} {list(item.shape)} is no picture: give what preprocess returns, "
                f"float [3, {size}, {size}]"
            )
        return item.float()
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3:
            raise UserError(f"an array {item.dtype} {list(item.shape)} is no picture: give uint8 [H, W, 3]")
        item = PIL.Image.fromarray(item)
    if not isinstance(item, PIL.Image.Image | str | os.PathLike):
        raise UserError(f"{type(item).__name__} is no picture: give a PIL image, a path, or an array uint8 [H, W, 3]")
    if isinstance(item, str) and "://" in item:
        raise BadSampleError("a URL, and pictures are read from files: download it first")
    try:
        image = item if isinstance(item, PIL.Image.Image) else open_image(Path(item).read_bytes())
        with without_warnings:  # of damage that does not matter; what matters raises
            return preprocess(ImageOps.exif_transpose(image) if upright else image)
    except (BadSampleError, MemoryError):
        raise
    except OSError as error:
        raise BadSampleError(error.strerror or str(error)) from error
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise BadSampleError(str(error) or "undecodable") from error
