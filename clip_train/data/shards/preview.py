"""Show what `shards make` would write, before it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clip_train.data.images.decode import BadSampleError
from clip_train.data.shards.inputs.detect import read_input
from clip_train.data.shards.make import MakeOptions, sample_key, shuffled
from clip_train.data.shards.sample import examine, read_captions

if TYPE_CHECKING:
    from pathlib import Path

    from clip_train.data.shards.inputs.pair import InputOptions, Pair


def preview_pairs(source: Path, *, options: MakeOptions, input_options: InputOptions, number: int = 5) -> str:
    """Return the kind of an input, how many pairs it holds, and the first pairs with their captions.

    Raises:
        UserError: the input is of no known kind.
    """
    found = read_input(source, options=input_options)
    lines = [f"{source} is {found}: {len(found.pairs):,} pictures"]
    for place, pair in enumerate(shuffled(found.pairs, options=options)[:number]):
        lines += [sample_key(pair, number=place), f"  picture  {pair.image.path}", *_outcome(pair, options=options)]
    return "\n".join(lines)


def _outcome(pair: Pair, *, options: MakeOptions) -> list[str]:
    try:
        side = "val" if examine(pair) < options.val else "train"
        captions = [f"  caption  {caption.decode('utf-8-sig').strip()[:200]}" for caption in read_captions(pair)]
    except BadSampleError as error:
        return [f"  left out: {error.reason}"]
    return [*captions, f"  goes to  {side}"]
