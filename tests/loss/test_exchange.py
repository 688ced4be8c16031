"""What the loss sends, and when: the event log of two real processes."""

import time

import pytest
import torch
import torch.distributed as dist

from clip_train.distributed import collectives
from clip_train.distributed.parallel import average_scalars, parallelize
from clip_train.loss import exchange
from clip_train.loss.clip import ClipLoss
from clip_train.step import TrainStep
from tests.gloo import run_on_ranks
from tests.standin import StandinCLIP, draw_batch

PAIRS, WIDTH = 8, 16


class Logged:
    """A collective under way that records who waits for it."""

    def __init__(self, work, name, log):
        self._work, self._name, self._log = work, name, log

    def wait(self):
        self._log.append(f"wait {self._name}")
        return self._work.wait()


def logged_step(world):
    """Events of one step, collectives with their bytes, and seconds until the image tower ran beside a late rank."""
    log, sent, started = [], [], {}

    def watch(name, start):
        def watched(*args, **kwargs):
            log.append(f"start {name}")
            result, work = start(*args, **kwargs)
            return result, Logged(work, name, log)

        return watched

    def count(name, call, sent_argument):
        def counted(*args, **kwargs):
            sent.append((name, args[sent_argument].nbytes))
            return call(*args, **kwargs)

        return counted

    exchange.all_gather_async = watch("gather", exchange.all_gather_async)
    exchange.reduce_scatter_async = watch("reduce-scatter", exchange.reduce_scatter_async)
    collectives._all_gather = count("gather", collectives._all_gather, 1)
    collectives._reduce_scatter = count("reduce-scatter", collectives._reduce_scatter, 1)
    dist.all_reduce = count("all-reduce", dist.all_reduce, 0)

    model, batch = StandinCLIP(), draw_batch(PAIRS)
    wrapped = parallelize(model, world=world)
    loss_fn = ClipLoss(world=world)
    sent.clear()

    def late_on_text(text):
        if world.rank == 1:
            time.sleep(0.5)
        text = loss_fn.on_text(text)
        started["gather"] = time.monotonic()
        return text

    def image_tower_starts(*_):
        log.append("image forward")
        started["image"] = time.monotonic()

    model.conv1.register_forward_pre_hook(image_tower_starts)
    model.conv1.weight.register_hook(lambda _: log.append("image backward"))
    model.token_embedding.weight.register_hook(lambda _: log.append("text backward"))
    features = wrapped(batch.images, batch.tokens, late_on_text)
    loss_fn(features, valid=batch.valid)["contrastive_loss"].backward()
    average_scalars(model, world=world, with_them=[])
    stalled = world.stalls.take()
    whole, exchanged, seconds = list(log), list(sent), started["image"] - started["gather"]

    log.clear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    step = TrainStep(
        model, wrapped=wrapped, loss_fn=loss_fn, optimizer=optimizer, world=world, seed=0, micro_batch_size=PAIRS // 2
    )
    step.backward(batch, step=0)
    return whole, exchanged, seconds, log, stalled


@pytest.fixture(scope="module")
def ranks():
    return run_on_ranks(logged_step)


def test_the_time_that_a_rank_waits_for_a_late_one_is_counted(ranks):
    prompt, late = (stalled for *_, stalled in ranks)
    assert prompt > 0.3 > late  # of the half second by which rank 1 is late


def test_with_micro_batches_one_exchange_of_all_texts_hides_behind_the_last_image_tower(ranks):
    for *_, log, _ in ranks:
        assert log == [
            "image forward",  # of the first micro-batch, without a graph
            "start gather",
            "image forward",
            "wait gather",
            "start reduce-scatter",
            "image backward",
            "wait reduce-scatter",
            "text backward",
            "image forward",  # of the first micro-batch again
            "image backward",
            "text backward",
        ]


def test_the_gather_hides_behind_the_image_tower_and_the_reduce_scatter_behind_its_backward(ranks):
    total = 2 * PAIRS
    for log, sent, seconds, *_ in ranks:
        assert log == [
            "start gather",
            "image forward",
            "wait gather",
            "start reduce-scatter",
            "image backward",
            "wait reduce-scatter",
            "text backward",
        ]
        assert sent == [
            ("gather", PAIRS * WIDTH * 4),  # text features
            ("gather", PAIRS),  # padding flags
            ("gather", 2 * total * 4),  # column sums
            ("reduce-scatter", total * WIDTH * 4),
            ("all-reduce", 8),  # temperature
        ]
        assert seconds < 0.25  # rank 0's image tower does not wait for a late rank
