"""A model as `load` returns it: OpenAI CLIP's methods and attributes around the training model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clip_train.errors import UserError
from clip_train.interop.pictures import Preprocess, picture_batches
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
                [n, H, W, 3] will do. Of an iterator two batches are held at a time, resized. As in `preprocess`, EXIF
                orientation is not applied. Give these or `texts`.
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
        rows = [np.empty((0, self.config.embed_dim), dtype=np.float32)]
        if images is not None:
            what, total = "images", len(images) if isinstance(images, Sized) else None
            embedded = self._embed_pictures(images, batch_size=batch_size, normalize=normalize)
        else:
            assert texts is not None
            what, total = "texts", len(texts) if isinstance(texts, Sized) else None
            embedded = self._embed_captions(texts, batch_size=batch_size, normalize=normalize, truncate=truncate)
        with closing(embedded), progress_bar(total, what=what, shown=progress) as advance:
            for features in embedded:
                rows.append(features.float().cpu().numpy())
                advance(len(features))
        return np.concatenate(rows)

    def _embed_pictures(
        self, images: Iterable[object], *, batch_size: int, normalize: bool
    ) -> Generator[Tensor, None, None]:
        with closing(picture_batches(images, preprocess=self.preprocess, batch_size=batch_size)) as batches:
            for batch in batches:
                pixels = []
                for name, read in batch:
                    if isinstance(read, str):
                        raise UserError(f"{name}: {read}")
                    pixels.append(read)
                yield self.encode_image(torch.stack(pixels).to(self.logit_scale.device), normalize=normalize)

    def _embed_captions(
        self, texts: Iterable[str], *, batch_size: int, normalize: bool, truncate: bool
    ) -> Generator[Tensor, None, None]:
        items = iter(texts)
        while batch := list(islice(items, batch_size)):
            tokens = self.tokenize(batch, truncate=truncate)
            yield self.encode_text(tokens.to(self.logit_scale.device), normalize=normalize)


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
