"""Sets on disk: clip-benchmark's layout, class folders, shards with captions; read and evaluated through the config."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from clip_train.distributed.world import World
from clip_train.errors import IntegrityError, UserError
from clip_train.evaluation.classify.config import ClassifyConfig
from clip_train.evaluation.classify.labelled_images import open_labelled_images
from clip_train.evaluation.prompts.files import imagenet_classnames, imagenet_wnids
from clip_train.evaluation.result import read_result, write_result
from clip_train.evaluation.retrieve.captioned_images import open_captioned_shards
from clip_train.evaluation.retrieve.config import RetrieveConfig
from clip_train.evaluation.samples import load_samples, save_samples
from tests.evaluation.toys import ToyModel, ToyTokenizer, image_features_float64, text_feature_float64

SIZE = 16


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def png(seed):
    buffer = io.BytesIO()
    Image.fromarray(picture(seed)).save(buffer, format="png")
    return buffer.getvalue()


def write_shard(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_wds(root, *, labels, names, per_shard=4):
    samples = [(f"s{i:07d}", {"png": png(i), "cls": str(label).encode()}) for i, label in enumerate(labels)]
    shards = [samples[i : i + per_shard] for i in range(0, len(samples), per_shard)]
    for i, shard in enumerate(shards):
        write_shard(root / "test" / f"{i}.tar", shard)
    (root / "test" / "nshards.txt").write_text(f"{len(shards)}\n")
    (root / "classnames.txt").write_text("\n".join(names) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nart of the {c}\n")


def write_folders(root, names):
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        (root / name / "x.png").write_bytes(png(i))


def open_folders(root, *, classnames="auto", templates="auto", split="test"):
    return open_labelled_images(str(root), split=split, classnames=classnames, templates=templates)


def test_clip_benchmarks_layout_is_classified_as_by_hand(tmp_path):
    names = ["red fox", "cup", "boat"]
    labels = [0, 1, 2, 2, 1, 0, 1, 1, 0, 2, 2]  # twelve shards and more would sort as text in another order
    write_wds(tmp_path, labels=labels, names=names, per_shard=1)
    evaluator = ClassifyConfig(root=str(tmp_path), batch_size=4).build(
        world=World(), tokenizer=ToyTokenizer(), image_size=SIZE
    )
    model = ToyModel(size=SIZE)
    features = image_features_float64(model, np.stack([picture(i) for i in range(len(labels))]))
    vectors = []
    for name in names:
        prompts = [text_feature_float64(model, p) for p in (f"a photo of a {name}.", f"art of the {name}")]
        vectors.append(np.mean(prompts, axis=0) / np.linalg.norm(np.mean(prompts, axis=0)))
    expected = np.mean((features @ np.array(vectors).T).argmax(axis=1) == labels)
    assert evaluator.evaluate(model).metrics["acc1"] == pytest.approx(expected)


def test_a_label_out_of_range_is_refused_by_its_picture(tmp_path):
    write_wds(tmp_path, labels=[0, 3], names=["a", "b", "c"])
    with pytest.raises(IntegrityError, match=r"0\.tar/s0000001: its \.cls is '3', not an integer in \[0, 3\)"):
        open_folders(tmp_path)


def test_class_folders_get_their_names_in_sorted_order(tmp_path):
    write_folders(tmp_path / "test", ["tabby_cat", "corgi"])
    images = open_folders(tmp_path)
    assert list(images.classnames) == ["corgi", "tabby cat"]
    assert images.labels.tolist() == [0, 1]
    assert list(images.templates) == ["a photo of a {}."]


def test_folders_named_by_number_are_read_as_integers(tmp_path):
    write_folders(tmp_path, ["0", "2", "10"])
    names = tmp_path / "names.txt"
    names.write_text("".join(f"class {i}\n" for i in range(11)))
    images = open_folders(tmp_path, classnames=str(names))
    found = {images.source.key(i): int(images.labels[i]) for i in range(3)}
    assert found == {"0/x.png": 0, "2/x.png": 2, "10/x.png": 10}


def test_imagenet_folders_get_imagenets_names_and_a_part_is_scored_among_that_part(tmp_path):
    wnids = [imagenet_wnids()[c] for c in (5, 17, 900)]
    write_folders(tmp_path, wnids)
    images = open_folders(tmp_path)
    assert list(images.classnames) == [imagenet_classnames()[c] for c in (5, 17, 900)]
    assert len(images.templates) == 80


def test_imagenet_folders_under_other_names_are_refused_as_a_permutation(tmp_path):
    write_folders(tmp_path, ["tench", "goldfish"])
    with pytest.raises(UserError, match=r"goldfish.*probable permutation"):
        open_folders(tmp_path, classnames="imagenet")


def test_numbered_folders_without_names_are_refused(tmp_path):
    write_folders(tmp_path, ["0", "1"])
    with pytest.raises(UserError, match="classnames=FILE or imagenet"):
        open_folders(tmp_path)


def test_several_captions_per_picture_are_one_per_line(tmp_path):
    samples = [("a", {"png": png(0), "txt": b"a cup\n\n an old cup \n"}), ("b", {"png": png(1), "txt": b"a boat"})]
    write_shard(tmp_path / "0.tar", samples)
    images = open_captioned_shards(str(tmp_path / "*.tar"))
    assert list(images.captions) == ["a cup", "an old cup", "a boat"]
    assert images.owner.tolist() == [0, 0, 1]


def test_captions_in_json_belong_to_their_picture_too(tmp_path):
    members = {"png": png(0), "txt": b"a cup", "json": b'{"alts": ["one cup", "blue cup"]}'}
    write_shard(tmp_path / "0.tar", [("0", members), ("1", {**members, "json": b'{"alts": "a boat"}'})])
    images = open_captioned_shards(str(tmp_path), caption=["json:alts", "txt"])
    assert images.captions == ["one cup", "blue cup", "a cup", "a boat", "a cup"]
    assert images.owner.tolist() == [0, 0, 0, 1, 1]
    with pytest.raises(IntegrityError, match=r"0\.tar/0 has no caption: caption_missing"):
        open_captioned_shards(str(tmp_path), caption="json:title")


def test_a_picture_without_caption_is_refused_by_name(tmp_path):
    write_shard(tmp_path / "0.tar", [("a", {"png": png(0), "txt": b" \n"})])
    with pytest.raises(IntegrityError, match=r"0\.tar/a has no caption"):
        open_captioned_shards(str(tmp_path))


def test_shards_are_searched_through_the_config(tmp_path):
    captions = [f"thing {i} x{'yz' * i}" for i in range(6)]
    write_shard(tmp_path / "0.tar", [(str(i), {"png": png(i), "txt": c.encode()}) for i, c in enumerate(captions)])
    evaluator = RetrieveConfig(shards=str(tmp_path), batch_size=4, recall_k=[1, 2]).build(
        world=World(), tokenizer=ToyTokenizer(), image_size=SIZE
    )
    model = ToyModel(size=SIZE)
    cosines = image_features_float64(model, np.stack([picture(i) for i in range(6)])) @ np.array(
        [text_feature_float64(model, c) for c in captions]
    ).T  # fmt: skip
    expected = np.mean(cosines.argmax(axis=1) == np.arange(6))
    assert evaluator.evaluate(model).metrics["text_retrieval_recall@1"] == pytest.approx(expected)


def test_a_picture_that_cannot_be_decoded_fails_the_evaluation(tmp_path):
    write_shard(
        tmp_path / "0.tar", [("a", {"png": png(0)[:200], "txt": b"a cup"}), ("b", {"png": png(1), "txt": b"b"})]
    )
    evaluator = RetrieveConfig(shards=str(tmp_path)).build(world=World(), tokenizer=ToyTokenizer(), image_size=SIZE)
    with pytest.raises(IntegrityError, match=r"0\.tar/a"):
        evaluator.evaluate(torch.nn.Module.train(ToyModel(size=SIZE)))


def test_the_files_of_an_evaluation_show_the_pictures_with_their_answers(tmp_path):
    write_wds(tmp_path / "wds", labels=[0, 1, 2, 0, 1], names=["red fox", "cup", "boat"])
    captions = [f"thing {i} x{'yz' * i}" for i in range(6)]
    samples = [(str(i), {"png": png(i), "txt": c.encode()}) for i, c in enumerate(captions)]
    write_shard(tmp_path / "pairs" / "0.tar", samples)
    runtime = {"world": World(), "tokenizer": ToyTokenizer(), "image_size": SIZE}
    evaluators = {
        "classes": ClassifyConfig(root=str(tmp_path / "wds")).build(**runtime),
        "pairs": RetrieveConfig(shards=str(tmp_path / "pairs")).build(**runtime),
    }
    model = ToyModel(size=SIZE)
    results = {name: evaluator.evaluate(model) for name, evaluator in evaluators.items()}
    for name, result in results.items():
        write_result(result, tmp_path / f"{name}.json", dataset=name, model="toy")
        save_samples(evaluators[name].samples(result, size=112), tmp_path / f"{name}.samples.json")
    assert read_result(tmp_path / "classes.json")["metrics"]["acc1"] == results["classes"].metrics["acc1"]

    classes = load_samples(tmp_path / "classes.samples.json")
    assert [a.truth for a in classes.answers] == [["red fox"], ["cup"], ["boat"], ["red fox"], ["cup"]]
    assert np.mean([a.right for a in classes.answers]) == pytest.approx(results["classes"].metrics["acc1"])
    assert all(a.right == (a.answers[0] in a.truth) for a in classes.answers)

    pairs = load_samples(tmp_path / "pairs.samples.json")
    assert pairs.pair_captions == captions
    cosines = image_features_float64(model, np.stack([picture(i) for i in range(6)])) @ np.array(
        [text_feature_float64(model, c) for c in captions]
    ).T  # fmt: skip
    np.testing.assert_allclose(pairs.pair_cosines, cosines, atol=1e-5)
    assert [a.answers[0] for a in pairs.answers] == [captions[i] for i in cosines.argmax(axis=1)]
    # Enlarged pictures keep their mean colour: each stands at its own place.
    means = pairs.pair_pictures.reshape(6, -1, 3).mean(axis=1)
    expected = np.stack([picture(i).reshape(-1, 3).mean(axis=0) for i in range(6)])
    np.testing.assert_allclose(means, expected, atol=3)
