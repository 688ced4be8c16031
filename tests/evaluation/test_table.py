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


def test_a_scorecard_has_a_table_of_its_own_with_verdicts():
    labels = np.arange(200) % 8
    plain, judged = (score(labels, labels[:, None] + np.arange(5), num_classes=12) for _ in range(2))
    judged.verdicts = {metric: f"pitfall: {metric}" for metric in judged.metrics}
    judged.notes = ["what else"]
    text = printed({"shapes": plain, "card": judged})
    first, second = (part.splitlines() for part in text.split(" verdict"))
    assert any(line.startswith("shapes") for line in first) and not any("pitfall" in line for line in first)
    assert second[1].startswith("card") and second[1].rstrip().endswith("pitfall: acc1")
    assert "card: what else" in second
