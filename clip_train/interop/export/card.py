"""The model card: what the weights are, what has been measured, and how each library loads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from clip_train import __version__
from clip_train.calibration import RejectScore
from clip_train.interop.export.targets import Target, known_differences
from clip_train.interop.export.verify import Check, table

if TYPE_CHECKING:
    from clip_train.calibration import Calibration
    from clip_train.model.config import ModelConfig

DIAGRAM_FILE = "calibration.svg"
RECIPE_KEYS = (
    "global_batch_size", "steps", "samples", "epochs", "precision", "loss.name", "optim.name", "optim.lr",
    "optim.warmup", "optim.schedule", "optim.weight_decay", "optim.ema_decay", "model.init", "seed",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CardScore:
    """One row of the card's table of metrics, in the words it is shown with."""

    evaluation: str
    metric: str
    value: str
    interval: str
    chance: str
    num_items: str
    verdict: str = ""
    """What the score means; only a scorecard's have one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What is known of the weights besides their values."""

    name: str
    origin: str
    """The run and its step, or the name of the file."""
    weights: str
    """`ema`, `raw`, `best` or `auto`."""
    run_config: Mapping[str, Any] | None = None
    """The training config, None for weights that came without."""
    data: Mapping[str, str] = field(default_factory=dict)
    """What the run knows of its training data, by name."""
    cost: Mapping[str, str] = field(default_factory=dict)
    """Hours of each kind of device that the run took."""
    scores: Sequence[CardScore] = field(default_factory=list)
    """Of exactly these weights."""


def model_card(
    provenance: Provenance,
    *,
    config: ModelConfig,
    folder: str,
    served: Sequence[Target],
    refused: Mapping[Target, Sequence[str]],
    checks: Sequence[Check],
    calibration: Calibration | None = None,
    adapter: str | None = None,
    logit_scale: float | None = None,
) -> str:
    """Return the text of README.md. What nobody measured reads "not measured".

    Args:
        provenance: of the weights.
        config: the architecture.
        folder: the export's name, for the snippets.
        served: the libraries that have files.
        refused: those that have none, with the reason.
        checks: the verification; empty if there was none.
        calibration: what was measured of the confidence of these weights; its diagram is `DIAGRAM_FILE`.
        adapter: folder with the adapters in peft's format, None without any.
        logit_scale: the temperature's logarithm, which trains with adapters and is not among them.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    run = provenance.run_config or {}
    length = config.text.context_length
    return environment.get_template("card.md.j2").render(
        name=provenance.name,
        config=config,
        version=__version__,
        origin=provenance.origin,
        weights=provenance.weights,
        architecture=_architecture(config),
        data=provenance.data,
        started_from=_select(run, "model.init"),
        cost=provenance.cost,
        audits=sorted({score.evaluation for score in provenance.scores if "_worst_" in score.metric}),
        recipe=[(key, value) for key in RECIPE_KEYS if (value := _select(run, key)) is not None],
        scores=[score for score in provenance.scores if not score.verdict],
        pitfalls=[score for score in provenance.scores if score.verdict],
        calibration=calibration,
        adapter=adapter,
        logit_scale=logit_scale,
        diagram=DIAGRAM_FILE,
        main_score=RejectScore.max_cosine,
        folder=folder,
        served=[target.value for target in served],
        family="CLIP" if config.vision.timm is None else "Siglip",
        padding='"max_length"' if config.text.sees_padding else "True",
        context="" if length == 77 else f", context_length={length}",
        verification=table(checks) if checks else None,
        refused=[(target, "; ".join(reasons)) for target, reasons in refused.items()],
        differences=[
            (target, text)
            for target in served
            for text in known_differences(target, sees_padding=config.text.sees_padding)
        ],
    )


def _architecture(config: ModelConfig) -> list[tuple[str, str]]:
    vision, text = config.vision, config.text
    tower = f"ViT, {vision.layers} blocks of width {vision.width}, patches of {vision.patch_size} pixels"
    if vision.timm is not None:
        tower = f"timm's `{vision.timm}`"
    elif vision.resnet_stages:
        tower = f"ResNet, stages {'-'.join(str(n) for n in vision.resnet_stages)} from width {vision.width}"
    return [
        ("architecture", config.name),
        ("pictures", f"{vision.image_size} × {vision.image_size} pixels"),
        ("image tower", tower),
        ("text tower", f"{text.layers} blocks of width {text.width}, {text.context_length} tokens"),
        ("vocabulary", f"{text.vocab_size:,} ids"),
        ("activation", "QuickGELU" if config.quick_gelu else "GELU"),
    ]


def _select(values: Mapping[str, Any], key: str) -> Any:
    found: Any = values
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found
