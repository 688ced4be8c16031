"""Export a model for other libraries, and prove that they compute the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from clip_train.calibration import CALIBRATION_FILE, latest, read_calibration
from clip_train.errors import UserError
from clip_train.evaluation.classify.config import ClassifyConfig
from clip_train.evaluation.classify.evaluator import Classify
from clip_train.evaluation.classify.scores import score
from clip_train.evaluation.config import Precision
from clip_train.interop.export.adapter import ADAPTER_FOLDER, write_adapter
from clip_train.interop.export.card import DIAGRAM_FILE, model_card
from clip_train.interop.export.inputs import write_labelled
from clip_train.interop.export.onnx_graphs import missing_packages
from clip_train.interop.export.publish import CARD_FILE, check_replaceable, staged
from clip_train.interop.export.push import push as push_to_hub
from clip_train.interop.export.record import write_record, write_report
from clip_train.interop.export.refuse import refusals
from clip_train.interop.export.targets import MAIN_TARGET, TARGETS_OF, Part, Target
from clip_train.interop.export.verify import INSTALL, Benchmark, Check, Status, table, verify
from clip_train.interop.export.write import write_parts
from clip_train.interop.load import assemble, read_source
from clip_train.interop.loaded_model import LoadedModel
from clip_train.interop.weights import weights_sha256
from clip_train.tools.origin import describe_origin
from clip_train.tools.reliability import reliability_diagram

ALL = "all"


def export_command(
    source: str,
    *,
    to: str,
    out: Path | None,
    weights: str,
    drop_logit_bias: bool,
    int8: bool,
    prove: bool,
    pythons: Sequence[Path],
    repository: str | None,
) -> int:
    """Export `source`, print what came of it, and return the exit code: 1 if a library computes something else.

    Args:
        source: anything that `clip_train.load` takes.
        to: a `Part`, or `all`.
        out: the folder; `RUN/export` for a run, `exports/NAME` otherwise.
        weights: of a run, see `clip_train.load`.
        drop_logit_bias: see `refusals`.
        int8: also write 8-bit graphs, see `write_onnx`.
        prove: compare with the libraries that are installed.
        pythons: interpreters to look for them in, before this one; any of them implies `prove`.
        repository: `ORG/NAME` on the hub to upload to, None for none.

    Raises:
        UserError: the source is not usable, `to` names a part that this model cannot have, or `out` is in use.
    """
    if to not in (ALL, *Part):
        raise UserError(f"--to {to} must be one of {', '.join((ALL, *Part))}")
    if int8 and to not in (ALL, Part.onnx):
        raise UserError(f"--int8 is of the ONNX graphs: --to {to} writes none")
    named = None if to == ALL else MAIN_TARGET[Part(to)]
    found = read_source(source, weights=weights)
    out = out or _default_out(source, name=found.config.name)
    check_replaceable(out)
    model = assemble(found)
    former = read_calibration(out / CALIBRATION_FILE)  # measured on the export that will be replaced
    if former is not None and former.weights_sha256 == weights_sha256(model):
        model.calibration = latest(former, model.calibration)
    reasons = refusals(found.config, found.tensors, tokenizer=found.tokenizer, drop_logit_bias=drop_logit_bias)
    parts, absent = _plan(list(Part) if to == ALL else [Part(to)], reasons=reasons, named=named, int8=int8)
    refused = {check.target: reasons[check.target] for check in absent if check.status is Status.refused}
    provenance = describe_origin(found.origin, weights=weights, name=found.config.name)
    with staged(out) as folder:
        served = write_parts(
            folder, model=model, parts=parts, refused=refused, published_as=repository or out.resolve().name, int8=int8
        )
        adapters = found.adapters if Target.transformers in served else None
        if adapters is not None:
            base = (provenance.run_config or {}).get("model", {}).get("init")
            write_adapter(folder / ADAPTER_FOLDER, adapters=adapters, config=found.config, base=base)
        if model.calibration and model.calibration.temperature:
            diagram = reliability_diagram(model.calibration.temperature, standalone=True)
            (folder / DIAGRAM_FILE).write_text(diagram, encoding="utf-8")
        write_record(folder, model=model, provenance=provenance, served=served)
        proved: list[Check] = []
        if prove or pythons:
            proved = verify(folder, model=model, targets=served, pythons=pythons, score=partial(_score, model=model))
        rows = sorted([*proved, *absent], key=lambda check: list(Target).index(check.target))
        write_report(folder, checks=rows, served=served, refused=refused)
        card = model_card(
            provenance, config=found.config, folder=out.resolve().name, served=served, refused=refused,
            checks=rows if proved else [], calibration=model.calibration,
            adapter=ADAPTER_FOLDER if adapters else None, logit_scale=model.logit_scale.item(),
        )  # fmt: skip
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
    if rows:
        print(table(rows))
    print(f"exported to {out}: {', '.join(served)}")
    # A library that is named must pass; where all are asked for, one that is not installed is no failure.
    bad = {check.status for check in proved if check.target is named or check.status is Status.failed}
    if bad - {Status.passed}:
        return 1
    if repository is not None:
        print(f"uploaded to {push_to_hub(out, repository=repository)}")
    return 0


def _plan(
    parts: list[Part], *, reasons: Mapping[Target, Sequence[str]], named: Target | None, int8: bool
) -> tuple[list[Part], list[Check]]:
    """Return the parts that can be written, and a row of the table for each library that gets nothing.

    Raises:
        UserError: nothing can be written, or not the part that was named.
    """
    absent = [
        Check(target=target, status=Status.refused, note="; ".join(reasons[target]))
        for part in parts
        for target in TARGETS_OF[part]
        if target in reasons
    ]
    if named is not None and named in reasons:
        raise UserError(f"{named} would compute another model: {'; '.join(reasons[named])}")
    if Part.onnx in parts and (missing := missing_packages(int8=int8)):
        note = f"not written without {' and '.join(missing)}: {INSTALL[Target.onnxruntime]}"
        if named is Target.onnxruntime:
            raise UserError(f"{named}: {note}")
        absent.append(Check(target=Target.onnxruntime, status=Status.skipped, note=note))
        parts = [part for part in parts if part is not Part.onnx]
    parts = [part for part in parts if MAIN_TARGET[part] not in reasons]
    if not parts:
        raise UserError(f"nothing can be written: {'; '.join(f'{row.target}: {row.note}' for row in absent)}")
    return parts, absent


def _default_out(source: str, *, name: str) -> Path:
    path = Path(source).expanduser()
    if (path / "checkpoints").is_dir():
        return path / "export"
    return Path("exports") / name.replace("/", "-")


def _score(folder: Path, *, model: LoadedModel) -> Benchmark:
    """Write the labelled pictures and evaluate the model on them as on any set."""
    from clip_train.distributed.world import World

    write_labelled(folder)
    evaluator = ClassifyConfig(root=str(folder), precision=Precision.fp32).build(
        world=World(device=torch.device("cpu")),
        tokenizer=model.tokenize,
        image_size=model.config.vision.image_size,
        squash=model.config.squash,
    )
    assert isinstance(evaluator, Classify)
    predictions = evaluator.evaluate(model).predictions  # also of features that count as collapsed
    num_classes = len(evaluator.images.classnames)
    result = score(predictions["label"], predictions["top"], num_classes=num_classes)
    return Benchmark(folder=folder, metrics=result.metrics)
