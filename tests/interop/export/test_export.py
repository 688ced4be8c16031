"""The command from end to end: what it writes, what it refuses to write over, and what a reader of it gets back."""

import contextlib
import errno
import json
import os
import shutil
import tarfile
from collections import Counter
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import save_file

import clip_train
from clip_train.calibration import CALIBRATION_FILE, write_calibration
from clip_train.errors import UserError
from clip_train.evaluation.classify.scores import score
from clip_train.evaluation.result import write_result
from clip_train.interop.export.inputs import write_labelled
from clip_train.interop.export.publish import check_replaceable, staged
from clip_train.interop.export.targets import Target
from clip_train.interop.export.verify import Status, compare, find_libraries, verify
from clip_train.interop.weights import weights_sha256
from clip_train.tools.export import export_command
from clip_train.tools.origin import describe_origin
from tests.interop import files
from tests.interop.export.test_refuse import EVERYWHERE
from tests.interop.test_load import write_run
from tests.test_calibration import BOTH
from tests.tokenizer.made import write_bpe

# Pythons that have the libraries which do not fit into this environment (clip-benchmark, openai-clip).
PYTHONS = [Path(path) for path in os.environ.get("CLIP_TRAIN_VERIFY_PYTHONS", "").split(":") if path]


def export(source, **options):
    defaults = {
        "to": "folder", "out": None, "weights": "auto", "drop_logit_bias": False, "int8": False,
        "prove": False, "pythons": [], "repository": None,
    }  # fmt: skip
    return export_command(str(source), **{**defaults, **options})


@pytest.fixture(scope="module")
def model():
    return files.small_model(**EVERYWHERE)


@pytest.fixture(scope="module")
def source(model, tmp_path_factory):
    return files.write_open_clip_folder(model, tmp_path_factory.mktemp("source") / "mine")


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "mine"
    assert export(source, out=out) == 0
    return out


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_folder_holds_what_each_library_looks_for_and_a_hash_of_each_file(exported):
    expected = {
        "open_clip_config.json", "open_clip_model.safetensors", "config.json", "model.safetensors",
        "preprocessor_config.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
    }  # fmt: skip
    own = {"clip_train.json", "README.md", "export_report.json"}
    assert {path.name for path in exported.iterdir()} == expected | own
    record = json.loads((exported / "clip_train.json").read_text())
    assert record["files"].keys() == expected
    for name, stated in record["files"].items():
        assert sha256((exported / name).read_bytes()).hexdigest() == stated["sha256"]


def test_tensors_come_back_bit_for_bit_from_the_folder_and_the_archive(model, source, exported, tmp_path):
    assert same(clip_train.load(exported, device="cpu")[0].state_dict(), model.state_dict())
    assert export(source, to="clip", out=tmp_path / "archive") == 0
    back, _ = clip_train.load(tmp_path / "archive" / "openai_clip.pt", device="cpu")
    assert same(back.state_dict(), model.state_dict())
    assert (back.config.vision, back.config.text) == (model.config.vision, model.config.text)


def test_what_was_not_measured_reads_so(exported):
    card = (exported / "README.md").read_text()
    for heading in ("Training data", "Recipe", "Compute", "Metrics", "Known pitfalls", "Calibration", "Verification"):
        section = card.split(f"## {heading}\n")[1].split("\n## ")[0]
        assert section.strip().startswith("not measured"), heading
    assert "Bias towards groups of people:\nnot measured." in card
    assert 'getattr(f, "pooler_output", f)' in card
    assert "clip_benchmark eval --model_type open_clip --model local-dir:mine" in card


def test_the_card_has_what_the_run_knows_of_its_data_its_cost_and_its_audits(model, tmp_path):
    run, train = tmp_path / "run", {"own": {"shards": "/own"}, "web": {"shards": "/web"}}
    sources = [
        {"name": "own", "quota": 1024, "epoch_samples": 20, "fingerprint": "f1"},
        {"name": "web", "quota": 3072, "epoch_samples": 5000, "fingerprint": "f2"},
    ]
    progress = SimpleNamespace(
        state_dict=lambda: {"data": {"segments": [{"sources": sources}], "bad": {"undecodable": 3}}}
    )
    checkpoint = write_run(run, model, state={"progress": progress}, data={"train": train, "caption": "json:alt"})
    attempt = {"host": "h", "world": 2, "device": "cuda", "first_step": 0, "launch_id": "l", "code": 0}
    hours = [("2026-01-01T00:00:00", "2026-01-01T01:00:00"), ("2026-01-02T00:00:00", "2026-01-02T00:30:00")]
    lines = [json.dumps({**attempt, "start": start, "end": end}) for start, end in hours]
    (run / "attempts.jsonl").write_text("\n".join(lines) + "\n")
    audit = score(np.zeros(8, dtype=np.int64), np.zeros((8, 1), dtype=np.int64), num_classes=2)
    audit.metrics["acc1_worst_region"] = 0.5
    write_result(audit, run / "evaluation" / "step-00000005" / "geode.json", dataset="geode", model="m")
    assert export(run) == 0
    card = (run / "export" / "README.md").read_text()
    data = card.split("## Training data\n")[1].split("\n## ")[0]
    for line in (
        "| captions | `json:alt` |", "| samples of `own` | 20, 25.0% of a batch; index `f1` |",
        "| samples of `web` | 5,000, 75.0% of a batch; index `f2` |", "| seen | 40 pairs |",
        "| among them unusable | 3 undecodable |",
    ):  # fmt: skip
        assert line in data
    assert "/own" in data and "licences, and the people in them: not measured" in data
    assert "| cuda hours, all ranks and attempts | 3.00 |" in card and "Energy: not measured." in card
    assert "Bias towards groups of people:\ngeode above compare groups" in card
    weights = {"weights": "auto", "name": "x"}
    first, again = (describe_origin(path, **weights) for path in (checkpoint, run / "export" / "model.safetensors"))
    assert (again.data, again.cost) == (first.data, first.cost)


def test_the_card_has_the_recipe_and_scores_of_these_weights_before_those_of_the_others(model, tmp_path):
    run = tmp_path / "run"
    write_run(run, model, ema=files.small_model(seed=9, **EVERYWHERE))
    for step, name, top in ((4, "shapes", 1), (5, "shapes", 0), (4, "shapes_ema", 0), (5, "shapes_ema", 1)):
        result = score(np.zeros(8, dtype=np.int64), np.full((8, 1), top), num_classes=2)
        write_result(result, run / "evaluation" / f"step-0000000{step}" / f"{name}.json", dataset="shapes", model="m")
    judged = score(np.zeros(8, dtype=np.int64), np.zeros((8, 1), dtype=np.int64), num_classes=2)
    judged.verdicts = {metric: f"pitfall: {metric}" for metric in judged.metrics}
    write_result(judged, run / "evaluation" / "step-00000005" / "scorecard.json", dataset="scorecard", model="m")
    assert export(run, weights="raw") == 0
    card = (run / "export" / "README.md").read_text()
    assert "from run, step 5, weights `raw`" in card
    assert "| `steps` | 5 |" in card
    own = "| shapes | acc1 | 100.00 % | 67.56 % – 100.00 % | 50.00 % | 8 |"
    assert card.index(own) < card.index("| shapes, moving average | acc1 | 0.00 %")
    assert "| acc1 | 100.00 % | 67.56 % – 100.00 % | 50.00 % | pitfall: acc1 |" in card.split("## Known pitfalls")[1]
    assert export(run / "export", out=tmp_path / "again") == 0
    assert (tmp_path / "again" / "README.md").read_text().split("## Use")[0] == card.split("## Use")[0]
    assert export(run, weights="ema") == 0
    averaged = (run / "export" / "README.md").read_text()
    assert averaged.index("| shapes | acc1 | 0.00 %") < averaged.index("| shapes, raw weights | acc1 | 100.00 %")


def test_the_calibration_of_these_weights_goes_with_them_and_that_of_others_does_not(model, tmp_path, capsys):
    run = tmp_path / "run"
    write_run(run, model, ema=files.small_model(seed=9, **EVERYWHERE))
    own = replace(BOTH, weights_sha256=weights_sha256(model))
    write_calibration(own, run / CALIBRATION_FILE)
    assert export(run, weights="raw") == 0
    card = (run / "export" / "README.md").read_text()
    section = card.split("## Calibration\n")[1].split("\n## ")[0]
    assert "temperature 1.5 " in section
    assert "| expected calibration error, 15 bins | 10.00 % | 5.00 % |" in section
    assert "Below a highest cosine of 0.25 " in section
    assert "| noise | 5 | 99.0 % | 1.0 % |" in section
    assert (run / "export" / "calibration.svg").read_text().startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "calibration.svg" in json.loads((run / "export" / "clip_train.json").read_text())["files"]
    assert clip_train.load(run / "export", device="cpu")[0].calibration == own
    assert clip_train.load(run, device="cpu", weights="raw")[0].calibration == own
    assert capsys.readouterr().err == ""
    averaged, _ = clip_train.load(run, device="cpu")
    assert averaged.calibration is None
    assert "calibration is that of other weights (demo, step 5)" in capsys.readouterr().err
    assert export(run, weights="ema") == 0
    assert "## Calibration\n\nnot measured" in (run / "export" / "README.md").read_text()
    assert not (run / "export" / "calibration.svg").exists()


def test_an_export_is_replaced_and_nothing_else_is(source, model, exported, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    (out / "evaluation").mkdir()
    (out / "evaluation" / "val.json").write_text("of the same weights")
    measured = replace(BOTH, weights_sha256=weights_sha256(model))
    write_calibration(measured, out / CALIBRATION_FILE)
    assert export(source, out=out) == 0
    assert (out / "evaluation" / "val.json").read_text() == "of the same weights"
    assert clip_train.load(out, device="cpu")[0].calibration == measured
    assert not (out / CALIBRATION_FILE).exists() and "temperature 1.5 " in (out / "README.md").read_text()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        export(source, out=out)
    with pytest.raises(UserError, match="is no export"):
        export(source, out=source)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        export(source, out=tmp_path / "file")
    assert (out / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_results_of_other_weights_go_with_the_export_that_they_measured(tmp_path, capsys):
    out = tmp_path / "out"
    for weights in ("former", "new"):
        with staged(out) as folder:
            (folder / "clip_train.json").write_text(
                json.dumps({"files": {"open_clip_model.safetensors": {"sha256": weights}}})
            )
        if weights == "former":
            (out / "evaluation").mkdir()
            (out / "evaluation" / "val.json").touch()
            check_replaceable(out)
    assert [path.name for path in out.iterdir()] == ["clip_train.json"]
    assert "evaluation: results of the weights that were here before, deleted with them" in capsys.readouterr().out
    (out / "evaluation").mkdir()
    (out / "evaluation" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"evaluation/notes\.txt"):
        check_replaceable(out)


def test_a_full_disk_is_one_line_and_leaves_what_was_there(source, exported, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    write = os.write
    monkeypatch.setattr(os, "write", lambda to, what: _no_space() if len(what) > 100_000 else write(to, what))
    with pytest.raises(UserError, match=rf"--out {out} cannot be written: No space left on device"):
        export(source, out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert clip_train.load(out, device="cpu")


def _no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_part_named_and_refused_is_an_error_and_writes_nothing(tmp_path):
    gelu = files.write_open_clip_folder(files.small_model(), tmp_path / "gelu")
    with pytest.raises(UserError, match="the activation is GELU"):
        export(gelu, to="clip", out=tmp_path / "out")
    with pytest.raises(UserError, match="--to pt"):
        export(gelu, to="pt", out=tmp_path / "out")
    with pytest.raises(UserError, match="--int8 is of the ONNX graphs"):
        export(gelu, to="folder", int8=True, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_among_several_parts_a_refused_one_is_left_out_with_its_reason(tmp_path, capsys):
    resnet = {"image_size": 32, "resnet_stages": [1, 1, 1, 1], "width": 8, "heads": 4}
    source = files.write_open_clip_folder(files.small_model(vision=resnet), tmp_path / "resnet")
    assert export(source, out=tmp_path / "out") == 0
    assert "CLIPModel has no ResNet image tower" in capsys.readouterr().out
    assert not (tmp_path / "out" / "config.json").exists()
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert report["exported"] == ["open_clip", "clip-benchmark"]
    assert set(report["refused"]) == {"transformers", "sentence-transformers"}
    assert "transformers: CLIPModel has no ResNet" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "status"),
    [(0.0, Status.passed), (9e-6, Status.passed), (1e-4, Status.failed), (float("nan"), Status.failed)],
)
def test_features_further_off_than_the_limit_fail(change, status, tmp_path):
    expected = {"image": np.eye(3), "text": np.eye(3)}
    np.savez(tmp_path / "outputs.npz", image=np.eye(3), text=np.eye(3) + change)
    assert compare(Target.open_clip, tmp_path / "outputs.npz", expected=expected, version="1").status is status


def test_a_python_that_does_not_start_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*does not run"):
        find_libraries([tmp_path / "nowhere"])


@pytest.mark.slow
def test_open_clip_computes_the_same_in_a_process_of_its_own(exported):
    pytest.importorskip("open_clip")
    model, _ = clip_train.load(exported, device="cpu")
    (check,) = verify(exported, model=model, targets=[Target.open_clip], pythons=[], score=pytest.fail)
    assert check.status is Status.passed
    assert check.max_difference < 1e-6 and check.file_difference < 1e-6


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A model with a vocabulary of its own, as an export of it is read, and its tokenizer."""
    folder = tmp_path_factory.mktemp("foreign") / "foreign"
    folder.mkdir()
    write_bpe(folder / "tokenizer.json")
    chosen = {"name": "huggingface", "path": "tokenizer.json", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}
    text = {"width": 64, "heads": 1, "layers": 1, "vocab_size": 350, "end_id": 3, "context_length": 24}
    model = files.small_model(quick_gelu=True, text=text)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "clip_train.json").write_text(json.dumps({"model": asdict(model.config), "tokenizer": chosen}))
    return folder


def test_another_vocabulary_travels_with_start_and_end_token_and_cleaning(foreign, tmp_path):
    assert export(foreign, out=tmp_path / "out") == 0
    ours = clip_train.load(foreign, device="cpu")[0].tokenize
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in ("a photo of a CAT", "two  spaces\tand a tab ", "naïve café", ""):
        expected = ours(text)[0].tolist()
        ids = theirs.encode(text).ids
        assert ids == expected[: len(ids)] and set(expected[len(ids) :]) <= {ours.pad_id}
    again, _ = clip_train.load(tmp_path / "out", device="cpu")
    assert torch.equal(again.tokenize(["a photo of a CAT"]), ours(["a photo of a CAT"]))


@pytest.mark.slow
def test_another_vocabulary_computes_the_same_in_every_library(foreign, tmp_path):
    pytest.importorskip("sentence_transformers")
    assert export(foreign, out=tmp_path / "out", prove=True) == 0
    rows = json.loads((tmp_path / "out" / "export_report.json").read_text())["verified"]
    passed = {row["target"]: row["file_difference"] for row in rows if row["status"] == "PASS"}
    assert passed.keys() >= {"open_clip", "transformers", "sentence-transformers"}
    assert passed["open_clip"] < 1e-6
    assert max(passed["transformers"], passed["sentence-transformers"]) < 0.05  # pictures are resized by torchvision


@pytest.mark.slow
def test_every_library_that_is_installed_computes_the_same(source, tmp_path, capsys):
    for package in ("open_clip", "transformers", "sentence_transformers", "onnxruntime"):
        pytest.importorskip(package)
    assert export(source, to="all", out=tmp_path / "out", int8=True, prove=True, pythons=PYTHONS) == 0
    print(capsys.readouterr().out)
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    status = {row["target"]: row["status"] for row in report["verified"]}
    here = {"open_clip", "transformers", "sentence-transformers", "onnxruntime"}
    assert {name: status[name] for name in here} == dict.fromkeys(here, "PASS")
    assert set(status) == set(Target)
    assert not {"FAIL", "REFUSED"} & set(status.values())
    notes = {row["target"]: row["note"] for row in report["verified"]}
    assert float(notes["onnxruntime"].rpartition(" ")[2]) > 0.99  # cosine of the 8-bit graphs


@pytest.mark.slow
def test_a_library_that_computes_something_else_fails(exported, tmp_path):
    pytest.importorskip("open_clip")
    shutil.copytree(exported, tmp_path / "out")
    model, _ = clip_train.load(exported, device="cpu")
    tensors = model.state_dict()
    save_file({**tensors, "visual.proj": tensors["visual.proj"].flip(0)}, tmp_path / "out/open_clip_model.safetensors")
    (check,) = verify(tmp_path / "out", model=model, targets=[Target.open_clip], pythons=[], score=pytest.fail)
    assert check.status is Status.failed
    assert check.max_difference > 0.01


def test_the_labelled_set_shows_many_classes(tmp_path):
    write_labelled(tmp_path)
    with contextlib.ExitStack() as stack:
        tars = [stack.enter_context(tarfile.open(path)) for path in tmp_path.rglob("*.tar")]
        labels = [
            tar.extractfile(member).read()
            for tar in tars
            for member in tar.getmembers()
            if member.name.endswith(".cls")
        ]
    assert len(labels) == 40 and set(Counter(labels).values()) == {2}
