"""A suite runs what is on disk, lists what is not, and its means say what they are over."""

import json

import pytest

from clip_train.config import load
from clip_train.errors import UserError
from clip_train.evaluation.suite import require_some, summarize

SETS = ["imagenet", "imagenet_v2", "imagenet_sketch", "imagenet_a", "imagenet_r"]


def suite_in(folder):
    return load("evaluate", ["checkpoint=runs/x", "suite=imagenet_shifts", f"evaluation_root={folder}"])


def test_every_set_is_looked_for_below_the_root(tmp_path):
    config = suite_in(tmp_path)
    assert list(config.evaluation) == SETS and config.suite == "imagenet_shifts"
    assert {one.classnames for one in config.evaluation.values()} == {"imagenet"}
    assert config.evaluation["imagenet_r"].root == f"{tmp_path}/imagenet-r"


def test_missing_sets_are_listed_with_their_place(tmp_path):
    (tmp_path / "sketch").mkdir()
    missing = require_some(suite_in(tmp_path).evaluation, suite="imagenet_shifts")
    assert list(missing) == [name for name in SETS if name != "imagenet_sketch"]
    assert missing["imagenet_a"] == f"{tmp_path}/imagenet-a"


def test_a_suite_with_nothing_on_disk_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"suite=imagenet_shifts: none of its sets is there: .*/imagenet-a"):
        require_some(suite_in(tmp_path).evaluation, suite="imagenet_shifts")


def test_a_suite_without_a_root_is_refused():
    with pytest.raises(UserError, match="needs evaluation_root=DIR"):
        load("evaluate", ["checkpoint=runs/x", "suite=imagenet_shifts"])


def test_means_are_over_the_sets_that_report_the_metric(tmp_path):
    scores = {"imagenet/acc1": 0.5, "imagenet_a/acc1": 0.1, "imagenet/acc5": 0.75}
    result = summarize(scores, suite="s", names=SETS, missing={"imagenet_r": "/data/imagenet-r"})
    assert result.means == {"acc1": pytest.approx(0.3), "acc5": 0.75}
    assert result.lines() == [
        "s: mean acc1 30.00 % over 2 of 5 sets",
        "s: mean acc5 75.00 % over 1 of 5 sets",
        "s: imagenet_r is not there (/data/imagenet-r)",
    ]
    result.write(tmp_path / "suite.json")
    assert json.loads((tmp_path / "suite.json").read_text())["sets"]["acc1"] == ["imagenet", "imagenet_a"]
