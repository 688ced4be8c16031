"""Compiled blocks and the layout of convolutions, on the CPU."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from clip_train.checkpoint.safetensors_writer import safetensors_chunks
from clip_train.distributed.config import DistributedConfig
from clip_train.distributed.parallel import channels_last_, compile_each_block, transformer_blocks
from clip_train.distributed.world import World
from clip_train.errors import UserError
from clip_train.model.zoo import create_model
from tests.model import reference

MAX_COMPILATIONS = 8  # per tower: full and last block, static and any size, with and without gradients


@pytest.fixture(autouse=True)
def _no_compilations_of_other_tests():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batches(count):
    """Batches whose size and caption lengths change all the time."""
    g = torch.Generator().manual_seed(0)
    for i in range(count):
        size = 1 + 7 * i % 20
        lengths = torch.randint(3, 78, (size,), generator=g).tolist()
        pixels = torch.randint(0, 256, (size, 64, 64, 3), dtype=torch.uint8, generator=g)
        yield pixels, reference.random_captions(lengths, seed=i), lengths


def attention_of_any_kind(q, k, v, *, q_offsets, k_offsets, max_q, max_k, causal):
    """Stands for the kernel: operations on the same tensors, to see what is traced around them."""
    return q * k.mean() + (v if max_q > 1 else v[(k_offsets[1:] - 1).long()])


@pytest.mark.slow
@pytest.mark.parametrize("ragged", ["buckets", "packed"])
def test_blocks_have_no_graph_break_and_few_compilations_for_any_lengths_and_batch_sizes(ragged):
    model, plain = (create_model("tiny", seed=0, ragged=ragged) for _ in range(2))
    if ragged == "packed":
        model.varlen_attention = plain.varlen_attention = attention_of_any_kind
    compile_each_block(model, backend="eager")
    for i, (pixels, tokens, lengths) in enumerate(batches(9)):
        with torch.set_grad_enabled(i % 3 != 2):
            got, want = (m.train(i % 3 != 2)(pixels, tokens, None, lengths) for m in (model, plain))
        assert torch.allclose(got.image, want.image, atol=1e-6) and torch.allclose(got.text, want.text, atol=1e-6)
    assert not counters["graph_break"]
    assert 4 <= counters["stats"]["unique_graphs"] <= 2 * MAX_COMPILATIONS


def test_equal_blocks_share_one_compilation():
    model = create_model("tiny", seed=0, vision={"layers": 6})
    compile_each_block(model, backend="eager")
    model.encode_image(torch.zeros(4, 64, 64, 3, dtype=torch.uint8))
    assert len(list(transformer_blocks(model.visual))) == 6
    assert counters["stats"]["unique_graphs"] == 2  # five that compute all positions, one that reads one


@pytest.mark.slow
def test_compiled_training_on_the_cpu_gives_the_same_gradients():
    gradients = []
    for compiled in (False, True):
        model = create_model("tiny", seed=0)
        if compiled:
            compile_each_block(model)
        for pixels, tokens, lengths in batches(3):
            features = model(pixels, tokens, None, lengths)
            (features.image @ features.text.T).logsumexp(1).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, want in gradients[0].items():
        assert (gradients[1][name] - want).norm() <= 1e-4 * want.norm(), name


def test_compiling_on_a_cpu_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"model\.compile=true on a CPU needs a C\+\+ compiler"):
        DistributedConfig().parallelize(None, world=World(), precision="fp32", compile_blocks=True)


def test_channels_last_changes_neither_features_nor_gradients_nor_saved_bytes():
    pixels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    gradients, saved = [], []
    for last in (False, True):
        model = create_model("tiny-rn", seed=0).double()
        if last:
            channels_last_(model)
            assert model.visual.conv2.weight.is_contiguous(memory_format=torch.channels_last)
        saved.append(b"".join(safetensors_chunks(model.state_dict())))
        model.encode_image(pixels).square().sum(0).logsumexp(0).backward()
        gradients.append({name: p.grad for name, p in model.visual.named_parameters()})
    assert saved[0] == saved[1]
    assert all(torch.allclose(gradients[1][name], want, atol=1e-12) for name, want in gradients[0].items())
    transformer = create_model("tiny", seed=0)
    channels_last_(transformer)
    assert transformer.visual.conv1.weight.is_contiguous()
