"""`clip_train.json` and `export_report.json`: what an export is made of, and what has been proved of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from clip_train import __version__
from clip_train.calibration import calibration_to_json
from clip_train.files import hash_file
from clip_train.interop.export.publish import RECORD_FILE, REPORT_FILE
from clip_train.interop.export.targets import Target, known_differences
from clip_train.interop.export.tokenizer_files import write_json
from clip_train.tokenizer.huggingface import FILE_NAME, HuggingFaceTokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from clip_train.interop.export.card import Provenance
    from clip_train.interop.export.verify import Check
    from clip_train.interop.loaded_model import LoadedModel
    from clip_train.tokenizer.base import Tokenizer


def write_record(folder: Path, *, model: LoadedModel, provenance: Provenance, served: Sequence[Target]) -> None:
    """Write `clip_train.json`: the architecture for `clip_train.load`, the origin, and a hash of every file."""
    seen = model.config.text.sees_padding
    differences = {target: known_differences(target, sees_padding=seen) for target in served}
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    record = {
        "clip_train": __version__,
        "name": provenance.name,
        "model": asdict(model.config),
        "tokenizer": _tokenizer(model.tokenize),
        "origin": provenance.origin,
        "weights": provenance.weights,
        "run": provenance.run_config,
        "data": provenance.data,
        "cost": provenance.cost,
        "scores": [asdict(score) for score in provenance.scores],
        "calibration": model.calibration and calibration_to_json(model.calibration),
        "known_differences": {target: texts for target, texts in differences.items() if texts},
        "files": {name: asdict(hash_file(path)) for name, path in files.items()},
    }
    write_json(folder / RECORD_FILE, record)


def _tokenizer(tokenizer: Tokenizer) -> dict[str, object]:
    """Return the choice of `tokenizer=` that makes it again from the export's files."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return {"name": "clip", "context_length": tokenizer.context_length}
    return {
        "name": "huggingface",
        "context_length": tokenizer.context_length,
        "path": FILE_NAME,
        "bos": tokenizer.bos,
        "eos": tokenizer.eos,
        "pad": tokenizer.pad,
        "cleaning": tokenizer.cleaning,
    }


def write_report(
    folder: Path, *, checks: Sequence[Check], served: Sequence[Target], refused: Mapping[Target, Sequence[str]]
) -> None:
    """Write `export_report.json`: what each library got, why it got nothing, and what the verification found."""
    record = hash_file(folder / RECORD_FILE)
    report = {
        "clip_train": __version__,
        "exported": list(served),
        "refused": dict(refused),
        "verified": [asdict(check) for check in checks],
        "record_sha256": record.sha256,
    }
    write_json(folder / REPORT_FILE, report)
