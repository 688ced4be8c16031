"""`clip-train classify`: which pictures, which labels, which model, and what is printed."""

import io
import json
import os

import pytest

import clip_train
from clip_train.calibration import RejectScore
from clip_train.errors import UserError
from clip_train.tools.classify import BACKGROUND
from clip_train.tools.classify_command import classify_command, find_pictures
from tests.tools.test_classify import COLOURS, ColourModel, by_hand, calibration, pictures

__all__ = ["pictures"]  # a fixture


@pytest.fixture
def model(monkeypatch):
    model = ColourModel()
    monkeypatch.setattr(clip_train, "load", lambda name: (model, None), raising=False)
    return model


def run(images, **options):
    arguments = {"labels": "red, green,blue", "labels_file": None, "model": "m", "as_json": True, **options}
    return classify_command([str(image) for image in images], **arguments)


def rows(capsys):
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {row["path"].rpartition("/")[2]: row for row in found}


def test_an_unreadable_picture_is_reported_the_rest_goes_on_and_the_exit_code_is_3(pictures, model, capsys):
    (pictures / "bad.png").write_bytes(b"no picture at all")
    assert run([pictures, pictures / "missing.png"], top=2) == 3
    named = rows(capsys)
    assert named["bad.png"]["error"] == "unknown format"
    assert named["missing.png"]["error"] == "No such file or directory"
    assert [named[f"{c}.png"]["answer"] for c in COLOURS] == list(COLOURS)
    assert [named[f"{c}.png"]["labels"][0]["label"] for c in COLOURS] == list(COLOURS)
    assert len(named["red.png"]["labels"]) == 2
    assert named["red.png"]["model"] == "m"


def test_the_table_shows_percent_and_cosine_and_bad_files_go_to_stderr(pictures, model, capsys):
    assert run([pictures / "green.png", pictures / "none.png"], labels="red,green", as_json=False) == 3
    output = capsys.readouterr()
    assert "none.png: No such file or directory" in output.err
    cosines, probabilities = by_hand("green", ["red", "green"])
    assert f"{100 * probabilities[1]:.1f} %" in output.out
    assert f"{cosines[1]:.3f}" in output.out
    assert "m; probabilities not calibrated; always an answer, since no threshold was measured" in output.out


def test_unknown_comes_with_score_threshold_nearest_label_and_reason(pictures, model, capsys):
    model.calibration = calibration(temperature=2.0, thresholds={RejectScore.max_cosine: 0.9})
    assert run([pictures / "red.png", pictures / "blue.png"], labels="red,green") == 0
    named = rows(capsys)
    assert named["red.png"]["answer"] == "red"
    assert named["red.png"]["unknown"] is None
    row = named["blue.png"]
    assert row["answer"] == "unknown"
    assert row["unknown"]["score"] == "max_cosine"
    assert row["unknown"]["value"] < row["unknown"]["threshold"] == 0.9
    assert row["unknown"]["nearest"] == row["labels"][0]["label"]
    assert "is below max cosine 0.9: 95 % of the pictures of toys reach it" in row["unknown"]["reason"]
    run([pictures / "red.png", pictures / "blue.png"], labels="red,green", as_json=False)
    printed = capsys.readouterr().out
    assert printed.count("unknown (none of the labels)") == 1
    assert "unknown: below max cosine 0.9; 95 % of the pictures of toys reach it" in printed
    assert "toy; calibrated at temperature 2" in printed
    assert run([pictures / "blue.png"], labels="red,green", min_similarity="off") == 0
    assert rows(capsys)["blue.png"]["unknown"] is None


def test_a_single_label_is_said_to_be_compared_with_background_prompts(pictures, model, capsys):
    assert run([pictures / "red.png"], labels="red") == 0
    output = capsys.readouterr()
    row = json.loads(output.out)
    _, probabilities = by_hand("red", ["red", *BACKGROUND])
    assert row["labels"][0]["probability"] == pytest.approx(probabilities[0], abs=1e-5)
    assert "one label" in output.err


def test_labels_come_from_a_file_too_commas_included(pictures, model, tmp_path, capsys):
    file = tmp_path / "labels.txt"
    file.write_text("red, bright red\n\nblue\nblue\n")
    assert run([pictures / "blue.png"], labels=None, labels_file=file) == 0
    assert [score["label"] for score in rows(capsys)["blue.png"]["labels"]] == ["blue", "red, bright red"]


def test_folders_patterns_and_standard_input_name_pictures(pictures, monkeypatch, tmp_path):
    (pictures / "deep").mkdir()
    (pictures / "deep" / "x.JPG").write_bytes(b"")
    (pictures / "[1].png").write_bytes(b"")
    (pictures / "note.txt").write_bytes(b"")
    every = [pictures / name for name in ("[1].png", "blue.png", "deep/x.JPG", "green.png", "red.png")]
    assert list(find_pictures([str(pictures)])) == every
    assert list(find_pictures([str(pictures / "**" / "*.JPG")])) == [every[2]]
    assert list(find_pictures([str(pictures / "[1].png")])) == [every[0]]  # a file before a pattern
    assert list(find_pictures([str(pictures / "[bg]*.png")])) == [every[1], every[3]]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{every[4]}\n\n{pictures / 'deep'}\n"))
    assert list(find_pictures(["-"])) == [every[4], every[2]]


def test_links_to_folders_are_followed_and_what_is_hidden_is_left_out(pictures, tmp_path):
    links = tmp_path / "links"
    (links / "__MACOSX").mkdir(parents=True)
    (links / ".thumbnails").mkdir()
    for name in ("._red.png", ".thumbnails/red.png", "__MACOSX/red.png", "red.png"):
        (links / name).write_bytes(b"")
    (links / "folder.png").mkdir()
    (links / "same").symlink_to(pictures / "deep", target_is_directory=True)
    (links / "loop").symlink_to(links, target_is_directory=True)
    (pictures / "deep").mkdir()
    (pictures / "deep" / "blue.png").write_bytes(b"")
    assert list(find_pictures([str(links)])) == [links / "red.png", links / "same" / "blue.png"]


@pytest.mark.parametrize(("given", "message"), [("https://x.org/a.png", "is a URL"), ("\x89PNG\0", "is not text")])
def test_what_is_no_path_is_one_line(given, message, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(given))
    with pytest.raises(UserError, match=message):
        list(find_pictures(["-"]))


def test_labels_are_read_as_editors_save_them(pictures, model, tmp_path, capsys):
    file = tmp_path / "labels.txt"
    file.write_bytes(b"\xef\xbb\xbfred\r\n\r\n  green\t\r\nred\r\n")
    assert run([pictures / "red.png"], labels=None, labels_file=file, templates="{} or {c}") == 0
    assert [label["label"] for label in rows(capsys)["red.png"]["labels"]] == ["red", "green"]
    file.write_bytes("rouge foncé".encode("latin-1"))
    with pytest.raises(UserError, match=r"labels.txt is not UTF-8 text \(byte 10\)"):
        run([pictures / "red.png"], labels=None, labels_file=file)


def test_without_a_model_the_newest_run_is_taken_and_named(pictures, model, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run below runs"):
        run([pictures / "red.png"], model=None)
    for name, age in (("old", 200), ("new", 100), ("unsaved", 0)):
        folder = tmp_path / "runs" / name / "checkpoints"
        folder.mkdir(parents=True)
        if age:
            (folder / "step-00000001").mkdir()
            os.utime(folder / "step-00000001", (10**9 - age, 10**9 - age))
    run([pictures / "red.png"], model=None)
    assert rows(capsys)["red.png"]["model"] == "runs/new"


@pytest.mark.parametrize(
    "options",
    [
        {"labels": " , "}, {"labels": None}, {"labels_file": "x"}, {"top": 0}, {"images": []},
        {"min_similarity": "2"}, {"min_similarity": "nan"}, {"min_similarity": "high"},
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_the_model_is_loaded(pictures, options):
    arguments = {"images": [pictures], **options}
    with pytest.raises(UserError):
        run(arguments.pop("images"), **arguments)
