"""`clip-train compare` says what the files of two runs support, and refuses what they do not."""

import json

import numpy as np
import pytest
from scipy import stats

from clip_train.errors import IntegrityError, UserError
from clip_train.evaluation.choose.choices import Choice, Kind
from clip_train.evaluation.choose.score import score as score_choices
from clip_train.evaluation.result import EvaluationResult, write_result
from clip_train.tools.compare.command import compare_command
from clip_train.tools.compare.comparison import Row, compare
from clip_train.tools.compare.items import scores_of
from clip_train.tools.compare.paired_bootstrap import Discordant, Interval, point
from clip_train.tools.compare.seeds import welch
from clip_train.tools.compare.sources import open_sides
from tests.tools.compare.results import NUM, make_run, write_classes
from tests.tools.test_report import parse


def compared(*given, chosen=()):
    first, second = open_sides([str(path) for path in given])
    return compare(first, second, chosen=chosen)


def rows_of(found):
    return {f"{row.evaluation}/{row.metric}": row for row in found.rows}


@pytest.fixture
def two_runs(tmp_path):
    return make_run(tmp_path / "a", accuracy=0.6), make_run(tmp_path / "b", accuracy=0.75, seed=1, extra=3)


def test_a_clear_gain_is_better_and_a_clear_loss_worse(two_runs):
    forth, back = rows_of(compared(*two_runs)), rows_of(compared(*reversed(two_runs)))
    row = forth["shapes/acc1"]
    results = [json.loads(next(run.glob("evaluation/*/shapes.json")).read_text()) for run in two_runs]
    assert (row.first, row.second) == tuple(result["metrics"]["acc1"] for result in results)
    assert row.verdict == "better" and back["shapes/acc1"].verdict == "worse"
    assert row.interval.low < row.difference < row.interval.high
    assert back["shapes/acc1"].interval == pytest.approx((-row.interval.high, -row.interval.low))
    assert row.split.only_second - row.split.only_first == round(row.difference * NUM)
    assert forth["val/image_retrieval_recall@1"].verdict == "better"
    assert {"shapes/f1_macro", "shapes/mean_per_class_recall", "val/mean_recall@1"} <= forth.keys()
    assert all(row.interval for row in forth.values())


def test_the_same_recipe_again_shows_no_difference(tmp_path):
    runs = make_run(tmp_path / "a", accuracy=0.6), make_run(tmp_path / "b", accuracy=0.6, seed=5)
    assert rows_of(compared(*runs, chosen=["acc1"]))["shapes/acc1"].verdict == f"no difference shown at n={NUM}"


@pytest.mark.parametrize(
    ("metric", "difference", "interval", "split", "seeds", "verdict"),
    [
        ("acc1", 0.01, (0.001, 0.02), None, None, "better"),
        ("fpr_at_95_tpr", 0.01, (0.001, 0.02), None, None, "worse"),
        ("acc1_gap_region", -0.01, (-0.02, -0.001), None, None, "better"),
        ("acc1", 0.01, (0.0, 0.02), None, None, "no difference shown at n=900"),
        ("acc1", 0.01, (0.001, 0.02), Discordant(0, 4), None, "no difference shown at n=900"),
        ("acc1", 0.01, (0.001, 0.02), Discordant(0, 9), None, "better"),
        ("acc1", 0.01, (0.001, 0.02), None, welch([0.4, 0.51], [0.5, 0.6]), "no difference shown at n=900"),
        ("acc1", 0.01, (0.001, 0.02), None, welch([0.4, 0.41], [0.59, 0.6]), "better"),
        ("acc1", 0.01, (0.001, 0.02), None, welch([0.4, 0.4], [0.5, 0.5]), "no difference shown at n=900"),
        ("acc1", 0.01, None, None, None, "no per-item results: not tested"),
    ],
)
def test_the_verdict_follows_from_interval_test_and_seeds(metric, difference, interval, split, seeds, verdict):
    row = Row(
        evaluation="e", metric=metric, first=0.5, second=0.5 + difference, num_items=900,
        interval=Interval(*interval) if interval else None, split=split, seeds=seeds,
    )  # fmt: skip
    assert row.verdict == verdict
    assert not row.within_seed_spread
    close = Row(evaluation="e", metric="acc1", first=0.5, second=0.5015, num_items=9, interval=Interval(0.001, 0.002))
    assert close.verdict == "better" and close.within_seed_spread


def test_items_in_another_order_are_paired_by_their_names(tmp_path, two_runs):
    other = tmp_path / "c"
    order = np.random.default_rng(7).permutation(NUM)
    write_classes(other / "shapes.json", accuracy=0.75, seed=1, order=order)
    straight, shuffled = (
        rows_of(compared(two_runs[0], one, chosen=["acc1"]))["shapes/acc1"] for one in (two_runs[1], other)
    )
    assert straight.split == shuffled.split and straight.interval == shuffled.interval


def test_other_items_are_refused_with_the_difference_named(tmp_path, two_runs):
    keys = np.array([f"class/{i:04d}.png" for i in range(NUM)])
    keys[3] = "class/new.png"
    for name, settings, message in (
        ("one", {"keys": keys}, r"1 of 240 items only in a \(class/0003.png\), 1 of 240 items only in one"),
        ("fewer", {"num": NUM - 2}, r"2 of 240 items only in a \(class/0238.png, class/0239.png\)"),
    ):
        write_classes(tmp_path / name / "shapes.json", accuracy=0.7, seed=3, **settings)
        with pytest.raises(UserError, match=message):
            compared(two_runs[0], tmp_path / name)
    path = next(two_runs[1].glob("evaluation/*/shapes.json"))
    write_classes(path, accuracy=0.7, seed=3, keys=keys)
    found = compared(*two_runs)
    assert "only in a" in found.refused["shapes"] and {row.evaluation for row in found.rows} == {"val"}
    with pytest.raises(UserError, match="only in a"):
        compared(*two_runs, chosen=["shapes"])


def test_results_without_names_are_paired_by_their_order_if_their_labels_agree(tmp_path, two_runs):
    write_classes(tmp_path / "old" / "shapes.json", accuracy=0.7, seed=3, keys=False)
    found = compared(two_runs[0], tmp_path / "old", chosen=["acc1"])
    assert "paired by their order" in found.remarks[0] and rows_of(found)["shapes/acc1"].interval
    order = np.random.default_rng(7).permutation(NUM)
    write_classes(tmp_path / "old" / "shapes.json", accuracy=0.7, seed=3, keys=np.arange(NUM), order=order)
    with np.load(tmp_path / "old" / "shapes.npz") as arrays:
        kept = {name: values for name, values in arrays.items() if name != "key"}
    np.savez(tmp_path / "old" / "shapes.npz", **kept)
    with pytest.raises(UserError, match="`label` differs"):
        compared(two_runs[0], tmp_path / "old")


def test_scores_that_do_not_follow_from_their_items_are_damage(two_runs):
    path = next(two_runs[1].glob("evaluation/*/shapes.json"))
    content = json.loads(path.read_text())
    content["metrics"]["acc1"] += 0.01
    path.write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match="do not belong together"):
        compared(*two_runs)
    path.with_suffix(".npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(IntegrityError, match=r"shapes\.npz cannot be read"):
        compared(*two_runs)


def test_a_collapsed_model_is_not_compared(two_runs):
    path = next(two_runs[1].glob("evaluation/*/shapes.json"))
    content = json.loads(path.read_text())
    content["clip_train"] |= {"status": "collapsed", "reason": "mean cosine 0.99"}
    path.write_text(json.dumps(content))
    assert compared(*two_runs, chosen=["text_retrieval_recall@1"]).refused == {
        "shapes": "b has collapsed: mean cosine 0.99"
    }


def test_a_score_without_items_has_a_difference_and_no_verdict(two_runs):
    for run, value in zip(two_runs, (0.4, 0.5), strict=True):
        result = EvaluationResult(
            task="t", num_items=9, metrics={"mean_average_precision": value}, chance={}, intervals={}
        )
        write_result(result, run / "evaluation" / "voc.json", dataset="voc", model="m")
    row = rows_of(compared(*two_runs, chosen=["voc"]))["voc/mean_average_precision"]
    assert row.difference == pytest.approx(0.1) and "not tested" in row.verdict


def test_configs_and_classes_are_compared(two_runs):
    found = compared(*two_runs, chosen=["acc1"])
    assert found.config == [("extra", "absent", "3")]
    changes = found.classes["shapes"]
    assert sum(change.second - change.first for change in changes) == round(
        rows_of(found)["shapes/acc1"].difference * NUM
    )
    assert sum(change.num_items for change in changes) == NUM
    assert changes[0].name.startswith("kind ")
    gains = [change.second - change.first for change in changes]
    assert gains == sorted(gains, reverse=True)


def test_seeds_of_one_side_are_averaged_and_compared_with_welchs_interval(tmp_path, capsys):
    first = [make_run(tmp_path / f"a{s}", accuracy=0.6, seed=s) for s in range(3)]
    second = [make_run(tmp_path / f"b{s}", accuracy=0.66, seed=10 + s) for s in range(3)]
    sides = open_sides([",".join(map(str, side)) for side in (first, second)])
    row = rows_of(compare(*sides, chosen=["acc1"]))["shapes/acc1"]
    scores = [json.loads(next(run.glob("evaluation/*/shapes.json")).read_text())["metrics"]["acc1"] for run in first]
    assert row.first == pytest.approx(np.mean(scores)) and row.split is None
    assert row.verdict == "better" and row.seeds.interval.low < row.difference < row.seeds.interval.high
    given = [",".join(map(str, side)) for side in (first, second)]
    compare_command(given, metrics=["acc1"], html=tmp_path / "page.html", as_json=False)
    said = f"(df {row.seeds.degrees_of_freedom:.1f})"
    assert said in capsys.readouterr().out and said in parse(tmp_path / "page.html")[1]


@pytest.mark.parametrize("sizes", [(2, 2), (3, 2), (5, 4), (40, 3)])
def test_the_interval_over_seeds_is_that_of_scipys_welch_test(sizes):
    rng = np.random.default_rng(sum(sizes))
    first, second = (rng.normal(0.5, spread, size) for spread, size in zip((0.01, 0.04), sizes, strict=True))
    found, reference = welch(first, second), stats.ttest_ind(second, first, equal_var=False)
    assert found.interval == pytest.approx(tuple(reference.confidence_interval()), rel=1e-9)
    assert found.degrees_of_freedom == pytest.approx(reference.df, rel=1e-9)
    assert (found.num_first, found.num_second) == sizes


def test_runs_of_a_side_that_differ_in_more_than_their_seed_are_named(tmp_path):
    first = [make_run(tmp_path / f"a{s}", accuracy=0.6, seed=s) for s in range(2)]
    other = [make_run(tmp_path / "b0", accuracy=0.7), make_run(tmp_path / "b1", accuracy=0.7, extra=3)]
    sides = open_sides([",".join(map(str, side)) for side in (first, other)])
    assert compare(*sides, chosen=["acc1"]).remarks == [
        "a1 is no other seed of a0's recipe: seed: 0 for both",
        "b1 is no other seed of b0's recipe: extra: absent -> 3",
    ]


def test_a_folder_with_a_comma_in_its_name_is_one_run(tmp_path):
    runs = [make_run(tmp_path / name, accuracy=0.6) for name in ("lr=1,wd=2", "b")]
    assert [side.name for side in open_sides([str(run) for run in runs])] == ["lr=1,wd=2", "b"]


def test_a_checkpoint_and_a_folder_of_results_are_compared_too(tmp_path, two_runs):
    write_classes(two_runs[0] / "evaluation" / "step-00000400" / "shapes.json", accuracy=0.3, seed=0)
    (two_runs[0] / "checkpoints" / "step-00000400").mkdir(parents=True)
    write_classes(tmp_path / "others" / "shapes.json", accuracy=0.9, seed=2)
    row = rows_of(compared(two_runs[0] / "checkpoints" / "step-00000400", tmp_path / "others", chosen=["acc1"]))[
        "shapes/acc1"
    ]
    assert row.first < 0.4 and row.second > 0.8
    for wrong in (["a"], [str(tmp_path / "nothing"), str(two_runs[0])], [str(two_runs[0])] * 2):
        with pytest.raises(UserError):
            open_sides(wrong)


def test_what_was_evaluated_later_is_preferred_where_both_have_it(two_runs):
    for run, accuracy in zip(two_runs, (0.2, 0.9), strict=True):
        write_classes(run / "evaluation" / "shapes.json", accuracy=accuracy, seed=0)
    assert rows_of(compared(*two_runs, chosen=["acc1"]))["shapes/acc1"].first < 0.3
    (two_runs[1] / "evaluation" / "shapes.json").unlink()
    assert rows_of(compared(*two_runs, chosen=["acc1"]))["shapes/acc1"].first > 0.5


def test_choices_about_one_picture_count_as_one_picture():
    rng = np.random.default_rng(0)
    items = [
        Choice(pictures=(i // 2,), captions=("a", "b"), kind=Kind.caption, right=frozenset({(0, 0)})) for i in range(80)
    ]
    models = []
    for _ in range(2):
        cosines = [rng.normal(size=(1, 2)) for _ in range(40) for _ in range(2)]
        arrays = score_choices(items, cosines).predictions
        models.append({**arrays, "image_key": np.repeat(np.arange(40), 2).astype(str)})
    (scored,) = scores_of(models, metrics=["text_acc"]).values()
    assert point(scored.statistic) == pytest.approx([model["text_acc"].mean() for model in models])
    assert sum(scored.statistic.populations[0]) == 40


def test_the_worst_group_is_that_of_the_groups_that_are_large_enough():
    rng = np.random.default_rng(0)
    labels = rng.integers(5, size=200)
    groups = np.repeat([0, 1, 2, -1], [90, 80, 10, 20])
    model = {"label": labels, "top": (labels + (rng.random(200) < 0.4))[:, None] % 5, "group_place": groups}
    right = model["top"][:, 0] == labels
    by_group = [right[groups == g].mean() for g in range(3)]
    metrics = ["acc1_worst_place", "acc1_gap_place", "acc1_worst_place_any_size"]
    found = {name: point(scored.statistic)[0] for name, scored in scores_of([model, model], metrics=metrics).items()}
    large = by_group[:2]
    assert found == pytest.approx(dict(zip(metrics, (min(large), max(large) - min(large), min(by_group)), strict=True)))


def test_the_command_prints_tables_json_and_a_page_without_scripts_or_network(tmp_path, two_runs, capsys):
    third = make_run(tmp_path / "<c>", accuracy=0.5, seed=4)
    given = [str(run) for run in (*two_runs, third)]
    compare_command(given, metrics=["shapes/acc1", "val"], html=tmp_path / "page.html", as_json=False)
    shown = capsys.readouterr().out
    assert "b against a" in shown and "<c> against a" in shown and "better" in shown and "worse" in shown
    tags, text = parse(tmp_path / "page.html")
    assert "<c> against a" in text and "script" not in {name for name, _ in tags.tags}
    assert "http" not in (tmp_path / "page.html").read_text()
    paths = [a["class"] for name, a in tags.tags if name == "path"]
    assert [paths.count(f"curve side{i}") for i in range(3)] == [5, 5, 5]
    compare_command(given[:2], metrics=["shapes/acc1"], html=None, as_json=True)
    (found,) = json.loads(capsys.readouterr().out)
    (row,) = found["metrics"]
    assert row["verdict"] == "better" and row["mcnemar"]["p"] < 0.05 and len(row["interval"]) == 2
    with pytest.raises(UserError, match="--metric nothing"):
        compare_command(given[:2], metrics=["nothing"], html=None, as_json=True)
