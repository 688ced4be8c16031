"""Make the model of a run: random weights or those of `model.init`, then what is locked and what is adapted."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.checkpoint.retention import list_checkpoints
from clip_train.config import flatten
from clip_train.distributed.agree import on_main
from clip_train.distributed.parallel import SCALARS
from clip_train.errors import UserError, first_of, writing
from clip_train.interop.folders import Source
from clip_train.interop.load import read_source
from clip_train.metrics.panel import say
from clip_train.model.finetune import prepare
from clip_train.model.positions import resize_positions

if TYPE_CHECKING:
    from torch import Tensor

    from clip_train.distributed.world import World
    from clip_train.model.clip import CLIP
    from clip_train.model.config import ModelConfig
    from clip_train.schema import TrainConfig
    from clip_train.tokenizer.base import Tokenizer

RECORD_NAME = "initial_weights.txt"
# What may differ between the weights' model and the run's: how it trains and is computed, what shapes tell anyhow, and
# the tokenizer's facts. Anything else would change what the weights compute without a word.
_MAY_DIFFER = (
    "name", "embed_dim", "init", "init_strict", "init_logit_scale", "init_logit_bias", "lora", "matryoshka", "ragged",
    "patch_dropout", "checkpointing", "compile", "vision.image_size", "vision.patch_size", "vision.width",
    "vision.layers", "vision.resnet_stages", "vision.mlp_ratio", "vision.layer_scale", "vision.unlocked_blocks",
    "vision.cache_features", "vision.pretrained", "text.context_length", "text.vocab_size", "text.end_id",
    "text.pad_id", "text.width", "text.layers", "text.mlp_ratio", "text.unlocked_blocks",
)  # fmt: skip


def build_model(config: TrainConfig, *, world: World, tokenizer: Tokenizer) -> CLIP:
    """Return the run's model on its device, ready to be wrapped. Every rank calls this; rank 0 reads weights.

    The others get rank 0's weights when the model is spread over the ranks. A run that has a checkpoint will load it,
    so nothing is read for it: its source may be gone.

    Raises:
        UserError: `model.init` does not fit the run's model, timm's weights cannot be had, or locks and adapters do
            not fit the model.
    """
    model = config.model.build(seed=config.seed)
    starts = config.model.init is not None or config.model.vision.pretrained
    will_resume = starts and on_main(lambda: _will_resume(config), world=world)
    if config.model.vision.pretrained and not will_resume:
        on_main(model.load_timm_weights, world=world)
    if config.model.init is not None and not will_resume:
        lines = on_main(lambda: initialise(model, init=str(config.model.init), tokenizer=tokenizer), world=world)
        if world.is_main:
            say("\n".join(lines))
            _record(lines, run_dir=Path(config.run_dir))
    prepare(model, seed=config.seed)
    return model.to(world.device)


def _record(lines: list[str], *, run_dir: Path) -> None:
    """Keep what became of the initial weights: of a hub's name, the path tells the commit."""
    with writing(f"run_dir={run_dir}"):
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / RECORD_NAME).write_text("\n".join([*lines, ""]), encoding="utf-8")


def initialise(model: CLIP, *, init: str, tokenizer: Tokenizer) -> list[str]:
    """Give the model the weights of `init` where they fit, and return what became of them, a line each.

    Position tables are interpolated to the model's image size and context.

    Raises:
        UserError: `init` is not there; or with `model.init_strict`, weights are missing, left over or of another shape,
            or belong to a model that computes differently. The first ten names of each are listed.
        IntegrityError: a checkpoint is damaged.
    """
    config = model.config
    source = read_source(init, architecture=config.name)
    different = differences(source.config, config)
    if source.tokenizer is not None and source.tokenizer.files() != tokenizer.files():
        different.append("tokenizer: another vocabulary, in which the same ids are other words")
    if different and config.init_strict:
        raise UserError(
            f"model.init={init}: the weights belong to a model that computes differently: {'; '.join(different)}. "
            "Set these keys to what the weights need, or model.init_strict=false"
        )
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in source.tensors.items()}
    for name in SCALARS:
        if name in tensors and tensors[name].numel() == 1:
            tensors[name] = tensors[name].reshape(())  # some files hold [1]
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    resized = resize_positions(tensors, expected=expected)
    misfits = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "of another shape": [
            f"{name} {list(tensors[name].shape)}, not {list(expected[name])}"
            for name in sorted(expected.keys() & tensors.keys())
            if tensors[name].shape != expected[name]
        ],
    }
    if config.init_strict and any(misfits.values()):
        listed = "; ".join(f"{len(names)} {kind}: {first_of(names)}" for kind, names in misfits.items() if names)
        raise UserError(
            f"model.init={init} does not fit {config.name}: {listed}. model.init_strict=false loads what fits and "
            "leaves the rest as drawn"
        )
    fitting = {name: t for name, t in tensors.items() if name in expected and t.shape == expected[name]}
    model.load_state_dict(fitting, strict=False)
    return _table(source, fitting, resized=resized, misfits=misfits, different=different)


def differences(theirs: ModelConfig, ours: ModelConfig) -> list[str]:
    """Return `model.KEY=VALUE, not VALUE` for what two models compute differently and no shape shows."""
    before, after = flatten(asdict(theirs)), flatten(asdict(ours))
    return [
        f"model.{key}={_plain(before[key])} there, {_plain(value)} here"
        for key, value in after.items()
        if before[key] != value and not key.startswith(_MAY_DIFFER)
    ]


def _table(
    source: Source, fitting: dict[str, Tensor], *, resized: list[str], misfits: dict[str, list[str]],
    different: list[str],
) -> list[str]:  # fmt: skip
    count = sum(tensor.numel() for tensor in fitting.values())
    lines = [
        f"starting from {source.origin} ({source.config.name})",
        f"  {'loaded':<18}{len(fitting)} tensors, {count:,} values",
    ]
    lines += [f"  {'interpolated':<18}{line}" for line in resized]
    fates = {"missing": "as drawn", "unexpected": "not used", "of another shape": "as drawn"}
    lines += [f"  {kind:<18}{len(names)}, {fates[kind]}: {first_of(names)}" for kind, names in misfits.items() if names]
    return lines + [f"  {'differs':<18}{line}" for line in different]


def _will_resume(config: TrainConfig) -> bool:
    if config.resume in ("auto", "never"):
        return config.resume == "auto" and bool(list_checkpoints(Path(config.run_dir)))
    return True


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
