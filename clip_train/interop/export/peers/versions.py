"""Print which of the libraries this Python has, as JSON: the name in the table to the version."""

import importlib.util
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = {
    "open_clip": ("open_clip_torch",),
    "transformers": ("transformers",),
    "sentence-transformers": ("sentence-transformers",),
    "clip-benchmark": ("clip-benchmark",),
    "openai clip": ("openai-clip", "clip"),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
}


def is_openais() -> bool:
    """Tell OpenAI's module `clip` from other packages of that name."""
    found = importlib.util.find_spec("clip")
    return bool(found and found.origin and (Path(found.origin).parent / "simple_tokenizer.py").is_file())


installed = {}
for name, packages in PACKAGES.items():
    for package in packages:
        try:
            installed[name] = version(package)
            break
        except PackageNotFoundError:
            continue
if "openai clip" in installed and not is_openais():
    del installed["openai clip"]
print(json.dumps(installed))
