"""A checkpoint knows nothing of the ranks and wrappers that wrote it."""

from pathlib import Path

import pytest
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from clip_train.checkpoint.load import load_part, newest_verified
from clip_train.errors import ClipTrainError, UserError
from tests.checkpoint.parts import Model, adamw, open_fixed, open_training, save_steps, train
from tests.gloo import run_on_ranks


def wrap(model, kind):
    """Leave the 0-d temperature to the trainer, as both wrappers must."""
    if kind == "ddp":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["logit_scale"])
        return DistributedDataParallel(model, find_unused_parameters=True)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params={model.logit_scale})
    return model


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().numpy().copy()


def contents(model, optimizer):
    """Return parameters, and the optimizer's tensors as torch itself collects them, under native names."""
    arrays = {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}
    options = StateDictOptions(full_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)["state"]
    arrays |= {f"state.{name}.{key}": whole(t) for name, values in state.items() for key, t in values.items()}
    return arrays


def build(kind, *, seed):
    model = wrap(Model(seed=seed), kind)
    model_optimizer = adamw(model)
    return model, model_optimizer


def errors_of_rank_0(world, folder: Path):
    """Return the messages of errors that only rank 0 can see."""
    messages = []
    try:
        checkpointer, _ = open_fixed(folder / "taken", world=world)
    except UserError as error:
        messages.append(str(error))
    checkpointer, part = open_fixed(folder / "damaged", world=world)
    with checkpointer:
        for mode in (str(folder / "missing"), "auto"):
            try:
                checkpointer.resume(mode)
            except ClipTrainError as error:
                messages.append(f"{type(error).__name__}: {error}")
        checkpointer._state["counter"].value = float("nan")
        try:
            checkpointer.save(step=9, consumed=9, config_yaml="")
        except Exception as error:
            messages.append("not JSON compliant" in str(error))
        checkpointer._state["counter"].value = 1
        part.fill(float("inf") if world.is_main else 1.0)
        try:
            checkpointer.save(step=9, consumed=9, config_yaml="")
        except ClipTrainError as error:
            messages.append(str(error))
    return messages


def on_two_ranks(world, folder: Path):
    """Load a checkpoint of one process into each wrapper; then train on two ranks and save."""
    found = {}
    for kind in ("ddp", "fsdp"):
        model, optimizer = build(kind, seed=world.rank + 1)
        with open_training(folder / f"from-one-{kind}", model, optimizer, world=world) as checkpointer:
            resumed = checkpointer.resume(str(folder / "one"))
            found[f"one-{kind}"] = (resumed.step, contents(model, optimizer))
        model, optimizer = build(kind, seed=0)
        train(model, optimizer, steps=range(3))
        with open_training(folder / f"two-{kind}", model, optimizer, world=world) as checkpointer:
            checkpointer.save(step=3, consumed=24, config_yaml="")
            saved = contents(model, optimizer)
            train(model, optimizer, steps=range(3, 5))
            checkpointer.wait()
        found[f"two-{kind}"] = (3, saved)
    return {**found, "errors": errors_of_rank_0(world, folder)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    model = Model()
    train(model, optimizer := adamw(model), steps=range(3))
    with open_training(folder / "one", model, optimizer) as checkpointer:
        checkpointer.save(step=3, consumed=12, config_yaml="")
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    save_steps(folder / "damaged", 1)
    (folder / "damaged" / "checkpoints" / "step-00000001" / "model.safetensors").write_bytes(b"")
    holder, _ = open_fixed(folder / "taken")
    with holder:
        return run_on_ranks(on_two_ranks, folder)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert array.dtype == found[name].dtype
        assert array.shape == found[name].shape
        assert array.tobytes() == found[name].tobytes(), name


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_continue_what_one_process_saved_bit_for_bit(folder, ranks, kind):
    model = Model(seed=9)
    optimizer = adamw(model)
    with open_training(folder / "one", model, optimizer) as checkpointer:
        checkpointer.resume("auto")
    for rank in ranks:
        step, arrays = rank[f"one-{kind}"]
        assert step == 3
        assert_equal(arrays, contents_of_one(model, optimizer))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_process_continues_what_two_ranks_saved_bit_for_bit(folder, ranks, kind):
    model = Model(seed=9)
    optimizer = adamw(model)
    with open_training(folder / f"two-{kind}", model, optimizer) as checkpointer:
        assert checkpointer.resume("auto").step == 3
    for rank in ranks:
        assert_equal(contents_of_one(model, optimizer), rank[f"two-{kind}"][1])
    train(model, optimizer, steps=range(3, 5))


def test_the_files_have_the_same_names_whatever_wrote_them(folder, ranks):
    del ranks
    names = []
    for run in ("one", "two-ddp", "two-fsdp"):
        path = newest_verified(folder / run)
        names.append(
            {
                part: {k: getattr(v, "shape", None) for k, v in load_part(path, part).items()}
                for part in ("model", "optimizer")
            }
        )
    assert names[0] == names[1] == names[2]
    assert "logit_scale" in names[0]["model"]


def contents_of_one(model, optimizer):
    """Return what `contents` does, from the optimizer's own dictionary."""
    arrays = {name: whole(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        arrays |= {f"state.{name}.{key}": whole(t) for key, t in optimizer.state.get(p, {}).items()}
    return arrays


def test_every_rank_fails_with_the_error_of_rank_0(ranks):
    first, second = (rank["errors"] for rank in ranks)
    assert first == second
    taken, missing, damaged, not_json, infinite = first
    assert not_json
    assert "is in use by process" in taken
    assert missing.startswith("UserError: ")
    assert "no such checkpoint" in missing
    assert damaged.startswith("IntegrityError: ")
    assert "none of 1 checkpoints is intact" in damaged
    assert "NaN or Inf in model: a" in infinite
