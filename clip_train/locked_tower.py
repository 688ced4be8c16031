"""Compute the features of a locked image tower once for all training pictures: `model.vision.cache_features`."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from clip_train.data.features import FeatureTable, MissingPictures
from clip_train.data.loader import TrainStream
from clip_train.data.sequential import evaluation_batches
from clip_train.distributed.agree import on_main
from clip_train.distributed.parallel import reshard
from clip_train.distributed.shards import whole
from clip_train.evaluation.features import encode_images, evaluating, to_numpy
from clip_train.evaluation.interruptible import Interrupted, InterruptibleEncoder
from clip_train.metrics.panel import SECONDS_BETWEEN_LINES, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from clip_train.data.sequential import EvaluationBatch
    from clip_train.data.stream import BatchStream
    from clip_train.distributed.stop import StopReason
    from clip_train.distributed.world import World
    from clip_train.model.clip import CLIP
    from clip_train.schema import TrainConfig

BATCH_SIZE = 256


def cache_features(
    config: TrainConfig, *, model: CLIP, stream: BatchStream, run_dir: Path, world: World,
    wanted: Callable[[], StopReason],
) -> None:  # fmt: skip
    """Let `stream` deliver features [B, D] in place of pictures, after computing those that are not there yet.

    Does nothing unless the config asks for it. Every rank calls it, with the weights that the run will have; each
    computes its share. Pictures are seen whole, as in evaluation. `wanted` says why this rank should stop: then the
    stream goes on with pictures, of which no step is taken, and the next attempt computes what is missing.

    Raises:
        UserError: there is no room for the features.
        IntegrityError: a shard cannot be read.
    """
    if not config.model.vision.cache_features:
        return
    assert isinstance(stream, TrainStream), "the config allows no other reader"
    table = FeatureTable(run_dir / "features", sources=stream.sources, width=model.config.embed_dim)
    identity = {
        "sources": [[source.name, source.fingerprint] for source in stream.sources],
        "tower": {key: str(value) for key, value in asdict(model.config.vision).items()},
        "pixels": [list(model.config.mean), list(model.config.std), model.config.squash],
        "precision": config.precision.value,
        "weights": _weights_hash(model),
    }
    on_main(lambda: table.begin(identity), world=world)
    missing = table.missing()
    pictures = MissingPictures(stream.sources, table=table.samples, numbers=missing)
    count, told = 0, time.monotonic()
    if len(missing) and world.is_main:
        say(f"computing the features of {len(missing):,} pictures, once")

    def batches() -> Iterator[EvaluationBatch]:
        return evaluation_batches(
            pictures, world=world, image_size=config.model.vision.image_size, squash=config.model.squash,
            batch_size=BATCH_SIZE, workers=config.data.workers, skip_bad=True,
        )  # fmt: skip

    encoder = InterruptibleEncoder(model, wanted=wanted, world=world)
    try:
        with evaluating(encoder, world=world, precision=config.precision.value):
            for features, indices, valid in encode_images(encoder, batches if len(missing) else list, world=world):
                rows, own = to_numpy(features), to_numpy(indices)
                shown = own >= 0
                table.write(missing[own[shown]], rows[shown], valid=to_numpy(valid)[shown])
                count += len(features) * world.size
                if world.is_main and time.monotonic() - told > SECONDS_BETWEEN_LINES:
                    told = time.monotonic()
                    say(f"features of {min(count, len(missing)):,} of {len(missing):,} pictures")
    except Interrupted:
        return
    finally:
        reshard(model)
    on_main(lambda: None, world=world)  # no rank reads before all have written
    stream.use_features(table)


def _weights_hash(model: CLIP) -> str:
    """Hash the image tower. Every rank calls it: sharded weights are put together."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.visual.state_dict().items()):
        digest.update(name.encode())
        digest.update(whole(tensor.detach()).cpu().numpy().tobytes())
    return digest.hexdigest()
