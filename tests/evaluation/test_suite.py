"""A suite runs what is on disk, lists what is not, and its means say what they are over."""

import json

import pytest

from clip_train.config import load
from clip_train.errors import UserError
from clip_train.evaluation.suite import report_suite, require_some, summarize

SETS = ["imagenet", "imagenet_v2", "imagenet_sketch", "imagenet_a", "imagenet_r", "imagenet_o", "objectnet"]


def suite_in(folder, suite="imagenet"):
    return load("evaluate", ["checkpoint=runs/x", f"suite={suite}", f"evaluation_root={folder}"])


def result(*, n, classes=None, parts=None, status="ok", chance=None, **metrics):
    extras = {"n": n, "status": status, "reason": "one point", "chance": chance or dict.fromkeys(metrics, 0.5)}
    extras |= {"intervals": {name: (value, value) for name, value in metrics.items()}, "classes": classes}
    return {"metrics": metrics, "clip_train": {**extras, **({"parts": parts} if parts else {})}}


def test_every_set_is_looked_for_below_the_root(tmp_path):
    config = suite_in(tmp_path)
    assert list(config.evaluation) == SETS and config.suite == "imagenet"
    assert config.evaluation["imagenet_r"].root == f"{tmp_path}/imagenet-r"
    assert config.evaluation["imagenet_r"].classnames == "imagenet"


def test_datacomp_has_38_sets_in_its_means():
    config = suite_in("/data", suite="datacomp")
    published = {one.benchmark.task: one.benchmark for one in config.evaluation.values()}
    assert len(published) == len(config.evaluation) == 38
    sizes = {name: sum(name in one.part_of for one in published.values()) for name in ("ImageNet", "shifts", "VTAB")}
    assert sizes == {"ImageNet": 1, "shifts": 6, "VTAB": 13}
    assert all(one.metric for one in published.values())
    assert sum(one.images for one in published.values()) == 697_369
    assert config.evaluation["vtab_dtd"].root == "/data/wds_vtab-dtd_test"
    assert config.evaluation["fairness_geode"].root == "/data/wds_geode_test"
    others = [n for n, one in config.evaluation.items() if one.benchmark.metric not in ("acc1", "mean_recall@1")]
    assert sorted(others) == sorted(
        ("vtab_caltech101", "vtab_flowers", "vtab_pets", "fgvc_aircraft", "misc_winogavil", "wilds_iwildcam",
         "wilds_fmow", "fairness_dollar_street", "fairness_geode")
    )  # fmt: skip


def test_missing_sets_are_listed_with_their_place(tmp_path):
    (tmp_path / "sketch").mkdir()
    missing = require_some(suite_in(tmp_path).evaluation, suite="imagenet")
    assert list(missing) == [name for name in SETS if name != "imagenet_sketch"]
    assert missing["imagenet_a"] == f"{tmp_path}/imagenet-a"


def test_a_suite_with_nothing_on_disk_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"suite=imagenet: none of its sets is there: .*/imagenet-a"):
        require_some(suite_in(tmp_path).evaluation, suite="imagenet")


def test_a_suite_without_a_root_is_refused():
    with pytest.raises(UserError, match="needs evaluation_root=DIR"):
        load("evaluate", ["checkpoint=runs/x", "suite=imagenet"])


def test_means_are_over_the_sets_that_have_a_score_and_say_so():
    config = suite_in("/data")
    results = {
        "imagenet": result(n=50_000, classes=1000, acc1=0.6),
        "imagenet_a": result(n=7500, classes=200, acc1=0.2),
        "imagenet_r": result(n=29_999, classes=200, acc1=0.4),
        "imagenet_o": result(n=2000, classes=200, status="collapsed"),
    }
    missing = {name: f"/data/{name}" for name in SETS if name not in results}
    suite = summarize(results, suite="imagenet", evaluations=config.evaluation, missing=missing)
    assert suite.lines() == [
        "imagenet: ImageNet 60.00 % over 1/1",
        "imagenet: shifts 30.00 % over 2/6",
        "imagenet: average 40.00 % over 3/7",
        "imagenet: imagenet_v2 is not there: /data/imagenet_v2",
        "imagenet: imagenet_sketch is not there: /data/imagenet_sketch",
        "imagenet: objectnet is not there: /data/objectnet",
    ]
    remarks = {one.name: one.remark for one in suite.sets}
    assert remarks["imagenet_r"] == "29,999 images, 30,000 published"
    assert remarks["imagenet_o"] == "collapsed: one point"
    assert remarks["objectnet"] == "not there: /data/objectnet"
    # The published chance, not the evaluator's own.
    imagenet_a = suite.sets[SETS.index("imagenet_a")]
    assert (imagenet_a.chance, imagenet_a.normalised) == (0.008056, pytest.approx((0.2 - 0.008056) / (1 - 0.008056)))


def test_the_score_of_a_part_counts_where_the_benchmark_says_so_and_a_missing_metric_is_told(tmp_path, capsys):
    config = suite_in("/data", suite="retrieval")
    names = {one.benchmark.title: name for name, one in config.evaluation.items()}
    part = {"n": 9, "metrics": {"jaccard": 0.4}, "chance": {"jaccard": 0.2}, "intervals": {"jaccard": (0.3, 0.5)}}
    results = {
        names["WinoGAViL"]: result(n=3563, parts={"10-12": part}, jaccard=0.7),
        names["MSCOCO"]: result(n=5000, **{"image_retrieval_recall@5": 0.5}),
    }
    for name, content in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    report_suite("retrieval", evaluations=config.evaluation, missing={names["Flickr"]: "/data/flickr"}, folder=tmp_path)
    shown = capsys.readouterr().out
    assert "retrieval: average 40.00 % over 1/3\n" in shown and "is not there: /data/flickr\n" in shown
    written = json.loads((tmp_path / "suite-retrieval.json").read_text())
    assert written["means"]["retrieval"] == {"score": 0.4, "over": 1, "of": 3}
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "key": "misc/winogavil", "dataset": "WinoGAViL", "metrics": {"jaccard": 0.7, "main_metric": 0.4}
    }  # fmt: skip
    assert lines[0]["metrics"]["main_metric"] is None
    remarks = {one["name"]: one["remark"] for one in written["sets"]}
    assert remarks[names["MSCOCO"]] == "not counted: it has no mean_recall@1"
