"""Any number of ranks gives the scores of one, on sets that they cannot share evenly."""

from functools import partial

import numpy as np
import pytest

from tests.evaluation.calibrate import test_calibrate
from tests.evaluation.choose import test_choose
from tests.evaluation.classify import test_classify
from tests.evaluation.group_audit import test_group_audit
from tests.evaluation.reject import test_reject
from tests.evaluation.retrieve import test_retrieve
from tests.evaluation.scorecard import test_scorecard
from tests.evaluation.toys import ToyModel
from tests.gloo import run_on_ranks


def _evaluate(world, sizes):
    results = []
    for num_images in sizes:
        kinds = [
            test_classify.make,
            test_classify.make_several,
            test_retrieve.make,
            partial(test_retrieve.make, most_captions=1),
            test_group_audit.make,
            test_reject.make,
            test_calibrate.make,
            test_calibrate.make_pairs,
            *(partial(test_choose.make, kind=k) for k in test_choose.KINDS),
        ]
        evaluators = [make(num_images, world=world)[0] for make in kinds]
        asked = [(one, ToyModel()) for one in [*evaluators, test_scorecard.make(24, world=world)]]
        asked.append((test_calibrate.make(num_images, world=world)[0], ToyModel(logit_bias=-4.0)))
        for evaluator, model in asked:
            result = evaluator.evaluate(model)
            measured = result.metrics | ({} if result.loss is None else {"loss": result.loss})
            results.append((measured, result.intervals, result.collapsed, result.warnings, result.predictions))
    return results


def assert_ranks_agree_with_one_process(sizes, *, world_size):
    from clip_train.distributed.world import World

    alone = _evaluate(World(), sizes)
    for of_rank in run_on_ranks(_evaluate, sizes, world_size=world_size):
        for (metrics, *scores, predictions), (expected_metrics, *expected_scores, expected) in zip(
            of_rank, alone, strict=True
        ):
            assert metrics == pytest.approx(expected_metrics, abs=1e-6)  # far below one picture more or less
            assert scores == expected_scores
            for name, values in expected.items():
                if values.dtype.kind == "f":
                    np.testing.assert_allclose(predictions[name], values, atol=1e-6)
                else:
                    np.testing.assert_array_equal(predictions[name], values)


def test_two_ranks_give_the_scores_of_one():
    assert_ranks_agree_with_one_process([37, 10], world_size=2)


@pytest.mark.slow
def test_three_ranks_give_the_scores_of_one_even_if_one_has_no_image():
    assert_ranks_agree_with_one_process([10, 37], world_size=3)
