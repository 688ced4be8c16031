"""Learn a byte-pair vocabulary from the captions of shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.errors import UserError
from clip_train.tokenizer.cleaning import CLEANERS
from clip_train.tokenizer.config import Cleaning

if TYPE_CHECKING:
    from clip_train.data.source import Source

START, END = "<|startoftext|>", "<|endoftext|>"
NUM_BYTES = 256
# CLIP's words, with the marks that many scripts write on their letters.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}\p{M}]+|\p{N}|[^\s\p{L}\p{M}\p{N}]+"


def train_tokenizer(shards: str | Sequence[str], out: Path, *, vocab_size: int, cleaning: Cleaning) -> str:
    """Write a `tokenizer.json` whose merges are the most frequent ones of the captions, and return how to use it.

    Byte-pair encoding (Sennrich et al. 2016) on UTF-8 bytes within words, so that every text has ids. Ids: 256 bytes,
    the merges, the start and the end token, which is the largest: text towers that read at the largest id find it.

    Raises:
        UserError: the vocabulary is too small for the bytes, or the file exists.
        IntegrityError: a shard is damaged.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    from clip_train.data.config import DataConfig
    from clip_train.distributed.world import World

    smallest = NUM_BYTES + 2
    if vocab_size < smallest:
        raise UserError(f"--vocab-size {vocab_size} must be at least {smallest}: all bytes, start and end token")
    if out.exists():
        raise UserError(f"{out} exists; runs may need it, so it is not replaced")
    (source,) = DataConfig(train=shards).open_train(world=World())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), "removed"),
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    clean = CLEANERS[cleaning.value]
    tokenizer.train_from_iterator(
        (clean(caption) for caption in captions_of(source)), trainer, length=source.num_samples
    )  # fmt: skip
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (START, END)])
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out))
    return (
        f"{out}: {tokenizer.get_vocab_size():,} ids from {source.num_samples:,} captions. Train with\n"
        f"  tokenizer=huggingface tokenizer.path={out} tokenizer.cleaning={cleaning.value} "
        f"'tokenizer.bos=\"{START}\"' 'tokenizer.eos=\"{END}\"'"
    )
