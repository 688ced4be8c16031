"""Learn a byte-pair vocabulary from the captions of shards."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from clip_train.data.captions import CaptionChooser, caption_extensions
from clip_train.data.config import DataConfig
from clip_train.data.files import write_atomically
from clip_train.data.images.decode import BadSampleError
from clip_train.data.index.tar import read_samples
from clip_train.data.source import expand_shards
from clip_train.errors import IntegrityError, UserError
from clip_train.tokenizer.cleaning import CLEANERS
from clip_train.tokenizer.config import Cleaning

GOLDEN = 0.6180339887498949
START, END = "<|startoftext|>", "<|endoftext|>"
SMALLEST_VOCABULARY = 256 + 2  # all bytes, start and end token
# GPT-2's words, which carry the space before them; letters with the marks that many scripts write on them, single
# digits as in CLIP.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}\p{M}]+| ?\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+"


def train_tokenizer(
    shards: str | Sequence[str], out: Path, *, vocab_size: int, cleaning: Cleaning = Cleaning.clip, caption: str = "txt"
) -> str:
    """Write a `tokenizer.json` with the most frequent merges of the captions, and return how to train with it.

    Byte-pair encoding (Sennrich et al. 2016) within words, on UTF-8 bytes, so that every text has ids and decodes to
    itself. Ids: the bytes, the merges, the start token, the end token. The end has the largest id, where every library
    that follows CLIP looks for it.

    Args:
        shards: pattern, folder or list.
        out: the file to write.
        vocab_size: ids in all; fewer if the captions hold no more pairs.
        cleaning: of the captions; the run that uses the file must be told the same.
        caption: where captions are, as `data.caption`.

    Raises:
        UserError: no shards, a vocabulary too small for the bytes, or `out` exists.
        IntegrityError: a shard is damaged, or no caption is in any.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"--vocab-size {vocab_size} must be at least {SMALLEST_VOCABULARY}: bytes, start and end token")
    if out.exists():
        raise UserError(f"{out} exists and is not replaced: a run may need it")
    paths = expand_shards(shards, field="SHARDS")
    tokenizer = Tokenizer(models.BPE())
    # Every word carries a space, the first one too: a word has the same ids wherever it stands.
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    counted = _Counted(paths, caption=caption, cleaning=cleaning)
    tokenizer.train_from_iterator(counted, trainer)
    if not counted.num_captions:
        raise IntegrityError(f"{shards}: no sample has a caption in {caption}")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (START, END)])
    write_atomically(out, tokenizer.to_str(pretty=True).encode())
    without = f" ({counted.num_without:,} samples have none that can be used)" if counted.num_without else ""
    return (
        f"{out}: {tokenizer.get_vocab_size():,} ids from {counted.num_captions:,} captions{without}. Train with\n"
        f"  tokenizer=huggingface tokenizer.path={out} tokenizer.cleaning={cleaning.value} "
        f"'tokenizer.bos=\"{START}\"' 'tokenizer.eos=\"{END}\"'"
    )


class _Counted:
    """The cleaned captions of shards, counted as they pass, as are the samples without a usable one."""

    def __init__(self, shards: Sequence[Path], *, caption: str, cleaning: Cleaning) -> None:
        fields = DataConfig(caption=caption).caption_fields()
        self._shards, self._clean = shards, CLEANERS[cleaning.value]
        self._choose, self._extensions = CaptionChooser(fields), caption_extensions(fields)
        self.num_captions = self.num_without = 0

    def __iter__(self) -> Iterator[str]:
        for shard in self._shards:
            with shard.open("rb") as file:
                for sample in read_samples(shard):
                    try:
                        members = [sample.members[name] for name in self._extensions]
                        contents = [os.pread(file.fileno(), member.size, member.offset) for member in members]
                        # Of several captions each sample gives another one, in golden steps.
                        caption = self._choose(contents, uniform=self.num_captions * GOLDEN % 1)
                    except (KeyError, BadSampleError):
                        self.num_without += 1
                        continue
                    self.num_captions += 1
                    yield self._clean(caption)
