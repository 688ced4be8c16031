"""The file that keeps a model's temperature and thresholds."""

import json
from dataclasses import asdict, replace

import pytest

from clip_train.calibration import (
    CALIBRATION_FILE,
    Calibration,
    Rejection,
    RejectScore,
    Reliability,
    Temperature,
    hash_prompts,
    latest,
    read_calibration,
    write_calibration,
)
from clip_train.errors import IntegrityError

RELIABILITY = Reliability(
    ece=0.1, nll=0.5, brier=0.3, accuracy=0.9, counts=[0, 8], confidences=[None, 0.8], accuracies=[None, 0.9]
)
TEMPERATURE = Temperature(
    value=1.5, data="scenes", num_fitted=4, num_tested=8, before=RELIABILITY, after=replace(RELIABILITY, ece=0.05),
    date="2026-11-21",
)  # fmt: skip
REJECTION = Rejection(
    thresholds={RejectScore.max_cosine: 0.25, RejectScore.mcm: 0.2},
    known_passing={RejectScore.max_cosine: 0.94, RejectScore.mcm: 0.95},
    foreign_passing={"noise": {RejectScore.max_cosine: 0.01, RejectScore.mcm: 0.5}},
    auroc={"noise": {RejectScore.max_cosine: 0.99, RejectScore.mcm: 0.7}}, coverages=[0.5, 1.0], risks=[0.0, 0.1],
    data="scenes", num_fitted=4, num_tested=8, num_foreign={"noise": 5}, templates=["a {}"],
    prompts_sha256=hash_prompts(["a cat"]), date="2026-11-21",
)  # fmt: skip
BOTH = Calibration(weights_sha256="ab" * 32, model="demo, step 5", temperature=TEMPERATURE, rejection=REJECTION)


@pytest.mark.parametrize("calibration", [BOTH, replace(BOTH, temperature=None), replace(BOTH, rejection=None)])
def test_what_is_written_is_read_again(tmp_path, calibration):
    write_calibration(calibration, tmp_path / CALIBRATION_FILE)
    assert read_calibration(tmp_path / CALIBRATION_FILE) == calibration
    assert [path.name for path in tmp_path.iterdir()] == [CALIBRATION_FILE]


def test_no_file_is_no_calibration(tmp_path):
    assert read_calibration(tmp_path / CALIBRATION_FILE) is None


def test_of_two_calibrations_each_part_is_the_one_measured_last():
    newer = replace(TEMPERATURE, value=2.0, date="2026-11-22")
    other = replace(BOTH, temperature=newer, rejection=replace(REJECTION, date="2026-11-20"))
    assert latest(BOTH, other) == replace(BOTH, temperature=newer)
    assert latest(None, other) == other and latest(BOTH, None) == BOTH
    assert latest(replace(BOTH, temperature=None), other) == replace(BOTH, temperature=newer)


def damaged_files():
    whole = {"format": 1, "weights_sha256": "", "model": "", "temperature": None, "rejection": None}
    yield "{"
    yield "[1]"
    yield "3"
    yield json.dumps({k: v for k, v in whole.items() if k != "rejection"})
    yield json.dumps({**whole, "temperature": {"value": 1}})
    yield json.dumps({**whole, "rejection": {"thresholds": {"wisdom": 1}}})
    reliability = asdict(RELIABILITY)
    for wrong in ({"counts": ["<b>"]}, {"ece": "much"}, {"accuracies": 1}):
        temperature = {**asdict(TEMPERATURE), "before": {**reliability, **wrong}}
        yield json.dumps({**whole, "temperature": temperature})
    yield json.dumps({**whole, "surprise": 1})
    yield json.dumps({**whole, "format": 2})


@pytest.mark.parametrize("content", list(damaged_files()))
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / CALIBRATION_FILE
    path.write_text(content)
    with pytest.raises(IntegrityError, match=CALIBRATION_FILE):
        read_calibration(path)


def test_the_hash_of_prompts_ignores_order_and_repeats():
    assert hash_prompts(["a", "b", "a"]) == hash_prompts(["b", "a"]) != hash_prompts(["a", "c"])
