"""Generated pictures that no caption of the scenes describes."""

import io

import numpy as np
import pytest
from PIL import Image

from clip_train.data.scenes.draw import Item, Scene, draw_scene
from clip_train.data.scenes.foreign import Foreign, ForeignImages
from clip_train.data.scenes.vocabulary import SHAPES, UNSEEN_SHAPES


def pictures(kind, *, num_images=8, **arguments):
    source = ForeignImages(kind, num_images=num_images, **arguments)
    return [np.asarray(Image.open(io.BytesIO(source.read(i)))).astype(int) for i in range(len(source))]


@pytest.mark.parametrize("kind", Foreign)
def test_pictures_differ_and_depend_on_index_and_seed_only(kind):
    first, again, other = pictures(kind), pictures(kind), pictures(kind, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({picture.tobytes() for picture in [*first, *other]}) == 16
    assert {picture.shape for picture in pictures(kind, num_images=2, image_size=48)} == {(48, 48, 3)}


def test_blank_has_one_colour_noise_has_no_structure_and_text_is_black_on_grey():
    assert all(len(np.unique(picture.reshape(-1, 3), axis=0)) == 1 for picture in pictures(Foreign.blank))
    for picture in pictures(Foreign.noise):
        grain = next(g for g in (8, 4, 2, 1) if np.array_equal(picture, picture[::g, ::g].repeat(g, 0).repeat(g, 1)))
        grains = picture[::grain, ::grain, 0]
        assert abs(np.corrcoef(grains[:-1].ravel(), grains[1:].ravel())[0, 1]) < 0.5
    for picture in pictures(Foreign.text):
        dark = (picture < 120).all(axis=2)
        assert 0.05 < dark.mean() < 0.6
        assert dark[: picture.shape[0] // 2].any()
        assert dark[picture.shape[0] // 2 :].any()


def test_unseen_shapes_look_like_no_shape_of_the_scenes():
    def silhouette(shape):
        scene = Scene((Item(shape, "black", "solid", 0.5, 0.5, 0.4),), "white")
        return np.asarray(draw_scene(scene, image_size=64)).mean(axis=2) < 128

    assert not set(UNSEEN_SHAPES) & set(SHAPES)
    for unseen in UNSEEN_SHAPES:
        overlaps = [
            (silhouette(unseen) & silhouette(shape)).sum() / (silhouette(unseen) | silhouette(shape)).sum()
            for shape in (*SHAPES, *(s for s in UNSEEN_SHAPES if s != unseen))
        ]
        assert max(overlaps) < 0.9, unseen
