import math

import pytest
import torch

from clip_train.distributed.parallel import parallelize
from clip_train.distributed.shards import whole
from clip_train.distributed.world import World
from clip_train.errors import UserError
from clip_train.loss.clip import ClipLoss
from clip_train.loss.siglip import SigLipLoss
from clip_train.optim.adamw import build_adamw
from clip_train.optim.ema import Ema
from clip_train.step import LossScale, TrainStep
from clip_train.types import Batch
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


def recorded_step(world, model, batch, *, strategy="ddp", sharding=None, siglip=False, **options):
    """Run one step and return its result and the gradient that the optimizer received."""
    wrapped = parallelize(model, world=world, strategy=strategy, **(sharding or {}))
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
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


class Agreement:
    """A loss that needs no other rank."""

    needs_caption_ids = False

    def on_text(self, text):
        return text

    def __call__(self, features, **_):
        return {"contrastive_loss": -(features.image * features.text).sum()}

    def metrics(self):
        return {"in_batch_recall@1": torch.zeros(())}


def test_dropout_masks_differ_between_steps_ranks_and_micro_batches():
    half = draw_batch(8)
    batch = Batch(*(torch.cat([values, values]) for values in half))

    def features(*, step, rank):
        model, world = StandinCLIP(dropout=0.5), World(rank=rank)
        train_step = TrainStep(
            model, wrapped=model, loss_fn=Agreement(), optimizer=adamw(model), world=world, seed=3, micro_batch_size=8
        )
        return train_step(batch, learning_rate=RATE, step=step).image_features

    seen = features(step=0, rank=0)
    assert torch.equal(seen, features(step=0, rank=0))
    others = [features(step=1, rank=0), features(step=0, rank=1), seen.roll(8, 0)]
    assert [torch.isclose(seen, other).all(1).sum().item() for other in others] == [0, 0, 0]


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
        results.append(([t.item() for t in result if t.ndim == 0], {n: g.numpy() for n, g in seen.items()}))
    return results


CASES = [(s, m, False) for s in ("ddp", "fsdp") for m in (None, 8, 4)] + [("ddp", 4, True), ("fsdp", 4, True)]


def options_on_rank(world):
    """Gradients under FSDP2 with an option, and what DDP says to bf16 without nccl."""
    seen = []
    for sharding in ({"cpu_offload": True}, {"gradient_type": "bf16"}):
        model = StandinCLIP(seed=world.rank).double()
        got = recorded_step(world, model, draw_batch(32), strategy="fsdp", sharding=sharding, micro_batch_size=4)[1]
        seen.append({n: g.double().numpy() for n, g in got.items()})
    with pytest.raises(UserError, match="needs nccl, not gloo"):
        parallelize(StandinCLIP(), world=world, gradient_type="bf16")
    return seen


def everything_on_rank(world):
    return on_rank(world, CASES), train_on_rank(world), options_on_rank(world)


@pytest.fixture(scope="module")
def two_ranks():
    """What two processes return for all tests of this file: starting them costs more than the work."""
    gradients, training, options = zip(*run_on_ranks(everything_on_rank), strict=True)
    return {"gradients": gradients, "training": training, "options": options}


def test_two_ranks_give_the_gradients_of_one_under_both_wrappers(two_ranks):
    ranks = two_ranks["gradients"]
    for i, (strategy, micro_batch_size, siglip) in enumerate(CASES):
        model = StandinCLIP(logit_bias=-5.0 if siglip else None).double()
        loss, want = reference_gradients(model, draw_batch(32), siglip=siglip)
        for rank in ranks:
            got = {n: torch.as_tensor(g) for n, g in rank[i][1].items()}
            assert relative_error(got, want) < 1e-12, (strategy, micro_batch_size, siglip)
        assert sum(rank[i][0][0] for rank in ranks) / 2 == pytest.approx(loss.item(), rel=1e-12)
        assert ranks[0][i][0][2:] == ranks[1][i][0][2:]


def test_offloading_changes_no_gradient_and_bf16_sums_round_them(two_ranks):
    _, want = reference_gradients(StandinCLIP().double(), draw_batch(32))
    for offloaded, rounded in two_ranks["options"]:
        assert relative_error({n: torch.as_tensor(g) for n, g in offloaded.items()}, want) < 1e-12
        assert 1e-4 < relative_error({n: torch.as_tensor(g) for n, g in rounded.items()}, want) < 1e-2


# ------------------------------------------------------------------ the update


def trained(world=World(), *, strategy="ddp", steps=3, damage=None, ema_decay=None, loss_scale=None, **options):  # noqa: B008
    """Weights, optimizer state and results after some steps of the whole program."""
    model = StandinCLIP()
    wrapped = parallelize(model, world=world, strategy=strategy)
    optimizer = adamw(model)
    ema = None if ema_decay is None else Ema(model, decay=ema_decay)
    train_step = TrainStep(
        model,
        wrapped=wrapped,
        loss_fn=ClipLoss(world=world),
        optimizer=optimizer,
        world=world,
        seed=3,
        ema=ema,
        **options,
    )
    if loss_scale is not None:
        train_step.loss_scale.value.fill_(loss_scale)
    results = []
    for step in range(steps):
        batch = draw_batch(16, seed=step)
        rows = 16 // world.size
        own = type(batch)(*(t[world.rank * rows : (world.rank + 1) * rows] for t in batch))
        handle = model.conv1.register_forward_hook(poisoned) if (world.rank, step) == damage else None
        results.append(train_step(own, learning_rate=RATE * (step + 1), step=step))
        if handle is not None:
            handle.remove()
    weights = {n: v.full_tensor() if hasattr(v, "full_tensor") else v.clone() for n, v in model.state_dict().items()}
    return weights, results, ema


def poisoned(module, inputs, output):
    """Forward hook: the value is right, its gradient is not a number."""
    output.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))


def reference_training(*, steps=3, max_grad_norm, skip=()):
    """The same with torch's own parts, unfused, over the full matrix."""
    model = StandinCLIP()
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in n]
    rest = [p for p in model.parameters() if not any(p is q for q in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, foreach=False)
    norms = []
    for step in range(steps):
        if step in skip:
            continue
        batch = draw_batch(16, seed=step)
        for group in optimizer.param_groups:
            group["lr"] = RATE * (step + 1)
        optimizer.zero_grad()
        clip_loss(model(batch.images, batch.tokens), valid=batch.valid).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item())
        optimizer.step()
        model.clamp_logit_scale_()
    return model.state_dict(), norms


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e9])
def test_updates_equal_torch_adamw_with_its_own_clipping(max_grad_norm):
    weights, results, _ = trained(max_grad_norm=max_grad_norm)
    want, norms = reference_training(max_grad_norm=max_grad_norm)
    assert all(torch.allclose(weights[n], want[n], atol=1e-5) for n in want)
    assert [r.grad_norm.item() for r in results] == pytest.approx(norms, rel=1e-4)
    assert norms[0] > 0.5


def test_an_update_that_is_not_finite_leaves_everything_as_it_was():
    weights, results, _ = trained(max_grad_norm=0.5, damage=(0, 1))
    want, _ = reference_training(max_grad_norm=0.5, skip=(1,))
    assert all(torch.allclose(weights[n], want[n], atol=1e-5) for n in want)
    assert [r.skipped.item() for r in results] == [False, True, False]
    assert [r.finite.item() for r in results] == [True, False, True]


class Spoiled(ClipLoss):
    """A loss whose value is lost while its gradient is right."""

    def __call__(self, features, **options):
        return {name: loss + math.nan for name, loss in super().__call__(features, **options).items()}


def test_a_loss_that_is_not_finite_is_a_fault_even_if_its_gradient_is():
    model = StandinCLIP()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = TrainStep(
        model, wrapped=model, loss_fn=Spoiled(world=World()), optimizer=adamw(model), world=World(), seed=3
    )
    result = step(draw_batch(16), learning_rate=RATE, step=0)
    assert result.grad_norm.isfinite() and result.skipped and not result.finite
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def hybrid_on_rank(world):
    model = StandinCLIP(seed=world.rank).double()
    _, seen = recorded_step(
        world, model, draw_batch(32), strategy="fsdp", sharding={"shard_ranks": 2}, micro_batch_size=4
    )
    return {n: g.numpy() for n, g in seen.items()}


@pytest.mark.slow
def test_hybrid_sharding_on_four_ranks_gives_the_gradients_of_one():
    _, want = reference_gradients(StandinCLIP().double(), draw_batch(32))
    for seen in run_on_ranks(hybrid_on_rank, world_size=4):
        assert relative_error({n: torch.as_tensor(g) for n, g in seen.items()}, want) < 1e-12


@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_a_frozen_text_tower_trains_the_image_tower_alone(micro_batch_size):
    model, batch = StandinCLIP().double(), draw_batch(16)
    _, want = reference_gradients(model, batch)
    frozen = ("transformer", "token_embedding", "positional_embedding")
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    _, got = recorded_step(World(), model, batch, micro_batch_size=micro_batch_size)
    assert relative_error(got, {n: g for n, g in want.items() if not n.startswith(frozen)}) < 1e-12
    assert not any(n.startswith(frozen) for n in got)


def train_on_rank(world):
    runs = []
    for strategy in ("ddp", "fsdp"):
        weights, results, ema = trained(world, strategy=strategy, max_grad_norm=0.5, damage=(1, 1), ema_decay=0.9)
        flags = [(r.skipped.item(), r.finite.item()) for r in results]
        averages = {n: whole(v) for n, v in ema.state_dict().items()}
        runs.append(({n: v.numpy() for n, v in weights.items()}, {n: v.numpy() for n, v in averages.items()}, flags))
    return runs


def test_a_fault_on_one_rank_is_skipped_by_all_under_both_wrappers(two_ranks):
    ranks = two_ranks["training"]
    want, _ = reference_training(max_grad_norm=0.5, skip=(1,))
    for first, second in zip(*ranks, strict=True):
        weights, averages, flags = first
        assert flags == second[2] == [(False, True), (True, False), (False, True)]
        assert weights.keys() == averages.keys() == want.keys()
        for n in want:
            assert torch.allclose(torch.as_tensor(weights[n]), want[n], atol=1e-5)
            assert (weights[n] == second[0][n]).all() and (averages[n] == second[1][n]).all()


def test_the_temperature_turns_back_at_its_bound():
    model, batch = StandinCLIP(), draw_batch(16)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100))
    step = TrainStep(
        model, wrapped=model, loss_fn=ClipLoss(world=World()), optimizer=adamw(model), world=World(), seed=3
    )
    assert step(batch, learning_rate=RATE, step=0).logit_scale < math.log(100)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100))
        model.token_embedding.weight.zero_()
    easy = batch._replace(images=batch.images[:1], tokens=batch.tokens[:1], valid=batch.valid[:1])
    assert step(easy, learning_rate=RATE, step=1).logit_scale <= math.log(100)


def test_a_step_never_asks_the_device_for_a_number():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    model = StandinCLIP()
    step = TrainStep(
        model, wrapped=model, loss_fn=ClipLoss(world=World(), ignore_duplicates=True), optimizer=adamw(model),
        world=World(), seed=3, precision="bf16", max_grad_norm=1.0, micro_batch_size=4, ema=Ema(model, decay=0.9),
    )  # fmt: skip
    with Watch():
        step(draw_batch(16), learning_rate=RATE, step=0)
    assert len(seen) > 100
    assert not [f for f in seen if "_local_scalar_dense" in f or "nonzero" in f]


@pytest.mark.parametrize(("precision", "loss_scale"), [("bf16", None), ("fp16", 128.0)])
def test_short_types_train_like_float32(precision, loss_scale):
    want = trained(steps=4)[1]
    results = trained(steps=4, precision=precision, loss_scale=loss_scale)[1]
    assert [r.loss.item() for r in results] == pytest.approx([r.loss.item() for r in want], rel=3e-2)
    assert [r.grad_norm.item() for r in results] == pytest.approx([r.grad_norm.item() for r in want], rel=0.1)


def test_clipping_in_float16_goes_by_the_norm_without_the_loss_scale():
    model = StandinCLIP()
    optimizer = adamw(model)
    step = TrainStep(
        model, wrapped=model, loss_fn=ClipLoss(world=World()), optimizer=optimizer, world=World(), seed=3,
        precision="fp16", max_grad_norm=0.5,
    )  # fmt: skip
    step.loss_scale.value.fill_(128.0)
    result = step(draw_batch(16), learning_rate=RATE, step=0)
    assert result.grad_norm > 0.5 and result.grad_norms.norm().item() == pytest.approx(result.grad_norm.item())
    (beta1, _), moments = optimizer.defaults["betas"], [state["exp_avg"] for state in optimizer.state.values()]
    clipped = torch.cat([moment.flatten() for moment in moments]).norm() / (1 - beta1)
    assert clipped.item() == pytest.approx(0.5, rel=1e-3)


def test_a_group_trains_at_its_share_of_the_learning_rate():
    model = StandinCLIP()
    optimizer = adamw(model)
    optimizer.param_groups[0]["lr_scale"] = 0.25
    before = {id(p): p.detach().clone() for p in model.parameters()}
    step = TrainStep(model, wrapped=model, loss_fn=ClipLoss(world=World()), optimizer=optimizer, world=World(), seed=3)
    step(draw_batch(16), learning_rate=RATE, step=0)
    # Adam's first step moves an element by the learning rate, whatever its gradient; decay adds to it a little.
    moved = [max((p - before[id(p)]).abs().max().item() for p in g["params"]) for g in optimizer.param_groups]
    assert moved == [pytest.approx(0.25 * RATE, rel=0.2), pytest.approx(RATE, rel=0.2)]


def test_overflow_in_float16_skips_but_is_no_fault():
    result = trained(steps=1, precision="fp16", loss_scale=2.0**40)[1][0]
    assert result.skipped and result.finite and not result.grad_norm.isfinite()


def test_the_loss_scale_halves_on_overflow_and_survives_a_restart():
    scale = LossScale(device=torch.device("cpu"), enabled=True)
    scale.update(overflow=torch.tensor(True))
    assert scale.value == 2.0**15
    for _ in range(1999):
        scale.update(overflow=torch.tensor(False))
    restored = LossScale(device=torch.device("cpu"), enabled=True)
    restored.load_state_dict(scale.state_dict())
    for s in (scale, restored):
        s.update(overflow=torch.tensor(False))
    assert scale.value == restored.value == 2.0**16
