"""The report is one safe file that tells the truth about a run."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from clip_train.calibration import CALIBRATION_FILE, write_calibration
from clip_train.errors import UserError
from clip_train.evaluation.result import EvaluationResult, Part, write_result
from clip_train.evaluation.samples import load_samples, save_samples
from clip_train.tools.report import judge, write_report
from clip_train.tools.report_evaluations import read_evaluations
from tests.test_calibration import BOTH
from tests.tools.synthetic_run import write_run

VOID = {"meta", "img", "br", "line", "path", "circle", "rect", "link"}


class Tags(HTMLParser):
    """Collects elements and checks that they close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(path):
    parser = Tags()
    parser.feed(path.read_text(encoding="utf-8"))
    assert parser.open == []
    return parser, " ".join("".join(parser.text).split())


def test_the_calibration_of_the_run_is_shown_with_its_diagram_and_thresholds(tmp_path):
    run = write_run(tmp_path)
    assert "How sure is it?" not in parse(write_report(run))[1]
    write_calibration(replace(BOTH, model="<b>demo</b>"), run / CALIBRATION_FILE)
    path = write_report(run)
    tags, text = parse(path)
    assert "Of <b>demo</b>. A bar is" in text  # as text
    cells = text.replace(" ", "")
    assert "expectedcalibrationerror10.00%5.00%" in cells
    assert "maxcosine0.2594.01.0" in cells
    assert "mcm0.295.050.0" in cells
    labels = [attributes.get("aria-label") for name, attributes in tags.tags if name == "svg"]
    assert "Reliability diagram" in labels
    assert "http" not in path.read_text(encoding="utf-8")


def test_the_page_is_one_small_well_formed_file_without_scripts_or_network(tmp_path):
    path = write_report(write_run(tmp_path))
    tags, _ = parse(path)
    assert path.stat().st_size < 3_000_000
    names = {name for name, _ in tags.tags}
    assert not names & {"script", "link", "iframe", "object", "embed"}
    for _, attributes in tags.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"url\(|@import|https?://", path.read_text(encoding="utf-8"))
    assert "prefers-color-scheme: dark" in path.read_text(encoding="utf-8")


def test_scores_stand_beside_chance_and_the_loss_beside_guessing(tmp_path):
    _, text = parse(write_report(write_run(tmp_path)))
    results = json.loads((tmp_path / "evaluation" / "step-00002000" / "shapes.json").read_text())
    assert f"{100 * results['metrics']['acc1']:.1f} %" in text
    assert "chance 5 %" in text
    assert "guessing 5.55" in text
    assert "step 2,000 of 2,000" in text


def test_a_scorecard_is_a_section_of_its_own_with_verdicts_and_no_headline(tmp_path):
    _, before = parse(write_report(write_run(tmp_path)))
    assert "Known pitfalls Not measured." in before
    result = EvaluationResult(
        task="pitfall_scorecard",
        num_items=600,
        metrics={"control": 0.98, "binding": 0.51},
        chance={"control": 1 / 24, "binding": 0.5},
        intervals={"control": (0.97, 0.99), "binding": (0.47, 0.55)},
        verdicts={"control": "sees these drawings", "binding": "pitfall: no better than guessing"},
        notes=["control: <b>97 %</b> elsewhere"],
    )
    write_result(result, tmp_path / "evaluation" / "step-00002000" / "scorecard.json", dataset="scorecard", model="m")
    page, text = parse(write_report(tmp_path))
    section = text.split("Known pitfalls")[1].split("Training Over")[0]
    assert "600 questions a row" in section and "Not measured" not in section
    assert "binding 51.0 47.0 – 55.0 50.0 pitfall: no better than guessing" in section
    assert "<b>97 %</b> elsewhere" in section
    assert "binding" not in text.split("Known pitfalls")[0]
    assert ("span", {"class": "mark bad"}) in page.tags


def test_parts_of_a_set_follow_its_scores_and_are_no_headline(tmp_path):
    write_run(tmp_path)
    parts = {
        name: Part(num_items=n, metrics={"text_acc": value}, chance={"text_acc": 0.5}, intervals={"text_acc": (0.1, 1)})
        for name, n, value in (("add_att", 30, 0.625), ("swap_obj", 20, 0.25))
    }
    result = EvaluationResult(
        task="image_caption_selection",
        num_items=50,
        metrics={"text_acc": 0.475},
        chance={"text_acc": 0.5},
        intervals={"text_acc": (0.3, 0.6)},
        parts=parts,
    )
    write_result(result, tmp_path / "evaluation" / "step-00002000" / "crepe.json", dataset="crepe", model="m")
    _, text = parse(write_report(tmp_path))
    assert "right caption chosen 47.5 30.0 – 60.0 50.00 50 " in text
    assert "add_att: right caption chosen 62.5 10.0 – 100.0 50.00 30 swap_obj: right caption chosen 25.0" in text
    (crepe,) = (e for e in read_evaluations(tmp_path / "evaluation") if e.name == "crepe")
    assert crepe.headline.value == 0.475


def test_every_curve_of_training_and_of_evaluation_is_drawn(tmp_path):
    tags, _ = parse(write_report(write_run(tmp_path)))
    titles = [a["aria-label"].partition(",")[0] for name, a in tags.tags if name == "svg"]
    assert titles == [
        "shapes · zero-shot accuracy", "val · mean recall@1", "val · loss", "Loss", "Recall@1 in the batch",
        "Temperature (logit scale)", "Learning rate", "Samples per second", "Share of time waiting for data",
    ]  # fmt: skip


def test_captions_and_names_cannot_inject_markup(tmp_path):
    attack = "\"><script>alert(1)</script><img src=x onerror=alert(1)>' {{ 7*7 }}"
    tags, text = parse(write_report(write_run(tmp_path, name=attack, caption=attack)))
    assert "script" not in {name for name, _ in tags.tags}
    assert not any("onerror" in attributes for _, attributes in tags.tags)
    assert "<script>alert(1)</script>" in text
    assert "{{ 7*7 }}" in text


def test_pictures_of_noise_stay_below_the_limit(tmp_path):
    write_run(tmp_path)
    for path in (tmp_path / "evaluation").glob("*/*.samples.json"):
        samples = load_samples(path)
        rng = np.random.default_rng(0)
        samples.pictures = rng.integers(0, 256, samples.pictures.shape, dtype=np.uint8)
        samples.pair_pictures = rng.integers(0, 256, samples.pair_pictures.shape, dtype=np.uint8)
        save_samples(samples, path)
    assert write_report(tmp_path).stat().st_size < 3_000_000


def test_a_run_without_metrics_or_evaluations_gets_a_page_too(tmp_path):
    (tmp_path / "config.yaml").write_text("name: fresh\n")
    _, text = parse(write_report(tmp_path))
    assert "Nothing has been logged yet." in text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.yaml"):
        write_report(tmp_path)


def test_the_newest_result_of_each_evaluation_is_shown(tmp_path):
    write_run(tmp_path, steps=900)
    write_run(tmp_path, steps=1000)
    (tmp_path / "evaluation" / "step-00001000" / "val.json").unlink()
    assert {e.name: e.step for e in read_evaluations(tmp_path / "evaluation")} == {"shapes": 1000, "val": 900}


def test_what_is_evaluated_later_enters_the_report_unless_it_is_the_same_again(tmp_path):
    run = write_run(tmp_path)
    own = run / "evaluation" / "step-00002000" / "shapes.json"
    content = json.loads(own.read_text())
    later = run / "evaluation" / "shapes.json"
    later.write_text(own.read_text())
    assert [e.label for e in read_evaluations(run / "evaluation")] == ["shapes", "val"]
    content["metrics"]["acc1"] = 0.4321
    content["clip_train"] |= {"step": 1900, "weights": "raw"}
    for path in (later, run / "evaluation" / "elsewhere.json", run / "evaluation" / "embed_dim-16" / "shapes.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    content["clip_train"]["weights"] = "ema"
    (run / "evaluation" / "val.json").write_text(json.dumps(content))
    found = read_evaluations(run / "evaluation")
    assert [(e.label, e.step) for e in found] == [
        ("elsewhere, evaluated later", 1900), ("shapes", 2000), ("shapes, evaluated later", 1900), ("val", 2000),
        ("val_ema, evaluated later", 1900), ("shapes, 16 dimensions, evaluated later", None),
    ]  # fmt: skip
    tags, text = parse(write_report(run))
    assert text.count("shapes, evaluated later") == 3 and "43.2" in text  # verdict, tile and table
    titles = [a["aria-label"].partition(",")[0] for name, a in tags.tags if name == "svg"]
    assert titles.count("shapes · zero-shot accuracy") == 1  # its curve is that of the training


def test_a_suite_of_many_sets_leaves_verdict_and_tiles_short(tmp_path):
    run = write_run(tmp_path, results=False)
    for i in range(20):
        result = EvaluationResult(
            task="t", num_items=9, metrics={"acc1": 0.5 + i / 100}, chance={"acc1": 0.1}, intervals={"acc1": (0.4, 0.9)}
        )
        write_result(result, run / "evaluation" / f"set{i:02d}.json", dataset="d", model="m")
    tags, text = parse(write_report(run))
    assert "14 more sets below" in text and "set19, evaluated later" in text
    assert sum(attributes.get("class") == "value" for name, attributes in tags.tags if name == "dd") == 6 + 4


def row(loss):
    return {"train/loss": loss, "train/loss_of_guessing": 5.0}


def test_the_verdict_measures_against_guessing(tmp_path):
    good = read_evaluations(write_run(tmp_path) / "evaluation")
    assert judge([row(2.0)], good).kind == "good"
    assert (
        judge([row(2.0)], []).text
        == "Learning: the loss is 2.000 against 5.000 for guessing; nothing has been evaluated yet."
    )
    assert judge([row(4.99)], good).text.startswith("No better than guessing yet")
    assert judge([row(None)], good).text == "The last loss is not finite."


def test_a_collapsed_or_lucky_result_is_no_success(tmp_path):
    path = write_run(tmp_path) / "evaluation" / "step-00002000" / "shapes.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"metrics": {"acc1": 0.05}} | {
        "clip_train": content["clip_train"] | {"intervals": {"acc1": [0.03, 0.08]}}
    }))  # fmt: skip
    assert "no better than guessing on this set" in judge([row(2.0)], read_evaluations(tmp_path / "evaluation")).text
    path.write_text(json.dumps(content | {"metrics": {}} | {
        "clip_train": content["clip_train"] | {"status": "collapsed", "reason": "mean cosine too high"}
    }))  # fmt: skip
    verdict = judge([row(2.0)], read_evaluations(tmp_path / "evaluation"))
    assert (verdict.kind, verdict.text) == ("bad", "Collapsed on shapes: mean cosine too high.")
    _, text = parse(write_report(tmp_path))
    assert "mean cosine too high" in text


def test_what_all_attempts_together_have_cost_is_shown(tmp_path):
    run = write_run(tmp_path)
    assert "hours of all ranks" not in parse(write_report(run))[1]
    attempt = {"host": "a", "world": 4, "device": "cuda", "first_step": 0, "launch_id": "x", "last_step": 9, "code": 85}
    times = [("2026-11-21T10:00:00+00:00", "2026-11-21T11:30:00+00:00"), ("2026-11-21T12:00:00+00:00",) * 2]
    lines = [json.dumps({"start": start, "end": end, **attempt}) for start, end in times]
    (run / "attempts.jsonl").write_text("\n".join(lines) + "\n")
    assert "attempts2cudahoursofallranks6.00" in parse(write_report(run))[1].replace(" ", "")
