"""The space of a sweep: every range means what it says, and a mistake names its key."""

import math

import pytest

from clip_train.errors import UserError
from clip_train.tools.sweep.space import Kind, parse_range, parse_space


@pytest.mark.parametrize(
    ("text", "kind", "samples"),
    [
        ("log(1e-5,1e-2)", Kind.log, ("1e-05", "0.01")),
        (" uniform( 0 , 0.25 ) ", Kind.uniform, ("0", "0.25")),
        ("int(-2,16)", Kind.int, ("-2", "16")),
        ("choice(tiny,tiny-rn)", Kind.choice, ("tiny", "tiny-rn")),
        ("choice(null,[0.9,0.98],'a,b')", Kind.choice, ("null", "[0.9,0.98]", "'a,b'")),
    ],
)
def test_a_range_has_the_ends_or_choices_that_were_written(text, kind, samples):
    one = parse_range("optim.lr", text)
    assert (one.kind, one.samples) == (kind, samples)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1e-3", r"is no range: log\(LOW,HIGH\), uniform"),
        ("normal(0,1)", "is no range"),
        ("log(1e-5,1e-2", "is no range"),
        ("log(1e-5)", "log takes two numbers"),
        ("log(1e-5,fast)", "log takes two numbers"),
        ("uniform(1,1)", "LOW must be below HIGH"),
        ("uniform(0,inf)", "both finite"),
        ("log(0,1)", "LOW must be above 0"),
        ("int(1,2.5)", "int takes whole numbers"),
        ("choice(a)", "two or more different values"),
        ("choice(a,a)", "two or more different values"),
        ("choice(a,[b)", "sweep.space.optim.lr"),
        ("choice()", "sweep.space.optim.lr"),
    ],
)
def test_what_is_no_range_is_refused_with_its_key(text, message):
    with pytest.raises(UserError, match=message) as refused:
        parse_range("optim.lr", text)
    assert str(refused.value).startswith(f"sweep.space.optim.lr={text}")


@pytest.mark.parametrize("key", ["name", "run_dir", "resume"])
def test_what_each_trial_has_for_itself_is_not_varied(key):
    with pytest.raises(UserError, match=f"each trial has a {key} of its own"):
        parse_range(key, "choice(a,b)")


def test_a_file_and_the_command_line_make_one_space(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text("optim.lr: log(1e-5,1e-2)\noptim:\n  warmup: int(1,5)\nmodel: choice(tiny,demo)\n")
    space = parse_space(str(path), given={"optim.warmup": "int(2,9)", "seed": "int(0,1)"})
    assert {one.key: str(one) for one in space} == {
        "optim.lr": "log(1e-05,0.01)",
        "optim.warmup": "int(2,9)",
        "model": "choice(tiny,demo)",
        "seed": "int(0,1)",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "holds no keys"),
        ("optim.lr: 3\n", "optim.lr=3 is no range"),
        (None, "sweep.space=.*cannot be read"),
    ],
)
def test_a_file_that_holds_no_space_is_named(tmp_path, content, message):
    path = tmp_path / "space.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        parse_space(str(path), given={})


@pytest.mark.parametrize("space", [[1], 3])
def test_a_space_that_is_neither_file_nor_ranges_is_refused(space):
    with pytest.raises(UserError, match="neither a file nor ranges"):
        parse_space(space, given={})


def test_nothing_to_vary_is_refused_with_an_example():
    with pytest.raises(UserError, match=r"sweep\.space\.optim\.lr=log\(1e-5,1e-2\)"):
        parse_space(None, given={})


def test_places_on_an_axis_follow_the_scale_of_the_range():
    log, steps, named = (parse_range("k", text) for text in ("log(1e-4,1e-2)", "int(2,6)", "choice(a,b,c)"))
    assert math.isclose(log.share("1e-3"), 0.5)
    assert [steps.share(value) for value in ("2", "3", "6")] == [0.0, 0.25, 1.0]
    assert [named.share(value) for value in "abc"] == [0.0, 0.5, 1.0]
