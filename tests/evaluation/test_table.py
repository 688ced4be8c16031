"""What a person reads after an evaluation."""

import io

import numpy as np
from rich.console import Console

from clip_train.evaluation.classify.evaluator import score
from clip_train.evaluation.table import print_results


def printed(results):
    console = Console(file=io.StringIO(), width=110)
    print_results(results, console=console)
    return console.file.getvalue()


def test_every_score_stands_beside_its_interval_chance_and_n():
    labels = np.arange(200) % 8
    top = (labels[:, None] + np.arange(5)) % 8
    top[:50, 0] = (labels[:50] + 7) % 8
    text = printed({"shapes": score(labels, top, num_classes=8)})
    row = next(line.split() for line in text.splitlines() if "acc1" in line)
    assert row == ["shapes", "acc1", "75.00", "68.57", "–", "80.49", "12.50", "200"]
    assert "62.50" in next(line for line in text.splitlines() if "acc5" in line)


def test_a_collapsed_result_has_a_reason_and_no_score():
    result = score(np.array([0, 1]), np.array([[0, 1], [0, 1]]), num_classes=2)
    result.collapsed, result.metrics = "mean cosine between image features is 1.0000", {}
    text = printed({"shapes": result})
    assert "collapsed" in text
    assert "mean cosine between image features is 1.0000" in text
    assert "50.00" not in text
