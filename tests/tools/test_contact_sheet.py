"""The contact sheet shows the samples, crops and captions that a run would train on, and needs nothing but itself."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from clip_train.data.config import DataConfig
from clip_train.distributed.world import World
from clip_train.errors import UserError
from clip_train.tokenizer.bpe import ClipTokenizer
from clip_train.tools.contact_sheet import write_contact_sheet
from tests.data.made import encoded, picture, write_shard

SIZE = 32


def _two_colours(n: int) -> Image.Image:
    """A picture that is smaller as PNG than as JPEG, so that the page holds its exact pixels."""
    image = Image.new("RGB", (60, 50), (20 * n, 255 - 20 * n, 100))
    image.paste((0, 0, 20 * n), (10 + n, 5, 40, 20 + 2 * n))
    return image


def _shards(folder, *, extra=()):
    captions = [f"A photo, number {n} <b>" for n in range(12)]
    samples = [
        {"__key__": f"k{n:02d}", "png": encoded(_two_colours(n)), "txt": text.encode()}
        for n, text in enumerate(captions)
    ]
    write_shard(folder / "0.tar", [*samples, *extra])
    return folder


def _crops(page: str) -> list[np.ndarray]:
    addresses = re.findall(r'src="data:image/png;base64,([^"]+)" alt="training crop', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(address)))) for address in addresses]


def test_crops_and_captions_are_those_of_a_runs_first_batch(tmp_path):
    _shards(tmp_path / "in")
    page = write_contact_sheet(str(tmp_path / "in"), tmp_path / "out.html", number=8, seed=5, image_size=SIZE)
    text = page.read_text()
    config = DataConfig(train=str(tmp_path / "in"), workers=0)
    tokenizer = ClipTokenizer()
    stream = config.stream(
        config.open_train(world=World()), world=World(), seed=5, global_batch_size=8, tokenizer=tokenizer,
        image_size=SIZE,
    )  # fmt: skip
    batch = next(stream.batches(0))
    rows = np.argsort(batch.slots.numpy())
    crops = _crops(text)
    assert len(crops) == 8
    for row, crop in zip(rows, crops, strict=True):
        assert np.array_equal(batch.images[row].numpy(), crop)
    spelled = re.findall(r'class="ids">([^<]*)<', text)
    assert [line.replace("&lt;", "<").replace("&gt;", ">") for line in spelled] == [
        tokenizer.decode(batch.tokens[row].tolist()) for row in rows
    ]


def test_the_page_is_self_contained_and_says_what_cannot_be_used(tmp_path):
    bad = [
        {"__key__": "broken", "png": b"no picture", "txt": b"x"},
        {"__key__": "blank", "png": encoded(picture(3)), "txt": b" "},
        {"__key__": "long", "png": encoded(picture(3)), "txt": b"word " * 200},
    ]
    _shards(tmp_path / "in", extra=bad)
    text = write_contact_sheet(str(tmp_path / "in"), tmp_path / "out.html", number=99, image_size=SIZE).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and "<script" not in text and "number 3 <b>" not in text
    assert "2 of the 15 shown cannot be used" in text
    assert 'chip bad">unknown_format' in text and 'chip bad">caption_empty' in text
    assert "77 tokens, cut" in text and "0.tar/broken.png" in text


def test_a_page_without_samples_or_pixels_is_refused(tmp_path):
    _shards(tmp_path / "in")
    with pytest.raises(UserError, match="--num=0"):
        write_contact_sheet(str(tmp_path / "in"), tmp_path / "out.html", number=0)
    with pytest.raises(UserError, match="--seed=-1"):
        write_contact_sheet(str(tmp_path / "in"), tmp_path / "out.html", seed=-1)
    with pytest.raises(UserError, match="cannot be written"):
        write_contact_sheet(str(tmp_path / "in"), tmp_path / "no" / "out.html", number=1)
