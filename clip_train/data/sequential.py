"""Read pictures in order for evaluation: each exactly once, over all ranks, never resampled."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from clip_train.data.images.decode import open_image
from clip_train.data.images.folder import pictures_below
from clip_train.data.images.transforms import preprocess_pixels
from clip_train.data.index.files import IMAGE_EXTENSIONS
from clip_train.data.index.tar import Member, read_samples
from clip_train.data.index.walk import picture_of
from clip_train.data.shard_file import ShardFile
from clip_train.data.workers import WORKER_START_METHOD, as_is, start_worker, start_worker_server
from clip_train.errors import ClipTrainError, IntegrityError, UserError, reading

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from clip_train.distributed.world import World


class ImageSource(Protocol):
    """Pictures with a fixed order."""

    def __len__(self) -> int:
        """Return the number of pictures."""

    def read(self, index: int) -> bytes:
        """Return the encoded picture."""

    def key(self, index: int) -> str:
        """Return the name of the picture, for messages."""


class EvaluationBatch(NamedTuple):
    """A piece of this rank's pictures; every batch of an evaluation has the same shape."""

    images: Tensor  # [B, S, S, 3] uint8
    indices: Tensor  # [B] int64, place in the source; -1 in padding rows
    valid: Tensor  # [B] bool, False for padding rows


class ShardImages:
    """The pictures of shards, in shard order; captions and labels are not required.

    Args:
        shards: tars in order, as from `expand_shards` or `find_files`. Their headers are walked once, here; a remote
            one is downloaded for that, and again for its pictures if the cache has not kept it.

    Raises:
        IntegrityError: a shard is damaged or no sample has a picture.
    """

    def __init__(self, shards: Sequence[Path | ShardFile]) -> None:
        self._samples: list[tuple[ShardFile, str, Member, dict[str, Member]]] = []
        files = [shard if isinstance(shard, ShardFile) else ShardFile(location=str(shard)) for shard in shards]
        for file in files:
            with file.here() as path:
                for sample in read_samples(path):
                    extension = picture_of(sample)
                    if extension is not None:
                        self._samples.append((file, sample.key, sample.members[extension], sample.members))
        if not self._samples:
            raise IntegrityError(f"no pictures in {', '.join(file.location for file in files[:5]) or 'no shards'}")

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, index: int) -> bytes:
        """Return the encoded picture.

        Raises:
            IntegrityError: the shard cannot be read any more.
        """
        shard, _, member, _ = self._samples[index]
        return _read_member(shard, member)

    def key(self, index: int) -> str:
        """Return `shard.tar/key` of the picture."""
        shard, key, _, _ = self._samples[index]
        return f"{shard.name}/{key}"

    def content(self, index: int, extension: str) -> bytes:
        """Return another member of the picture's sample, such as `npy`.

        Raises:
            IntegrityError: the sample has no such member.
        """
        shard, _, _, members = self._samples[index]
        member = members.get(extension)
        if member is None:
            raise IntegrityError(f"{self.key(index)} has no .{extension} member, only {', '.join(sorted(members))}")
        return _read_member(shard, member)

    def text(self, index: int, extension: str) -> str:
        """Return the text member of the picture's sample, such as `txt` or `cls`, without surrounding blanks.

        Raises:
            IntegrityError: the sample has no such member, or it is not UTF-8.
        """
        try:
            return self.content(index, extension).decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise IntegrityError(f"{self.key(index)}.{extension} is not UTF-8 text") from error


class FileImages:
    """Pictures that are files, in the order given.

    Args:
        paths: of the pictures.
        folder: where their names start.
    """

    def __init__(self, paths: Sequence[Path], *, folder: Path) -> None:
        self._folder = folder
        self._paths = list(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def only(self, indices: Sequence[int]) -> FileImages:
        """Return some of the pictures, in the order given."""
        return FileImages([self._paths[i] for i in indices], folder=self._folder)

    def read(self, index: int) -> bytes:
        """Return the encoded picture.

        Raises:
            UserError: the file cannot be read.
        """
        with reading(self._paths[index]):
            return self._paths[index].read_bytes()

    def key(self, index: int) -> str:
        """Return the path of the picture, below the folder where it lies there."""
        path = self._paths[index]
        return (path.relative_to(self._folder) if path.is_relative_to(self._folder) else path).as_posix()


class FolderImages(FileImages):
    """The pictures below a folder, in the order of their paths.

    Raises:
        UserError: there are none.
    """

    def __init__(self, folder: Path) -> None:
        pictures = sorted(pictures_below(folder), key=lambda path: os.fsencode(path.relative_to(folder).as_posix()))
        super().__init__(pictures, folder=folder)
        if not len(self):
            raise UserError(f"{folder} holds no pictures ({', '.join(IMAGE_EXTENSIONS)})")


def evaluation_batches(
    source: ImageSource,
    *,
    world: World,
    image_size: int,
    squash: bool = False,
    batch_size: int,
    workers: int = 0,
    skip_bad: bool = False,
) -> Iterator[EvaluationBatch]:
    """Yield this rank's contiguous piece of a source, resized and centre-cropped.

    All ranks yield the same number of batches of the same shape, so collectives may follow each; over all ranks every
    picture is valid exactly once.

    Args:
        source: the pictures.
        world: which piece is this rank's.
        image_size: side S of the result in pixels.
        squash: resize both sides instead of cropping, as the model's config says.
        batch_size: rows B of every batch.
        workers: loader processes of this rank; 0 reads in this process.
        skip_bad: give rows whose picture cannot be decoded as not valid.

    Raises:
        IntegrityError: a picture cannot be decoded and `skip_bad` is not set; the message names it.
    """
    piece = -(-len(source) // world.size)
    num_batches = -(-piece // batch_size)
    first, last = world.rank * piece, min((world.rank + 1) * piece, len(source))
    batches = [(start, min(start + batch_size, last)) for start in range(first, first + piece, batch_size)]
    assert len(batches) == num_batches
    dataset = _EvaluationDataset(
        source, batches, image_size=image_size, squash=squash, batch_size=batch_size, skip_bad=skip_bad
    )
    if workers:
        start_worker_server()
        loader = DataLoader(
            dataset, batch_size=None, collate_fn=as_is, num_workers=workers, worker_init_fn=start_worker,
            multiprocessing_context=WORKER_START_METHOD,
        )  # fmt: skip
    else:
        loader = DataLoader(dataset, batch_size=None, collate_fn=as_is)
    for batch in loader:
        if isinstance(batch, ClipTrainError):
            raise batch
        yield batch


class _EvaluationDataset(Dataset[EvaluationBatch | ClipTrainError]):
    """Decodes one batch per item. Errors travel as values, since workers would wrap them in a traceback."""

    def __init__(
        self,
        source: ImageSource,
        batches: list[tuple[int, int]],
        *,
        image_size: int,
        squash: bool,
        batch_size: int,
        skip_bad: bool,
    ) -> None:
        self._source = source
        self._batches = batches
        self._image_size = image_size
        self._squash = squash
        self._batch_size = batch_size
        self._skip_bad = skip_bad

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> EvaluationBatch | ClipTrainError:
        try:
            return self._batch(*self._batches[number])
        except ClipTrainError as error:
            return error

    def _batch(self, first: int, last: int) -> EvaluationBatch:
        size = self._image_size
        images = np.zeros((self._batch_size, size, size, 3), dtype=np.uint8)
        indices = np.full(self._batch_size, -1, dtype=np.int64)
        valid = np.zeros(self._batch_size, dtype=bool)
        for row, index in enumerate(range(first, last)):
            indices[row] = index
            try:
                images[row] = self._pixels(index)
                valid[row] = True
            except IntegrityError:
                if not self._skip_bad:
                    raise
        return EvaluationBatch(torch.from_numpy(images), torch.from_numpy(indices), torch.from_numpy(valid))

    def _pixels(self, index: int) -> np.ndarray:
        content = self._source.read(index)
        try:
            return preprocess_pixels(open_image(content), image_size=self._image_size, squash=self._squash)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise whatever damaged bytes lead them to
            raise IntegrityError(f"{self._source.key(index)} cannot be decoded for evaluation: {error}") from error


def _read_member(shard: ShardFile, member: Member) -> bytes:
    try:
        with shard.here() as path:
            file = path.open("rb")
        with file:  # a shard that is open stays readable, whatever leaves the cache
            file.seek(member.offset)
            content = file.read(member.size)
    except OSError as error:
        raise IntegrityError(f"{shard.location}: {error.strerror or error}") from error
    if len(content) != member.size:
        raise IntegrityError(
            f"{shard.location} at byte {member.offset}: {len(content)} of {member.size} bytes could be read"
        )
    return content
