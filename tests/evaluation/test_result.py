"""Result files: clip-benchmark's keys, its bare NaN, and ours."""

import json

import numpy as np
import pytest

from clip_train.errors import IntegrityError
from clip_train.evaluation.classify.scores import score
from clip_train.evaluation.result import read_result, write_result


def test_a_result_has_clip_benchmarks_keys_and_ours_under_one_name(tmp_path):
    labels = np.array([0, 1, 1, 0])
    result = score(labels, np.array([[0, 1], [0, 1], [1, 0], [1, 0]]), num_classes=2)
    result.predictions = {"label": labels}
    path = tmp_path / "evaluation" / "00000100" / "colours.json"
    write_result(result, path, dataset="colours", model="ViT-B-32", pretrained="step-00000100")
    content = json.loads(path.read_text())
    assert content["metrics"] == {"acc1": 0.5, "mean_per_class_recall": 0.5, "f1_macro": 0.5, "acc5": None}
    assert {k: content[k] for k in ("dataset", "model", "pretrained", "task", "language")} == {
        "dataset": "colours",
        "model": "ViT-B-32",
        "pretrained": "step-00000100",
        "task": "zeroshot_classification",
        "language": "en",
    }
    extras = content["clip_train"]
    assert extras["n"] == 4
    assert extras["chance"]["acc1"] == 0.5
    assert extras["normalised"]["acc1"] == 0.0
    assert extras["status"] == "ok"
    low, high = extras["intervals"]["acc1"]
    assert low < 0.5 < high
    np.testing.assert_array_equal(np.load(path.with_suffix(".npz"))["label"], labels)
    assert read_result(path)["metrics"]["acc5"] is None


def test_the_hash_of_the_items_tells_their_names_order_and_truth(tmp_path):
    def written(**columns):
        result = score(np.array([0, 1]), np.array([[0, 1], [0, 1]]), num_classes=2)
        result.predictions = {"top": np.zeros(2)} | {name: np.array(column) for name, column in columns.items()}
        write_result(result, tmp_path / "x.json", dataset="x", model="m")
        return json.loads((tmp_path / "x.json").read_text())["clip_train"].get("items_sha256")

    first = written(key=["a", "b"], label=[0, 1])
    assert first == written(key=["a", "b"], label=[0, 1])
    others = [written(key=["b", "a"], label=[0, 1]), written(key=["a", "b"], label=[1, 0]), written(label=[0, 1])]
    assert others[-1] is None and len({first, *others}) == 4


def test_the_bare_nan_of_clip_benchmark_is_read_as_no_value(tmp_path):
    path = tmp_path / "theirs.json"
    path.write_text('{"dataset": "x", "metrics": {"acc1": 0.25, "acc5": NaN}, "language": "en"}')
    assert read_result(path)["metrics"] == {"acc1": 0.25, "acc5": None}


def test_another_file_is_refused_by_name(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"steps": 3}')
    with pytest.raises(IntegrityError, match=r"config\.json has no `metrics`"):
        read_result(path)


def test_a_collapsed_result_shows_its_reason_and_no_score(tmp_path):
    result = score(np.array([0, 1]), np.array([[0, 1], [0, 1]]), num_classes=2)
    result.collapsed, result.metrics, result.intervals = "mean cosine too high", {}, {}
    write_result(result, tmp_path / "x.json", dataset="x", model="m")
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["metrics"] == {}
    assert (content["clip_train"]["status"], content["clip_train"]["reason"]) == ("collapsed", "mean cosine too high")
