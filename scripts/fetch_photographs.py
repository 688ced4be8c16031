"""Fetch 23 real photographs that Debian ships as desktop backgrounds, for measuring decoders on real pictures.

    python scripts/fetch_photographs.py photographs
    python scripts/bench_data.py --peer-python PATH --pictures photographs

Needs Debian (or a relative of it) with apt, but no root. 140 MB are downloaded, 17 MB are kept.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from debian import fetch_package

from clip_train.errors import UserError

# The other backgrounds of these packages are drawn.
PHOTOGRAPHS = {
    "mate-backgrounds": [
        f"usr/share/backgrounds/mate/nature/{name}.jpg"
        for name in (
            "Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "LadyBird", "RainDrops", "Storm",
            "TwoWings", "Wood", "YellowFlower",
        )
    ],
    "plasma-workspace-wallpapers": [
        f"usr/share/wallpapers/{name}/contents/images/2560x1600.jpg"
        for name in (
            "BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow", "FallenLeaf", "Grey", "Kite",
            "OneStandsOut", "Path", "summer_1am",
        )
    ],
}  # fmt: skip


def main() -> int:
    """Fetch the packages and copy their photographs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the photographs; must not exist yet")
    out = parser.parse_args().out
    try:
        if out.exists():
            raise UserError(f"{out} exists already: remove it or name another folder")
        with tempfile.TemporaryDirectory(prefix="photographs-") as folder:
            for package, paths in PHOTOGRAPHS.items():
                root = fetch_package(package, folder=Path(folder))
                out.mkdir(parents=True, exist_ok=True)
                for path in paths:
                    name = Path(path).stem if package == "mate-backgrounds" else Path(path).parts[3]
                    shutil.copyfile(root / path, out / f"{name}.jpg")
    except UserError as error:
        print(f"fetch_photographs: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{len(list(out.iterdir()))} photographs in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
