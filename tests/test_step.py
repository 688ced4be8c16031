import pytest
import torch

from clip_train.distributed.parallel import parallelize
from clip_train.distributed.world import World
from clip_train.errors import UserError
from clip_train.loss.clip import ClipLoss
from clip_train.loss.siglip import SigLipLoss
from clip_train.optim.adamw import build_adamw
from clip_train.step import TrainStep
from tests.gloo import run_on_ranks
from tests.loss.reference import clip_loss, siglip_loss
from tests.standin import StandinCLIP, draw_batch

RATE = 1e-2


def adamw(model):
    return build_adamw(model, lr=RATE, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6)


def reference_gradients(model, batch, *, siglip=False):
    """Gradient of the full-matrix loss of the whole batch, by plain autograd."""
    features = model(batch.images, batch.tokens)
    loss = (siglip_loss if siglip else clip_loss)(features, valid=batch.valid)
    names = [name for name, _ in model.named_parameters()]
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


class Recorder(torch.optim.SGD):
    """Keeps what an update would use instead of making one."""

    def step(self):
        self.seen = {}
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                self.seen[name] = grad.clone() / self.grad_scale


def recorded_step(world, model, batch, *, strategy="ddp", siglip=False, **options):
    """Run one step and return its result and the gradient that the optimizer received."""
    wrapped = parallelize(model, world=world, strategy=strategy)
    names, parameters = zip(*model.named_parameters(), strict=True)
    recorder = Recorder([{"params": list(parameters), "names": list(names)}], lr=0.0)
    loss_fn = (SigLipLoss if siglip else ClipLoss)(world=world, tile=(5, 7))
    train_step = TrainStep(model, wrapped=wrapped, loss_fn=loss_fn, optimizer=recorder, world=world, seed=3, **options)
    rows = len(batch.images) // world.size
    own = type(batch)(*(t[world.rank * rows : (world.rank + 1) * rows] for t in batch))
    return train_step(own, learning_rate=RATE, step=0), recorder.seen


def relative_error(got, want):
    return max(((got[n] - want[n]).norm() / want[n].norm()).item() for n in want)


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize("micro_batch_size", [None, 8, 4])
def test_gradients_equal_those_of_the_whole_batch(micro_batch_size, siglip):
    model, batch = StandinCLIP(logit_bias=-5.0 if siglip else None).double(), draw_batch(16)
    loss, want = reference_gradients(model, batch, siglip=siglip)
    model.calls = 0
    result, got = recorded_step(World(), model, batch, micro_batch_size=micro_batch_size, siglip=siglip)
    assert relative_error(got, want) < 1e-12
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    norm = torch.stack([g.norm() for g in want.values()]).norm()
    assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-12)
    micro_batches = 16 // (micro_batch_size or 16)
    assert model.calls == 2 * micro_batches - 1


def test_dropout_masks_are_replayed():
    model, batch = StandinCLIP(dropout=0.5).double(), draw_batch(16)
    features = {}

    def keep(module, inputs, output):
        key = inputs[0].double().sum().item()
        features.setdefault(key, []).append(output.image.detach().clone())

    model.register_forward_hook(keep)
    _, got = recorded_step(World(), model, batch, micro_batch_size=4)
    assert sorted(len(f) for f in features.values()) == [1, 2, 2, 2]
    assert all(torch.equal(f[0], f[-1]) for f in features.values())
    again = recorded_step(World(), StandinCLIP(dropout=0.5).double(), batch, micro_batch_size=4)[1]
    assert all(torch.equal(got[n], again[n]) for n in got)


def test_a_micro_batch_that_does_not_divide_the_rows_is_refused():
    with pytest.raises(UserError, match="micro_batch_size=5"):
        recorded_step(World(), StandinCLIP(), draw_batch(16), micro_batch_size=5)


def on_rank(world, cases):
    """Gradients that the optimizer of this rank received, case by case."""
    results = []
    for strategy, micro_batch_size, siglip in cases:
        model = StandinCLIP(logit_bias=-5.0 if siglip else None, seed=world.rank).double()
        result, seen = recorded_step(
            world, model, draw_batch(32), strategy=strategy, siglip=siglip, micro_batch_size=micro_batch_size
        )
        results.append(([t.item() for t in result], {n: g.numpy() for n, g in seen.items()}))
    return results


def test_two_ranks_give_the_gradients_of_one_under_both_wrappers():
    cases = [(s, m, False) for s in ("ddp", "fsdp") for m in (None, 8, 4)] + [("ddp", 4, True), ("fsdp", 4, True)]
    ranks = run_on_ranks(on_rank, cases)
    for i, (strategy, micro_batch_size, siglip) in enumerate(cases):
        model = StandinCLIP(logit_bias=-5.0 if siglip else None).double()
        loss, want = reference_gradients(model, draw_batch(32), siglip=siglip)
        for rank in ranks:
            got = {n: torch.as_tensor(g) for n, g in rank[i][1].items()}
            assert relative_error(got, want) < 1e-12, (strategy, micro_batch_size, siglip)
        assert sum(rank[i][0][0] for rank in ranks) / 2 == pytest.approx(loss.item(), rel=1e-12)
        assert ranks[0][i][0][2:] == ranks[1][i][0][2:]
