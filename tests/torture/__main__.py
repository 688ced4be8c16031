"""Torture clip-train in as many cases as there is time for.

    python -m tests.torture                           # every row in full: many hours
    python -m tests.torture --fraction 0.25           # a quarter of each row
    python -m tests.torture --rows 9,10 --fraction 1  # some rows
    python -m tests.torture --rows 9 --case 1234      # one case again, with its error
    python -m tests.torture --table                   # what has been done

Stop it whenever you like: finished cases are in OUT/results.jsonl, and the same command goes on after them. Ends with 1
if a case failed.
"""

import argparse
import os
import sys
from pathlib import Path

from tests.torture.runner import chosen, find_rows, read_results, run_row, table


def main() -> int:
    """Run as the command line says; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="numbers, separated by commas; all if not given")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the nightly count of each row (default 1)")
    parser.add_argument("--out", type=Path, default=Path("runs/torture"), help="folder of the results")
    parser.add_argument("--seed", type=int, default=0, help="another one makes other cases")
    parser.add_argument("--case", type=int, help="run the case of this seed alone; nothing is written")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = find_rows()
    selected = chosen(rows, [name for name in options.rows.split(",") if name])
    if options.case is not None:
        errors = [o.error for row in selected for o in row.run(0, 1, options.case) if o.error]
        print("\n".join(errors) or "passed")
        return int(bool(errors))
    if not options.table:
        for row in selected:
            run_row(row, fraction=options.fraction, out=options.out, seed=options.seed)
    print(table(rows, out=options.out))
    return int(any(record["failed"] for record in read_results(options.out)))


if __name__ == "__main__":
    sys.exit(main())
