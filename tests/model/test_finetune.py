import pytest
import torch

from clip_train.errors import UserError
from clip_train.model.finetune import layers_above, prepare
from clip_train.model.zoo import create_model

SMALL = {"vision": {"image_size": 32, "layers": 3}, "text": {"layers": 3, "context_length": 12, "vocab_size": 40}}


def model(**overrides):
    towers = {key: {**SMALL[key], **overrides.pop(key, {})} for key in SMALL}
    return create_model("tiny", **towers, **overrides)


def prepared(**overrides):
    made = model(**overrides)
    prepare(made, seed=3)
    return made


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (4, 32, 32, 3), generator=g, dtype=torch.uint8)
    tokens = torch.randint(1, 39, (4, 12), generator=g)
    tokens[:, -1] = 39
    return images, tokens


def trained(made):
    return {name for name, parameter in made.named_parameters() if parameter.requires_grad}


def test_a_locked_tower_has_no_gradient_and_the_other_and_the_temperature_have_theirs():
    made = prepared(vision={"unlocked_blocks": 0})
    assert trained(made) == {n for n, _ in made.named_parameters() if not n.startswith("visual.")}
    features = made(*inputs())
    assert not features.image.requires_grad and features.text.requires_grad


def test_the_last_blocks_and_what_follows_them_stay_unlocked():
    made = prepared(vision={"unlocked_blocks": 1}, text={"unlocked_blocks": 2})
    own = {name for name in trained(made) if name.startswith("visual.")}
    assert {name.split(".")[3] for name in own if ".resblocks." in name} == {"2"}
    assert {n for n in own if ".resblocks." not in n} == {"visual.ln_post.weight", "visual.ln_post.bias", "visual.proj"}
    text = trained(made) - own
    assert {name.split(".")[2] for name in text if ".resblocks." in name} == {"1", "2"}
    assert {n for n in text if ".resblocks." not in n} == {
        "ln_final.weight", "ln_final.bias", "text_projection", "logit_scale",
    }  # fmt: skip


def test_locked_parts_stay_in_evaluation_mode_so_that_batch_statistics_do_not_move():
    made = create_model("tiny-rn", vision={"unlocked_blocks": 1})
    prepare(made, seed=0)
    assert {n.split(".")[1] for n in trained(made) if n.startswith("visual.")} == {"layer4", "attnpool"}
    made.train()
    before = {name: buffer.clone() for name, buffer in made.named_buffers()}
    made.encode_image(torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8))
    moved = {name for name, buffer in made.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved and all(name.startswith("visual.layer4.") for name in moved)


def test_the_blocks_of_timms_resnets_are_known():
    made = prepared(vision={"timm": "test_resnet", "unlocked_blocks": 1})
    tower = {".".join(n.split(".")[1:3]) for n in trained(made) if n.startswith("visual.")}
    assert tower == {"trunk.layer4", "head.proj"}


def test_patches_are_not_dropped_in_a_locked_tower():
    made = prepared(vision={"unlocked_blocks": 0}, patch_dropout=0.5).train()
    images, _ = inputs()
    assert torch.equal(made.encode_image(images), made.eval().encode_image(images))


def test_impossible_locks_are_named():
    with pytest.raises(UserError, match=r"model\.vision\.unlocked_blocks=9: the tower has 3 blocks"):
        prepared(vision={"unlocked_blocks": 9})
    with pytest.raises(UserError, match="leave nothing to train"):
        prepared(vision={"unlocked_blocks": 0}, text={"unlocked_blocks": 0})


def test_layers_are_counted_from_the_output_of_their_own_tower():
    above = layers_above(model(text={"layers": 2}))
    want = {
        "visual.conv1.weight": 4, "visual.positional_embedding": 4, "visual.class_embedding": 4,
        "visual.ln_pre.weight": 4, "visual.transformer.resblocks.0.mlp.c_fc.weight": 3,
        "visual.transformer.resblocks.2.ln_1.bias": 1, "visual.ln_post.weight": 0, "visual.proj": 0,
        "token_embedding.weight": 3, "positional_embedding": 3, "transformer.resblocks.0.attn.in_proj_bias": 2,
        "transformer.resblocks.1.ln_2.weight": 1, "ln_final.bias": 0, "text_projection": 0,
    }  # fmt: skip
    assert {name: above[name] for name in want} == want
    assert "logit_scale" not in above
    resnet = layers_above(create_model("tiny-rn"))
    assert (resnet["visual.conv1.weight"], resnet["visual.layer4.0.bn1.bias"]) == (5, 1)
    assert resnet["visual.attnpool.q_proj.weight"] == 0
