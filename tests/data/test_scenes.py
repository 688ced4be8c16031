"""Generated scenes: what is drawn, what is said about it, and what training never sees."""

import hashlib
import io
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_train.data.index.files import INDEX_NAME
from clip_train.data.scenes.compose import Detail, Draw, compose, describe
from clip_train.data.scenes.draw import Item, Scene, draw_scene
from clip_train.data.scenes.pictures import held_out_pair, labelled_scene, training_pair
from clip_train.data.scenes.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    COMBINATIONS,
    HELD_OUT,
    SEEN,
    SHAPES,
    TEMPLATES,
    TEXTURES,
)  # fmt: skip
from clip_train.data.scenes.write import write_scenes
from clip_train.data.source import open_source
from clip_train.distributed.world import World
from clip_train.errors import UserError

HELD_OUT_NAMES = {combination.class_name for combination in HELD_OUT}


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def read_tar(path: Path) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.rsplit(".", 1)
            samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return samples


def one_item(shape: str, *, texture: str = "solid", x: float = 0.5, y: float = 0.5, colour: str = "red") -> np.ndarray:
    item = Item(shape, colour, texture, x, y, radius=0.22)
    return pixels(draw_scene(Scene((item,), "white"), image_size=64))


def test_every_shape_and_every_colour_is_held_out_equally_often_and_seen_in_other_combinations():
    assert len(COMBINATIONS) == len(set(COMBINATIONS)) == 100
    assert len(HELD_OUT) == 20 and set(HELD_OUT) | set(SEEN) == set(COMBINATIONS) and not set(HELD_OUT) & set(SEEN)
    assert Counter(combination.shape for combination in HELD_OUT) == dict.fromkeys(SHAPES, 2)
    assert Counter(combination.colour for combination in HELD_OUT) == dict.fromkeys(COLOURS, 2)


def test_no_training_picture_shows_a_held_out_combination_and_no_caption_names_one():
    plural = re.compile(rf"(\w+) ({'|'.join(SHAPES)})(?:s|es)?\b")
    for index in range(4000):
        draw = Draw("scenes", 5, "train", index)
        scene, description = compose(draw)
        assert not {f"{item.colour} {item.shape}" for item in scene.items} & HELD_OUT_NAMES
        for detail in Detail:
            caption = describe(description, draw, detail=detail)
            assert not {f"{word} {shape}" for word, shape in plural.findall(caption)} & HELD_OUT_NAMES, caption


def test_training_shows_every_seen_combination():
    shown = set()
    for index in range(3000):
        scene, _ = compose(Draw("scenes", 0, "train", index))
        shown |= {f"{item.colour} {item.shape}" for item in scene.items}
    assert shown == {combination.class_name for combination in SEEN}


def test_held_out_pairs_and_labelled_pictures_show_their_combination():
    for index, combination in enumerate(HELD_OUT * 2):
        assert combination.shape in held_out_pair(index, seed=3, image_size=64).caption
        assert COMBINATIONS[labelled_scene(index, seed=3, image_size=64).label] == combination


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_drawn_in_its_colour_inside_its_circle(shape):
    image = one_item(shape)
    rows, columns = np.mgrid[:64, :64] + 0.5
    distance = np.hypot(columns - 32, rows - 32)
    assert (image[distance > 1.26 * 0.22 * 64 + 1] == BACKGROUNDS["white"]).all()
    red = (abs(image - COLOURS["red"]) <= 2).all(axis=-1)
    assert 0.15 < red.sum() / (np.pi * (0.22 * 64) ** 2) <= 1.0


def test_no_two_shapes_and_no_two_textures_look_alike():
    for things in (
        [one_item(shape) for shape in SHAPES],
        [one_item("circle", texture=texture) for texture in TEXTURES],
    ):
        for index, one in enumerate(things):
            for other in things[:index]:
                differs = (abs(one - other) > 60).any(axis=-1)
                assert differs.sum() > 60  # of 4,096 pixels


def test_the_areas_of_circle_ring_and_square_are_those_of_geometry():
    def covered(shape: str) -> float:
        background, red = BACKGROUNDS["white"][1], COLOURS["red"][1]
        return float((background - one_item(shape)[..., 1]).sum() / (background - red))

    radius = 0.22 * 64
    assert covered("circle") == pytest.approx(np.pi * radius**2, rel=0.02)
    assert covered("ring") == pytest.approx(np.pi * radius**2 * (1 - 0.48**2), rel=0.03)
    assert covered("square") == pytest.approx((1.6 * radius) ** 2, rel=0.05)


def test_edges_are_anti_aliased():
    green = one_item("circle")[..., 1]
    assert len(np.unique(green)) > 8


def test_full_captions_say_what_the_picture_shows():
    for index in range(300):
        draw = Draw("scenes", 1, "val", index)
        scene, description = compose(draw)
        caption = describe(description, draw, detail=Detail.full)
        for item in scene.items:
            assert f"{item.texture} {item.colour} {item.shape}" in caption
        assert caption.endswith(f"on a {scene.background} background")
        number = re.match(r"(two|three|four) ", caption)
        if number:
            assert len(scene.items) == {"two": 2, "three": 3, "four": 4}[number[1]]
        if "to the left of" in caption:
            left = caption.index(scene.items[0].shape) < caption.index("to the left of")
            assert left and scene.items[0].x < scene.items[1].x
        if " above " in caption:
            assert scene.items[0].y < scene.items[1].y
        for place, holds in (("left", scene.items[0].x < 0.4), ("bottom", scene.items[0].y > 0.6)):
            if re.search(rf"(on the|at the|in the)[\w ]* {place}\b", caption) and "of" not in caption:
                assert holds, caption


def test_varied_captions_have_articles_and_plurals_that_fit():
    captions = [training_pair(index, seed=2, image_size=32).caption for index in range(1500)]
    assert len(set(captions)) > 600
    for caption in captions:
        assert not re.search(
            r"\ba [aeiou]|\ban [^aeiou]|\b(two|three|four) [\w ]*(circle|square|cross|arrow|shape)\b", caption
        )


def test_shapes_of_one_picture_do_not_cover_each_other_or_leave_it():
    for index in range(500):
        scene, _ = compose(Draw("scenes", 4, "train", index))
        for place, item in enumerate(scene.items):
            assert min(item.x, item.y, 1 - item.x, 1 - item.y) > item.radius - 0.02
            for other in scene.items[:place]:
                assert np.hypot(item.x - other.x, item.y - other.y) > item.radius + other.radius - 0.02


def test_pairs_are_the_same_on_every_machine():
    # Captions are exact. Pixels may differ by the version of Pillow, so only their average is held.
    pairs = [training_pair(index, seed=0, image_size=64) for index in range(200)]
    digest = hashlib.sha256("\n".join(pair.caption for pair in pairs).encode()).hexdigest()
    means = [pixels(Image.open(io.BytesIO(pair.png))).mean() for pair in pairs]
    assert (digest[:16], round(float(np.mean(means)))) == ("9f5ad45bedf794ad", 204)


def test_written_scenes_are_shards_and_do_not_depend_on_the_number_of_workers(tmp_path):
    for workers in (1, 2):
        written = write_scenes(
            tmp_path / str(workers), num_train=130, num_val=40, seed=6, image_size=32, workers=workers
        )
        assert (written.num_train, written.num_val, written.num_labelled) == (130, 40, 800)
    one, two = ({path.relative_to(tmp_path / n): path for path in (tmp_path / n).rglob("*.*")} for n in "12")
    assert one.keys() == two.keys()
    for name, path in one.items():
        if path.is_file():
            assert path.read_bytes() == two[name].read_bytes()
    pairs = list(read_tar(tmp_path / "1/train/000000.tar").values())
    assert [pair["txt"].decode() for pair in pairs] == [
        training_pair(i, seed=6, image_size=32).caption for i in range(130)
    ]
    assert Image.open(io.BytesIO(pairs[0]["png"])).size == (32, 32)
    assert (tmp_path / "1/train" / INDEX_NAME).is_file()
    captions = [pair["txt"] for pair in read_tar(tmp_path / "1/val/000000.tar").values()]
    assert len(captions) == len(set(captions)) == 40


def test_drawing_that_was_interrupted_begins_anew_and_what_is_there_is_never_mixed_with_it(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("clip_train.data.scenes.write.write_classes", interrupted)
        write_scenes(tmp_path, num_train=3, num_val=1, seed=0, image_size=32)
    write_scenes(tmp_path, num_train=2, num_val=1, seed=0, image_size=32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes", "train", "val"]
    assert open_source(str(tmp_path / "train"), name="train", world=World(), field="data.train").num_samples == 2
    with pytest.raises(UserError, match="train is not empty: remove it or choose another folder"):
        write_scenes(tmp_path, num_train=1, num_val=1, seed=0, image_size=32)


def test_classes_follow_the_layout_of_clip_benchmark(tmp_path):
    write_scenes(tmp_path, num_train=1, num_val=1, seed=0, image_size=32, workers=1)
    classes = tmp_path / "classes"
    names = (classes / "classnames.txt").read_text().splitlines()
    assert names == [combination.class_name for combination in COMBINATIONS]
    templates = (classes / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert [template.format(c="red ring") for template in templates] == [t.format("red ring") for t in TEMPLATES]
    assert (classes / "test/nshards.txt").read_text().strip() == "1"
    labels = Counter(names[int(sample["cls"])] for sample in read_tar(classes / "test/0.tar").values())
    assert labels == dict.fromkeys(HELD_OUT_NAMES, 40)


def test_impossible_numbers_are_refused(tmp_path):
    with pytest.raises(UserError, match="num_train=0 must be at least 1"):
        write_scenes(tmp_path / "a", num_train=0, num_val=1, seed=0)
    with pytest.raises(UserError, match="workers=0"):
        write_scenes(tmp_path / "b", num_train=1, num_val=1, seed=0, workers=0)
