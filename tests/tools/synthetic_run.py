"""A run directory made of invented numbers and drawings, for tests of the report and for looking at it."""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from clip_train.evaluation.classify.evaluator import score
from clip_train.evaluation.result import EvaluationResult, write_result
from clip_train.evaluation.samples import PictureAnswers, ReportSamples, save_samples

COLOURS = {"red": "#d24b3e", "blue": "#3b6fc4", "green": "#3f9a5f", "yellow": "#e2b93b", "purple": "#7b56b3"}
SHAPES = ["circle", "square", "triangle", "bar"]
CONFIG = """\
name: {name}
seed: 0
global_batch_size: 256
run_dir: runs/demo
steps: 2000
precision: fp32
data:
  train: shards/demo/train
  val: shards/demo/val
model:
  name: tiny
loss:
  name: clip
optim:
  name: adamw
  lr: 0.001
  warmup: 100
"""


def write_run(
    run_dir: Path, *, name: str = "demo", steps: int = 2000, caption: str = "", seed: int = 0, results: bool = True
) -> Path:
    """Write config, metrics, and with `results` two evaluations and their pictures.

    `caption` is put into every text.
    """
    rng = np.random.default_rng(seed)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(CONFIG.format(name=json.dumps(name)))
    rows = []
    for step in range(20, steps + 1, 20):
        progress = step / steps
        loss = math.log(256) * (0.25 + 0.75 * math.exp(-5 * progress)) + rng.normal(0, 0.04)
        rows.append(
            {
                "step": step,
                "samples_seen": step * 256,
                "time": 1e9 + step * 0.11,
                "train/loss": loss,
                "train/loss_of_guessing": math.log(256),
                "train/in_batch_recall@1": 0.6 * (1 - math.exp(-4 * progress)),
                "train/logit_scale": 14.3 + 20 * progress**2,
                "train/learning_rate": 1e-3 * min(1, step / 100) * (0.5 + 0.5 * math.cos(math.pi * progress)),
                "perf/samples_per_second": 2300 + rng.normal(0, 40),
                "perf/data_wait": abs(rng.normal(0.02, 0.01)),
                "perf/step_seconds": 0.11,
            }
        )
        if step % 400 == 0:
            rows.append(
                {
                    "step": step,
                    "samples_seen": step * 256,
                    "time": 1e9 + step * 0.11,
                    "shapes/acc1": 0.9 - 0.85 * math.exp(-4 * progress),
                    "val/mean_recall@1": 0.6 - 0.55 * math.exp(-3 * progress),
                    "val/loss": 1.5 + 4 * math.exp(-3 * progress),
                }
            )
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not results:
        return run_dir
    folder = run_dir / "evaluation" / f"step-{steps:08d}"
    _write_classes(folder, rng, caption)
    _write_pairs(folder, rng, caption)
    return run_dir


def draw(colour: str, shape: str, rng: np.random.Generator, *, size: int = 112) -> np.ndarray:
    """Return one drawing, uint8 [size, size, 3]."""
    image = Image.new("RGB", (size, size), "#f6f3ec")
    pen = ImageDraw.Draw(image)
    r = int(rng.integers(size // 6, size // 3))
    x, y = (int(v) for v in rng.integers(r, size - r, 2))
    fill = COLOURS[colour]
    if shape == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], fill=fill)
    elif shape == "square":
        pen.rectangle([x - r, y - r, x + r, y + r], fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    else:
        pen.rectangle([x - r, y - r // 3, x + r, y + r // 3], fill=fill)
    return np.asarray(image)


def _write_classes(folder: Path, rng: np.random.Generator, caption: str) -> None:
    names = [f"{colour} {shape}{caption}" for colour in COLOURS for shape in SHAPES]
    labels = np.arange(400) % len(names)
    top = np.stack([rng.permutation([label, *rng.choice(len(names), 4)]) for label in labels])
    top[: int(0.87 * len(labels)), 0] = labels[: int(0.87 * len(labels))]
    write_result(score(labels, top, num_classes=len(names)), folder / "shapes.json", dataset="shapes", model="tiny")
    pictures, answers = [], []
    for i in range(24):
        colour, shape = list(COLOURS)[i % 5], SHAPES[i % 4]
        others = [n for n in rng.permutation(names) if n != f"{colour} {shape}{caption}"][:4]
        right = i % 7 != 3
        truth = f"{colour} {shape}{caption}"
        pictures.append(draw(colour, shape, rng))
        answers.append(
            PictureAnswers(
                truth=[truth],
                answers=[truth, *others] if right else [others[0], truth, *others[1:]],
                cosines=sorted(rng.uniform(0.1, 0.5, 5).round(4).tolist(), reverse=True),
                right=right,
            )
        )
    samples = ReportSamples(
        pictures=np.stack(pictures),
        answers=answers,
        pair_pictures=np.zeros((0, 112, 112, 3), np.uint8),
        pair_cosines=np.zeros((0, 0), np.float32),
    )
    save_samples(samples, folder / "shapes.samples.json")


def _write_pairs(folder: Path, rng: np.random.Generator, caption: str) -> None:
    kinds = [(c, s) for c in COLOURS for s in SHAPES][:16]
    words = ["a large {} {} near the left edge of a plain page", "one small {} {}", "a striped {} {} above the middle"]
    captions = [words[i % 3].format(*kind) + caption for i, kind in enumerate(kinds)]
    cosines = 0.1 + 0.08 * rng.standard_normal((16, 16))
    for i, (colour, shape) in enumerate(kinds):
        for j, (other_colour, other_shape) in enumerate(kinds):
            cosines[i, j] += 0.15 * (colour == other_colour) + 0.15 * (shape == other_shape)
    pictures = np.stack([draw(c, s, rng) for c, s in kinds])
    answers = [
        PictureAnswers(
            truth=[captions[i]],
            answers=[captions[j] for j in np.argsort(-cosines[i])[:5]],
            cosines=[round(float(v), 4) for v in np.sort(cosines[i])[::-1][:5]],
            right=bool(cosines[i].argmax() == i),
        )
        for i in range(16)
    ]
    result = EvaluationResult(
        task="zeroshot_retrieval",
        num_items=1000,
        metrics={
            "image_retrieval_recall@1": 0.512,
            "text_retrieval_recall@1": 0.534,
            "image_retrieval_recall@5": 0.871,
            "text_retrieval_recall@5": 0.88,
            "mean_recall@1": 0.523,
        },
        chance={
            "image_retrieval_recall@1": 0.001,
            "text_retrieval_recall@1": 0.001,
            "image_retrieval_recall@5": 0.005,
            "text_retrieval_recall@5": 0.005,
            "mean_recall@1": 0.001,
        },
        intervals={"image_retrieval_recall@1": (0.481, 0.543), "text_retrieval_recall@1": (0.503, 0.565)},
        warnings=["12 captions are shared by several pictures"],
    )
    write_result(result, folder / "val.json", dataset="val", model="tiny")
    samples = ReportSamples(
        pictures=pictures,
        answers=answers,
        pair_pictures=pictures,
        pair_captions=captions,
        pair_cosines=cosines.astype(np.float32),
    )
    save_samples(samples, folder / "val.samples.json")
