"""The text tower: a transformer, causal and read at the end token as in OpenAI CLIP, or seeing all as in SigLIP.

Exactness of ragged text, for the first kind: position i of a causal stack depends on positions up to i only, and a
caption is read at its end token, so computing it without the padding changes neither features nor gradients.
"""

from __future__ import annotations

import bisect
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_train.errors import UserError
from clip_train.model.config import ModelConfig, Ragged, TextPool
from clip_train.model.packed import Probe, VarlenAttention, pack, probe, to_device
from clip_train.model.transformer import BlockStyle, Transformer

BUCKETS = (16, 24, 32, 48, 77)


class TextTransformer(nn.Module):
    """Map token ids to the shared embedding, not yet normalised."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text = config.text
        self.context_length = text.context_length
        self.vocab_size = text.vocab_size
        self.text = text
        self.ragged = Ragged.off if text.sees_padding else config.ragged
        # Attention over packed captions in place of torch's kernel, where that does not exist.
        self.varlen_attention: VarlenAttention | None = None
        self.token_embedding = nn.Embedding(text.vocab_size, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context_length, text.width))
        self.transformer = Transformer(
            text.width,
            layers=text.layers,
            heads=text.heads,
            style=BlockStyle(
                mlp_ratio=text.mlp_ratio,
                quick_gelu=config.quick_gelu,
                gelu_tanh=text.gelu_tanh,
                norm_eps=text.norm_eps,
            ),
            checkpointing=config.checkpointing,
        )
        self.ln_final = nn.LayerNorm(text.width, eps=text.norm_eps)
        self.text_projection: nn.Parameter | nn.Linear
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        if text.proj_bias:
            self.text_projection = nn.Linear(text.width, config.embed_dim)
            nn.init.normal_(self.text_projection.weight, std=text.width**-0.5)
            nn.init.zeros_(self.text_projection.bias)
        else:
            self.text_projection = nn.Parameter(torch.empty(text.width, config.embed_dim))
            nn.init.normal_(self.text_projection, std=text.width**-0.5)
        self.transformer.init_as_text_tower()

    def embed_text(self, tokens: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Embed captions: int64 [B, L] to [B, D].

        A caption is read at its end token, the first maximum of its ids unless the config names the id. A tower that
        sees padding is given the whole context: missing columns are filled.

        Args:
            lengths: tokens of each caption up to its end token, known on the host; None asks the device for them.

        Raises:
            UserError: tokens are wider than the context and a caption needs the width.
        """
        tokens = self._fit_context(tokens)
        layout = self.layout(tokens.device, dtype=self._compute_type(tokens.device))
        if layout is Ragged.off:
            read = self._read(self.token_embedding(tokens), self._ends(tokens))
        else:
            if lengths is None:
                lengths = (self._ends(tokens) + 1).tolist()
            read = (self._read_packed if layout is Ragged.packed else self._read_in_buckets)(tokens, lengths)
        read = self.ln_final(read)
        if isinstance(self.text_projection, nn.Linear):
            projected: Tensor = self.text_projection(read)
            return projected
        return read @ self.text_projection

    def layout(self, device: torch.device, *, dtype: torch.dtype) -> Ragged:
        """Return how captions are computed on `device` where matrix products have `dtype`; never `auto`.

        Raises:
            UserError: `model.ragged=packed` is to train where it cannot. Evaluation takes what is there.
        """
        if self.ragged in (Ragged.buckets, Ragged.off):
            return self.ragged
        found = self._probe(device, dtype)
        if self.ragged is Ragged.packed and self.training and found.attend is None:
            raise UserError(f"model.ragged=packed: {found.reason}; take model.ragged=auto")
        return Ragged.buckets if found.attend is None else Ragged.packed

    def _probe(self, device: torch.device, dtype: torch.dtype) -> Probe:
        if self.varlen_attention is not None:
            return Probe(self.varlen_attention, "")
        return probe(device, dtype, head_width=self.transformer.head_width)

    def _compute_type(self, device: torch.device) -> torch.dtype:
        on = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if on else self.ln_final.weight.dtype

    def _ends(self, tokens: Tensor) -> Tensor:
        """Return the position at which each caption [n, T] is read, [n]."""
        if self.text.pool is TextPool.last:
            return tokens.new_full(tokens.shape[:1], tokens.shape[1] - 1)
        if self.text.end_id is None:
            return tokens.argmax(dim=1)  # the first of equal maxima
        return (tokens == self.text.end_id).int().argmax(dim=1)

    def _read(self, embedded: Tensor, ends: Tensor) -> Tensor:
        """Return the state at each end token: [n, T, width] to [n, width]."""
        x = embedded + self.positional_embedding[: embedded.shape[1]]
        return self.transformer(x, causal=self.text.causal, positions=ends)

    def _read_packed(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Compute all captions in one row without padding."""
        attend = self._probe(tokens.device, self._compute_type(tokens.device)).attend
        assert attend is not None
        packing = pack(
            lengths, width=tokens.shape[1], context_length=self.context_length, device=tokens.device, attend=attend
        )
        x = self.token_embedding(tokens.flatten()[packing.tokens]) + self.positional_embedding[packing.positions]
        return self.transformer(x, causal=True, packing=packing)[: len(tokens)]

    def _read_in_buckets(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Make one call per bucket of lengths, each as wide as its longest caption, and restore the order of rows."""
        rows_of: dict[int, list[int]] = {}
        if _is_sharded(self.transformer.resblocks[0]):
            # Each call gathers sharded parameters: every rank must make the same calls, also for buckets it lacks.
            rows_of = {bucket: [] for bucket in range(bisect.bisect_left(BUCKETS, self.context_length) + 1)}
        for row, length in enumerate(lengths):
            rows_of.setdefault(bisect.bisect_left(BUCKETS, length), []).append(row)
        buckets = [rows for _, rows in sorted(rows_of.items())]
        order = to_device(torch.tensor([row for rows in buckets for row in rows]), tokens.device)
        groups = [  # [n, longest of the bucket]; a bucket without captions computes one token, and drops it below
            tokens[index, : max(1, *(lengths[row] for row in rows))] if rows else tokens[:1, :1]
            for index, rows in zip(order.split([len(rows) for rows in buckets]), buckets, strict=True)
        ]
        # One lookup for all buckets: each would otherwise make its own gradient as large as the vocabulary.
        embedded = self.token_embedding(torch.cat([group.flatten() for group in groups]))
        read = [
            self._read(x.view(*group.shape, -1), self._ends(group))[: len(rows)]
            for x, group, rows in zip(embedded.split([g.numel() for g in groups]), groups, buckets, strict=True)
        ]
        return torch.cat(read)[order.argsort()]

    def _fit_context(self, tokens: Tensor) -> Tensor:
        """Drop columns past the context, which must be padding: `tokenize` pads to 77 whatever the model.

        Fill missing ones with padding for a tower that sees it.
        """
        missing = self.context_length - tokens.shape[1]
        if missing >= 0:
            return F.pad(tokens, (0, missing), value=self.text.pad_id) if self.text.sees_padding else tokens
        if self.text.sees_padding:
            too_long = tokens[:, self.context_length :] != self.text.pad_id
        else:
            too_long = self._ends(tokens) >= self.context_length
        if too_long.any():
            raise UserError(
                f"a caption is longer than the model's context of {self.context_length} tokens: "
                f"tokenize with context_length={self.context_length}, truncate=True"
            )
        return tokens[:, : self.context_length]


def _is_sharded(block: nn.Module) -> bool:
    # Importing FSDP takes seconds; whoever sharded the block has done it.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(block, fsdp.FSDPModule)
