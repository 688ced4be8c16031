"""Features of a whole evaluation set, computed on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_train.distributed.collectives import all_gather, gather_objects
from clip_train.errors import IntegrityError, UserError

if TYPE_CHECKING:
    import numpy as np

    from clip_train.distributed.world import World

TEXT_BATCH_SIZE = 256


class EvaluationBatch(Protocol):
    """One batch of `data/sequential.py`."""

    @property
    def images(self) -> Tensor:
        """[B, S, S, 3] uint8."""

    @property
    def indices(self) -> Tensor:
        """[B] int64, places in the source."""

    @property
    def valid(self) -> Tensor:
        """[B] bool, False for padding rows."""


Batches = Callable[[], Iterable[EvaluationBatch]]


class Tokenizer(Protocol):
    """What the evaluators need of a tokenizer."""

    @property
    def end_id(self) -> int:
        """The token at which the text tower reads its feature."""

    def __call__(self, texts: list[str], *, truncate: bool = False) -> Tensor:
        """Return tokens [n, L] int64, zero-padded after the end token."""


class DualEncoder(Protocol):
    """What the evaluators need of a model; `CLIP` and what `load` returns both have it."""

    training: bool

    @property
    def logit_scale(self) -> Tensor:
        """[] log of the factor that turns cosines into logits."""

    @property
    def logit_bias(self) -> Tensor | None:
        """[] added to the logits by a model that judges each label by itself (SigLIP), None for others."""

    def train(self, mode: bool = True) -> DualEncoder:
        """Set training or evaluation mode."""

    def encode_image(self, images: Tensor, *, normalize: bool = True) -> Tensor:
        """Return features [B, D] of raw pixels [B, H, W, 3] uint8."""

    def encode_text(self, tokens: Tensor, *, normalize: bool = True) -> Tensor:
        """Return features [B, D] of tokens [B, L]."""

    def pool_image(self, images: Tensor) -> Tensor:
        """Return features [B, width] of raw pixels before the projection to D dimensions."""


class WrappedEncoder:
    """A model behind which another one works. Kinds of it say what they do around the work.

    Args:
        model: the model that works.
    """

    same_features = False
    """Whether features are those of `model`, so that what is remembered of its class vectors holds here too."""

    def __init__(self, model: DualEncoder) -> None:
        self.model = model
        self.training = model.training

    @property
    def logit_scale(self) -> Tensor:
        """The model's own."""
        return self.model.logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        """The model's own."""
        return self.model.logit_bias

    def train(self, mode: bool = True) -> WrappedEncoder:
        """Set training or evaluation mode of the model."""
        self.model.train(mode)
        self.training = mode
        return self

    def encode_image(self, images: Tensor, *, normalize: bool = True) -> Tensor:
        """Return features [B, D] of raw pixels [B, H, W, 3] uint8."""
        return self.model.encode_image(images, normalize=normalize)

    def encode_text(self, tokens: Tensor, *, normalize: bool = True) -> Tensor:
        """Return features [B, D] of tokens [B, L]."""
        return self.model.encode_text(tokens, normalize=normalize)

    def pool_image(self, images: Tensor) -> Tensor:
        """Return features [B, width] of raw pixels before the projection to D dimensions."""
        return self.model.pool_image(images)


class PrefixEncoder(WrappedEncoder):
    """A model of which only the first dimensions are used, brought to unit length again.

    Raises:
        UserError: there are not so many dimensions.
    """

    def __init__(self, model: DualEncoder, *, embed_dim: int, full: int) -> None:
        """Cut `model`, whose embeddings have `full` dimensions, to the first `embed_dim`."""
        if not 0 < embed_dim <= full:
            raise UserError(f"embed_dim={embed_dim} must lie between 1 and the model's {full}")
        super().__init__(model)
        self._embed_dim = embed_dim

    def encode_image(self, images: Tensor, *, normalize: bool = True) -> Tensor:
        """Return features [B, embed_dim] of raw pixels [B, H, W, 3] uint8."""
        return self._cut(super().encode_image(images, normalize=normalize), normalize)

    def encode_text(self, tokens: Tensor, *, normalize: bool = True) -> Tensor:
        """Return features [B, embed_dim] of tokens [B, L]."""
        return self._cut(super().encode_text(tokens, normalize=normalize), normalize)

    def _cut(self, features: Tensor, normalize: bool) -> Tensor:
        features = features[:, : self._embed_dim]
        return F.normalize(features, dim=-1) if normalize else features


class TokenizedTexts(NamedTuple):
    """Texts whose tokens differ, and which of them each asked-for text is."""

    tokens: Tensor  # [U, L] int64, L the length of the longest
    lengths: Tensor  # [U] int64, up to and including the end token
    rows: Tensor  # [n] int64 in [0, U)


class EncodedTexts(NamedTuple):
    """Features of distinct texts, and which of them each asked-for text has."""

    features: Tensor  # [U, D] float32, unit length
    rows: Tensor  # [n] int64 in [0, U)


@contextmanager
def evaluating(model: DualEncoder, *, world: World, precision: str) -> Iterator[str]:
    """Put the model in evaluation mode without gradients, its towers under `precision`, and restore its mode after.

    Yields `fp32` or `bf16`, which `auto` stands for.
    """
    use_bf16 = precision == "bf16" or (precision == "auto" and world.device.type == "cuda")
    was_training = model.training
    model.train(False)
    try:
        with torch.no_grad(), torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=use_bf16):
            yield "bf16" if use_bf16 else "fp32"
    finally:
        model.train(was_training)


def similarity(queries: Tensor, gallery: Tensor) -> Tensor:
    """Return the cosines [Q, G] of unit rows [Q, D] and [G, D] in full float32, whatever the run allows elsewhere."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(queries.device.type, enabled=False):
            return queries.float() @ gallery.float().T
    finally:
        torch.set_float32_matmul_precision(allowed)


def tokenize_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> TokenizedTexts:
    """Tokenize each distinct text once. Texts longer than the context are cut.

    Texts with the same tokens are one: their features are equal, and what compares them is a tie.

    Raises:
        UserError: there is no text.
    """
    if not texts:
        raise UserError("there is no text to encode")
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    tokens, row = tokenizer(list(place), truncate=True).unique(dim=0, return_inverse=True)  # [U, L]
    lengths = (tokens == tokenizer.end_id).int().argmax(dim=1) + 1
    tokens = tokens[:, : int(lengths.max())].contiguous()
    return TokenizedTexts(tokens, lengths, row[torch.tensor([place[text] for text in texts])])


def encode_texts(
    model: DualEncoder, texts: TokenizedTexts, *, world: World, batch_size: int = TEXT_BATCH_SIZE
) -> EncodedTexts:
    """Return the features of `texts` on every rank, each distinct text encoded once on one rank.

    Texts are sorted by length and a batch is cut to its longest: exact, since the tower is causal and reads its feature
    at the end token.
    """
    order = texts.lengths.argsort(stable=True)
    per_rank = -(-len(order) // world.size)
    padding = order[-1].expand(per_rank * world.size - len(order))
    by_rank = torch.cat([order, padding]).view(per_rank, world.size).T.contiguous()  # [ranks, per_rank]
    own = []
    for rows in by_rank[world.rank].split(batch_size):
        batch = texts.tokens[rows, : int(texts.lengths[rows].max())].to(world.device)
        own.append(model.encode_text(batch).float())
    gathered = all_gather(torch.cat(own), world=world)
    features = torch.empty(len(order), gathered.shape[1], device=world.device)
    features[by_rank.flatten().to(world.device)] = gathered
    return EncodedTexts(features, texts.rows.to(world.device))


def encode_images(model: DualEncoder, batches: Batches, *, world: World) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield this rank's image features [B, D] float32, indices [B] and valid [B], batch after batch."""
    for batch in batches():
        features = model.encode_image(batch.images.to(world.device, non_blocking=True)).float()
        yield features, batch.indices.to(world.device), batch.valid.to(world.device)


def encode_all_images(model: DualEncoder, batches: Batches, *, num_images: int, world: World) -> Tensor:
    """Return the features [N, D] float32 of a whole set on every rank, in the order of the set.

    Raises:
        IntegrityError: the batches of all ranks are not exactly the `num_images` images, each once.
    """
    rows = list(encode_images(model, batches, world=world))
    features, indices, valid = (torch.cat(column) for column in zip(*rows, strict=True))
    columns = {"features": features}
    return gather_items(indices, columns, valid=valid, num_items=num_images, world=world)["features"]


def gather_items(
    indices: Tensor, columns: dict[str, Tensor], *, valid: Tensor, num_items: int, world: World
) -> dict[str, Tensor]:
    """Return the valid rows of all ranks in index order, on every rank.

    Args:
        indices: [K] int64, the place of each row in the evaluation set.
        columns: tensors [K, ...] whose rows belong to `indices`.
        valid: [K] bool, False for padding rows.
        num_items: size of the evaluation set.

    Raises:
        IntegrityError: the rows are not exactly the `num_items` items, each once.
    """
    rows_per_rank = gather_objects(len(indices), world=world)
    if len(set(rows_per_rank)) > 1:
        raise IntegrityError(f"the ranks evaluated different numbers of rows: {rows_per_rank}")
    seen = all_gather(torch.where(valid, indices, -1), world=world)
    order = seen.argsort(stable=True)[int((seen < 0).sum()) :]
    if not torch.equal(seen[order], torch.arange(num_items, device=seen.device)):
        raise IntegrityError(
            f"the evaluation saw {len(order)} images ({len(seen[order].unique())} different) of a set of {num_items}: "
            "no score is given for another set than the one asked for"
        )
    return {name: all_gather(column, world=world)[order] for name, column in columns.items()}


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return the values in host memory."""
    return tensor.detach().cpu().numpy()
