"""Open what known pictures are told from: sets of foreign pictures, and words that are no labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.errors import UserError
from clip_train.evaluation.config import missing_shards, names_shards
from clip_train.evaluation.prompts.files import imagenet_classnames, read_lines

if TYPE_CHECKING:
    from clip_train.data.remote.cache import ShardCache
    from clip_train.data.sequential import ImageSource

GENERATED = "generated"
RESERVED = ("known", "all", "aurc")  # their figures have these names
NUM_GENERATED = 200


def open_foreign(
    sets: Mapping[str, str], *, image_size: int, cache: ShardCache | None = None
) -> dict[str, ImageSource]:
    """Open sets of foreign pictures by name, all of the generated ones if none is named.

    Args:
        sets: name -> folder, shards, or `generated`; see `RejectConfig.foreign`.
        image_size: side of the pictures that are generated, in pixels.
        cache: where remote shards are read; without it they are refused.

    Raises:
        UserError: a set is not there, or is not one that can be generated.
        IntegrityError: a shard is damaged.
    """
    from clip_train.data.scenes.foreign import Foreign, ForeignImages
    from clip_train.data.sequential import FolderImages, ShardImages
    from clip_train.data.shard_file import find_files

    opened: dict[str, ImageSource] = {}
    for name, place in (sets or {kind.value: GENERATED for kind in Foreign}).items():
        if name in RESERVED:
            raise UserError(f"foreign.{name}: call the set something else")
        folder = Path(place).expanduser()
        if place == GENERATED:
            if name not in list(Foreign):
                raise UserError(f"foreign.{name}={GENERATED}: only {', '.join(Foreign)} can be generated")
            opened[name] = ForeignImages(Foreign(name), num_images=NUM_GENERATED, image_size=image_size)
        elif folder.is_dir() and not any(folder.glob("*.tar")):
            opened[name] = FolderImages(folder)
        else:
            opened[name] = ShardImages(find_files(place, field=f"foreign.{name}", cache=cache))
    return opened


def missing_foreign(sets: Mapping[str, str], *, public_only: bool) -> str | None:
    """Return the first set that is not there, or what is wrong with its shards; None if all are there."""
    for name, place in sets.items():
        if names_shards(place):
            if wrong := missing_shards(place, field=f"foreign.{name}", public_only=public_only):
                return wrong
        elif place != GENERATED and not Path(place).expanduser().exists():
            return place
    return None


def load_lexicon(choice: str | None) -> list[str]:
    """Return distinct words: `imagenet` for its class names, or those of a text file; None for none.

    Raises:
        UserError: the file cannot be read.
    """
    if choice is None:
        return []
    return list(dict.fromkeys(imagenet_classnames() if choice == "imagenet" else read_lines(choice)))
