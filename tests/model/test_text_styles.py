"""Text towers that see padding, as SigLIP's: the whole context, whatever is given."""

import pytest
import torch

from clip_train.config import load
from clip_train.errors import UserError
from clip_train.model.config import Ragged
from clip_train.model.flops import text_flops
from clip_train.model.zoo import create_model, model_config

from .reference import random_captions

SIGLIP = {"causal": False, "pool": "last", "proj_bias": True, "norm_eps": 1e-6, "vocab_size": 200, "pad_id": 7}


def small_model(**text):
    return create_model("tiny", seed=1, text={**SIGLIP, **text}, vision={"image_size": 32}).double().eval()


def padded_with(tokens, pad_id):
    return torch.where(torch.arange(tokens.shape[1]) > tokens.argmax(1, keepdim=True), pad_id, tokens)


def test_missing_columns_are_padding():
    model = small_model()
    whole = padded_with(random_captions([3, 9, 12], vocab_size=200), 7)
    expected = model.encode_text(whole)
    assert torch.equal(model.encode_text(whole[:, :12]), expected)
    assert not torch.allclose(model.encode_text(padded_with(whole, 8)), expected)


@pytest.mark.parametrize("style", [{}, {"causal": True}, {"pool": "end"}])
def test_a_caption_does_not_depend_on_its_neighbours_nor_on_known_lengths(style):
    model = small_model(**style)
    tokens = padded_with(random_captions([3, 9, 77], vocab_size=200), 7)
    together = model.embed_text(tokens, [3, 9, 77])
    alone = torch.cat([model.embed_text(row[None]) for row in tokens])
    assert (together - alone).abs().max() < 1e-12
    assert model.layout(torch.device("cpu"), dtype=torch.float64) is Ragged.off


def test_a_token_after_the_caption_that_is_not_padding_is_refused():
    tokens = padded_with(random_captions([3, 9], vocab_size=200, context_length=80), 7)
    model = small_model()
    assert torch.equal(model.encode_text(tokens), model.encode_text(tokens[:, :77]))
    tokens[0, 78] = 5
    with pytest.raises(UserError, match="context of 77 tokens"):
        model.encode_text(tokens)


def test_captions_end_where_the_named_token_is_first():
    model = small_model(causal=True, pool="end", end_id=9)
    tokens = random_captions([12], vocab_size=200)
    tokens[0, 5] = tokens[0, 8] = 9
    read = model.encode_text(tokens)
    tokens[0, 6:] = 11
    assert torch.equal(model.encode_text(tokens), read)


@pytest.mark.parametrize("ragged", ["packed", "buckets"])
@pytest.mark.parametrize("style", ["model.text.causal=false", "model.text.pool=last"])
def test_leaving_padding_out_is_refused_where_it_is_seen(ragged, style):
    with pytest.raises(UserError, match=f"model.ragged={ragged} leaves out the padding"):
        load("train", ["model=tiny", "steps=10", "optim.warmup=1", "data.train=x", f"model.ragged={ragged}", style])


def test_arithmetic_is_counted_for_the_whole_context():
    config = model_config("tiny-siglip")
    assert text_flops(config, lengths=[3, 9]) == 2 * text_flops(config, lengths=[64])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"norm_eps": 0}, "norm_eps"),
        ({"mlp_ratio": 0}, "text.mlp_ratio"),
        ({"pad_id": 200}, "pad_id=200 must lie below"),
    ],
)
def test_impossible_values_are_refused_by_name(text, message):
    with pytest.raises(UserError, match=message):
        small_model(**text)


def test_siglips_start_values_are_those_of_its_training():
    for name in ("ViT-B-16-SigLIP", "ViT-L-16-SigLIP-256", "tiny-siglip"):
        config = model_config(name)
        assert config.init_logit_scale == pytest.approx(2.302585, abs=1e-6) and config.init_logit_bias == -10
