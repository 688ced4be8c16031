"""A CLIP model small enough for exact comparisons: same interface, double precision if asked, dropout if asked."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from clip_train.types import Batch, Features

VOCABULARY, CONTEXT, SIDE, WIDTH = 50, 8, 4, 16


class Block(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.ln_1, self.fc, self.dropout = nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(torch.tanh(self.fc(self.ln_1(x))))


class Tower(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(WIDTH, dropout) for _ in range(2))

    def forward(self, x):
        for block in self.resblocks:
            x = block(x)
        return x


class StandinCLIP(nn.Module):
    """Two small towers with the interface of `clip_train.model.clip.CLIP`."""

    def __init__(self, *, seed=0, dropout=0.0, logit_bias=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv1 = nn.Linear(SIDE * SIDE * 3, WIDTH)
            self.visual = Tower(dropout)
            self.token_embedding = nn.Embedding(VOCABULARY, WIDTH)
            self.positional_embedding = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.1)
            self.transformer = Tower(dropout)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
            self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(logit_bias))
        self.calls = 0

    def encode_image(self, images):
        x = images.to(self.conv1.weight.dtype).flatten(1) / 255 - 0.5
        return F.normalize(self.visual(self.conv1(x)).to(self.logit_scale.dtype), dim=-1)

    def pool_image(self, images):
        return self.encode_image(images)

    def encode_text(self, tokens):
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding)
        return F.normalize(x.mean(1).to(self.logit_scale.dtype), dim=-1)

    def forward(self, images, tokens, on_text=None, lengths=None):
        self.calls += 1
        text = self.encode_text(tokens)
        if on_text is not None:
            text = on_text(text)
        return Features(self.encode_image(images), text, self.logit_scale, self.logit_bias)

    @torch.no_grad()
    def clamp_logit_scale_(self):
        self.logit_scale.clamp_(0, math.log(100))


def draw_batch(pairs, *, seed=0):
    """A batch of `pairs` random rows of which every seventh is padding."""
    g = torch.Generator().manual_seed(seed)
    return Batch(
        images=torch.randint(0, 256, (pairs, SIDE, SIDE, 3), generator=g, dtype=torch.uint8),
        tokens=torch.randint(0, VOCABULARY, (pairs, CONTEXT), generator=g),
        lengths=torch.full((pairs,), CONTEXT),
        slots=torch.arange(pairs),
        valid=torch.arange(pairs) % 7 != 3,
    )
