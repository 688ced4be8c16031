import numpy as np
import pytest
import torch
from PIL import Image

from clip_train.config import changes, load, to_yaml
from clip_train.model.positions import resize_image_positions, resize_positions, resize_text_positions
from clip_train.model.zoo import create_model


def resized_by_pillow(table, side):
    """Bicubic with antialiasing by another library, channel by channel: [1 + n², w] -> [1 + side², w]."""
    n = round((len(table) - 1) ** 0.5)
    planes = table[1:].reshape(n, n, -1).permute(2, 0, 1).numpy()
    resized = [np.asarray(Image.fromarray(p).resize((side, side), Image.Resampling.BICUBIC)) for p in planes]
    return torch.cat([table[:1], torch.from_numpy(np.stack(resized)).permute(1, 2, 0).reshape(side * side, -1)])


@pytest.mark.parametrize("side", [3, 7, 10, 16])
def test_image_positions_equal_another_librarys_antialiased_bicubic(side):
    table = torch.randn(1 + 49, 5, generator=torch.Generator().manual_seed(0))
    got = resize_image_positions(table, num_rows=1 + side * side)
    assert torch.equal(got[0], table[0])
    assert (got - resized_by_pillow(table, side)).abs().max() < 1e-5


@pytest.mark.parametrize("length", [20, 64, 77, 120])
def test_text_positions_are_interpolated_linearly_between_centres(length):
    table = torch.randn(77, 3, generator=torch.Generator().manual_seed(0))
    centres = (np.arange(length) + 0.5) * 77 / length - 0.5
    expected = np.stack([np.interp(centres, np.arange(77), column) for column in table.T.double().numpy()], axis=1)
    assert (resize_text_positions(table, length=length).double() - torch.from_numpy(expected)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "table"), [("tiny", "positional_embedding"), ("tiny-rn", "attnpool.positional_embedding")]
)
def test_weights_go_to_a_larger_image_and_a_longer_context_with_a_line_each(name, table):
    tensors = create_model(name, seed=0).state_dict()
    larger = create_model(name, seed=1, vision={"image_size": 128}, text={"context_length": 100})
    grid = 8 if name == "tiny" else 4
    lines = resize_positions(tensors, expected={n: t.shape for n, t in larger.state_dict().items()})
    assert lines == [
        f"visual.{table}: {grid // 2}x{grid // 2} -> {grid}x{grid} positions, bicubic",
        "positional_embedding: 77 -> 100 tokens, linear",
    ]
    larger.load_state_dict(tensors, strict=True)
    assert larger.encode_image(torch.zeros(1, 128, 128, 3, dtype=torch.uint8)).isfinite().all()


def test_half_precision_tables_are_computed_in_float32_and_keep_their_type():
    table = torch.randn(1 + 49, 5, generator=torch.Generator().manual_seed(0)).half()
    got = resize_image_positions(table, num_rows=1 + 100)
    assert got.dtype == torch.float16
    assert torch.equal(got, resize_image_positions(table.float(), num_rows=1 + 100).half())


def test_tables_that_fit_and_those_of_another_width_are_left_alone():
    tensors = create_model("tiny", seed=0).state_dict()
    same = {name: tensor.shape for name, tensor in tensors.items()}
    assert resize_positions(dict(tensors), expected=same) == []
    wider = create_model("tiny", seed=0, vision={"width": 64, "image_size": 128})
    kept = dict(tensors)
    assert resize_positions(kept, expected={n: t.shape for n, t in wider.state_dict().items()}) == []
    assert all(kept[name] is tensors[name] for name in tensors)


def test_prefix_rows_are_found_whatever_their_number():
    for prefix in (0, 1, 5):
        table = torch.randn(1, prefix + 196, 4, generator=torch.Generator().manual_seed(0))
        tensors = {"visual.trunk.pos_embed": table}
        expected = {"visual.trunk.pos_embed": torch.Size([1, prefix + 256, 4])}
        assert resize_positions(tensors, expected=expected) == [
            "visual.trunk.pos_embed: 14x14 -> 16x16 positions, bicubic"
        ]
        resized = tensors["visual.trunk.pos_embed"]
        assert resized.shape == (1, prefix + 256, 4) and torch.equal(resized[:, :prefix], table[:, :prefix])


def test_another_image_size_is_refused_at_resume():
    first, second = (
        to_yaml(load("train", ["experiment=demo", f"model.vision.image_size={size}", "data.train=x"]))
        for size in (64, 96)
    )
    assert changes(first, second) == ["model.vision.image_size: 64 -> 96"]
