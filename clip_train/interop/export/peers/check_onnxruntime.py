"""Features by onnxruntime, from the exported graphs, at batch sizes 1, 2 and the rest."""

import numpy as np
import onnxruntime
from peer_io import FOLDER, read_tensors, write_features


def run(graph: str, name: str, rows: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(FOLDER / "onnx" / graph), sess_options=options, providers=["CPUExecutionProvider"]
    )
    return np.concatenate([session.run(None, {name: piece})[0] for piece in np.split(rows, [1, 3])])


pixels, tokens = read_tensors()
features = {"image": run("image.onnx", "pixel_values", pixels), "text": run("text.onnx", "input_ids", tokens)}
if (FOLDER / "onnx" / "image.int8.onnx").is_file():
    features["int8_image"] = run("image.int8.onnx", "pixel_values", pixels)
    features["int8_text"] = run("text.int8.onnx", "input_ids", tokens)
write_features(**features)
