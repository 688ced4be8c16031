"""The inputs of the benchmarks: pictures, captions and starting weights, made once and read by both sides."""

from __future__ import annotations

import itertools
import random
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_train.tokenizer.bpe import ClipTokenizer

if TYPE_CHECKING:
    from clip_train.model.config import ModelConfig

PROMPTS = Path(__file__).resolve().parent.parent / "clip_train" / "evaluation" / "prompts" / "data"
# After each phrase, the chance of another: 20 to 22 tokens on average, as captions from the web have.
MORE_PHRASES = 0.6


def model_config(name: str) -> ModelConfig:
    """Return the row `name`, or for `half` ViT-B-32 with half the width and half the depth."""
    from clip_train.model import zoo

    if name != "half":
        return zoo.model_config(name)
    vision, text = {"width": 384, "layers": 6, "heads": 6}, {"width": 256, "layers": 6, "heads": 4}
    config = zoo.model_config("ViT-B-32", vision=vision, text=text)
    config.name = "ViT-B-32 at half width and depth"
    return config


def model_shape(config: ModelConfig) -> dict[str, Any]:
    """Return what both sides build the architecture from: our fields, and open_clip's keyword arguments."""
    from clip_train.interop.open_clip import model_cfg

    return asdict(config) | {"open_clip": model_cfg(config)}


def captions(number: int, *, seed: int, lengths: str = "web") -> list[str]:
    """Draw captions from ImageNet's prompts.

    lengths: `prompts` for one prompt each (10 tokens on average), `web` for a random number of them in a row, with the
    mean and the long tail of web captions, `full` for captions that fill the context.
    """
    draw = random.Random(seed)
    names = (PROMPTS / "imagenet_classnames.txt").read_text(encoding="utf-8").splitlines()
    templates = (PROMPTS / "imagenet_templates.txt").read_text(encoding="utf-8").splitlines()

    def phrases() -> int:
        if lengths != "web":
            return {"prompts": 1, "full": 30}[lengths]
        return 1 + next(n for n in itertools.count() if draw.random() >= MORE_PHRASES)

    def caption() -> str:
        return " ".join(draw.choice(templates).format(draw.choice(names)) for _ in range(phrases()))

    return [caption() for _ in range(number)]


def token_batch(texts: list[str], *, context_length: int) -> Tensor:
    """Tokenize `texts` to int64 [n, L], longer ones cut."""
    return ClipTokenizer(context_length=context_length)(texts, truncate=True)


def mean_length(tokens: Tensor) -> float:
    """Return the mean number of tokens of a caption, start and end token included."""
    return (tokens.argmax(dim=1) + 1).float().mean().item()


def drawn_pairs(number: int, *, image_size: int, seed: int) -> tuple[Tensor, list[str]]:
    """Return smooth random pictures, uint8 [n, S, S, 3], and captions drawn like web captions."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, 3, 7, 7, generator=generator)
    pictures = F.interpolate(coarse, size=image_size, mode="bilinear").mul_(255).byte()
    return pictures.permute(0, 2, 3, 1).contiguous(), captions(number, seed=seed)


def shard_pairs(folder: Path, number: int, *, image_size: int, seed: int) -> tuple[Tensor, list[str]]:
    """Return pictures, uint8 [n, S, S, 3], and captions of pairs drawn from the shards in `folder`."""
    from clip_train.data.images.decode import open_image
    from clip_train.data.images.transforms import preprocess_pixels
    from clip_train.data.sequential import ShardImages

    source = ShardImages(sorted(folder.glob("*.tar")))
    draw = random.Random(seed)
    indices = (
        draw.sample(range(len(source)), number) if number <= len(source) else draw.choices(range(len(source)), k=number)
    )
    pictures = np.stack([preprocess_pixels(open_image(source.read(i)), image_size=image_size) for i in indices])
    return torch.from_numpy(pictures), [source.text(i, "txt") for i in indices]
