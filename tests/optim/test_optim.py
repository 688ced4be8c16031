import math

import pytest
import torch
from omegaconf import OmegaConf

from clip_train.errors import UserError
from clip_train.optim.config import AdamWConfig, Schedule
from clip_train.optim.ema import Ema
from clip_train.optim.param_groups import decays, param_groups
from clip_train.optim.schedule import learning_rate
from tests.standin import StandinCLIP


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_rates_equal_those_of_torch_schedulers(schedule, warmup):
    total = 40
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    after = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup)
        if schedule == "cosine"
        else torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    )
    parts, milestones = [after], []
    if warmup:
        ramp = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / warmup)
        parts, milestones = [ramp, after], [warmup]
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones)
    for step in range(total):
        rate = learning_rate(step, peak=0.3, warmup=warmup, total_steps=total, schedule=schedule)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_cosine_ends_at_zero_and_stays_there():
    at = [learning_rate(s, peak=1.0, warmup=2, total_steps=10, schedule="cosine") for s in (9, 10, 50)]
    assert 0 < at[0] < 0.05 and at[1:] == [pytest.approx(0, abs=1e-12)] * 2


def test_only_weight_matrices_decay():
    model = StandinCLIP(logit_bias=-10.0)
    model.visual.resblocks[0].fc.weight.requires_grad_(False)
    decay, constant = param_groups(model, weight_decay=0.2)
    names = {id(p): n for n, p in model.named_parameters()}
    assert (decay["weight_decay"], constant["weight_decay"]) == (0.2, 0.0)
    assert {names[id(p)] for p in decay["params"]} == {
        "conv1.weight",
        "visual.resblocks.1.fc.weight",
        "transformer.resblocks.0.fc.weight",
        "transformer.resblocks.1.fc.weight",
    }
    assert {"logit_scale", "logit_bias", "token_embedding.weight", "positional_embedding", "conv1.bias"} <= {
        names[id(p)] for p in constant["params"]
    }


@pytest.mark.parametrize(
    "name",
    ["trunk.layers.0.attn.relative_position_bias_table", "trunk.blocks.0.attn.logit_scale", "trunk.dist_token"],
)
def test_tables_of_biases_and_temperatures_of_timm_do_not_decay(name):
    assert not decays(f"visual.{name}", torch.nn.Parameter(torch.zeros(4, 1, 3)))
    assert decays("visual.trunk.layers.0.attn.qkv.weight", torch.nn.Parameter(torch.zeros(4, 3)))


def test_a_layers_share_of_the_learning_rate_is_the_decay_once_for_each_layer_above_it():
    model = StandinCLIP()
    above = {"conv1.weight": 3, "visual.resblocks.0.fc.weight": 2, "visual.resblocks.1.fc.weight": 1}
    optimizer = AdamWConfig(layer_decay=0.5).build(model, layers_above=above)
    share = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    of = {name: share[id(p)] for name, p in model.named_parameters()}
    assert {name: of[name] for name in above} == {
        "conv1.weight": 0.125, "visual.resblocks.0.fc.weight": 0.25, "visual.resblocks.1.fc.weight": 0.5,
    }  # fmt: skip
    assert {of[name] for name in of.keys() - above.keys()} == {1.0}
    assert {g["weight_decay"] for g in optimizer.param_groups if g["lr_scale"] < 1} == {0.2}


@pytest.mark.parametrize("build", [StandinCLIP, lambda: torch.nn.BatchNorm1d(3)])
def test_averages_equal_those_of_torch(build):
    model = build()
    ema = Ema(model, decay=0.9)
    theirs = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(model)
    for seed in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
            for buffer in model.buffers():
                buffer.add_(seed + 1)
        ema.update()
        theirs.update_parameters(model)
    want = theirs.module.state_dict()
    assert all(torch.allclose(ema.state_dict()[n], want[n]) for n in want)


def test_averages_are_applied_for_a_while_and_restored():
    model = StandinCLIP()
    start = {n: v.clone() for n, v in model.state_dict().items()}
    ema = Ema(model, decay=0.5)
    with torch.no_grad():
        model.logit_scale.add_(1.0)
    ema.update()
    moved = model.logit_scale.item()
    with ema.applied():
        assert model.logit_scale.item() == pytest.approx(start["logit_scale"].item() + 0.5)
    assert model.logit_scale.item() == moved
    restored = Ema(StandinCLIP(seed=5), decay=0.5)
    restored.load_state_dict(ema.state_dict())
    assert all(torch.equal(restored.state_dict()[n], ema.state_dict()[n]) for n in start)
    with pytest.raises(KeyError, match="logit_scale"):
        restored.load_state_dict({n: v for n, v in ema.state_dict().items() if n != "logit_scale"})


@pytest.mark.parametrize(
    "wrong", [{"lr": 0}, {"warmup": -1}, {"betas": [0.9]}, {"betas": [0.9, 1.0]}, {"eps": 0}, {"weight_decay": -1},
              {"max_grad_norm": 0}, {"ema_decay": 1.0}, {"layer_decay": 0}, {"layer_decay": 1.1}],
)  # fmt: skip
def test_a_value_out_of_range_is_named(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"optim.{name}="):
        AdamWConfig(**wrong)


def test_the_config_is_readable_by_omegaconf_and_builds_torch_adamw():
    config = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(AdamWConfig), {"betas": [0.9, 0.95], "schedule": "constant"})
    )
    assert config.schedule is Schedule.constant
    optimizer = config.build(StandinCLIP())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.9, 0.95) and optimizer.defaults["eps"] == 1e-6
    assert config.learning_rate(3, total_steps=10) == config.lr and math.isclose(config.lr, 5e-4)
    assert config.build_ema(StandinCLIP()) is None
