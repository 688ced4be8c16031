"""Losses of a fixed run: a change of the code that is not meant to change numbers leaves them as they are.

One that is meant to says so in its commit and writes them anew: python -m tests.test_golden
"""

import json
from pathlib import Path

import pytest
import torch

from clip_train.distributed.world import World
from clip_train.loss.clip import ClipLoss
from clip_train.model.zoo import create_model
from clip_train.optim.adamw import build_adamw
from clip_train.step import TrainStep
from clip_train.types import Batch
from tests.model import reference

GOLDEN = Path(__file__).parent / "golden_losses.json"


def losses(steps=20, pairs=16):
    """Train the smallest model on noise, on one thread."""
    torch.set_num_threads(1)
    model, world = create_model("tiny", seed=0), World()
    optimizer = build_adamw(model, lr=0.0, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6)
    step = TrainStep(
        model, wrapped=model, loss_fn=ClipLoss(world=world), optimizer=optimizer, world=world, seed=0,
        max_grad_norm=1.0, micro_batch_size=8,
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    found = []
    for i in range(steps):
        lengths = torch.randint(3, 78, (pairs,), generator=g)
        batch = Batch(
            images=torch.randint(0, 256, (pairs, 64, 64, 3), dtype=torch.uint8, generator=g),
            tokens=reference.random_captions(lengths.tolist(), seed=i),
            lengths=lengths,
            slots=torch.arange(pairs),
            valid=torch.ones(pairs, dtype=torch.bool),
        )
        found.append(step(batch, learning_rate=1e-4, step=i).loss.item())
    return found


def test_the_losses_of_twenty_steps_are_the_stored_ones():
    assert losses() == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-5)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(losses(), indent=0) + "\n")
