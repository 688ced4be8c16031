"""The text tower: a causal transformer read at the end token, as in OpenAI CLIP.

Exactness of ragged text: position i of a causal stack depends on positions up to i only, and a caption is read at its
end token, so computing it without the padding changes neither features nor gradients.
"""

from __future__ import annotations

import bisect
import sys

import torch
from torch import Tensor, nn

from clip_train.errors import UserError
from clip_train.model.config import ModelConfig, Ragged
from clip_train.model.transformer import Transformer

BUCKETS = (16, 24, 32, 48, 77)


class TextTransformer(nn.Module):
    """Map token ids to the shared embedding, not yet normalised."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text = config.text
        self.context_length = text.context_length
        self.vocab_size = text.vocab_size
        self.ragged = config.ragged
        self.token_embedding = nn.Embedding(text.vocab_size, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context_length, text.width))
        self.transformer = Transformer(
            text.width,
            layers=text.layers,
            heads=text.heads,
            quick_gelu=config.quick_gelu,
            checkpointing=config.checkpointing,
        )
        self.ln_final = nn.LayerNorm(text.width)
        self.text_projection = nn.Parameter(torch.empty(text.width, config.embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=text.width**-0.5)
        self.transformer.init_as_text_tower()

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Embed captions: int64 [B, L] to [B, D].

        The end token is the first maximum of the ids, as in OpenAI CLIP: its id is the largest of the vocabulary.

        Raises:
            UserError: tokens are wider than the context and a caption needs the width.
        """
        tokens = self._fit_context(tokens)
        ends = tokens.argmax(dim=1)  # the first of equal maxima
        in_buckets = tokens.device.type == "cpu" if self.ragged == Ragged.auto else self.ragged == Ragged.buckets
        read = self._read_in_buckets(tokens, ends) if in_buckets else self._read(self.token_embedding(tokens), ends)
        return self.ln_final(read) @ self.text_projection

    def _read(self, embedded: Tensor, ends: Tensor) -> Tensor:
        """Return the state at each end token: [n, T, width] to [n, width]."""
        x = embedded + self.positional_embedding[: embedded.shape[1]]
        return self.transformer(x, causal=True, positions=ends)

    def _read_in_buckets(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """Make one call per bucket of lengths, each as wide as its longest caption, and restore the order of rows."""
        lengths = (ends + 1).tolist()
        rows_of: dict[int, list[int]] = {}
        if _is_sharded(self.transformer.resblocks[0]):
            # Each call gathers sharded parameters: every rank must make the same calls, also for buckets it lacks.
            rows_of = {bucket: [] for bucket in range(bisect.bisect_left(BUCKETS, self.context_length) + 1)}
        for row, length in enumerate(lengths):
            rows_of.setdefault(bisect.bisect_left(BUCKETS, length), []).append(row)
        buckets = [rows for _, rows in sorted(rows_of.items())]
        order = torch.tensor([row for rows in buckets for row in rows], device=tokens.device)
        groups = [  # [n, longest of the bucket]; a bucket without captions computes one token, and drops it below
            tokens[index, : max(lengths[row] for row in rows)] if rows else tokens[:1, :1]
            for index, rows in zip(order.split([len(rows) for rows in buckets]), buckets, strict=True)
        ]
        # One lookup for all buckets: each would otherwise make its own gradient as large as the vocabulary.
        embedded = self.token_embedding(torch.cat([group.flatten() for group in groups]))
        read = [
            self._read(x.view(*group.shape, -1), group.argmax(dim=1))[: len(rows)]
            for x, group, rows in zip(embedded.split([g.numel() for g in groups]), groups, buckets, strict=True)
        ]
        return torch.cat(read)[order.argsort()]

    def _fit_context(self, tokens: Tensor) -> Tensor:
        """Drop columns past the context, which must be padding: `tokenize` pads to 77 whatever the model."""
        if tokens.shape[1] <= self.context_length:
            return tokens
        if (tokens[:, self.context_length :] != 0).any():
            raise UserError(
                f"a caption is longer than the model's context of {self.context_length} tokens: "
                f"tokenize with context_length={self.context_length}, truncate=True"
            )
        return tokens[:, : self.context_length]


def _is_sharded(block: nn.Module) -> bool:
    # Importing FSDP takes seconds; whoever sharded the block has done it.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(block, fsdp.FSDPModule)
