"""The search for the largest micro-batch, and what one trial leaves behind."""

import pytest
import torch

from clip_train.config import load
from clip_train.distributed.stop import StopReason
from clip_train.distributed.world import World
from clip_train.errors import UserError
from clip_train.loss.clip import ClipLoss
from clip_train.micro_batch import choose_micro_batch, fits_on_cuda, largest_micro_batch, recorded_micro_batch, try_step
from clip_train.model.zoo import create_model
from clip_train.step import TrainStep
from tests.gloo import run_on_ranks

BASE = ["steps=100", "optim.warmup=1", "data.train=x", "global_batch_size=12", "model=tiny", "device=cpu"]


@pytest.mark.parametrize("rows", [1, 7, 12, 96, 4096])
def test_the_search_finds_the_largest_divisor_under_any_limit(rows):
    for limit in range(1, min(rows, 100) + 1):
        asked = []
        size = search(rows, fits=lambda n, a=asked, m=limit: a.append(n) or n <= m)
        assert size == max(n for n in range(1, limit + 1) if rows % n == 0)
        assert len(asked) == len(set(asked)) <= 5
    with pytest.raises(UserError, match="not even one pair"):
        search(rows, fits=lambda n: False)


def search(rows, *, fits, world=None, wanted=lambda: StopReason.none):
    return largest_micro_batch(rows, fits=fits, world=world or World(), wanted=wanted)


def test_a_search_that_is_asked_to_stop_ends_after_the_trial_under_way():
    asked = []

    def wanted():
        return StopReason.preempted if len(asked) == 2 else StopReason.none

    assert search(4096, fits=lambda n: bool(asked.append(n)), wanted=wanted) is None
    assert len(asked) == 2


def search_on_rank(world):
    """Search with another limit on each rank; then be asked to stop on rank 1 alone, which needs no third trial."""
    found = search(96, fits=lambda n: n <= (40, 20)[world.rank], world=world)
    asked = []

    def wanted():
        return StopReason.interrupted if world.rank == 1 and len(asked) == 2 else StopReason.none

    stopped = search(96, fits=lambda n: asked.append(n) or n <= 40, world=world, wanted=wanted)
    return found, stopped, len(asked)


@pytest.mark.slow
def test_ranks_find_what_fits_all_of_them_and_stop_together():
    assert run_on_ranks(search_on_rank) == [(16, None, 2)] * 2


def trial(model, *, micro_batch_size):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return TrainStep(
        model, wrapped=model, loss_fn=ClipLoss(world=World()), optimizer=optimizer, world=World(), seed=0,
        micro_batch_size=micro_batch_size,
    )  # fmt: skip


def test_a_trial_computes_every_gradient_and_changes_neither_weights_nor_statistics():
    model = create_model("tiny-rn", seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sizes = []
    model.visual.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    try_step(trial(model, micro_batch_size=2), model=model, rows=4, device=torch.device("cpu"))
    assert sizes == [2, 2, 2]  # features, features with a graph, and the first once more
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_auto_is_all_rows_on_the_cpu_and_what_was_recorded_where_it_divides_them(tmp_path):
    config = load("train", [*BASE, "micro_batch_size=auto", f"run_dir={tmp_path}"])
    choose = {"model": None, "optimizer": None, "world": World(), "wanted": lambda: StopReason.none}
    assert choose_micro_batch(config, **choose) == 12
    (tmp_path / "config.yaml").write_text("micro_batch_size: 4\n")
    assert choose_micro_batch(config, **choose) == 4
    assert recorded_micro_batch(tmp_path / "config.yaml", rows=6) is None
    (tmp_path / "config.yaml").write_text("micro_batch_size: null\n")
    assert choose_micro_batch(config, **choose) == 12


@pytest.mark.parametrize(
    ("value", "message"),
    [(["micro_batch_size=most"], "micro_batch_size=most must be a number, auto or null"),
     (["micro_batch_size=0"], "micro_batch_size=0 must be positive"),
     (["micro_batch_size=auto", "distributed=fsdp"], "needs distributed.strategy=ddp")],
)  # fmt: skip
def test_other_values_are_refused(value, message):
    with pytest.raises(UserError, match=message):
        load("train", [*BASE, *value])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_small_micro_batches_fit_where_the_whole_batch_does_not():
    device = torch.device("cuda", 0)
    model = create_model("tiny", seed=0).to(device)
    step = {}
    for size in (32, 4096):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        world = World(device=device)
        step[size] = TrainStep(
            model, wrapped=model, loss_fn=ClipLoss(world=world), optimizer=optimizer, world=world, seed=0,
            micro_batch_size=size,
        )  # fmt: skip
    options = {"model": model, "rows": 4096, "global_rows": 4096, "device": device}
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + 1536 * 2**20) / total, device)
    try:
        assert fits_on_cuda(step[32], **options) and not fits_on_cuda(step[4096], **options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert all(p.grad is None for p in model.parameters())
    assert torch.cuda.max_memory_allocated(device) == torch.cuda.memory_allocated(device)
