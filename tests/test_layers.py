"""A file imports only from lower rows; peers in a row do not import each other."""

import ast

from tests.sources import ROOT, modules

ROWS = [
    {"__main__"},
    {"cli"},
    {"cli_shards", "cli_runs", "cli_models", "cli_examples"},
    {"tools"},
    {"__init__"},
    {"train", "help"},
    {"evaluate", "micro_batch", "starting_point", "initial_weights", "locked_tower", "health", "progress", "attempts"},
    {"config", "step"},
    {"config_keys"},
    {"schema"},
    {"evaluation", "interop"},
    {"data", "model", "tokenizer", "loss", "optim", "checkpoint", "metrics"},
    {"distributed", "storage", "calibration", "overrides", "requirements", "sweep_config"},
    {"exit_record"},
    {"types", "errors", "files", "config_dir", "redact"},
]


def room_of(module: str) -> str:
    """`clip_train.data.order` -> `data`; `clip_train` itself -> `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_every_file_has_a_row():
    known = set().union(*ROWS)
    found = {
        p.stem if p.suffix == ".py" else p.name
        for p in ROOT.iterdir()
        if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert found == known


def test_a_file_imports_only_from_lower_rows():
    height = {room: -i for i, row in enumerate(ROWS) for room in row}
    broken = []
    for path, _, tree in modules():
        own = path.parts[0].removesuffix(".py")
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            if isinstance(node, ast.ImportFrom) and node.module == "clip_train":
                names = [f"clip_train.{a.name}" if a.name in height else "clip_train" for a in node.names]
            for name in names:
                if not name or name.split(".")[0] != "clip_train":
                    continue
                room = room_of(name)
                version_only = room == "__init__" and {a.name for a in node.names} <= {"__version__"}
                if room != own and height[room] >= height[own] and not version_only:
                    broken.append(f"{path}:{node.lineno} imports {name}")
    assert not broken, "\n".join(broken)


def test_config_and_data_choices_have_the_same_names_everywhere():
    from clip_train.schema import CHOICES

    configs = {p.name for p in (ROOT.parent / "configs").iterdir() if p.is_dir()}
    without_package = {"logging", "launch", "experiment", "suite"}
    packages = {p.name for p in ROOT.iterdir() if (p / "__init__.py").exists()}
    for group in configs - without_package:
        assert group in packages, f"configs/{group} has no clip_train/{group}"
        assert group in CHOICES, f"configs/{group} has no entry in CHOICES"
        assert (ROOT.parent / "tests" / group).is_dir(), f"configs/{group} has no tests/{group}"
    assert set(CHOICES) <= configs
