"""What stays on disk."""

import random

import pytest

from clip_train.checkpoint.best import best_checkpoint
from clip_train.checkpoint.config import CheckpointConfig
from clip_train.checkpoint.last_good import read_last_good
from clip_train.checkpoint.retention import list_checkpoints, step_of
from clip_train.errors import UserError
from tests.checkpoint.parts import open_fixed, save_steps


def steps_on_disk(run_dir) -> list[int]:
    return [step_of(path) for path in list_checkpoints(run_dir)][::-1]


def damage(run_dir, step):
    (run_dir / "checkpoints" / f"step-{step:08d}" / "model.safetensors").write_bytes(b"x")


def test_the_newest_and_every_milestone_stay(tmp_path):
    save_steps(tmp_path, *range(10, 101, 10), every=10, keep=3, milestone_every=40)
    assert steps_on_disk(tmp_path) == [40, 80, 90, 100]


def test_the_checkpoint_resumed_from_stays(tmp_path):
    save_steps(tmp_path, 1, 2)
    checkpointer, _ = open_fixed(tmp_path)
    with checkpointer:
        assert checkpointer.resume("auto").step == 2
        for step in (3, 4, 5, 6):
            checkpointer.save(step=step, consumed=step, config_yaml="")
    assert steps_on_disk(tmp_path) == [2, 5, 6]


def test_damaged_checkpoints_do_not_count_among_those_that_are_kept(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, keep=4)
    damage(tmp_path, 3)
    damage(tmp_path, 4)
    save_steps(tmp_path, 5)
    assert steps_on_disk(tmp_path) == [2, 3, 4, 5]
    save_steps(tmp_path, 6)
    assert steps_on_disk(tmp_path) == [5, 6]


def test_the_last_two_verified_and_the_milestones_survive_any_history(quick_path):
    for seed in range(20):
        generator = random.Random(seed)
        run_dir = quick_path / str(seed)
        milestone_every = generator.choice([None, 4])
        good: set[int] = set()
        for step in range(1, 13):
            checkpointer, part = open_fixed(
                run_dir, every=1, keep=generator.choice([2, 3]), milestone_every=milestone_every
            )
            with checkpointer:
                part.fill(step)
                checkpointer.save(step=step, consumed=step, config_yaml="")
            good.add(step)
            assert set(sorted(good)[-2:]) <= set(steps_on_disk(run_dir))
            if milestone_every:
                assert {s for s in good if s % 4 == 0} <= set(steps_on_disk(run_dir))
            if generator.random() < 0.3:
                victim = generator.choice(steps_on_disk(run_dir))
                damage(run_dir, victim)
                good.discard(victim)
            good &= set(steps_on_disk(run_dir))


def test_no_checkpoint_is_deleted_by_a_save_that_failed(tmp_path):
    save_steps(tmp_path, 1, 2)
    checkpointer, part = open_fixed(tmp_path)
    part.fill(float("nan"))
    with checkpointer, pytest.raises(Exception, match="NaN"):
        checkpointer.save(step=3, consumed=3, config_yaml="")
    assert steps_on_disk(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"every": 0}, "checkpoint.every=0 must be at least 1"),
        ({"keep": 1}, "checkpoint.keep=1 must be at least 2"),
        ({"every": 10, "milestone_every": 15}, "checkpoint.milestone_every=15 must be null or a multiple of"),
        ({"milestone_every": 0}, "checkpoint.milestone_every=0"),
    ],
)
def test_values_out_of_range_are_rejected(values, message):
    with pytest.raises(UserError, match=message):
        CheckpointConfig(**values)


def test_the_config_is_typed():
    from omegaconf import OmegaConf
    from omegaconf.errors import ValidationError

    config = OmegaConf.structured(CheckpointConfig)
    config.milestone_every = 2000
    assert OmegaConf.to_object(config) == CheckpointConfig(milestone_every=2000)
    with pytest.raises(ValidationError):
        config.every = "often"


def save_scored(run_dir, scores, *, best="val/acc1", **config):
    """Save after steps 1, 2, … whose evaluations gave `scores`; return the steps that were best in their time."""
    checkpointer, part = open_fixed(run_dir, best=best, **config)
    winners = []
    with checkpointer:
        for step, value in enumerate(scores, start=1):
            part.fill(step)
            if checkpointer.is_best({best.removeprefix("-"): value}, step=step):
                winners.append(step)
            checkpointer.save(step=step, consumed=step, config_yaml="")
    return winners


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_best_by_a_metric_stays_and_is_named(tmp_path, asynchronous):
    assert save_scored(tmp_path, [0.1, 0.7, 0.3, float("nan"), 0.5], asynchronous=asynchronous) == [1, 2]
    assert steps_on_disk(tmp_path) == [2, 4, 5]
    assert step_of(best_checkpoint(tmp_path)) == 2


def test_a_leading_minus_makes_the_smallest_best(tmp_path):
    assert save_scored(tmp_path, [5.0, 2.0, 3.0, 4.0], best="-val/median_rank") == [1, 2]
    assert step_of(best_checkpoint(tmp_path)) == 2


def test_a_later_attempt_must_beat_the_best_of_the_former(tmp_path):
    save_scored(tmp_path, [0.9])
    checkpointer, _ = open_fixed(tmp_path, best="val/acc1")
    with checkpointer:
        checkpointer.resume("auto")
        assert not checkpointer.is_best({"val/acc1": 0.8}, step=2)
        assert checkpointer.is_best({"val/acc1": 0.95}, step=3)
    assert step_of(best_checkpoint(tmp_path)) == 1, "only a checkpoint that stands is best"


def test_a_run_without_a_best_says_how_to_get_one(tmp_path):
    save_steps(tmp_path, 1)
    with pytest.raises(UserError, match=r"no best checkpoint.*checkpoint.best=EVALUATION/METRIC"):
        best_checkpoint(tmp_path)


def test_the_last_checkpoint_that_training_went_on_from_in_good_health_stays(tmp_path):
    checkpointer, part = open_fixed(tmp_path)
    seen = []
    with checkpointer:
        for step, healthy in enumerate([True, True, True, False, False, False, True], start=1):
            part.fill(step)
            checkpointer.save(step=step, consumed=step, config_yaml="", healthy=healthy)
            good = read_last_good(tmp_path)
            seen.append(good and step_of(good))
    assert seen == [None, 1, 2, 2, 2, 2, 6]
    assert steps_on_disk(tmp_path) == [6, 7]


def test_a_resumed_run_makes_its_start_the_last_good_one_at_its_first_healthy_save(tmp_path):
    save_steps(tmp_path, 1, 2)
    checkpointer, _ = open_fixed(tmp_path)
    with checkpointer:
        checkpointer.resume("auto")
        checkpointer.save(step=3, consumed=3, config_yaml="", healthy=False)
        assert step_of(read_last_good(tmp_path)) == 1
        checkpointer.resume("auto")
        checkpointer.save(step=4, consumed=4, config_yaml="")
    assert step_of(read_last_good(tmp_path)) == 3


def test_a_damaged_note_of_the_last_good_one_is_named_and_costs_no_checkpoint(tmp_path):
    lines = []
    save_steps(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "last_good.json").write_text("{")
    checkpointer, _ = open_fixed(tmp_path, lines=lines)
    with checkpointer:
        checkpointer.save(step=3, consumed=3, config_yaml="", healthy=False)
    assert "last_good.json: unreadable" in lines[0]
    assert steps_on_disk(tmp_path) == [1, 2, 3]


def test_a_run_that_starts_afresh_leaves_the_notes_of_the_former_line_behind(tmp_path):
    save_scored(tmp_path, [0.1, 0.9, 0.5])
    checkpointer, _ = open_fixed(tmp_path, best="val/acc1")
    with checkpointer:
        assert checkpointer.resume("never") is None
        assert checkpointer.is_best({"val/acc1": 0.2}, step=2), "the former line's 0.9 counts no more"
        checkpointer.save(step=2, consumed=2, config_yaml="")
    assert step_of(best_checkpoint(tmp_path)) == 2
    assert read_last_good(tmp_path) is None
    aside = {path.name for path in (tmp_path / "checkpoints" / "set-aside-1").iterdir()}
    assert aside == {"step-00000002", "step-00000003", "best.json", "last_good.json"}
