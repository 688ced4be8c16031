"""Versions: Python, torch, CUDA, the driver, and the libraries that exclude each other."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from typing import TYPE_CHECKING, NamedTuple

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from clip_train.errors import UserError
from clip_train.requirements import require_versions
from clip_train.tools.verdict import Line, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PACKAGE = "clip-train"
_OLDEST_PYTHON = (3, 11)
_NOT_OFFERED = ("dev", "verify", "bench")  # extras for those who work on this package


class Conflict(NamedTuple):
    """A pair of libraries that is known to fail though no requirement says so."""

    library: str
    with_library: str
    broken: str  # versions of the second
    text: str
    fix: str


KNOWN_CONFLICTS = (
    Conflict(
        "open-clip-torch", "webdataset", ">=1", "open_clip's training reads shards with webdataset<=0.2.86 only",
        "train with open_clip in an environment of its own; loading and evaluating its models works",
    ),
    Conflict(
        "torchmetrics", "transformers", ">=5", "CLIPScore of torchmetrics fails with transformers 5",
        "leave CLIPScore alone, or use transformers<5 in an environment of its own",
    ),
    Conflict(
        "hydra-optuna-sweeper", "optuna", ">=3", "Hydra's Optuna plugin needs optuna<3",
        "pip uninstall hydra-optuna-sweeper",
    ),
)  # fmt: skip


def check_software() -> list[Line]:
    """Return a line on each piece of software."""
    installed = installed_versions()
    return [
        _python(), _torch(), *_cuda(), _requirements(), _extras(installed), *known_conflicts(installed),
        *broken_requirements(installed),
    ]  # fmt: skip


def installed_versions() -> dict[str, str]:
    """Return the version of every installed library by its canonical name."""
    return {canonicalize_name(one.name): one.version for one in distributions() if one.name}


def known_conflicts(installed: Mapping[str, str]) -> list[Line]:
    """Return a warning for each pair of installed libraries that is known to fail."""
    return [
        Line(
            Verdict.warning, "conflict",
            f"{one.library} {installed[one.library]} and {one.with_library} {installed[one.with_library]}: {one.text}",
            one.fix,
        )
        for one in KNOWN_CONFLICTS
        if one.library in installed
        and installed.get(one.with_library) is not None
        and SpecifierSet(one.broken).contains(installed[one.with_library], prereleases=True)
    ]  # fmt: skip


def broken_requirements(installed: Mapping[str, str]) -> list[Line]:
    """Return a warning for each installed library whose own requirement on one of ours does not hold."""
    ours = {canonicalize_name(one.name) for one in _requirements_of(PACKAGE)}
    lines = []
    for name, found in sorted(installed.items()):
        for one in _requirements_of(name) if name != PACKAGE else ():
            needed = canonicalize_name(one.name)
            applies = one.marker is None or one.marker.evaluate({"extra": ""})
            if applies and needed in ours & installed.keys() and not _holds(one.specifier, installed[needed]):
                text = f"{name} {found} needs {needed}{one.specifier}, here is {installed[needed]}"
                lines.append(
                    Line(Verdict.warning, "conflict", text, f"pip install -U {name}, or an environment of its own")
                )
    return lines


def _python() -> Line:
    text = f"{platform.python_version()} on {platform.platform()}"
    if sys.version_info[:2] < _OLDEST_PYTHON:
        return Line(Verdict.fail, "Python", text, "Python 3.11 or newer")
    return Line(Verdict.ok, "Python", text)


def _torch() -> Line:
    import torch

    return Line(
        Verdict.ok, "torch",
        f"{torch.__version__}, {torch.get_num_threads()} threads, built for "
        f"{f'CUDA {torch.version.cuda}' if torch.version.cuda else 'the CPU'}",
    )  # fmt: skip


def _cuda() -> list[Line]:
    import torch

    driver = driver_version()
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus)
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        return [
            Line(Verdict.ok, "GPU", names), Line(Verdict.ok, "driver", driver or "unknown"),
            Line(Verdict.ok, "NCCL", nccl),
        ]  # fmt: skip
    if driver is None:
        return [Line(Verdict.ok, "GPU", "none, and no NVIDIA driver: training runs on the CPU")]
    fix = "an older torch that suits the driver, a newer driver, or look at CUDA_VISIBLE_DEVICES"
    if torch.version.cuda is None:
        fix = "install torch built for CUDA"
    return [Line(Verdict.fail, "GPU", f"torch sees none, though there is driver {driver}", fix)]


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, None without its command line tool, which containers may lack."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return "that does not answer"
    return asked.stdout.split("\n")[0].strip() or None if asked.returncode == 0 else None


def _requirements() -> Line:
    try:
        found = version(PACKAGE)
        require_versions()
    except PackageNotFoundError:
        text = "runs from a checkout, not installed: versions of its libraries cannot be checked"
        return Line(Verdict.warning, PACKAGE, text, "pip install -e .")
    except UserError as error:
        return Line(Verdict.fail, PACKAGE, str(error), f"pip install -U {PACKAGE}")
    return Line(Verdict.ok, PACKAGE, f"{found}, with libraries of the versions that it needs")


def _extras(installed: Mapping[str, str]) -> Line:
    needed: dict[str, list[Requirement]] = {}
    for one in _requirements_of(PACKAGE):
        for extra in _extras_named(one):
            needed.setdefault(extra, []).append(one)
    offered = {extra: ones for extra, ones in needed.items() if extra not in _NOT_OFFERED}
    old: list[str] = []
    present: list[str] = []
    absent: list[str] = []
    for extra, ones in sorted(offered.items()):
        versions = {one.name: installed.get(canonicalize_name(one.name)) for one in ones}
        wrong = [one for one in ones if (found := versions[one.name]) and not _holds(one.specifier, found)]
        old += [f"{one.name} {versions[one.name]}, needed {one.specifier}" for one in wrong]
        (absent if None in versions.values() else present).append(extra)
    text = f"there: {', '.join(present) or 'none'}; not there: {', '.join(absent) or 'none'}"
    if old:
        return Line(Verdict.warning, "extras", f"{text}; {'; '.join(old)}", "pip install -U of these")
    return Line(Verdict.ok, "extras", text + (f' (pip install "{PACKAGE}[{absent[0]}]")' if absent else ""))


def _extras_named(one: Requirement) -> list[str]:
    """Return the extras that ask for a requirement."""
    if one.marker is None or one.marker.evaluate({"extra": ""}):
        return []
    parts = str(one.marker).replace("'", '"').split('extra == "')[1:]
    return [part.partition('"')[0] for part in parts]


def _requirements_of(name: str) -> Iterable[Requirement]:
    try:
        lines = requires(name) or []
    except PackageNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(Requirement(line))
        except InvalidRequirement:
            continue  # an old library's own mistake
    return found


def _holds(specifier: SpecifierSet, found: str) -> bool:
    return specifier.contains(found, prereleases=True)
