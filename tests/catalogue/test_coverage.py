"""Every item of the catalogue has a test that carries its number."""

import ast
from pathlib import Path

ITEMS = range(1, 81)


def marked_items() -> set[int]:
    """Return the numbers in all calls `catalogue(N)` and `pytest.mark.catalogue(N)` of the tests."""
    found = set()
    for path in Path(__file__).parents[1].rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "catalogue(" in text else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "catalogue":
                found |= {one.value for one in node.args if isinstance(one, ast.Constant)}
    return found


def test_every_item_of_the_catalogue_has_a_test():
    assert marked_items() == set(ITEMS)
