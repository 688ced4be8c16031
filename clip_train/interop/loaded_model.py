"""A model as `load` returns it: OpenAI CLIP's methods and attributes around the training model."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from PIL import ImageOps
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clip_train.data.images.decode import BadSampleError, open_image
from clip_train.data.images.transforms import preprocess_pixels
from clip_train.errors import UserError
from clip_train.model.clip import CLIP
from clip_train.tokenizer.config import ClipTokenizerConfig

if TYPE_CHECKING:
    from PIL import Image

    from clip_train.calibration import Calibration
    from clip_train.model.config import ModelConfig
    from clip_train.tokenizer.base import Tokenizer


BATCH_SIZE = 64


class LoadedModel(CLIP):
    """A CLIP model to use rather than to train; same parameters, same state-dict keys.

    Features are of unit length unless `normalize=False` is passed. OpenAI CLIP and open_clip return raw features; code
    that normalises by itself gets the same numbers here.

    Attributes:
        tokenize: the model's own tokenizer, list of captions to int64 [n, context_length].
        preprocess: from a PIL image to float32 [3, S, S].
        visual.input_resolution: side of the input images in pixels.
        context_length, vocab_size: of the text tower.
        logit_scale: [] log of the inverse temperature; use `.exp()`.
        calibration: what is known of the confidence of these weights, None if it was not measured.
    """

    def __init__(self, config: ModelConfig, *, tokenizer: Tokenizer | None = None) -> None:
        """Make the towers; without a tokenizer the model has CLIP's."""
        super().__init__(config)
        self.tokenize = tokenizer or ClipTokenizerConfig().build(context_length=config.text.context_length)
        self.preprocess = Preprocess(config)
        self.calibration: Calibration | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type."""
        return self.token_embedding.weight.dtype

    def forward(self, image: Tensor, text: Tensor | list[str]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return (logits_per_image [B, N], logits_per_text [N, B]): scaled cosines, plus the bias if there is one.

        Args:
            image: as `encode_image` takes it, B images.
            text: as `encode_text` takes it, N captions.
        """
        logits = self.logit_scale.exp().float() * self.encode_image(image) @ self.encode_text(text).T
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return logits, logits.T

    def encode_image(self, images: Tensor, *, normalize: bool = True) -> Tensor:
        """Embed images, [B, D] in float32, by default of unit length.

        Args:
            images: what `preprocess` returns, stacked to [B, 3, S, S], or raw pixels uint8 [B, S, S, 3]; on the
                model's device.
            normalize: False gives what OpenAI CLIP and open_clip return.
        """
        self._check_images(images)
        if images.shape[0] == 0:
            return self.logit_scale.new_empty(0, self.config.embed_dim, dtype=torch.float32)
        return super().encode_image(images, normalize=normalize)

    def encode_text(self, tokens: Tensor | str | Iterable[str], *, normalize: bool = True) -> Tensor:
        """Embed token ids [n, L] or captions, [n, D] in float32, by default of unit length.

        Raises:
            UserError: not such tokens, or a caption is longer than the context (a RuntimeError, too).
        """
        if not isinstance(tokens, Tensor):
            texts = tokens if isinstance(tokens, str) else list(tokens)
            tokens = self.tokenize(texts).to(self.logit_scale.device)
        if tokens.ndim != 2:
            raise UserError(f"tokens of shape {list(tokens.shape)} are no batch: give [n, L]")
        if tokens.shape[0] == 0:
            return self.logit_scale.new_empty(0, self.config.embed_dim, dtype=torch.float32)
        return super().encode_text(tokens, normalize=normalize)

    def _check_images(self, images: object) -> None:
        if not isinstance(images, Tensor):
            raise UserError(
                f"encode_image takes a batch of tensors, not {type(images).__name__}: stack what preprocess returns, "
                "or call encode(images=[…])"
            )
        size = self.preprocess.image_size
        raw = images.dtype == torch.uint8
        channels_at, sides = (3, images.shape[1:3]) if raw else (1, images.shape[2:])
        fits = images.ndim == 4 and images.shape[channels_at] == 3
        if not fits or (self.config.vision.timm is None and tuple(sides) != (size, size)):
            raise UserError(
                f"images of shape {list(images.shape)} ({images.dtype}): this model takes what preprocess returns, "
                f"stacked to [B, 3, {size}, {size}], or raw pixels uint8 [B, {size}, {size}, 3]"
            )

    @torch.no_grad()
    def encode(
        self,
        *,
        images: Iterable[Image.Image | str | Path | np.ndarray | Tensor] | None = None,
        texts: Iterable[str] | None = None,
        batch_size: int = BATCH_SIZE,
        normalize: bool = True,
        truncate: bool = False,
        progress: bool = True,
    ) -> np.ndarray:
        """Embed any number of pictures or captions in batches: numpy float32 [n, D], in their order.

        Args:
            images: PIL images, files, or uint8 arrays [H, W, 3] of any sizes, or what `preprocess` returned; one array
                [n, H, W, 3] will do. Of an iterator one batch is held at a time. As in `preprocess`, EXIF orientation
                is not applied. Give these or `texts`.
            texts: captions.
            batch_size: pictures or captions at a time.
            normalize: unit length; False gives raw features.
            truncate: cut captions that are longer than the context instead of raising.
            progress: show a bar on standard error, if that is a terminal.

        Raises:
            UserError: neither or both of images and texts, a file that is no picture, an array of another shape, what
                is no caption, or one longer than the context (a RuntimeError, too).
        """
        if (images is None) == (texts is None):
            raise UserError("encode takes images=… or texts=…, one of them")
        single = isinstance(images, np.ndarray | Tensor) and images.ndim < 4
        if single or isinstance(texts, str) or isinstance(images, str | Path | PIL.Image.Image):
            raise UserError("encode takes several images or texts: put a single one into a list")
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        given: Iterable[Any] = texts if images is None else images  # type: ignore[assignment]  # one is there
        total = len(given) if isinstance(given, Sized) else None
        features = [np.empty((0, self.config.embed_dim), dtype=np.float32)]
        items, done = iter(given), 0
        with progress_bar(total, what="texts" if images is None else "images", shown=progress) as advance:
            while batch := list(islice(items, batch_size)):
                if images is None:
                    encoded = self._embed_captions(batch, normalize=normalize, truncate=truncate)
                else:
                    encoded = self._embed_pictures(batch, normalize=normalize, first=done)
                features.append(encoded.cpu().numpy())
                done += len(batch)
                advance(len(batch))
        return np.concatenate(features)

    def _embed_pictures(self, items: list[Any], *, normalize: bool, first: int) -> Tensor:
        pixels = []
        for place, item in enumerate(items, start=first):
            try:
                pixels.append(read_picture(item, preprocess=self.preprocess))
            except BadSampleError as error:
                name = item if isinstance(item, str | os.PathLike) else f"images[{place}]"
                raise UserError(f"{name}: {error.reason.replace('_', ' ')}") from error
        return self.encode_image(torch.stack(pixels).to(self.logit_scale.device), normalize=normalize)

    def _embed_captions(self, texts: list[str], *, normalize: bool, truncate: bool) -> Tensor:
        tokens = self.tokenize(texts, truncate=truncate)
        return self.encode_text(tokens.to(self.logit_scale.device), normalize=normalize)


def read_picture(item: object, *, preprocess: Preprocess, upright: bool = False) -> Tensor:
    """Return what the model takes of a picture, float32 [3, S, S].

    Args:
        item: a PIL image, a file, an array uint8 [H, W, 3], or what `preprocess` returned.
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
        raise UserError(f"{type(item).__name__} is no picture: give a PIL image, a file, or an array uint8 [H, W, 3]")
    if isinstance(item, str) and "://" in item:
        raise BadSampleError("a URL, and pictures are read from files: download it first")
    try:
        image = item if isinstance(item, PIL.Image.Image) else open_image(Path(item).read_bytes())
        with warnings.catch_warnings(action="ignore"):  # of damage that does not matter; what matters raises
            return preprocess(ImageOps.exif_transpose(image) if upright else image)
    except (BadSampleError, MemoryError):
        raise
    except OSError as error:
        raise BadSampleError(error.strerror or str(error)) from error
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise BadSampleError(str(error) or "undecodable") from error


@contextmanager
def progress_bar(total: int | None, *, what: str, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances a bar on standard error; one without an end if `total` is None."""
    with Progress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True, disable=not shown or not sys.stderr.isatty(),
    ) as bar:  # fmt: skip
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def empty_model(config: ModelConfig, *, tokenizer: Tokenizer | None = None) -> LoadedModel:
    """Make the model with memory in place of weights, to be assigned. Pages that nobody writes to cost nothing."""
    with _WithoutInit():
        return LoadedModel(config, tokenizer=tokenizer)


class _WithoutInit(TorchFunctionMode):
    """Draw no random numbers. The meta device draws none either, but imports the compiler at its first product."""

    def __torch_function__(
        self, func: Any, types: object, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **(kwargs or {}))


class Preprocess:
    """Turn a picture into what the model expects: resize, crop the centre unless squashed, scale, normalise.

    Pixel-equal to the transform of OpenAI CLIP. Transparency goes over white; EXIF orientation is not applied.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.image_size = config.vision.image_size
        self.squash = config.squash
        self.mean = torch.tensor(config.mean).view(3, 1, 1)
        self.std = torch.tensor(config.std).view(3, 1, 1)

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
        pixels = torch.from_numpy(square.copy())
        return pixels.permute(2, 0, 1).float().div(255).sub_(self.mean).div_(self.std).contiguous()
