"""A model as `load` returns it: OpenAI CLIP's methods and attributes around the training model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clip_train.data.transforms import preprocess_pixels
from clip_train.model.clip import CLIP
from clip_train.tokenizer.config import ClipTokenizerConfig

if TYPE_CHECKING:
    from PIL import Image

    from clip_train.model.config import ModelConfig
    from clip_train.tokenizer.base import Tokenizer


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
    """

    def __init__(self, config: ModelConfig, *, tokenizer: Tokenizer | None = None) -> None:
        """Make the towers; without a tokenizer the model has CLIP's."""
        super().__init__(config)
        self.tokenize = tokenizer or ClipTokenizerConfig().build(context_length=config.text.context_length)
        self.preprocess = Preprocess(config)

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type."""
        return next(self.visual.parameters()).dtype

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

    def encode_text(self, tokens: Tensor | str | list[str], *, normalize: bool = True) -> Tensor:
        """Embed token ids [n, L] or captions, [n, D], by default of unit length.

        Raises:
            RuntimeError: a caption given as text is longer than the context.
        """
        if not isinstance(tokens, Tensor):
            tokens = self.tokenize(tokens).to(self.logit_scale.device)
        return super().encode_text(tokens, normalize=normalize)


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
    """Turn a picture into what the model expects: resize the short side, crop the centre, scale, normalise.

    Pixel-equal to the transform of OpenAI CLIP. Transparency goes over white; EXIF orientation is not applied.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.image_size = config.vision.image_size
        self.mean = torch.tensor(config.mean).view(3, 1, 1)
        self.std = torch.tensor(config.std).view(3, 1, 1)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return float32 [3, S, S]."""
        pixels = torch.from_numpy(preprocess_pixels(image, image_size=self.image_size).copy())  # uint8 [S, S, 3]
        return pixels.permute(2, 0, 1).float().div(255).sub_(self.mean).div_(self.std).contiguous()
