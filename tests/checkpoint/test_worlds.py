"""A checkpoint knows nothing of the ranks and wrappers that wrote it."""

import errno
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from clip_train.checkpoint import publish
from clip_train.checkpoint.load import load_part, newest_verified
from clip_train.errors import ClipTrainError, UserError
from tests.checkpoint.parts import Model, adamw, open_fixed, open_training, save_steps, train
from tests.gloo import run_on_ranks


def wrap(model, kind):
    """Leave the 0-d temperature to the trainer, as both wrappers must."""
    if kind == "ddp":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["logit_scale"])
        return DistributedDataParallel(model, find_unused_parameters=True)
    size = dist.get_world_size()
    shape, names = ((size,), None) if kind == "fsdp" else ((size // 2, 2), ("replicate", "shard"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})
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


def whole_tensors_forbidden():
    """Fail if a sharded tensor is gathered or sent from one rank to the others."""

    def never(*_arguments, **_options):
        raise AssertionError("a whole tensor was gathered or sent")

    return mock.patch.multiple(DTensor, full_tensor=never, redistribute=never)


def saves_that_fail_on_rank_1(world, folder: Path):
    """Let rank 1's disk, then its numbers fail in saves that both write."""
    lines: list[str] = []
    model, optimizer = build("fsdp", seed=0)
    checkpointer = open_training(folder / "failing", model, optimizer, world=world, say=lines.append)
    write, found = publish.write_file, []

    def full_on_rank_1(path, **options):
        if world.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, **options)

    with checkpointer:
        checkpointer.save(step=1, consumed=1, config_yaml="")
        checkpointer.wait()
        publish.write_file = full_on_rank_1
        checkpointer.save(step=2, consumed=2, config_yaml="")
        try:
            checkpointer.wait()
        except ClipTrainError as error:
            found.append(str(error))
        publish.write_file = write
        if world.rank == 1:
            model.first.weight.data.to_local().fill_(float("nan"))
        checkpointer.save(step=3, consumed=3, config_yaml="")
        try:
            checkpointer.wait()
        except ClipTrainError as error:
            found.append(str(error))
    return found, lines, sorted(p.name for p in (folder / "failing" / "checkpoints").iterdir())


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
            with whole_tensors_forbidden():
                resumed = checkpointer.resume(str(folder / "one"))
            found[f"one-{kind}"] = (resumed.step, contents(model, optimizer))
        model, optimizer = build(kind, seed=0)
        train(model, optimizer, steps=range(3))
        with open_training(folder / f"two-{kind}", model, optimizer, world=world) as checkpointer:
            model(torch.zeros(1, 3))  # leaves the root of a sharded model gathered
            with whole_tensors_forbidden():
                checkpointer.save(step=3, consumed=24, config_yaml="")
            saved = contents(model, optimizer)
            train(model, optimizer, steps=range(3, 5))
            checkpointer.wait()
        found[f"two-{kind}"] = (3, saved)
    found["failing"] = saves_that_fail_on_rank_1(world, folder)
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


def test_sharded_tensors_lie_in_a_file_for_each_chunk_of_rows(folder, ranks):
    del ranks
    path = newest_verified(folder / "two-fsdp")
    names = [f"{part}-0000{i}-of-00002.safetensors" for part in ("model", "optimizer") for i in (1, 2)]
    assert sorted(p.name for p in path.glob("*.safetensors")) == names
    first, second = (load_file(path / name) for name in names[:2])
    assert first.keys() - second.keys() == {"logit_scale", "count"}
    assert {name: len(rows) for name, rows in second.items()} == {
        "first.weight": 2,
        "first.bias": 2,
        "unused": 1,
        "second.weight": 1,
    }
    expected = load_file(newest_verified(folder / "two-ddp") / "model.safetensors")
    for name in second:
        assert np.array_equal(np.concatenate([first[name], second[name]]), expected[name])


def test_a_failure_of_one_writer_fails_the_save_on_all_ranks_and_leaves_nothing_behind(ranks):
    for errors, _, left in (rank["failing"] for rank in ranks):
        full, nan = errors
        assert "step-00000002 was not saved: " in full and "No space left" in full
        assert "step 3 was not saved, NaN or Inf in model: first.weight" in nan
        assert left == ["step-00000001"]
    assert ranks[1]["failing"][1] == [], "only rank 0 speaks"


def stage(world, folder: Path, source: str | None, target: str, kind: str, steps: range):
    """Continue from one run directory into another and return what was found and what was saved."""
    model = Model(seed=0 if source is None else 5)
    if world.size > 1:
        model = wrap(model, kind)
    optimizer = adamw(model)
    with open_training(folder / target, model, optimizer, world=world) as checkpointer:
        found = {}
        if source is not None:
            assert checkpointer.resume(str(folder / source)).step == steps.start
            found = contents(model, optimizer)
        train(model, optimizer, steps=steps)
        checkpointer.save(step=steps.stop, consumed=0, config_yaml="")
        checkpointer.wait()
        return found, contents(model, optimizer)


CHAINS = [
    [(1, "none"), (2, "fsdp"), (4, "fsdp"), (3, "fsdp"), (1, "none")],
    [(4, "hybrid"), (2, "ddp"), (3, "fsdp"), (4, "ddp"), (4, "hybrid")],
]


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
def test_any_world_and_wrapper_continues_what_any_other_saved(tmp_path, chain):
    former: dict = {}
    for i, (size, kind) in enumerate(chain):
        source = str(i - 1) if i else None
        ranks = run_on_ranks(stage, tmp_path, source, str(i), kind, range(3 * i, 3 * i + 3), world_size=size)
        for found, _ in ranks:
            assert_equal(found, former)
        former = ranks[0][1]
    reference = Model(seed=0)
    train(reference, adamw(reference), steps=range(3 * len(chain)))
    for name, parameter in reference.named_parameters():
        assert np.allclose(former[name], parameter.detach().numpy(), atol=1e-6)
