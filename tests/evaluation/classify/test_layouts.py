"""Every layout that labelled sets come in, and what is said of those that are wrong."""

import io
import json

import numpy as np
import pytest

from clip_train.distributed.world import World
from clip_train.errors import IntegrityError, UserError
from clip_train.evaluation.classify.config import ClassifyConfig
from clip_train.evaluation.classify.evaluator import Classify
from clip_train.evaluation.classify.labelled_images import LabelledImages
from clip_train.evaluation.classify.permutation import probable_permutation
from clip_train.evaluation.prompts.files import imagenet_classnames, imagenet_parts, imagenet_wnids, load_templates
from tests.evaluation.test_sets import SIZE, open_folders, picture, png, write_folders, write_shard
from tests.evaluation.toys import (
    ToyModel,
    ToySource,
    ToyTokenizer,
    image_features_float64,
    random_pixels,
    text_feature_float64,
    toy_setting,
)


def found(images):
    return {images.source.key(i): int(images.labels[i]) for i in range(len(images.source))}


def test_a_table_gives_paths_and_classes_by_name(tmp_path):
    write_folders(tmp_path / "pictures", ["a", "b"])
    (tmp_path / "set.csv").write_text("path,label\npictures/b/x.png,red fox\npictures/a/x.png,cup\n")
    images = open_folders(tmp_path / "set.csv")
    assert list(images.classnames) == ["cup", "red fox"]
    assert found(images) == {"pictures/b/x.png": 1, "pictures/a/x.png": 0}
    assert images.source.read(1) == png(0)


def test_a_table_with_numbers_needs_names_and_names_what_fits_neither(tmp_path):
    (tmp_path / "set.csv").write_text("path,label\na.png,1\nb.png,2\n")
    with pytest.raises(UserError, match="by number: say what they are"):
        open_folders(tmp_path / "set.csv")
    (tmp_path / "classnames.txt").write_text("cup\nboat\n")
    with pytest.raises(UserError, match=r"row 2: '2' is neither one of the 2 class names nor the number of one"):
        open_folders(tmp_path / "set.csv")


def test_a_picture_without_a_label_is_left_out_and_makes_no_class(tmp_path):
    (tmp_path / "set.csv").write_text("path,label\na.png,cup\nb.png,\nc.png,red fox\n")
    images = open_folders(tmp_path / "set.csv")
    assert list(images.classnames) == ["cup", "red fox"] and found(images) == {"a.png": 0, "c.png": 1}
    assert images.warnings == ["1 of 3 pictures have not just one label: left out"]


def test_another_split_is_not_taken_for_the_classes(tmp_path):
    for split in ("train", "val"):
        write_folders(tmp_path / "set" / split, ["a", "b"])
    with pytest.raises(UserError, match="set has no split=test; it has train, val"):
        open_folders(tmp_path / "set")
    assert list(open_folders(tmp_path / "set", split="val").classnames) == ["a", "b"]
    (tmp_path / "wds" / "test").mkdir(parents=True)
    (tmp_path / "wds" / "test" / "nshards.txt").write_text("1")
    with pytest.raises(UserError, match="wds has no split=dev; it has test"):
        open_folders(tmp_path / "wds", split="dev")


def test_a_class_may_be_a_link_and_what_is_hidden_is_none(tmp_path):
    write_folders(tmp_path / "set", ["b", ".clip-train-index", "__MACOSX"])
    write_folders(tmp_path / "elsewhere", ["a"])
    (tmp_path / "set" / "a").symlink_to(tmp_path / "elsewhere" / "a", target_is_directory=True)
    images = open_folders(tmp_path / "set")
    assert list(images.classnames) == ["a", "b"]
    assert sorted(found(images).values()) == [0, 1]


def test_a_table_without_the_columns_says_which_names_are_looked_for(tmp_path):
    (tmp_path / "set.csv").write_text("thing,what\na.png,1\n")
    with pytest.raises(UserError, match=r"has the columns thing, what: picture paths go under image or image_path"):
        open_folders(tmp_path / "set.csv")


@pytest.mark.parametrize("pattern", ["", "{0..1}.tar"])
def test_training_shards_are_labelled_by_their_cls(tmp_path, pattern):
    for i in range(2):
        write_shard(tmp_path / f"{i}.tar", [(f"k{i}", {"png": png(i), "txt": b"x", "cls": str(1 - i).encode()})])
    root = f"{tmp_path}/{pattern}" if pattern else tmp_path
    with pytest.raises(UserError, match="numbers of classes only"):
        open_folders(root)
    (tmp_path / "classnames.txt").write_text("cup\nboat\n")
    assert ClassifyConfig(root=str(root)).missing() is None
    images = open_folders(root)
    assert found(images) == {"0.tar/k0": 1, "1.tar/k1": 0}


def npy(values):
    buffer = io.BytesIO()
    np.save(buffer, np.array(values))
    return buffer.getvalue()


def write_multilabel(root, labels):
    samples = [(f"s{i}", {"png": png(i), "npy": npy(row)}) for i, row in enumerate(labels)]
    write_shard(root / "test" / "0.tar", samples)
    (root / "test" / "nshards.txt").write_text("1")
    (root / "dataset_type.txt").write_text("multilabel\n")
    (root / "classnames.txt").write_text("fox\ncup\nboat\n")


def test_several_labels_per_image_are_scored_by_mean_average_precision_as_scikit_learn_does(tmp_path):
    metrics = pytest.importorskip("sklearn.metrics")
    labels = np.random.default_rng(3).integers(0, 2, (20, 3))
    labels[4] = 0  # an image of no class
    write_multilabel(tmp_path, labels)
    model = ToyModel(size=SIZE)
    config = ClassifyConfig(root=str(tmp_path), batch_size=8)
    result = config.build(world=World(), tokenizer=ToyTokenizer(), image_size=SIZE).evaluate(model)
    features = image_features_float64(model, np.stack([picture(i) for i in range(20)]))
    vectors = np.array([text_feature_float64(model, f"a photo of a {name}.") for name in ("fox", "cup", "boat")])
    expected = metrics.average_precision_score(labels, features @ vectors.T, average=None)
    assert result.details["per_class_average_precision"] == pytest.approx(list(expected))
    assert result.metrics == {"mean_average_precision": pytest.approx(expected.mean())}
    low, high = result.intervals["mean_average_precision"]
    assert low < expected.mean() < high
    assert [row["images"] for row in result.per_class] == labels.sum(axis=0).tolist()


def test_a_multi_hot_vector_of_another_length_is_refused_by_its_picture(tmp_path):
    write_multilabel(tmp_path, [[0, 1, 0], [0, 1]])
    with pytest.raises(IntegrityError, match=r"s1: its \.npy has shape \[2\], not \[3\]"):
        open_folders(tmp_path)


def test_a_retrieval_set_is_not_classified(tmp_path):
    write_multilabel(tmp_path, [[0, 1, 0]])
    (tmp_path / "dataset_type.txt").write_text("retrieval")
    with pytest.raises(UserError, match=r"holds captions, not classes: evaluate it with evaluation=\[retrieve\]"):
        open_folders(tmp_path)


def test_prompts_of_each_class_come_from_json(tmp_path):
    write_folders(tmp_path / "set", ["cup", "boat"])
    own = {"cup": ["a cup", "an old cup of tea"], "boat": ["a boat"], "unused": ["x"]}
    (tmp_path / "prompts.json").write_text(json.dumps(own))
    config = ClassifyConfig(root=str(tmp_path / "set"), templates=str(tmp_path / "prompts.json"))
    evaluator = config.build(world=World(), tokenizer=ToyTokenizer(), image_size=SIZE)
    model = ToyModel(size=SIZE)
    result = evaluator.evaluate(model)
    cup = np.mean([text_feature_float64(model, prompt) for prompt in own["cup"]], axis=0)
    vectors = [text_feature_float64(model, "a boat"), cup / np.linalg.norm(cup)]
    features = image_features_float64(model, np.stack([picture(1), picture(0)]))
    np.testing.assert_allclose(
        np.sort(result.predictions["cosine"]), np.sort(features @ np.array(vectors).T), atol=1e-6
    )
    (tmp_path / "prompts.json").write_text(json.dumps({"cup": ["a cup"]}))
    with pytest.raises(UserError, match=r"prompts\.json has no list of prompts for the class 'boat'"):
        config.build(world=World(), tokenizer=ToyTokenizer(), image_size=SIZE)


def test_flat_validation_pictures_are_labelled_by_the_files_that_come_with_them(tmp_path):
    wnids = [imagenet_wnids()[c] for c in (65, 970)]
    for i in (1, 2):
        (tmp_path / "val").mkdir(exist_ok=True)
        (tmp_path / "val" / f"ILSVRC2012_val_0000000{i}.JPEG").write_bytes(png(i))
    with pytest.raises(UserError, match=r"in one folder, and no labels: put ILSVRC2012_validation_ground_truth\.txt"):
        open_labelled(tmp_path)
    expected = {"ILSVRC2012_val_00000001.JPEG": 65, "ILSVRC2012_val_00000002.JPEG": 970}

    solution = tmp_path / "LOC_val_solution.csv"
    rows = [f"ILSVRC2012_val_0000000{i},{wnids[i - 1]} 85 1 499 272 {wnids[i - 1]} 1 2 3 4 \n" for i in (2, 1)]
    solution.write_text("ImageId,PredictionString\n" + "".join(rows))
    images = open_labelled(tmp_path)
    assert found(images) == expected
    assert list(images.classnames) == imagenet_classnames() and len(images.templates) == 80

    solution.unlink()
    (tmp_path / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(wnids))
    assert found(open_labelled(tmp_path)) == expected


def test_the_devkits_own_class_numbers_are_not_the_order_of_the_ids(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    data = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    # Number 1 is the kit fox; a group of classes has a number too.
    synsets = np.array([(1, "n02119789", 0), (2, "n01440764", 0), (1001, "n02084071", 9)], dtype=fields)
    scipy_io.savemat(data / "meta.mat", {"synsets": synsets})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n")
    for i in (1, 2):
        (tmp_path / f"ILSVRC2012_val_0000000{i}.JPEG").write_bytes(png(i))
    expected = [imagenet_wnids().index(wnid) for wnid in ("n01440764", "n02119789")]
    assert list(found(open_labelled(tmp_path)).values()) == expected


def open_labelled(root):
    return ClassifyConfig(root=str(root), split="val", classnames="imagenet").open(
        toy_setting(random_pixels(1), world=World(), batch_size=1)
    ).images  # fmt: skip


def test_objectnet_is_scored_among_the_classes_it_shares_with_imagenet(tmp_path):
    write_folders(tmp_path / "images", ["air_freshener", "banana", "alarm_clock"])
    (tmp_path / "mappings").mkdir()
    labels = {"air_freshener": "Air freshener", "alarm_clock": "Alarm clock", "banana": "Banana"}
    (tmp_path / "mappings" / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    shared = {"Banana": "banana", "Alarm clock": "analog clock; digital clock"}
    (tmp_path / "mappings" / "objectnet_to_imagenet_1k.json").write_text(json.dumps(shared))
    images = open_folders(tmp_path)
    assert list(images.classnames) == ["alarm clock", "banana"] and len(images.templates) == 80
    assert found(images) == {"alarm_clock/x.png": 0, "banana/x.png": 1}


def test_an_incomplete_copy_of_imagenet_or_a_part_is_refused_and_a_choice_of_classes_is_remarked(tmp_path):
    part = imagenet_parts()["ImageNet-R"]
    for wnid in part:
        (tmp_path / wnid).mkdir()
    (tmp_path / part[0] / "x.png").write_bytes(png(0))
    images = open_folders(tmp_path)
    assert len(images.classnames) == 200 and not images.warnings
    (tmp_path / part[7]).rmdir()
    with pytest.raises(UserError, match=rf"lacks 1 of the 200 class folders of ImageNet-R \({part[7]}\)"):
        open_folders(tmp_path)
    for wnid in part[50:]:
        if wnid != part[7]:
            (tmp_path / wnid).rmdir()
    assert "among the 49 of ImageNet's 1,000 classes" in open_folders(tmp_path).warnings[0]


def test_permuted_classes_are_told_from_a_bad_model():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(40), 25)
    names = [f"class {c}" for c in range(40)]
    renamed = np.roll(np.arange(40), 1)
    answers = np.where(rng.random(1000) < 0.5, renamed[labels], rng.integers(0, 40, 1000))
    warning = probable_permutation(labels, answers, classnames=names)
    assert warning is not None and "images of 'class 0' are called 'class 39'" in warning
    assert probable_permutation(labels, rng.integers(0, 40, 1000), classnames=names) is None
    assert probable_permutation(labels, np.full(1000, 7), classnames=names) is None
    good = np.where(rng.random(1000) < 0.5, labels, rng.integers(0, 40, 1000))
    assert probable_permutation(labels, good, classnames=names) is None


def test_the_ablation_scores_the_shorter_published_lists_from_the_same_features():
    names = ["missile", "corgi", "red fox", "a", "gown"]
    pixels, labels = random_pixels(60), np.random.default_rng(2).integers(0, 5, 60)
    model, scores = ToyModel(), {}
    for choice in ("imagenet", "simple", "single"):
        images = LabelledImages(
            source=ToySource(60), labels=labels, classnames=names, templates=load_templates(choice)
        )  # fmt: skip
        scores[choice] = Classify(images, setting=toy_setting(pixels, world=World(), batch_size=16)).evaluate(model)
    ablation = scores["imagenet"].details["template_ablation"]
    assert ablation == {name: scores[name].metrics["acc1"] for name in ("simple", "single")}
    assert len({scores[name].metrics["acc1"] for name in scores}) > 1


def test_confusions_and_the_table_of_classes_count_what_happened(tmp_path):
    from clip_train.evaluation.classify.scores import score

    labels = np.array([0, 0, 0, 1, 1, 2])
    top = np.array([[1], [1], [0], [1], [0], [2]])
    result = score(labels, top, num_classes=3, classnames=["fox", "cup", "boat"])
    assert result.details["confusions"] == [
        {"class": "fox", "answer": "cup", "n": 2, "of": 3},
        {"class": "cup", "answer": "fox", "n": 1, "of": 2},
    ]
    fox = {"class": 0, "name": "fox", "images": 3, "recall": 1 / 3, "answered": 2, "precision": 0.5}
    assert result.per_class[0] == {**fox, "commonest_mistake": "cup"}
