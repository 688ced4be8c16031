"""Tokenizer files as the `tokenizers` library writes them."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "a photo of a cat", "ein Foto eines Hundes", "фото собаки", "猫の写真", "naïve café ☕", "</s> inside", "",
    "two  spaces\tand a tab", "HTML &amp; Straße", "🙂👍 emoji", "very long " * 40,
]  # fmt: skip


def write_bpe(path, *, vocab_size=350, specials=("<pad>", "<s>", "<unk>", "</s>")):
    """A byte-level BPE whose special tokens come first, as trainers put them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(path))
    return path


def write_unigram(path):
    """A sentencepiece-like unigram model: padding 0, end 1, no start token, as SigLIP's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.save(str(path))
    return path
