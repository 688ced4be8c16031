"""Evaluate a model: during training on the live weights, afterwards on anything that `clip_train.load` takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from clip_train.calibration import (
    CALIBRATION_FILE,
    FEWEST_TO_FIT,
    Calibration,
    Measured,
    rejection_from_json,
    temperature_from_json,
    write_calibration,
)
from clip_train.checkpoint.config import EMA_SUFFIX
from clip_train.checkpoint.retention import is_checkpoint_name, list_checkpoints, step_of
from clip_train.config import from_yaml
from clip_train.distributed.batch_norm import share_statistics
from clip_train.distributed.config import Strategy
from clip_train.distributed.stop import StopReason
from clip_train.distributed.world import World, stop_world
from clip_train.errors import IntegrityError, UserError, writing
from clip_train.evaluation.collapse import NOT_FINITE
from clip_train.evaluation.config import naming
from clip_train.evaluation.features import PrefixEncoder
from clip_train.evaluation.interruptible import Interrupted, InterruptibleEncoder
from clip_train.evaluation.result import read_result, write_result
from clip_train.evaluation.samples import PICTURE_SIZE, save_samples
from clip_train.evaluation.suite import report_suite, require_some
from clip_train.evaluation.table import print_results
from clip_train.interop.weights import weights_sha256
from clip_train.metrics.panel import say
from clip_train.schema import EvaluateConfig, TrainConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from clip_train.evaluation.config import EvaluationConfig
    from clip_train.evaluation.evaluator import Evaluator
    from clip_train.evaluation.features import DualEncoder
    from clip_train.evaluation.result import EvaluationResult
    from clip_train.interop.loaded_model import LoadedModel
    from clip_train.model.clip import CLIP
    from clip_train.model.config import ModelConfig
    from clip_train.optim.ema import Ema
    from clip_train.tokenizer.base import Tokenizer


def run_evaluations(
    evaluators: Mapping[str, Evaluator],
    model: DualEncoder,
    *,
    ema: Ema | None = None,
    world: World,
    out: Path,
    name: str,
    weights: str,
    samples: bool,
    strict: bool = False,
    origin: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, float]:
    """Run every evaluator on all ranks; return metrics and losses as `NAME/metric`. Rank 0 writes and prints results.

    With averaged weights every evaluator runs on these too; their metrics are `NAME_ema/metric`, with files of their
    own: a result belongs to one set of weights.

    Args:
        evaluators: by name.
        model: the towers; left in the mode and with the weights that it came with.
        ema: the averages of the model's weights, None if there are none.
        world: the ranks.
        out: folder that gets NAME.json and NAME.npz.
        name: the model's name, for the files.
        weights: which weights of it, for the files.
        samples: also keep pictures with their answers, for the report; none if the features have collapsed.
        strict: features that are not finite and files that cannot be written are an error; a run in training goes on.
        origin: further values for the files: where the weights are from.

    Raises:
        IntegrityError: with `strict`, naming the evaluation and the first such feature.
        UserError: with `strict`, a result cannot be written.
    """
    results: dict[str, EvaluationResult] = {}

    def run(suffix: str, *, of: str) -> None:
        for key, evaluator in evaluators.items():
            result = results[key + suffix] = evaluator.evaluate(model)
            if world.is_main:
                result.details |= origin
                file = out / f"{key}{suffix}.json"
                try:
                    write_result(result, file, dataset=key, model=name, pretrained=of)
                    if samples and not result.collapsed and (shown := evaluator.samples(result, size=PICTURE_SIZE)):
                        save_samples(shown, file.with_suffix(".samples.json"))
                except OSError as error:  # a full disk does not end a run; its metrics have the scores
                    if strict:
                        raise UserError(f"{file} cannot be written: {error.strerror or error}") from error
                    say(f"{file} cannot be written: {error.strerror or error}")

    run("", of=weights)
    if ema is not None:
        with ema.applied():
            run(EMA_SUFFIX, of=f"{weights}, moving average")
    if world.is_main:
        print_results(results)
    for key, result in results.items():
        if strict and result.collapsed and NOT_FINITE in result.collapsed:
            raise IntegrityError(f"{key}: {result.collapsed}: the weights of {name} are damaged or overflow")
    losses = {f"{key}/loss": result.loss for key, result in results.items() if result.loss is not None}
    return losses | {
        f"{key}/{metric}": value for key, result in results.items() for metric, value in result.metrics.items()
    }


class Evaluations:
    """The evaluations of a run in training, of its live weights and their averages. Every rank makes one.

    Args:
        config: the run's config.
        model: what is trained, unwrapped.
        ema: the averages of its weights, None if there are none.
        tokenizer: the run's own.
        world: the ranks.
        wanted: why this rank should stop.

    Raises:
        UserError: an evaluation set is not there, or `checkpoint.best` is no metric of its evaluation.
    """

    def __init__(
        self, config: TrainConfig, *, model: CLIP, ema: Ema | None, tokenizer: Tokenizer, world: World,
        wanted: Callable[[], StopReason],
    ) -> None:  # fmt: skip
        self._config, self._model, self._ema, self._world, self._wanted = config, model, ema, world, wanted
        self._evaluators = _build(config.evaluation, model=config.model, world=world, tokenizer=tokenizer)
        self._require_best(config.checkpoint.best)

    def run(self, names: Iterable[str], *, step: int, samples: bool) -> tuple[dict[str, float], StopReason]:
        """Run some of them; return every metric as `NAME/metric`, or no metric and why all ranks left amid it.

        Args:
            names: of the evaluations.
            step: updates made.
            samples: also keep pictures with their answers, for the report.
        """
        states = [self._model.state_dict(), *([self._ema.state_dict()] if self._ema else [])]
        share_statistics(self._model, states=states, world=self._world)
        model = InterruptibleEncoder(self._model, wanted=self._wanted, world=self._world)
        sharded = self._config.distributed.strategy is Strategy.fsdp  # its towers know the run's precision only
        try:
            scores = run_evaluations(
                {name: self._evaluators[name] for name in names}, model, ema=self._ema, world=self._world,
                out=Path(self._config.run_dir) / "evaluation" / f"step-{step:08d}", name=self._config.model.name,
                weights=f"{self._config.name}, step {step}", samples=samples,
                origin={"precision": self._config.precision.value} if sharded else {},
            )  # fmt: skip
        except Interrupted as interrupted:
            return {}, interrupted.reason
        return scores, StopReason.none

    def _require_best(self, best: str | None) -> None:
        if best is None:
            return
        name, _, metric = best.removeprefix("-").partition("/")
        evaluator = self._evaluators[name if name in self._evaluators else name.removesuffix(EMA_SUFFIX)]
        known = [*evaluator.metric_names(), *(["loss"] if evaluator.has_loss else [])]
        if metric not in known:
            raise UserError(f"checkpoint.best={best} is not one of {', '.join(f'{name}/{one}' for one in known)}")


def _build(
    evaluations: Mapping[str, EvaluationConfig], *, model: ModelConfig, world: World, tokenizer: Tokenizer
) -> dict[str, Evaluator]:
    built = {}
    for name, one in evaluations.items():
        with naming(name):
            built[name] = one.build(
                world=world, tokenizer=tokenizer, image_size=model.vision.image_size, squash=model.squash
            )
    return built


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Evaluate `config.checkpoint` as `config` says and return every metric as `NAME/metric`.

    Raises:
        UserError: the checkpoint or an evaluation set is not there, or there is nothing to evaluate.
        IntegrityError: they are damaged.
    """
    from clip_train.interop.load import load

    with ExitStack() as stack:
        world = config.distributed.build(device=config.device)
        stack.callback(stop_world)
        model, _ = load(config.checkpoint, device=world.device)
        run = Path(config.checkpoint).expanduser()
        evaluations: dict[str, EvaluationConfig] = dict(config.evaluation)
        if not evaluations and (run / "config.yaml").exists():
            trained: TrainConfig = from_yaml(run / "config.yaml")
            evaluations = trained.evaluation
        if not evaluations:
            raise UserError(f"nothing to evaluate: name evaluations, as in evaluation=[imagenet]; {run} has none")
        missing = require_some(evaluations, suite=config.suite) if config.suite else {}
        present = {name: one for name, one in evaluations.items() if name not in missing}
        evaluators = _build(present, model=model.config, world=world, tokenizer=model.tokenize)
        out = Path(config.output) if config.output else (run / "evaluation" if run.is_dir() else Path())
        encoder: DualEncoder = model
        weights = config.checkpoint
        if config.embed_dim is not None:
            encoder = PrefixEncoder(model, embed_dim=config.embed_dim, full=model.config.embed_dim)
            weights += f", first {config.embed_dim} of {model.config.embed_dim} dimensions"
            out = out if config.output else out / f"embed_dim-{config.embed_dim}"
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)  # what cannot be written is known before hours of work
        origin = _origin(run)
        scores = run_evaluations(
            evaluators, encoder, world=world, out=out, name=config.checkpoint, weights=weights, samples=bool(origin),
            strict=True, origin=origin | {"weights_sha256": weights_sha256(model)},
        )  # fmt: skip
        if world.is_main and config.embed_dim is None and run.is_dir() and not is_checkpoint_name(run.name):
            step = f", step {step_of(checkpoints[0]):,}" if (checkpoints := list_checkpoints(run)) else ""
            results = [out / f"{name}.json" for name in evaluators]
            keep_calibration(results, model=model, folder=run, name=f"{config.checkpoint}{step}")
        if config.suite and world.is_main:
            report_suite(config.suite, evaluations=evaluations, missing=missing, folder=out)
        return scores


def _origin(path: Path) -> dict[str, Any]:
    """Return the step and the kind of the weights that a run or a checkpoint of one stands for; nothing for others."""
    from clip_train.interop.folders import is_average

    checkpoints = [path] if is_checkpoint_name(path.name) and path.is_dir() else list_checkpoints(path)
    if not checkpoints:
        return {}
    average = is_average(checkpoints[0], weights="auto")
    return {"step": step_of(checkpoints[0]), "weights": "ema" if average else "raw"}


def keep_calibration(results: Sequence[Path], *, model: LoadedModel, folder: Path, name: str) -> None:
    """Write what result files say of the model's confidence into `folder`, where `load` finds it with the weights.

    What the folder already has of the same weights stays, if the results do not say it anew or from few pictures.

    Args:
        results: JSON files of evaluations of exactly this model, in float32; the last one that tells something counts.
        model: as loaded.
        folder: a run, an export or another model folder.
        name: what to call the weights.
    """
    temperature, rejection = None, None
    for path in results:
        details = read_result(path).get("clip_train", {})
        if details.get("status") == "ok":
            temperature = temperature_from_json(details["temperature"]) if "temperature" in details else temperature
            rejection = rejection_from_json(details["rejection"]) if "rejection" in details else rejection
    if temperature is None and rejection is None:
        return
    former = model.calibration
    calibration = Calibration(
        weights_sha256=weights_sha256(model),
        model=name,
        temperature=_firmer(temperature, former.temperature if former else None),
        rejection=_firmer(rejection, former.rejection if former else None),
    )
    if former and (calibration.temperature, calibration.rejection) == (former.temperature, former.rejection):
        return
    write_calibration(calibration, folder / CALIBRATION_FILE)
    print(f"kept in {folder / CALIBRATION_FILE}, for `clip-train classify` and exports")


def _firmer(found: Measured | None, former: Measured | None) -> Measured | None:
    """Return what was found, or the former one if that rests on pictures enough and the new one does not."""
    if found is None or former is None or not found.num_fitted < FEWEST_TO_FIT <= former.num_fitted:
        return found or former
    print(
        f"not kept: it rests on {found.num_fitted} pictures of {found.data} only, and the former one on "
        f"{former.num_fitted} of {former.data}"
    )
    return former


def keep_calibration_of_training(run_dir: Path, *, names: Iterable[str]) -> None:
    """Do the same with the evaluations after the last step of a run, if they tell something.

    Args:
        run_dir: the run.
        names: its evaluations.
    """
    from clip_train.interop.folders import is_average
    from clip_train.interop.load import load

    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        return
    newest = checkpoints[0]
    suffix = EMA_SUFFIX if is_average(newest, weights="auto") else ""
    folder = run_dir / "evaluation" / newest.name
    results = [path for name in names if (path := folder / f"{name}{suffix}.json").is_file()]
    details = [read_result(path).get("clip_train", {}) for path in results]
    if any("temperature" in one or "rejection" in one for one in details):
        model, _ = load(newest, device="cpu")
        keep_calibration(results, model=model, folder=run_dir, name=f"{run_dir.name}, step {step_of(newest):,}")
