import pytest
import torch

from clip_train.errors import UserError
from clip_train.evaluation.features import PrefixEncoder

from .toys import ToyModel, ToyTokenizer


def test_a_prefix_is_the_first_dimensions_at_unit_length():
    model = ToyModel(dim=12)
    cut = PrefixEncoder(model, embed_dim=5, full=12)
    images = torch.randint(0, 256, (3, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = ToyTokenizer()(["a cat", "two dogs"])
    for got, whole in (
        (cut.encode_image(images), model.encode_image(images)),
        (cut.encode_text(tokens), model.encode_text(tokens)),
    ):
        expected = whole[:, :5] / whole[:, :5].square().sum(1, keepdim=True).sqrt()
        torch.testing.assert_close(got, expected)
    assert torch.equal(cut.encode_text(tokens, normalize=False), model.encode_text(tokens, normalize=False)[:, :5])


def test_the_mode_is_the_models():
    model = ToyModel()
    cut = PrefixEncoder(model, embed_dim=5, full=12)
    cut.train(False)
    assert not model.training and not cut.training


@pytest.mark.parametrize("embed_dim", [0, 13])
def test_a_size_that_the_model_does_not_have_is_refused(embed_dim):
    with pytest.raises(UserError, match=f"embed_dim={embed_dim} must lie between 1 and the model's 12"):
        PrefixEncoder(ToyModel(), embed_dim=embed_dim, full=12)
