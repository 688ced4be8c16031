"""Which checkpoint a run continues from, and that it continues exactly."""

import multiprocessing
import random
import shutil
import signal
import time

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from clip_train.checkpoint.checkpointer import Checkpointer
from clip_train.checkpoint.config import CheckpointConfig
from clip_train.checkpoint.state import ModelState, OptimizerState
from clip_train.distributed.world import World
from clip_train.errors import UserError
from tests.checkpoint.parts import Counter, Fixed, Model, adamw, open_fixed, open_training, save_steps, train


def resume(run_dir, mode, *, lines=None):
    checkpointer, part = open_fixed(run_dir, lines=lines)
    with checkpointer:
        found = checkpointer.resume(mode)
    return (found.step, found.consumed, part.value) if found else None


def test_the_newest_checkpoint_is_taken(tmp_path):
    save_steps(tmp_path, 9, 10)
    assert resume(tmp_path, "auto") == (10, 80, 10.0)


def test_a_run_directory_without_checkpoints_is_a_fresh_start_and_says_so(tmp_path):
    lines = []
    assert resume(tmp_path, "auto", lines=lines) is None
    assert lines == [f"{tmp_path}: no checkpoint; starting from scratch"]


def test_unfinished_saves_alone_are_a_fresh_start_with_a_warning(tmp_path):
    (tmp_path / "checkpoints" / ".part-step-00000005-123").mkdir(parents=True)
    lines = []
    assert resume(tmp_path, "auto", lines=lines) is None
    assert lines == [
        f"{tmp_path}: no checkpoint, only unfinished saves (.part-step-00000005-123); starting from scratch"
    ]
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_path_that_is_missing_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="missing: no such checkpoint or run directory"):
        resume(tmp_path, str(tmp_path / "missing"))


def test_never_starts_from_scratch_and_moves_the_old_checkpoints_out_of_every_later_way(tmp_path):
    save_steps(tmp_path, 9, 10)
    lines = []
    assert resume(tmp_path, "never", lines=lines) is None
    assert lines == [f"moved 2 checkpoints of a line that was left to {tmp_path}/checkpoints/set-aside-1"]
    save_steps(tmp_path, 1)
    assert resume(tmp_path, "auto") == (1, 8, 1.0)
    assert resume(tmp_path, "never") is None
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"set-aside-1", "set-aside-2"}


def test_an_earlier_checkpoint_by_path_is_not_undone_by_the_next_automatic_resume(tmp_path):
    save_steps(tmp_path, 10, 20, 30, keep=3)
    assert resume(tmp_path, str(tmp_path / "checkpoints" / "step-00000010")) == (10, 80, 10.0)
    assert resume(tmp_path, "auto") == (10, 80, 10.0)


def test_a_requeued_command_with_a_path_goes_on_from_its_own_newest(tmp_path):
    save_steps(tmp_path / "old", 10, 20)
    mode = str(tmp_path / "old")
    for step in (21, 22):
        checkpointer, part = open_fixed(tmp_path / "new")
        with checkpointer:
            assert checkpointer.resume(mode).step == step - 1
            part.fill(step)
            checkpointer.save(step=step, consumed=step, config_yaml="")
    assert resume(tmp_path / "new", "auto") == (22, 22, 22.0)
    assert resume(tmp_path / "new", mode) == (22, 22, 22.0)


@pytest.mark.parametrize("run", ["another", "own"])
def test_going_back_before_the_first_save_leads_to_where_a_path_began_and_stays_in_its_line(tmp_path, run):
    save_steps(tmp_path / run, 1, 2)
    start = tmp_path / run / "checkpoints" / "step-00000001"
    checkpointer, part = open_fixed(tmp_path / "own")
    with checkpointer:
        checkpointer.resume(str(start))
        part.fill(7)
        assert checkpointer.go_back().path == start and part.value == 1
        checkpointer.save(step=2, consumed=16, config_yaml="")
        part.fill(7)
        assert checkpointer.go_back().step == 2 and part.value == 1
    checkpointer, _ = open_fixed(tmp_path / "own")
    with checkpointer:
        assert checkpointer.resume(str(start)).step == 2, "the requeued command goes on"


def test_a_start_that_was_deleted_meanwhile_is_named_when_the_run_would_go_back_there(tmp_path):
    save_steps(tmp_path / "another", 1)
    checkpointer, _ = open_fixed(tmp_path / "own")
    with checkpointer:
        checkpointer.resume(str(tmp_path / "another"))
        shutil.rmtree(tmp_path / "another")
        with pytest.raises(UserError, match="another/checkpoints/step-00000001: no such checkpoint"):
            checkpointer.go_back()


def test_a_checkpoint_without_a_part_that_is_asked_for_is_a_user_error(tmp_path):
    save_steps(tmp_path, 1)
    world, config = World(), CheckpointConfig()
    with (
        Checkpointer(tmp_path, world=world, config=config, tensors={"ema": Fixed()}, state={}) as checkpointer,
        pytest.raises(UserError, match=r"step-00000001: .*no ema.safetensors"),
    ):
        checkpointer.resume("auto")
    with (
        Checkpointer(tmp_path, world=world, config=config, tensors={}, state={"data": Counter()}) as checkpointer,
        pytest.raises(UserError, match=r"step-00000001: no data in train_state.json"),
    ):
        checkpointer.resume("auto")


def test_a_checkpoint_of_another_model_is_refused_with_the_first_ten_names(tmp_path):
    model = Model()
    model.extra = torch.nn.ParameterDict({f"{i:02d}": torch.nn.Parameter(torch.zeros(1)) for i in range(20)})
    with open_training(tmp_path, model, adamw(model)) as checkpointer:
        checkpointer.save(step=1, consumed=1, config_yaml="")
    other = Model(width=6)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with open_training(tmp_path, other, adamw(other)) as checkpointer, pytest.raises(UserError) as caught:
        checkpointer.resume("auto")
    message = str(caught.value)
    assert f"{tmp_path}/checkpoints/step-00000001: checkpoint does not fit this model: " in message
    assert "extra.00 [1] only in the checkpoint; " in message
    assert message.endswith("extra.09 [1] only in the checkpoint; and 13 more")
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


def test_another_shape_is_shown_from_both_sides(tmp_path):
    with pytest.raises(UserError, match=r"first.weight \[5, 3\] in the checkpoint, \[6, 3\] in the model"):
        ModelState(Model(width=6)).load_state_dict(ModelState(Model()).state_dict())


def test_another_optimizer_or_other_groups_are_refused(tmp_path):
    model = Model()
    saved = OptimizerState(model, adamw(model)).state_dict()
    with pytest.raises(UserError, match="optimizer AdamW saved, SGD configured"):
        OptimizerState(model, torch.optim.SGD(model.parameters(), lr=0.1)).load_state_dict(saved)
    one_group = torch.optim.AdamW(model.parameters())
    with pytest.raises(UserError, match=r"first\.bias group 1 in the checkpoint, group 0 in the optimizer"):
        OptimizerState(model, one_group).load_state_dict(saved)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True}])
@pytest.mark.parametrize("first", [0, 3])
def test_a_resumed_run_equals_one_that_was_not_interrupted_bit_for_bit(tmp_path, device, options, first):
    whole = Model().to(device)
    train(whole, adamw_whole := adamw(whole, **options), steps=range(6))

    model = Model().to(device)
    train(model, optimizer := adamw(model, **options), steps=range(first))
    with open_training(tmp_path, model, optimizer) as checkpointer:
        checkpointer.save(step=first, consumed=0, config_yaml="")
        train(model, optimizer, steps=range(first, 5))  # while the checkpoint is written

    resumed = Model(seed=1).to(device)
    optimizer = adamw(resumed, **options)
    with open_training(tmp_path, resumed, optimizer) as checkpointer:
        assert checkpointer.resume("auto").step == first
    train(resumed, optimizer, steps=range(first, 6))

    assert all(torch.equal(t, whole.state_dict()[name]) for name, t in resumed.state_dict().items())
    expected, found = adamw_whole.state_dict(), optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert state.keys() == found["state"][index].keys()
        for key, tensor in state.items():
            assert found["state"][index][key].dtype == tensor.dtype
            assert found["state"][index][key].device == tensor.device
            assert torch.equal(found["state"][index][key], tensor)


def test_step_counters_stay_on_the_host_where_torch_keeps_them():
    """Also the one of a parameter without dimensions, which has the counter's shape. Meta stands for any device."""
    parameter = torch.nn.Parameter(torch.empty((), device="meta"))
    model = torch.nn.Module()
    model.logit_scale = parameter
    parameter.grad = torch.empty((), device="meta")
    (optimizer := torch.optim.AdamW([parameter])).step()
    whole = OptimizerState(model, optimizer)
    whole.load_state_dict(whole.state_dict())
    assert {key: t.device.type for key, t in optimizer.state[parameter].items()} == {
        "step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"
    }  # fmt: skip


def test_a_resumed_convolution_with_channels_last_equals_one_that_was_not_interrupted():
    def step(model, optimizer, number):
        pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        model(pixels).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def make():
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    model, optimizer = make()
    step(model, optimizer, 0)
    resumed, its_optimizer = make()
    parts = [(ModelState(model), ModelState(resumed))]
    parts += [(OptimizerState(model, optimizer), OptimizerState(resumed, its_optimizer))]
    for saved, loaded in parts:  # as files hold them: in the order of the indices
        values = saved.state_dict().items()
        in_order = {k: v.clone(memory_format=torch.contiguous_format) for k, v in values if torch.is_tensor(v)}
        loaded.load_state_dict({k: in_order.get(k, v) for k, v in values})
    for one in ((model, optimizer), (resumed, its_optimizer)):
        step(*one, 1)
    assert torch.equal(model.weight, resumed.weight)


def test_how_the_optimizer_computes_is_decided_by_the_process_that_resumes():
    model = Model()
    train(model, fused := adamw(model, fused=True), steps=range(2))
    foreach = adamw(model, foreach=True)
    OptimizerState(model, foreach).load_state_dict(OptimizerState(model, fused).state_dict())
    assert all(group["foreach"] and not group["fused"] for group in foreach.param_groups)
    assert foreach.param_groups[0]["betas"] == (0.8, 0.95)
    assert all(torch.equal(s["exp_avg"], fused.state[p]["exp_avg"]) for p, s in foreach.state.items())
    train(model, foreach, steps=range(2, 3))


def test_optimizer_tensors_are_those_of_torchs_own_flattened_state_dict():
    model = Model()
    model.unused.requires_grad_(False)
    train(model, optimizer := adamw(model), steps=range(2))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=False)
    theirs = get_optimizer_state_dict(model, optimizer, options=options)["state"]
    ours = OptimizerState(model, optimizer).state_dict()
    expected = {f"state.{name}.{key}": t for name, state in theirs.items() for key, t in state.items()}
    assert {key for key in ours if key.startswith("state.")} == expected.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in expected.items())


@pytest.mark.slow
def test_compiled_models_leave_no_trace_in_the_names():
    names = {name for name, _ in Model().named_parameters()}
    model = Model()
    model.first = torch.compile(model.first)
    compiled = torch.compile(model)
    assert ModelState(compiled).state_dict().keys() == names | {"count"}
    saved = OptimizerState(compiled, adamw(compiled)).state_dict()
    assert {name for group in saved["param_groups"] for name in group["params"]} == names
    ModelState(compiled).load_state_dict(ModelState(Model(seed=1)).state_dict())
    assert torch.equal(model.second.weight, Model(seed=1).second.weight)


def test_a_save_holds_the_values_of_its_own_moment(tmp_path):
    model = Model()
    train(model, optimizer := adamw(model), steps=range(2))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with open_training(tmp_path, model, optimizer, asynchronous=True) as checkpointer:
        checkpointer.save(step=2, consumed=2, config_yaml="")
        for p in model.parameters():
            p.data.fill_(99.0)
        checkpointer.wait()
        checkpointer.resume("auto")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def save_until_killed(run_dir, ready):
    checkpointer, part = open_fixed(run_dir, asynchronous=True, size=200_000)
    found = checkpointer.resume("auto")
    ready.send(found.step if found else 0)
    for step in range(found.step + 1 if found else 1, 10**6):
        part.fill(step)
        checkpointer.save(step=step, consumed=step, config_yaml="")
        ready.send(step - 1)  # `save` has seen the one before to its end


def kill_while_saving(run_dir, *, times):
    generator = random.Random(0)
    context = multiprocessing.get_context("fork")
    published = 0
    for i in range(times):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=save_until_killed, args=(run_dir, sender), daemon=True)
        process.start()
        sender.close()
        resumed = receiver.recv()
        assert resumed >= published
        if i % 2:  # a slow disk must not keep every round from its first checkpoint
            while published <= resumed:
                published = receiver.recv()
        time.sleep(generator.uniform(0.0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        while receiver.poll():
            try:
                published = receiver.recv()
            except EOFError:
                break
        receiver.close()
    step, _, value = resume_large(run_dir)
    assert step >= published > 0
    assert value == step


def resume_large(run_dir):
    checkpointer, part = open_fixed(run_dir, size=200_000)
    with checkpointer:
        found = checkpointer.resume("auto")
    return found.step, found.consumed, part.value


def test_sigkill_while_saving_loses_no_published_checkpoint(tmp_path):
    kill_while_saving(tmp_path, times=10)


@pytest.mark.slow
def test_300_times_sigkill_while_saving_loses_no_published_checkpoint(tmp_path):
    kill_while_saving(tmp_path, times=300)
