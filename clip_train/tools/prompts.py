"""Find prompt templates that suit a model and a labelled set, and say honestly what they gain."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_train.data.sequential import evaluation_batches
from clip_train.distributed.world import World
from clip_train.errors import UserError, writing
from clip_train.evaluation.classify.labelled_images import open_labelled_images
from clip_train.evaluation.collapse import collapsed_tower
from clip_train.evaluation.draw import held_out
from clip_train.evaluation.features import encode_all_images, evaluating
from clip_train.evaluation.prompts.files import load_templates
from clip_train.evaluation.prompts.lab import PromptLab, choose_ensemble, encode_templates, paired_gain

if TYPE_CHECKING:
    from clip_train.evaluation.classify.labelled_images import LabelledImages
    from clip_train.interop.loaded_model import LoadedModel

BATCH_SIZE = 128
SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Ensemble:
    """Some templates and what they are worth on both halves of the images."""

    what: str
    templates: list[str]
    chosen_on: float
    """Accuracy on the half that the templates were chosen on."""
    held_out: float
    """Accuracy on the other half, which nothing was chosen on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReport:
    """What was found."""

    chosen: Ensemble
    others: list[Ensemble]
    """All templates together, then single ones, best first."""
    gain: float
    """Of the chosen over all together, on the held-out images."""
    gain_interval: tuple[float, float]
    num_held_out: int
    seconds_encoding: float
    milliseconds_per_template: float

    def lines(self) -> list[str]:
        """Return the report for a person."""
        rows = [self.chosen, *self.others[: SHOWN + 1]]
        width = max(len(row.what) for row in rows)
        low, high = self.gain_interval
        verdict = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
        return [
            f"{'accuracy %':<{width}}  chosen on  held out",
            *(f"{row.what:<{width}}  {100 * row.chosen_on:>9.2f}  {100 * row.held_out:>8.2f}" for row in rows),
            "",
            f"on {self.num_held_out:,} held-out pictures the chosen templates gain {100 * self.gain:+.2f} points over "
            f"all together (95 % interval {100 * low:+.2f} to {100 * high:+.2f}): {verdict}",
            f"features took {self.seconds_encoding:.1f} s, an ensemble {self.milliseconds_per_template:.1f} ms",
        ]


def prompts_command(
    model: str,
    images: Path,
    *,
    split: str,
    templates: str,
    classnames: str,
    most: int,
    name: str | None,
    out: Path | None,
) -> list[str]:
    """Choose templates for a set, write them to a file, and return what to print.

    Args:
        model: a run directory or anything that `clip_train.load` takes.
        images: a labelled set, as `evaluation.classify.root`.
        split: part of it.
        templates: candidates: `imagenet`, `simple`, `single` or a file.
        classnames: as `evaluation.classify.classnames`.
        most: templates to choose.
        name: of the file in RUN/prompts/; the set's own if None.
        out: the file, instead of one in the run.

    Raises:
        UserError: the set does not suit, the model has collapsed, or there is no place for the file.
    """
    import clip_train

    run = Path(model).expanduser()
    if out is None and not (run / "checkpoints").is_dir():
        raise UserError(f"{model} is not a run directory: say where the templates go with --out FILE")
    if most < 1:
        raise UserError(f"--most={most} must be at least 1")
    path = out or run / "prompts" / f"{name or images.expanduser().resolve().name}.txt"
    candidates = load_templates(templates)
    labelled = open_labelled_images(str(images), split=split, classnames=classnames, templates=templates)
    if labelled.multilabel:
        raise UserError(f"{images}: pictures with several classes have no accuracy to choose templates by")
    _make_place(path)
    loaded, _ = clip_train.load(model)
    report = explore(loaded, labelled, candidates=candidates, most=most)
    with writing(path):
        path.write_text("\n".join(report.chosen.templates) + "\n", encoding="utf-8")
        path.with_suffix(".json").write_text(json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n", "utf-8")
    return [*report.lines(), f"{path}: use it as evaluation.NAME.templates={path} or with classify --templates"]


def _make_place(path: Path) -> None:
    """Make the folder of a file that is written after a long computation."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file in it")


def explore(model: LoadedModel, images: LabelledImages, *, candidates: list[str], most: int) -> PromptReport:
    """Choose at most `most` of the candidate templates on one half of the images and judge them on the other.

    Raises:
        UserError: the model has collapsed, or there are too few images to hold some out.
    """
    started = time.monotonic()
    world = World(device=model.logit_scale.device)
    with evaluating(model, world=world, precision="auto"):
        features = encode_all_images(
            model,
            lambda: evaluation_batches(
                images.source, world=world, image_size=model.config.vision.image_size, squash=model.config.squash,
                batch_size=BATCH_SIZE,
            ),
            num_images=len(images.source),
            world=world,
        )  # fmt: skip
        vectors, first_class = encode_templates(
            model, tokenizer=model.tokenize, classnames=images.classnames, templates=candidates, world=world
        )
    if reason := collapsed_tower(image=features, text=vectors.flatten(0, 1)):
        raise UserError(f"the model has collapsed, so no template is better than another: {reason}")
    lab = PromptLab(
        image_features=features, labels=images.labels, template_vectors=vectors, first_class=first_class
    )  # fmt: skip
    judged = held_out(images.labels, share=0.5)
    if not judged.any() or judged.all():
        raise UserError("no class has two pictures, so that one could be held out")
    encoded = time.monotonic()
    singles = [(lab.accuracy([t], ~judged), lab.accuracy([t], judged), t) for t in range(len(candidates))]
    per_template = (time.monotonic() - encoded) / (2 * len(candidates))
    chosen = choose_ensemble(lab, ~judged, most=most)
    every = list(range(len(candidates)))
    gain, interval = paired_gain(lab.hits(chosen, judged), lab.hits(every, judged))
    return PromptReport(
        chosen=_ensemble(lab, chosen, f"chosen: {len(chosen)}", candidates, judged),
        others=[
            _ensemble(lab, every, f"all {len(candidates)} together", candidates, judged),
            *(
                Ensemble(what=candidates[t], templates=[candidates[t]], chosen_on=first, held_out=second)
                for first, second, t in sorted(singles, key=lambda row: (-row[0], row[2]))
            ),
        ],
        gain=gain,
        gain_interval=interval,
        num_held_out=int(judged.sum()),
        seconds_encoding=encoded - started,
        milliseconds_per_template=1000 * per_template,
    )


def _ensemble(lab: PromptLab, chosen: list[int], what: str, candidates: list[str], judged: np.ndarray) -> Ensemble:
    return Ensemble(
        what=what,
        templates=[candidates[t] for t in chosen],
        chosen_on=lab.accuracy(chosen, ~judged),
        held_out=lab.accuracy(chosen, judged),
    )
