"""Find pictures by a text or another picture: an index of a folder that grows with it, and an exact matrix product."""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clip_train.data.images.decode import BadSampleError
from clip_train.data.images.folder import is_picture
from clip_train.errors import UserError
from clip_train.files import hash_file, replace_file
from clip_train.interop.loaded_model import progress_bar
from clip_train.interop.pictures import picture_batches, read_picture
from clip_train.interop.weights import weights_sha256
from clip_train.tools.classify import BATCH_SIZE
from clip_train.tools.classify_command import find_pictures

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from clip_train.interop.loaded_model import LoadedModel

INDEX_FOLDER = ".clip-train-index"
# clip-retrieval's names: a matrix, and the pictures of its rows.
EMBEDDINGS_FILE = "img_emb/img_emb_0.npy"
METADATA_FILE = "metadata/metadata_0.jsonl"
PARQUET_FILE = "metadata/metadata_0.parquet"
STATE_FILE = "index.json"  # written last: what belongs together


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedFile:
    """A picture as it was when it was embedded."""

    image_path: str  # below the folder
    size: int
    mtime_ns: int
    sha256: str


class ImageIndex(NamedTuple):
    """The pictures of a folder, embedded."""

    embeddings: np.ndarray  # float32 [n, D], unit length
    files: list[IndexedFile]
    place: Path
    num_embedded: int  # by this call, the others were in the index
    unreadable: dict[str, str]  # path to reason


class Match(NamedTuple):
    """A picture and how near it is."""

    image_path: str
    cosine: float


def update_index(folder: Path, *, model: LoadedModel, index_dir: Path | None = None) -> ImageIndex:
    """Return the index of all pictures below a folder, embedding those that it does not have.

    It is of these very weights; others have their own beside it. A picture counts as known by its path, size and time,
    or else by its content: one that was moved or touched is not embedded again.

    Args:
        folder: of pictures.
        model: that embeds them.
        index_dir: where indexes are kept; None for `.clip-train-index` in the folder.

    Raises:
        UserError: there is no such folder, or the index cannot be written.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    place = (index_dir or folder / INDEX_FOLDER) / index_key(model)
    old_files, old_rows = _read_index(place)
    known = {(file.image_path, file.size, file.mtime_ns): file for file in old_files}
    vectors = {file.sha256: row for file, row in zip(old_files, old_rows, strict=True)}
    files: list[IndexedFile] = []
    unreadable: dict[str, str] = {}
    for path in find_pictures([str(folder)]):
        name = path.relative_to(folder).as_posix()
        try:
            facts = path.stat()
            file = known.get((name, facts.st_size, facts.st_mtime_ns)) or IndexedFile(
                image_path=name, size=facts.st_size, mtime_ns=facts.st_mtime_ns, sha256=hash_file(path).sha256
            )
        except OSError as error:
            unreadable[name] = error.strerror or str(error)
            continue
        files.append(file)
    new = {file.sha256: folder / file.image_path for file in files if file.sha256 not in vectors}
    reasons = _embed(new, model=model, into=vectors)
    unreadable |= {file.image_path: reasons[file.sha256] for file in files if file.sha256 in reasons}
    files = [file for file in files if file.sha256 in vectors]
    width = model.config.embed_dim
    embeddings = np.stack([vectors[file.sha256] for file in files]) if files else np.empty((0, width), np.float32)
    if files != old_files:
        _write_index(place, files=files, embeddings=embeddings)
    return ImageIndex(embeddings, files, place, len(new) - len(reasons), unreadable)


def index_key(model: LoadedModel) -> str:
    """Return a name for everything that an embedding depends on besides the picture: weights, sizes, preprocessing."""
    config = json.dumps(asdict(model.config), sort_keys=True, default=str)
    return sha256(f"{config}\n{weights_sha256(model)}".encode()).hexdigest()[:16]


@torch.no_grad()
def embed_query(query: str, *, model: LoadedModel) -> np.ndarray:
    """Embed a picture if the query is a file, else a text: float32 [D], unit length.

    Raises:
        UserError: the file is no picture or not there, or the text has more tokens than the model's context.
    """
    if os.path.isfile(query):  # noqa: PTH113 a text may be too long for a path, which pathlib raises for
        try:
            pixels = read_picture(query, preprocess=model.preprocess, upright=True)
        except BadSampleError as error:
            raise UserError(f"{query}: {error.reason.replace('_', ' ')}") from error
        return model.encode_image(pixels[None].to(model.logit_scale.device))[0].cpu().numpy()
    if is_picture(Path(query)):
        raise UserError(f"{query}: there is no picture of this name")
    return model.encode(texts=[query], progress=False)[0]


def nearest(index: ImageIndex, vector: np.ndarray, *, top: int) -> list[Match]:
    """Return the `top` pictures of highest cosine with a unit vector [D], all compared, best first."""
    cosines = index.embeddings @ vector
    order = np.argsort(-cosines, kind="stable")[:top]
    return [Match(index.files[i].image_path, float(cosines[i])) for i in order.tolist()]


@torch.no_grad()
def _embed(paths: dict[str, Path], *, model: LoadedModel, into: dict[str, np.ndarray]) -> dict[str, str]:
    """Embed pictures by the hash of their content, and return the reasons why some cannot be read."""
    reasons: dict[str, str] = {}
    hashes = iter(paths)
    with progress_bar(len(paths), what="pictures", shown=True) as advance:
        for batch in picture_batches(paths.values(), preprocess=model.preprocess, batch_size=BATCH_SIZE, upright=True):
            read = [(next(hashes), pixels) for _, pixels in batch]
            reasons |= {name: pixels for name, pixels in read if isinstance(pixels, str)}
            good = {name: pixels for name, pixels in read if isinstance(pixels, Tensor)}
            if good:
                features = model.encode_image(torch.stack(list(good.values())).to(model.logit_scale.device))
                into |= dict(zip(good, features.cpu().numpy(), strict=True))
            advance(len(batch))
    return reasons


def _read_index(place: Path) -> tuple[list[IndexedFile], Sequence[np.ndarray]]:
    """Return what an index holds; one that was interrupted while it was written, or damaged, holds nothing."""
    try:
        state = json.loads((place / STATE_FILE).read_text(encoding="utf-8"))
        if any(hash_file(place / name).sha256 != state[name] for name in (EMBEDDINGS_FILE, METADATA_FILE)):
            return [], []
        lines = (place / METADATA_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError, KeyError, TypeError):
        return [], []
    return [IndexedFile(**json.loads(line)) for line in lines], np.load(place / EMBEDDINGS_FILE, allow_pickle=False)


def _write_index(place: Path, *, files: Sequence[IndexedFile], embeddings: np.ndarray) -> None:
    rows = [asdict(file) for file in files]
    matrix = io.BytesIO()
    np.save(matrix, embeddings)
    contents = {
        EMBEDDINGS_FILE: matrix.getvalue(),
        METADATA_FILE: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    }
    state = {name: sha256(content).hexdigest() for name, content in contents.items()}
    if find_spec("pyarrow") is not None:  # what clip-retrieval reads
        contents[PARQUET_FILE] = _parquet(rows)
    contents[STATE_FILE] = json.dumps(state).encode()
    try:
        for name, content in contents.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            replace_file(place / name, content)
    except OSError as error:
        raise UserError(f"the index {place} cannot be written ({error.strerror}): name another with --index") from error


def _parquet(rows: Iterable[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    # Arrow's text is UTF-8, which file names need not be.
    shown = [{**row, "image_path": os.fsencode(row["image_path"]).decode("utf-8", "replace")} for row in rows]
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(shown), table)
    return table.getvalue()
