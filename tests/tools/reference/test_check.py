"""Public tools confirm our numbers, on random weights and on a trained model; and the comparison itself can fail."""

import csv
import json
import math

import pytest
import torch
from torch.nn import functional as F

from clip_train.config import load
from clip_train.data.sequential import evaluation_batches
from clip_train.distributed.world import World
from clip_train.errors import UserError
from clip_train.evaluation.classify.labelled_images import open_labelled_images
from clip_train.interop.export.targets import Target
from clip_train.interop.export.verify import find_libraries
from clip_train.tokenizer.bpe import ClipTokenizer
from clip_train.tools.reference.check import Comparison, check_reference, compare, table
from clip_train.tools.reference.sets import CLASSES, write_sets
from tests.interop import files
from tests.interop.export.test_export import PYTHONS
from tests.interop.export.test_refuse import EVERYWHERE


@pytest.fixture(scope="module")
def python():
    found = find_libraries(PYTHONS)
    if Target.clip_benchmark not in found:
        pytest.skip("CLIP_TRAIN_VERIFY_PYTHONS names no Python with clip-benchmark")
    return found[Target.clip_benchmark][0]


def fit(model, folder, *, steps=120):
    """Train on the very pictures that are evaluated, so that the scores lie far from chance."""
    with torch.no_grad():
        model.token_embedding.weight.mul_(30)  # from initial weights, captions are alike for hundreds of steps
    images = open_labelled_images(str(write_sets(folder)["shapes"]), split="test", classnames="auto", templates="auto")
    (batch,) = evaluation_batches(images.source, world=World(), image_size=32, batch_size=len(images.source))
    tokens = ClipTokenizer()([f"a {combination.class_name}" for combination in CLASSES])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        logits = 20 * model.encode_image(batch.images) @ model.encode_text(tokens).T
        loss = F.cross_entropy(logits, torch.from_numpy(images.labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def confirm(source, python, out, **reference):
    options = [f"reference.{key}={value}" for key, value in reference.items()]
    return check_reference(
        load("evaluate", [f"checkpoint={source}", f"output={out}", f"reference.python={python}", *options])
    )


@pytest.mark.slow
def test_clip_benchmark_and_open_clip_confirm_random_weights(tmp_path, python, capsys):
    source = files.write_open_clip_folder(files.small_model(**EVERYWHERE), tmp_path / "model")
    assert confirm(source, python, tmp_path / "out", imagenet=True) == 0
    shown = capsys.readouterr().out
    assert "18 scores, all equal (limit 1e-06)" in shown and shown.count("open_clip") == 2
    # Their table takes our files: one row for each of both tools' files.
    with (tmp_path / "out" / "benchmark.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert [row["acc5"] for row in rows if row["dataset"] in ("colours", "wds/colours")] == ["", "nan"]


@pytest.mark.slow
def test_clip_benchmark_confirms_a_trained_model(tmp_path, python, capsys):
    model = fit(files.small_model(**EVERYWHERE), tmp_path / "pictures").eval()
    source = files.write_open_clip_folder(model, tmp_path / "model")
    assert confirm(source, python, tmp_path / "out") == 0
    assert "13 scores, all equal" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "shapes.json").read_text())["metrics"]
    assert metrics["acc1"] > 0.35  # twice chance


def write(path, **metrics):
    path.write_text(json.dumps({"metrics": metrics}))


def test_a_score_that_differs_or_that_only_one_tool_has_is_told(tmp_path):
    write(tmp_path / "a.json", acc1=0.5, acc5=None, ours_only=1.0)
    write(tmp_path / "a.clip_benchmark.json", acc1=0.500002, acc5=math.nan, theirs_only=0.25)
    rows = compare(tmp_path, names=["a"])
    assert [(row.metric, row.difference) for row in rows] == [
        ("acc1", pytest.approx(2e-6)),
        ("acc5", 0.0),
        ("theirs_only", math.inf),
    ]
    assert table(rows).splitlines()[-1] == "3 scores, 2 differ (limit 1e-06)"
    equal = Comparison(tool="clip-benchmark", dataset="a", metric="acc1", ours=0.5, reference=0.5 + 1e-9)
    assert table([equal]).splitlines()[-1] == "1 scores, all equal (limit 1e-06)"


def test_a_python_without_clip_benchmark_is_refused(tmp_path):
    import sys

    with pytest.raises(UserError, match=r"has no clip-benchmark: pip install clip-benchmark==1\.6\.2"):
        confirm("x", sys.executable, tmp_path)
