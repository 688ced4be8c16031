"""The loss doctor: every signature is told from the rows of a run that has it, and none from those of a healthy run."""

import math
import random
import time

import pytest

from clip_train.config import load
from clip_train.health.doctor import SIGNATURES, Doctor, Facts, diagnose

SIZE, STEPS, WARMUP = 1024, 20_000, 1000
FACTS = Facts(global_batch_size=SIZE, steps=STEPS, warmup=WARMUP, workers=4)
NAMES = {s.number: s.name for s in SIGNATURES}


def healthy(step: int, rng: random.Random) -> dict[str, float]:
    """A row as a run from scratch writes it: noise on falling loss, towers that spread, a gap that opens and stays."""
    t = step / STEPS
    noise = 1 + 0.05 * rng.gauss(0, 1)
    loss = math.log(SIZE) * (0.3 + 0.7 * math.exp(-6 * t))
    return {
        "step": step,
        "train/loss": loss * (1 + 0.01 * rng.gauss(0, 1)),
        "train/loss_of_guessing": math.log(SIZE),
        "train/in_batch_recall@1": min(1.0, (1 / SIZE + 0.7 * (1 - math.exp(-6 * t))) * noise),
        "train/logit_scale": 14.3 + 60 * t,
        "train/learning_rate": 5e-4,
        "perf/data_wait": abs(0.02 * rng.gauss(0, 1)),
        "health/update_ratio": 2e-3 * noise,
        "health/duplicate_captions": 0.002,
        "health/duplicate_images": 0.0,
        "health/empty_captions": 0.001,
        "health/truncated_captions": 0.05,
        # Fresh towers are nearly collapsed; warm-up spreads them.
        "health/image_mean_cosine": 0.99 - 0.7 * min(1, step / WARMUP),
        "health/text_mean_cosine": 0.985 - 0.6 * min(1, step / WARMUP),
        "health/image_effective_rank": 1.5 + 60 * min(1, step / WARMUP),
        "health/text_effective_rank": 1.4 + 50 * min(1, step / WARMUP),
        "health/modality_gap": 0.6 + 0.3 * min(1, step / WARMUP) + 0.005 * rng.gauss(0, 1),
        "health/best_cosine": 0.05 + 0.3 * min(1, 4 * t),
        "health/pair_margin": 40 * t + rng.gauss(0, 1),
        "health/rank_disagreement": 1e-7,
    }


def rows(change=None, *, every=20, until=8000):
    """The rows of a run that is healthy but for `change(step)`."""
    rng = random.Random(0)
    return [healthy(step, rng) | (change(step, rng) if change else {}) for step in range(every, until + 1, every)]


def guessing(step, rng):
    return {
        "train/loss": math.log(SIZE) * (1 + 0.002 * rng.gauss(0, 1)),
        "train/in_batch_recall@1": max(0.0, (1 + 0.2 * rng.gauss(0, 1)) / SIZE),
        "health/pair_margin": rng.gauss(0, 1),
    }


SICK = {
    1: lambda step, rng: guessing(step, rng) | {"health/pair_margin": 3 + rng.gauss(0, 1)},
    2: lambda step, rng: guessing(step, rng) | {"health/update_ratio": 3e-6},
    3: lambda step, rng: {"train/logit_scale": 100.0 if step > 3000 else 80.0},
    4: lambda step, rng: {"health/duplicate_captions": 0.03 + 0.01 * rng.random()},
    5: guessing,
    6: lambda step, rng: {"health/truncated_captions": 0.6},
    7: lambda step, rng: {"health/rank_disagreement": 0.02 if step >= 40 else 0.0},
    8: lambda step, rng: {"perf/data_wait": 0.9 if step % 100 == 0 else 0.05},
    9: lambda step, rng: {"health/text_mean_cosine": 0.995 if step > 2000 else 0.5},
    10: lambda step, rng: {
        "health/modality_gap": 0.6 + step / 8000,
        "health/best_cosine": 0.02,
        "train/in_batch_recall@1": 0.01,
    },
}  # fmt: skip
# A plateau has more specific causes; those are told besides.
BESIDES = {2: {1}, 5: {1}}


@pytest.mark.parametrize("number", sorted(NAMES), ids=NAMES.get)
def test_each_signature_is_told_once_from_a_run_that_has_it(number):
    found = diagnose(rows(SICK[number]), facts=FACTS)
    assert sorted(f.number for f in found) == sorted({number} | BESIDES.get(number, set()))
    (finding,) = [f for f in found if f.number == number]
    assert finding.name == NAMES[number]
    assert len(finding.message) > 40 and "nan" not in finding.message


@pytest.mark.parametrize("every", [1, 20, 100])
def test_a_healthy_run_has_none_of_the_ten(every):
    assert diagnose(rows(every=every, until=6000), facts=FACTS) == []


def test_the_other_faces_of_a_signature():
    falling = diagnose(rows(lambda step, rng: {"train/logit_scale": 14.3 * math.exp(-step / 2000)}), facts=FACTS)
    assert [f.name for f in falling] == ["temperature"] and "has fallen to" in falling[0].message
    empty = diagnose(rows(lambda step, rng: {"health/empty_captions": 0.05}), facts=FACTS)
    assert [f.name for f in empty] == ["captions"]
    one = lambda step, rng: {"health/image_effective_rank": 1.2}  # noqa: E731
    assert "image tower" in diagnose(rows(one), facts=FACTS)[0].message
    images = diagnose(rows(lambda step, rng: {"health/duplicate_images": 0.2}), facts=FACTS)
    assert "share their image" in images[0].message


def test_duplicate_captions_that_the_loss_ignores_are_no_fault():
    ignored = Facts(global_batch_size=SIZE, steps=STEPS, warmup=WARMUP, workers=4, duplicates_ignored=True)
    assert diagnose(rows(SICK[4]), facts=ignored) == []


def test_a_plateau_is_told_2000_steps_after_warm_up_and_not_before():
    doctor = Doctor(FACTS)
    told = [f.step for row in rows(SICK[1]) for f in doctor.examine(row) if f.number == 1]
    assert told == [WARMUP + 20 + 2000]


def test_rows_of_evaluations_and_lost_values_are_passed_over():
    mixed = []
    for row in rows(SICK[4]):
        mixed += [row | {"health/update_ratio": None, "health/pair_margin": math.nan}]
        mixed += [{"step": row["step"], "imagenet/acc1": 0.1}]
    assert [f.number for f in diagnose(mixed, facts=FACTS)] == [4]


def test_facts_come_from_the_config_of_a_run():
    config = load("train", ["data.train=x", "steps=300", "optim.warmup=30", "loss.duplicates=ignore", "data.workers=3"])
    facts = Facts.of(config, steps=300)
    assert facts == Facts(
        global_batch_size=1024, steps=300, warmup=30, workers=3, duplicates_ignored=True, softmax=True
    )
    siglip = load("train", ["data.train=x", "steps=300", "optim.warmup=30", "model=ViT-B-16-SigLIP", "loss=siglip"])
    assert not Facts.of(siglip, steps=300).softmax


def test_the_doctor_costs_little():
    doctor, taken = Doctor(FACTS), rows(every=1, until=3000)
    started = time.process_time()
    for row in taken:
        doctor.examine(row)
    assert (time.process_time() - started) / len(taken) < 1e-3  # seconds a row; measured 5e-5
