"""Ids equal those of open_clip's tokenizer, string by string. Left out: spellings of special tokens, as documented."""

import random
import re
import sys
import unicodedata
from pathlib import Path

import pytest

from clip_train.evaluation.prompts.files import fill, imagenet_classnames, load_templates
from clip_train.tokenizer.bpe import ClipTokenizer

pytestmark = pytest.mark.slow

SPECIAL = re.compile(r"<(start|end)_of_text>", re.IGNORECASE)
MARKUP = ["&amp;", "&amp;lt;b&amp;gt;", "&#39;", "&nbsp;", "&eacute;", "&quot", "<b>", "</p>", "&#128512;", "&nosuch;"]
WORDS = [
    "a",
    "photo",
    "Cat's",
    "DOG",
    "42",
    "naïve",
    "don't",
    "I'LL",
    "straße",
    "re-do",
    "foo_bar",
    "x@y.com",
    "1,000.5",
]
MOJIBAKE = ["Ã©", "â€™", "â€œ", "ï¬�", "Â£", "Ð¿Ñ€", "éš¾", "\x85", "\ufeff"]


@pytest.fixture(scope="module")
def reference():
    return pytest.importorskip("open_clip").SimpleTokenizer()


def real_captions():
    """ImageNet prompts, and the dictionary definitions that timm ships: 22,000 sentences."""
    timm = pytest.importorskip("timm")
    table = Path(timm.__file__).parent / "data" / "_info" / "imagenet_synset_to_definition.txt"
    names, templates = imagenet_classnames(), load_templates("imagenet")
    prompts = [fill(templates[i % len(templates)], classname=name) for i, name in enumerate(names * 8)]
    return prompts + [line.partition("\t")[2] for line in table.read_text(encoding="utf-8").splitlines()]


def drawn_strings(rng, *, count):
    """Strings that mix words with letters of one Unicode block, markup, control characters and broken encodings."""
    for _ in range(count):
        start = rng.choice([0, 0x80, 0x100, 0x300, 0x2000, 0x3000, 0xFE00, 0x1F000, rng.randrange(0x110000)])
        block = [chr(c) for c in range(start & ~0xFF, (start & ~0xFF) + 0x100) if not 0xD800 <= c < 0xE000]
        pools = [WORDS, block or WORDS, MARKUP, MOJIBAKE, [chr(rng.randrange(32)), "\x7f", "\x9f"], [" ", "\t", "\r\n"]]
        length = 400 if rng.random() < 0.002 else rng.randint(0, 14)
        kinds = rng.choices(pools, weights=[6, 6, 1, 1, 1, 2], k=length)
        yield "".join(rng.choice(kind) + rng.choice(["", " "]) for kind in kinds)


def test_100000_strings(reference):
    tokenizer = ClipTokenizer()
    rng = random.Random(0)
    real = real_captions()
    texts = [*real, *drawn_strings(rng, count=100_000 - len(real))]
    assert len(texts) == 100_000 and sum(text.isascii() for text in texts) < 60_000
    compared = 0
    for text in texts:
        if not SPECIAL.search(text):
            compared += 1
            assert tokenizer.encode(text) == reference.encode(text), repr(text)
    assert compared > 99_900


def test_every_code_point_by_itself(reference):
    tokenizer = ClipTokenizer()
    reference.cache = _Forgetful(reference.cache)
    different = [
        (hex(c), unicodedata.name(chr(c), "?"))
        for c in range(sys.maxunicode + 1)
        if not 0xD800 <= c < 0xE000 and tokenizer.encode(chr(c)) != reference.encode(chr(c))
    ]
    assert not different, different[:20]


class _Forgetful(dict):
    """A cache that keeps nothing new: a million words would take gigabytes."""

    def __setitem__(self, key, value):
        pass
