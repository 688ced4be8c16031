"""Model files as other libraries write them."""

import json

import torch
from safetensors.torch import save_file
from torch import nn

from clip_train.model.zoo import create_model

SMALL = {"vision": {"image_size": 32}, "text": {"width": 64, "heads": 1, "layers": 1}}


def small_model(*, seed=1, **overrides):
    return create_model("tiny", seed=seed, **{**SMALL, **overrides}).eval()


def openai_integers(model):
    return {
        "input_resolution": torch.tensor(model.visual.input_resolution),
        "context_length": torch.tensor(model.context_length),
        "vocab_size": torch.tensor(model.vocab_size),
    }


def write_torchscript(model, path):
    """Write an archive that carries the parameters under their dotted names, in the half precision of OpenAI's."""
    root = nn.Module()
    for name, tensor in {**model.state_dict(), **openai_integers(model)}.items():
        *parents, leaf = name.split(".")
        owner = root
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        if tensor.is_floating_point():
            owner.register_parameter(leaf, nn.Parameter(tensor.half()))
        else:
            owner.register_buffer(leaf, tensor)
    torch.jit.script(root).save(path)


def write_open_clip_folder(model, folder, *, weights="open_clip_model.safetensors", **vision):
    """Write a folder as `open_clip.push_to_hf_hub` lays it out."""
    folder.mkdir()
    config, tower = model.config, model.config.vision
    values = {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "quick_gelu": config.quick_gelu,
            "vision_cfg": {
                "image_size": tower.image_size, "layers": tower.resnet_stages or tower.layers, "width": tower.width,
                "head_width": (32 if tower.resnet_stages else 1) * tower.width // tower.heads,
                "patch_size": None if tower.resnet_stages else tower.patch_size, **vision,
            },
            "text_cfg": {
                "context_length": config.text.context_length, "vocab_size": config.text.vocab_size,
                "width": config.text.width, "heads": config.text.heads, "layers": config.text.layers,
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
    }  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    if weights.endswith(".safetensors"):
        save_file(model.state_dict(), folder / weights)
    else:
        torch.save(model.state_dict(), folder / weights)
    return folder
