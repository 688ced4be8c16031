"""Where the YAML files are: inside an installed wheel, or beside the package in a checkout."""

from pathlib import Path


def config_dir() -> Path:
    """Return the folder that holds `model/`, `data/` and the other config groups."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"
