import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from clip_train.model.zoo import create_model
from tests.gloo import run_on_ranks

from . import reference

LENGTHS = ([3, 9, 77, 20], [5, 6, 7, 8])  # the second rank's captions are all in the first bucket


def text_gradients(world):
    """Return this rank's text features and the summed gradients, with every block sharded over the ranks."""
    model = create_model("tiny", seed=1, ragged="buckets", text={"vocab_size": 200}).double()
    if world is not None:
        mesh = init_device_mesh("cpu", (world.size,))
        for block in model.transformer.resblocks:
            fully_shard(block, mesh=mesh)
    batches = [LENGTHS[world.rank]] if world is not None else LENGTHS
    features = torch.cat(
        [
            model.encode_text(reference.random_captions(lengths, vocab_size=200, seed=sum(lengths)))
            for lengths in batches
        ]
    )
    features[:, :7].square().sum().backward()
    gradients = {}
    for name, parameter in model.transformer.named_parameters():
        whole = parameter.grad if world is None else parameter.grad.full_tensor() * world.size
        gradients[name] = whole.numpy()
    return features.detach().numpy(), gradients


def test_buckets_that_one_rank_lacks_hang_no_rank_and_change_no_gradient():
    expected, expected_gradients = text_gradients(None)
    ranks = run_on_ranks(text_gradients)
    for rank, (features, gradients) in enumerate(ranks):
        assert abs(features - expected[4 * rank : 4 * rank + 4]).max() < 1e-12
        for name, gradient in gradients.items():
            assert abs(gradient - expected_gradients[name]).max() < 1e-12, name
