"""The torture runner adds up pieces, keeps what is done, and says how to bring a failure back."""

import json

import pytest

from tests.torture.row import Row, each
from tests.torture.runner import chosen, find_rows, read_results, run_row, table


def fails_at_seven(seed):
    assert seed % 10 != 7, f"seven in {seed}"


ROW = Row(number=99, text="seeds without a seven", nightly=40, run=each(fails_at_seven))


def test_pieces_add_up_and_failures_carry_their_seed(tmp_path, capsys):
    run_row(ROW, fraction=0.25, out=tmp_path, seed=100)
    run_row(ROW, fraction=0.25, out=tmp_path, seed=100)  # done already
    run_row(ROW, fraction=0.5, out=tmp_path, seed=100)
    records = read_results(tmp_path)
    assert [(r["done"], r["passed"], r["failed"]) for r in records] == [(10, 9, 1), (10, 9, 1)]
    assert [f["seed"] for r in records for f in r["failures"]] == [107, 117]
    assert "seven in 117" in records[1]["failures"][0]["error"]
    assert "--rows 99 --case 117" in capsys.readouterr().out
    assert "| 99 | seeds without a seven | 20 | 40 | 2 | 0.0 |" in table([ROW], out=tmp_path)


def test_an_interrupted_row_goes_on_after_its_last_finished_case(tmp_path):
    seen = []

    def interrupted(seed):
        seen.append(seed)
        if len(seen) == 4:
            raise KeyboardInterrupt

    row = Row(number=1, text="", nightly=8, run=each(interrupted))
    with pytest.raises(KeyboardInterrupt):
        run_row(row, fraction=1, out=tmp_path, seed=0)
    run_row(row, fraction=1, out=tmp_path, seed=0)
    assert seen == [0, 1, 2, 3, 3, 4, 5, 6, 7]
    assert sum(r["done"] for r in read_results(tmp_path)) == 8


def test_a_half_line_of_a_killed_run_is_left_out_and_closed(tmp_path):
    run_row(ROW, fraction=0.1, out=tmp_path, seed=0)
    path = tmp_path / "results.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole[:30])
    run_row(ROW, fraction=0.2, out=tmp_path, seed=0)
    assert [r["done"] for r in read_results(tmp_path)] == [4, 4]


def test_rows_are_chosen_by_number_or_part():
    rows = [Row(number=13, part=part, text="", nightly=1, run=each(print)) for part in "ab"]
    assert [r.key for r in chosen(rows, [])] == ["13a", "13b"]
    assert [r.key for r in chosen(rows, ["13"])] == ["13a", "13b"]
    assert [r.key for r in chosen(rows, ["13b"])] == ["13b"]
    with pytest.raises(SystemExit, match="no row 14: there are 13a, 13b"):
        chosen(rows, ["14"])


@pytest.mark.slow
def test_the_first_case_of_every_row_of_many_passes():
    failed = {row.key: o.error for row in find_rows() if row.nightly > 1 for o in row.run(0, 1, 0) if o.error}
    assert not failed, json.dumps(failed, indent=1)
