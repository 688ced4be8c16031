"""Packed captions: the layout on the CPU with attention written out, and torch's kernel on CUDA where there is one."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from clip_train.errors import UserError
from clip_train.model.config import Ragged
from clip_train.model.packed import ROW_TOKENS, Packing, adapt, pack
from clip_train.model.transformer import BlockStyle, ReadingBlock, ResidualAttentionBlock
from clip_train.model.zoo import create_model

from . import reference

LENGTHS = [2, 3, 16, 17, 24, 25, 33, 48, 49, 76, 77, 9, 2, 77]


def written_out_attention(q, k, v, *, q_offsets, k_offsets, max_q, max_k, causal):
    """Softmax over each span by itself; the spans must be what the kernel may be given."""
    out = torch.full_like(q, torch.nan)
    q_spans, k_spans = q_offsets.diff().tolist(), k_offsets.diff().tolist()
    assert min(q_spans + k_spans) > 0 and max(q_spans) <= max_q and max(k_spans) <= max_k
    assert q_offsets.dtype == k_offsets.dtype == torch.int32
    for a, n, b, m in zip(q_offsets.tolist(), q_spans, k_offsets.tolist(), k_spans, strict=False):
        logits = torch.einsum("qhw,khw->hqk", q[a : a + n], k[b : b + m]) / q.shape[-1] ** 0.5
        if causal:
            logits = logits.masked_fill(torch.ones(n, m).triu(m - n + 1).bool(), -torch.inf)
        out[a : a + n] = torch.einsum("hqk,khw->qhw", logits.softmax(-1), v[b : b + m])
    return out


def small_model(**overrides):
    return create_model("tiny", seed=1, text={"vocab_size": 200}, vision={"image_size": 32}, **overrides).double()


@pytest.mark.parametrize("options", [{}, {"quick_gelu": True}, {"checkpointing": 1}])
@pytest.mark.parametrize("known_lengths", [False, True])
def test_packed_features_and_all_gradients_equal_full_padding(options, known_lengths):
    model = small_model(ragged="packed", **options)
    model.varlen_attention = written_out_attention
    tokens = reference.random_captions(LENGTHS, vocab_size=200)
    weights = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    expected = reference.encode_text(weights, tokens, heads=2, quick_gelu=model.config.quick_gelu)
    got = model.embed_text(tokens, LENGTHS if known_lengths else None)
    assert (got - expected).abs().max() < 1e-12
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected.backward(upstream)
    got.backward(upstream)
    for name, parameter in model.named_parameters():
        if not name.startswith(("visual.", "logit_")):
            want = weights[name].grad
            assert (parameter.grad - want).norm() <= 1e-12 * want.norm(), name


def test_a_packed_caption_does_not_depend_on_its_neighbours():
    model = small_model(ragged="packed")
    model.varlen_attention = written_out_attention
    tokens = reference.random_captions(LENGTHS, vocab_size=200)
    together = model.encode_text(tokens)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    assert (model.encode_text(tokens[order]) - together[order]).abs().max() < 1e-12
    assert (model.encode_text(tokens[:1]) - together[:1]).abs().max() < 1e-12


@pytest.mark.parametrize("context_length", [3, 16, 77])
@pytest.mark.parametrize("filler", range(0, ROW_TOKENS + 2, 73))
def test_rows_are_multiples_whatever_the_captions_and_no_span_is_empty_or_too_long(context_length, filler):
    lengths = [1 + i * filler % context_length for i in range(filler + 1)]
    packing = pack(
        lengths, width=context_length, context_length=context_length, device=torch.device("cpu"), attend=None
    )
    spans = packing.offsets.diff()
    num_dummies = len(spans) - len(lengths)
    assert spans[: len(lengths)].tolist() == lengths
    assert num_dummies * (context_length - 1) >= ROW_TOKENS - 1 > (num_dummies - 1) * (context_length - 1)
    assert len(packing.tokens) == spans.sum() and len(packing.tokens) % ROW_TOKENS == 0
    assert spans.min() > 0 and spans.max() <= context_length
    assert packing.positions.max() < context_length and packing.tokens.max() < len(lengths) * context_length


def test_without_the_kernel_training_packed_is_refused_and_evaluation_is_not():
    model, tokens = small_model(ragged="packed"), reference.random_captions([5, 9], vocab_size=200)
    with pytest.raises(UserError, match=r"model\.ragged=packed: packed captions need CUDA"):
        model.encode_text(tokens)
    expected = small_model(ragged="off").encode_text(tokens)
    assert (model.eval().encode_text(tokens) - expected).abs().max() < 1e-12


def test_auto_is_buckets_on_the_cpu():
    assert small_model().layout(torch.device("cpu"), dtype=torch.bfloat16) is Ragged.buckets


def test_both_signatures_of_torchs_function_are_called_by_keyword():
    seen = []

    def since_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        seen.append((max_q, max_k, window_size))
        return query

    def before(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        seen.append((max_q, max_k, is_causal))
        return query

    q, offsets = torch.zeros(3, 1, 8), torch.tensor([0, 3], dtype=torch.int32)
    for function in (since_2_11, before):
        for causal in (True, False):
            adapt(function)(q, q, q, q_offsets=offsets, k_offsets=offsets, max_q=3, max_k=4, causal=causal)
    assert seen == [(3, 4, (-1, 0)), (3, 4, (-1, -1)), (3, 4, True), (3, 4, False)]
    with pytest.raises(TypeError, match="neither"):
        adapt(lambda query, key, value: query)


def test_torchs_function_has_a_signature_that_is_understood():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    assert callable(adapt(varlen.varlen_attn))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ResidualAttentionBlock, ReadingBlock])
def test_torchs_operator_is_traced_into_one_graph_with_its_block(kind):
    """On tensors of a CUDA device that need not be there: shapes and graph breaks, no numbers."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    real = pack(LENGTHS, width=77, context_length=77, device=torch.device("cpu"), attend=adapt(varlen.varlen_attn))
    with FakeTensorMode(), torch.no_grad():
        block = kind(128, heads=2, style=BlockStyle())
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
                module._parameters[name] = torch.nn.Parameter(fake)
        fakes = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in real if isinstance(t, torch.Tensor)]
        packing = Packing(*fakes, context_length=77, attend=real.attend)
        x = torch.empty(len(real.tokens), 128, dtype=torch.bfloat16, device="cuda")
        compiled = torch.compile(block, fullgraph=True, backend="eager")
        out = compiled(x, causal=True, packing=packing)
    assert out.device.type == "cuda" and out.shape == (
        len(x) if kind is ResidualAttentionBlock else len(real.ends),
        128,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_packed_equals_full_padding_without_waiting_for_the_device():
    device = torch.device("cuda", 0)
    results = []
    for ragged in ("packed", "off"):
        model = create_model("tiny", seed=1, ragged=ragged).to(device)
        tokens = reference.random_captions(LENGTHS * 8).to(device)
        with torch.autocast("cuda", torch.bfloat16):
            model.embed_text(tokens, LENGTHS * 8)  # the probe of the kernel waits
            torch.cuda.set_sync_debug_mode("error")
            try:
                features = model.embed_text(tokens, LENGTHS * 8).float()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        features[:, :7].square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((features.detach(), gradients))
    (packed, packed_gradients), (padded, padded_gradients) = results
    assert (packed - padded).norm() < 2e-2 * padded.norm()
    for name, want in padded_gradients.items():
        assert (packed_gradients[name] - want).norm() <= 5e-2 * want.norm(), name
