"""Ranks that should hold the same weights are found to differ in a single bit, and named."""

import hashlib

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from clip_train.distributed.parallel import parallelize
from clip_train.health.replicas import CHUNK, bit_hash, differing_ranks
from clip_train.model.zoo import create_model
from tests.gloo import run_on_ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_single_bit_changes_the_hash(dtype):
    values = torch.randn(37, 3).to(dtype)
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    original = bit_hash(values)
    for element in (0, 1, 55, 110):
        for bit in range(8 * values.element_size()):
            flipped = values.clone()
            mask = torch.tensor(1).to(words) << bit
            flipped.view(words).flatten()[element] ^= mask
            assert bit_hash(flipped) != original, (element, bit)


def test_the_hash_depends_on_bits_and_places_alone():
    values = torch.randn(CHUNK + 5)
    assert bit_hash(values) == bit_hash(values.clone())
    swapped = values.clone()
    swapped[[3, CHUNK + 3]] = swapped[[CHUNK + 3, 3]]
    assert bit_hash(swapped) != bit_hash(values)
    zeros = torch.zeros(4)
    assert bit_hash(zeros) != bit_hash(-zeros)  # equal numbers, other bits
    nan = torch.tensor([float("nan"), 1.0])
    assert bit_hash(nan) == bit_hash(nan.clone())


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.towers = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))


def flip(parameter, *, element, bit):
    parameter.data.view(torch.int32).view(-1)[element] ^= 1 << bit


def copies(world, cases):
    """For each (rank, element, bit) flip it in that rank's copy, compare, and flip it back."""
    model = Tiny()
    found = [differing_ranks(model, world=world)]
    for rank, element, bit in cases:
        for _ in range(2):
            if world.rank == rank:
                flip(model.towers[1].weight, element=element, bit=bit)
            found.append(differing_ranks(model, world=world))
    return found


@pytest.mark.slow
def test_a_flipped_bit_in_one_of_two_ranks_is_found_and_the_tensor_named():
    digests = [hashlib.sha256(bytes([i])).digest() for i in range(4)]
    cases = [(d[0] % 2, d[1] % 128, d[2] % 31) for d in digests]
    for found in run_on_ranks(copies, cases):
        assert found[0] is None
        assert [f if f is None else (f.ranks, f.tensor) for f in found[1:]] == [
            x for _ in cases for x in (([0, 1], "towers.1.weight"), None)
        ]


@pytest.mark.slow
def test_among_three_ranks_the_one_that_differs_is_named():
    for found in run_on_ranks(copies, [(1, 17, 3), (2, 0, 30)], world_size=3):
        assert [f.ranks for f in found if f] == [[1], [2]]


def sharded(world, shard_ranks, rank, name):
    model = create_model("tiny", seed=1, text={"vocab_size": 200})
    parallelize(model, world=world, strategy="fsdp", shard_ranks=shard_ranks)
    found = [differing_ranks(model, world=world)]
    if world.rank == rank:
        parameter = model.get_parameter(name)
        flip(parameter.to_local() if isinstance(parameter, DTensor) else parameter, element=0, bit=5)
    return [*found, differing_ranks(model, world=world)]


@pytest.mark.slow
def test_sharded_ranks_compare_what_is_replicated():
    for before, after in run_on_ranks(sharded, None, 1, "logit_scale"):
        assert before is None
        assert after.ranks == [0, 1] and after.tensor == "logit_scale"
    # Parts of one rank's own have no copy: nothing to compare, and no false alarm.
    for before, after in run_on_ranks(sharded, None, 1, "visual.proj"):
        assert before is None and after is None
    # Two groups of two ranks hold the same parts: 1 and 3 the second half.
    for before, after in run_on_ranks(sharded, 2, 3, "visual.proj", world_size=4):
        assert before is None
        assert after.ranks == [1, 3] and after.tensor == "visual.proj"
