import pytest
import torch

from clip_train.data.prefetch import batches_on
from tests.standin import draw_batch


def test_on_the_cpu_batches_pass_as_they_are():
    batches = [draw_batch(4, seed=i) for i in range(3)]
    assert all(a is b for a, b in zip(batches_on(torch.device("cpu"), iter(batches)), batches, strict=True))


def test_lengths_stay_on_the_host_when_a_batch_moves():
    batch = draw_batch(4)
    moved = batch.to(torch.device("meta"))
    assert moved.lengths is batch.lengths
    assert {t.device.type for t in moved._replace(lengths=moved.tokens)} == {"meta"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_batches_arrive_whole_while_the_device_computes():
    device = torch.device("cuda", 0)
    batches = [draw_batch(4096, seed=i) for i in range(4)]
    pinned = (type(b)(*(t.pin_memory() for t in b)) for b in batches)
    busy, sums = torch.randn(4096, 4096, device=device), []
    for batch in batches_on(device, pinned):
        for _ in range(10):
            busy = busy @ busy / 64
        sums.append(batch.images.sum(dtype=torch.int64) + batch.tokens.sum())
    assert [s.item() for s in sums] == [(b.images.sum(dtype=torch.int64) + b.tokens.sum()).item() for b in batches]
